"""The error rule itself: honest functions pass it, the two mutants do not."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import allowed, check, compare, draw, eager, error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = (7, 19, 11, 3)


def honest(inputs):
    """The same function, summed in another order: one product with [x, S] and [W, B] side by side."""

    def fn(x, weight, lora_A, lora_B, bias):
        down = F.linear(x, lora_A) * inputs.scaling
        return F.linear(torch.cat([x, down], -1), torch.cat([weight, lora_B], -1), bias)

    return fn


def sixteen_bit_accumulator(inputs):
    """The base product's running sum over K rounded after every 64 terms."""

    def fn(x, weight, lora_A, lora_B, bias):
        total = eager(x, torch.zeros_like(weight), lora_A, lora_B, bias, inputs.scaling)
        for part, columns in zip(x.split(64, -1), weight.split(64, -1), strict=True):
            total = total + F.linear(part, columns)
        return total

    return fn


def without_lora(inputs):
    """Adds nothing but what keeps the gradients' names."""
    return lambda x, weight, a, b, bias: F.linear(x, weight, bias) + 0 * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SMALL, (1, 3, 2, 1), (64, 256, 128, 16)])
def test_an_honest_function_passes(dtype, shape):
    check(honest, [draw(*shape, dtype, seed=seed) for seed in range(16)])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_sixteen_bit_accumulator_fails(dtype):
    with pytest.raises(AssertionError, match="error too large: y: "):
        check(sixteen_bit_accumulator, [draw(64, 1024, 96, 8, dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_lora_term_fails(dtype):
    inputs = draw(64, 1024, 96, 16, dtype, b_std=0.002)
    check(honest, [inputs])
    with pytest.raises(AssertionError, match="y: .*dx: "):
        check(without_lora, [inputs])


def test_the_numbers_of_the_rule():
    assert allowed(1.0, torch.bfloat16, 4) == 1.05 + 2**-7
    assert allowed(1.0, torch.float32, 16) == 2 + 2**-24
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert error(torch.tensor([0.0, 0.5]), 0 * truth) == 0.5
    with pytest.raises(AssertionError, match="shape"):
        error(torch.zeros(2, 1), truth)


def test_squared_errors_are_pooled():
    truth, near = {"y": torch.ones(1, dtype=torch.float64)}, {"y": torch.full((1,), 1.1)}
    far = {"y": torch.full((1,), 1.2)}
    with pytest.raises(AssertionError):
        compare([far], [near], [truth], torch.bfloat16)
    compare([far, near], [near, far], [truth] * 2, torch.bfloat16)


def test_a_nan_fails():
    result = {"y": torch.full((2,), float("nan"))}
    with pytest.raises(AssertionError):
        compare([result], [{"y": torch.ones(2)}], [{"y": torch.ones(2, dtype=torch.float64)}], torch.float32)
