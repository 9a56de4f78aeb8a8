"""Several adapters in one batch under torch.compile: one graph, for any rows."""

import pytest
import torch
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from batches import an_adapter, results
from crossed import crossed

from lora_fast import dora_linear_batch, lora_linear_batch
from lora_fast.bases.four_bits import Nf4Weight


def calls(backend):
    compiles = []

    def counting(module, given):
        compiles.append(module)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, given)

    def fn(x, weight, adapters, which, bias):
        call = lora_linear_batch if adapters[0].lora_magnitude_vector is None else dora_linear_batch
        return call(x, weight, adapters, which, bias, backend=backend)

    torch._dynamo.reset()
    return fn, torch.compile(fn, backend=counting, fullgraph=True), compiles


FORMS = {
    "lora": (0.0, False, True),
    "dropout": (0.3, False, True),
    "dora": (0.0, True, False),
    "dora-dropout-bias": (0.3, True, True),
}


@pytest.mark.medium
@pytest.mark.parametrize("device, form", crossed([("lora",), ("dora-dropout-bias",)], FORMS))
def test_one_graph_for_any_rows(device, form):
    p, dora, biased = FORMS[form]
    gen = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(3, 8, width, generator=gen, device=device) for width in (32, 24))
    weight, bias = torch.randn(24, 32, generator=gen, device=device), torch.randn(24, generator=gen, device=device)
    bias = bias if biased else None
    adapters = [
        an_adapter(24, 32, r, torch.float32, device, gen=gen, p=p if r == 5 else 0.0, dora=dora) for r in (8, 5)
    ]
    fn, compiled, compiles = calls("triton")
    for which in ([0, 1, -1], [1, 1, 0]):
        which = torch.tensor(which, device=device)
        torch.manual_seed(3)
        expected = results(fn, x, weight, adapters, which, bias, dy)
        torch.manual_seed(3)
        found = results(compiled, x, weight, adapters, which, bias, dy)
        dropped = p > 0 and device == "cuda"  # eager and compiled draw their seeds in two ways
        assert all(torch.equal(t, expected[name]) for name, t in found.items()) or dropped
    assert len(compiles) == 1


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_without_gradients(device, dora):
    gen = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, 32, generator=gen, device=device) for rows in (6, 24))
    adapters = [an_adapter(24, 32, r, torch.float32, device, gen=gen, dora=dora) for r in (8, 5)]
    fn, compiled, _ = calls("triton")
    with torch.no_grad():
        which = torch.tensor([0, 1, -1, 1, 0, 0], device=device)
        assert torch.equal(compiled(x, weight, adapters, which, None), fn(x, weight, adapters, which, None))


def test_packed_base(device):
    gen = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(6, width, generator=gen, device=device) for width in (64, 24))
    weight = Nf4Weight.quantise(torch.randn(24, 64, generator=gen, device=device))
    adapters = [an_adapter(24, 64, r, torch.float32, device, gen=gen, dora=True) for r in (8, 5)]
    which = torch.arange(6, device=device) % 2
    fn, compiled, _ = calls("triton")
    expected = results(fn, x, weight, adapters, which, None, dy)
    found = results(compiled, x, weight, adapters, which, None, dy)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_only_some_ask_for_gradients_and_z_may_be_saved(device):
    """Of one adapter the magnitude alone; the output is changed in place."""
    gen = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(8, width, generator=gen, device=device) for width in (32, 24))
    weight = torch.randn(24, 32, generator=gen, device=device)
    which = torch.arange(8, device=device) % 3 - 1
    adapters = [an_adapter(24, 32, r, torch.float32, device, gen=gen, dora=True) for r in (8, 5)]
    leaves = [one.lora_magnitude_vector.requires_grad_() for one in adapters]
    leaves += [adapters[1].lora_A.requires_grad_(), adapters[1].lora_B.requires_grad_()]

    def fn(x):
        return dora_linear_batch(x, weight, adapters, which, backend="triton", save="z").mul_(2.0)

    expected = torch.autograd.grad(fn(x), leaves, dy)
    found = torch.autograd.grad(torch.compile(fn, backend="aot_eager", fullgraph=True)(x), leaves, dy)
    assert all(map(torch.equal, found, expected))
