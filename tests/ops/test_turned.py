"""Layers whose weight is stored as [K, N], as GPT-2's Conv1D is: read where it is, and as exact as any other."""

import pytest
import torch
from accuracy import check, draw
from devices import TRITON, saving
from dora_forms import hold, magnitude

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from fused import fused, fused_dora, masked

from lora_fast.functional import dora_linear, lora_linear

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = [((33, 72, 40, 3), 0.3, FLOAT), ((20, 64, 48, 17), 0.0, None)]
LARGE = [
    ((8192, 768, 2304, 8), 0.1, FLOAT),
    ((8192, 3072, 768, 16), 0.0, None),
    ((512, 1600, 4800, 16), 0.1, FLOAT),
    ((1000, 1003, 1001, 12), 0.0, None),
    ((4099, 2048, 4096, 100), 0.1, FLOAT),
    ((8, 768, 3072, 8), 0.0, FLOAT),
]
CASES = [pytest.param("cpu", dtype, *case, marks=pytest.mark.interpreted) for dtype in (FLOAT, HALF) for case in SMALL]
CASES += [pytest.param("cuda", dtype, *case, marks=pytest.mark.gpu) for dtype in (BF16, HALF, FLOAT) for case in LARGE]


def turned(weight):
    """The same matrix, its columns contiguous."""
    return weight.t().contiguous().t()


def with_turned(of):
    """A function for the error rule that reads the weight turned."""

    def fused_of(inputs):
        fn = of(inputs)
        return lambda x, weight, *small: fn(x, turned(weight), *small)

    return fused_of


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape, p, adapter", CASES, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_error_rule(device, dtype, shape, p, adapter, kind):
    pooled = 2 if device == "cpu" else 16 if shape[0] * shape[2] < 50000 else 1
    draws = [masked(draw(*shape, dtype, device, seed, adapter=adapter), p) for seed in range(pooled)]
    if kind == "dora":
        hold(with_turned(fused_dora(p)), draws)
    else:
        check(with_turned(fused(p)), draws)


def run(inputs, dora, train=True):
    """y and the gradients of a layer over the turned weight, and what it keeps."""
    m = magnitude(inputs) if dora else None
    leaves = [
        t.detach().requires_grad_(train) for t in (inputs.x, inputs.lora_A, inputs.lora_B, *([m] if dora else []))
    ]
    x, a, b, *m = leaves
    weight = turned(inputs.weight)
    with saving() as kept:
        call = dora_linear if dora else lora_linear
        y = call(x, weight, a, b, *m, 2.0, backend="triton")
    return y.detach(), torch.autograd.grad(y, leaves, inputs.dy) if train else (), kept, weight


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_nothing_is_copied_and_two_runs_give_the_same_bits(device, dora):
    inputs = draw(40, 64, 48, 5, FLOAT, device, bias=False)
    y, grads, kept, weight = run(inputs, dora)
    assert any(t.data_ptr() == weight.data_ptr() for t in kept)
    assert not any(t.numel() == weight.numel() and t.data_ptr() != weight.data_ptr() for t in kept)
    again = run(inputs, dora)
    assert torch.equal(y, again[0]) and all(map(torch.equal, grads, again[1]))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_forward_alone_is_the_same(device, dora):
    """Also of a weight with one row or one column, which is no less turned for it."""
    for shape in ((40, 64, 48, 5), (4, 64, 1, 5), (4, 1, 48, 5)):
        inputs = draw(*shape, FLOAT, device, bias=False)
        torch.testing.assert_close(run(inputs, dora, train=False)[0], run(inputs, dora)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_compiled(dora):
    inputs = draw(1024, 256, 384, 8, BF16, "cuda", bias=False, adapter=FLOAT)
    expected, grads = run(inputs, dora)[:2]
    m = magnitude(inputs) if dora else None
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, *([m] if dora else []))]
    weight = inputs.weight.t().contiguous()  # as a layer holds it

    @torch.compile(fullgraph=True)
    def layer(x, a, b, *m):
        return (dora_linear if dora else lora_linear)(x, weight.t(), a, b, *m, 2.0, backend="triton")

    y = layer(*leaves)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, inputs.dy), grads))
