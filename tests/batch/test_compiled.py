"""Several adapters in one batch under torch.compile: one graph, for any rows."""

import pytest
import torch
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from batches import an_adapter, results

from lora_fast import lora_linear_batch


def calls(backend):
    compiles = []

    def counting(module, given):
        compiles.append(module)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, given)

    def fn(x, weight, adapters, which, bias):
        return lora_linear_batch(x, weight, adapters, which, bias, backend=backend)

    torch._dynamo.reset()
    return fn, torch.compile(fn, backend=counting, fullgraph=True), compiles


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_graph_for_any_rows(device, p):
    gen = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(3, 8, width, generator=gen, device=device) for width in (32, 24))
    weight, bias = torch.randn(24, 32, generator=gen, device=device), torch.randn(24, generator=gen, device=device)
    adapters = [an_adapter(24, 32, r, torch.float32, device, gen=gen, p=p if r == 5 else 0.0) for r in (8, 5)]
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


def test_without_gradients(device):
    gen = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, 32, generator=gen, device=device) for rows in (6, 24))
    adapters = [an_adapter(24, 32, r, torch.float32, device, gen=gen) for r in (8, 5)]
    fn, compiled, _ = calls("triton")
    with torch.no_grad():
        which = torch.tensor([0, 1, -1, 1, 0, 0], device=device)
        assert torch.equal(compiled(x, weight, adapters, which, None), fn(x, weight, adapters, which, None))
