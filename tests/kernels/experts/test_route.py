"""The sort of a router's slots, and the tables of rows, against torch's stable sort."""

import pytest
import torch
from devices import CPU, CUDA, TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.kernels.experts.route import Route, Table, route_launches
from lora_fast.kernels.operands import Scratch, run

pytestmark = pytest.mark.usefixtures("poisoned")

TILE, CHUNK = 16, 32


def sort(ids, weights, experts):
    """What the kernels leave, by name; a table as (its numbers, the most spans)."""
    slots = ids.numel()
    sizes = {"slot": slots, "row": slots, "rows": 1}
    sizes |= {"tiles": Table.size(slots, experts, TILE), "chunks": Table.size(slots, experts, CHUNK)}
    found = {name: torch.empty(size, dtype=torch.int32, device=ids.device) for name, size in sizes.items()}
    found["weight"] = torch.empty(slots, device=ids.device)

    def make(ids, weights, slot, row, rows, tiles, chunks, weight, experts):
        tables = (Table(tiles, Table.most(slots, experts, TILE), TILE), Table(chunks, spans(CHUNK), CHUNK))
        return route_launches(ids, weights, experts, Route(slot, row, weight, rows, *tables), Scratch(ids.device))

    def spans(rows):
        return Table.most(slots, experts, rows)

    run(lambda **given: make(**given, experts=experts), ids=ids, weights=weights, **found)
    return {name: t.cpu() for name, t in found.items()}


def expected_spans(counts, rows):
    """(expert, first row, end) of each span, and each expert's first one."""
    spans, firsts, start = [], [], 0
    for expert, count in enumerate(counts):
        firsts.append(len(spans))
        spans += [(expert, row, min(row + rows, start + count)) for row in range(start, start + count, rows)]
        start += count
    return spans, [*firsts, len(spans)]


CASES = [
    pytest.param(40, 3, 5, torch.int64, id="odd"),
    pytest.param(300, 1, 3, torch.int32, id="several blocks, k=1"),
    pytest.param(1, 2, 200, torch.int64, id="one token, many experts"),
]


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("tokens, k, experts, kind", CASES)
def test_sort(tokens, k, experts, kind, foreign, device):
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(-1 if foreign else 0, experts + (2 if foreign else 0), (tokens, k), generator=gen).to(kind)
    weights = torch.rand(tokens, k, generator=gen)
    found = sort(ids.to(device), weights.to(device), experts)
    flat = ids.flatten().long()
    here = (flat >= 0) & (flat < experts)
    order = torch.sort(torch.where(here, flat, experts), stable=True).indices[: int(here.sum())].int()
    n = len(order)
    assert found["rows"].item() == n and torch.equal(found["slot"][:n], order)
    assert torch.equal(found["weight"][:n], weights.flatten()[order.long()])
    row = torch.full((tokens * k,), -1, dtype=torch.int32)
    row[order.long()] = torch.arange(n, dtype=torch.int32)
    assert torch.equal(found["row"], row)
    counts = torch.bincount(flat[here], minlength=experts).tolist()
    for name, rows in (("tiles", TILE), ("chunks", CHUNK)):
        spans, firsts = expected_spans(counts, rows)
        length = Table.most(tokens * k, experts, rows)
        assert len(spans) <= length
        columns = found[name][: 3 * length].view(3, length)[:, : len(spans)]
        assert columns.T.tolist() == [list(span) for span in spans]
        assert found[name][3 * length :].tolist() == firsts


@pytest.mark.gpu
def test_many_slots_on_a_gpu():
    ids = torch.randint(0, 384, (16384, 8), device="cuda")
    found = sort(ids, torch.rand(16384, 8, device="cuda"), 384)
    assert torch.equal(found["slot"].long(), torch.sort(ids.flatten().cpu(), stable=True).indices)
