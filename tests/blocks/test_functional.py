"""The functions: checks by the layer's name, and layer by layer in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from lora_fast import Layer, lora_glu, lora_group
from lora_fast.reference import dora_linear, lora_linear


def a_layer(n, k, r=3, dora=False, **others):
    weight, a, b = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)
    magnitude = torch.rand(n) if dora else None
    return Layer(weight, a, b, lora_magnitude_vector=magnitude, **others)


def test_group_is_its_layers():
    x = torch.randn(2, 5, 8)
    layers = [a_layer(6, 8, scaling=2.0, bias=torch.randn(6)), a_layer(4, 8, 2, dora=True), Layer(torch.randn(3, 8))]
    one, two, three = lora_group(x, layers, backend="reference")
    first, second, third = layers
    torch.testing.assert_close(one, lora_linear(x, first.weight, first.lora_A, first.lora_B, 2.0, first.bias))
    magnitude = second.lora_magnitude_vector
    torch.testing.assert_close(two, dora_linear(x, second.weight, second.lora_A, second.lora_B, magnitude, 1.0))
    torch.testing.assert_close(three, F.linear(x, third.weight))


@pytest.mark.parametrize(
    "activation, act",
    [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh"))],
)
def test_glu_is_its_layers(activation, act):
    x = torch.randn(5, 8)
    gate, up, down = a_layer(6, 8), a_layer(6, 8), a_layer(7, 6)

    def linear(x, layer):
        return lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)

    expected = linear(act(linear(x, gate)) * linear(x, up), down)
    torch.testing.assert_close(lora_glu(x, gate, up, down, activation, backend="reference"), expected)


@pytest.mark.parametrize(
    "layers, error, message",
    [
        (None, TypeError, "layers: got NoneType, expected a list"),
        ([a_layer(4, 8)], ValueError, "layers: got 1, expected two or more"),
        ([a_layer(4, 8), a_layer(4, 7)], ValueError, r"layers\[1\].weight: got shape \(4, 7\)"),
        ([a_layer(4, 8), torch.ones(4, 8)], TypeError, r"layers\[1\]: got Tensor, expected a Layer"),
        ([a_layer(4, 8), a_layer(4, 8)._replace(lora_B=None)], TypeError, r"layers\[1\].lora_B: got None"),
        ([a_layer(4, 8), a_layer(4, 8)._replace(lora_A=None)], TypeError, r"layers\[1\].lora_A: got None"),
        ([a_layer(4, 8, dropout_p=1.0), a_layer(4, 8)], ValueError, r"layers\[0\].dropout_p: got 1.0"),
        ([a_layer(4, 8, scaling="2"), a_layer(4, 8)], TypeError, r"layers\[0\].scaling: got str"),
        (
            [a_layer(4, 8)._replace(lora_magnitude_vector=torch.ones(5)), a_layer(4, 8)],
            ValueError,
            r"layers\[0\].lora_magnitude_vector: got shape \(5,\)",
        ),
        (
            [a_layer(4, 8), Layer(torch.ones(4, 8), lora_magnitude_vector=torch.ones(4))],
            ValueError,
            r"layers\[1\].lora_magnitude_vector: got a tensor without adapters",
        ),
    ],
)
def test_bad_groups(layers, error, message):
    with pytest.raises(error, match=message):
        lora_group(torch.ones(5, 8), layers)


def test_bad_glus():
    x, good = torch.ones(5, 8), (a_layer(6, 8), a_layer(6, 8), a_layer(8, 6))
    with pytest.raises(ValueError, match="activation: got 'tanh', expected one of 'silu', 'gelu', 'gelu_tanh'"):
        lora_glu(x, *good, "tanh")
    with pytest.raises(ValueError, match=r"up.weight: got shape \(5, 8\), expected \(6, 8\), as gate.weight"):
        lora_glu(x, good[0], a_layer(5, 8), good[2])
    with pytest.raises(ValueError, match=r"down.weight: got shape \(8, 5\)"):
        lora_glu(x, *good[:2], a_layer(8, 5))
    with pytest.raises(TypeError, match="^x: got list"):
        lora_glu([1.0], *good)
