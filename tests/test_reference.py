"""The plain torch path against the error rule and in float64."""

import pytest
import torch
from accuracy import check, draw, eager_gradients, gradients, with_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fast import reference

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def ours(p=0.0):
    def of(inputs):
        return lambda x, w, a, b, bias: reference.lora_linear(x, w, a, b, inputs.scaling, bias, p, keep=inputs.keep)

    return of


def dropped(inputs, p, seed=0):
    if p == 0:
        return inputs
    gen = torch.Generator(inputs.x.device).manual_seed(seed)
    keep = torch.rand(inputs.x.shape, generator=gen, device=inputs.x.device) >= p
    return with_mask(inputs, keep, 1 / (1 - p))


@pytest.mark.parametrize("adapter", [None, FLOAT], ids=["same", "float_adapters"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
@pytest.mark.parametrize("shape", [(7, 19, 11, 3), (64, 128, 96, 16), (5, 12, 8, 40)])
@pytest.mark.parametrize("device", DEVICES)
def test_error_rule(device, shape, dtype, p, adapter):
    check(ours(p), [dropped(draw(*shape, dtype, device, seed, adapter=adapter), p, seed) for seed in range(16)])


dim = st.integers(1, 24)


@pytest.mark.medium
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    m=dim,
    k=dim,
    n=dim,
    r=st.integers(1, 30),
    dtype=st.sampled_from([FLOAT, BF16, HALF]),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    transposed=st.booleans(),
)
def test_error_rule_everywhere(m, k, n, r, dtype, bias, p, transposed):
    if m * k * n == 1:
        return
    draws = [dropped(draw(m, k, n, r, dtype, seed=seed, bias=bias), p, seed) for seed in range(16)]
    if transposed:
        for inputs in draws:
            inputs.x, inputs.dy = inputs.x.T.contiguous().T, inputs.dy.T.contiguous().T
    check(ours(p), draws)


def test_float64():
    inputs = dropped(draw(4, 7, 5, 3, torch.float64), 0.4)
    truth, mine = eager_gradients(inputs), gradients(ours(0.4)(inputs), inputs)
    for name in truth:
        torch.testing.assert_close(mine[name], truth[name], rtol=1e-13, atol=1e-13)


def test_gradcheck():
    inputs = dropped(draw(3, 5, 4, 2, torch.float64), 0.4)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)]

    def fn(x, a, b, bias):
        return ours(0.4)(inputs)(x, inputs.weight, a, b, bias)

    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


def test_drawn_dropout_has_the_right_rate():
    n, p = 100_000, 0.3
    x, one = torch.ones(n, 1), torch.ones(1, 1)
    y = reference.lora_linear(x, 0 * one, one, one, 1.0, dropout_p=p)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert abs((y > 0).float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    assert (reference.lora_linear(x, 0 * one, one, one, 1.0, dropout_p=p, training=False) == 1).all()
