"""Who goes where: the slots of a router's choice [T, K] (slot = token * K + rank of the choice) sorted by expert, on
the device.

A stable counting sort in three launches: how many slots of each block chose each expert, how many ahead of each block,
then every slot's row. Slots of no expert here (ids below 0, or E and more: sentinels of expert parallelism) get none.

Beside it two tables of the experts' rows, in spans of up to so many rows of one expert: tiles for products and passes
by rows, chunks for passes by columns. How many spans there are, only the device knows: tables have room for the most,
and programs past the last span leave.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import wait_for_stream
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch

ONE_HOT = 16384  # slots times experts that a program has in registers
SCAN_EXPERTS, SCAN_BLOCKS = 16, 128
SPANS = 64  # spans that a program writes


class Table(NamedTuple):
    """Spans of rows: ``length`` experts, as many first rows, as many ends; then for each expert its first span, and how
    many there are. int32."""

    at: Operand
    length: int  # the most spans that there can be
    rows: int  # a span

    @staticmethod
    def most(slots: int, experts: int, rows: int) -> int:
        """Spans that these slots can make."""
        return slots // rows + min(experts, slots)

    @staticmethod
    def size(slots: int, experts: int, rows: int) -> int:
        """Numbers in memory."""
        return 3 * Table.most(slots, experts, rows) + experts + 1


class Route(NamedTuple):
    """What the sort leaves: int32, but for ``weight``, float32."""

    slot: Operand  # [S], of a row
    row: Operand  # [S], of a slot; -1 where it has none
    weight: Operand  # [S], of a row
    rows: Operand  # [1], how many there are
    tiles: Table
    chunks: Table


@triton.jit
def span_of(table_ptr, i, length, experts):
    """(expert, first row, end) of a span; of one past the last, no rows."""
    there = i < tl.load(table_ptr + 3 * length + experts)
    expert = tl.load(table_ptr + i, mask=there, other=0)
    first = tl.load(table_ptr + length + i, mask=there, other=0)
    end = tl.load(table_ptr + 2 * length + i, mask=there, other=0)
    return expert, first, end


@triton.jit
def _chosen(ids_ptr, slots, S, E):
    """The experts that slots have, -1 where none."""
    ids = tl.load(ids_ptr + slots, mask=slots < S, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def _count_kernel(ids_ptr, counts_ptr, S, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_stream(PDL)
    block, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    chosen = _chosen(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), S, E)
    counts = tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * E + experts, counts, mask=experts < E)


@triton.jit(do_not_specialize=["BLOCKS"])
def _scan_kernel(
    counts_ptr, before_ptr, totals_ptr, BLOCKS, E, EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr
):
    wait_for_stream(PDL)
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    carry = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, BLOCKS, AT_ONCE):
        blocks = first + tl.arange(0, AT_ONCE)
        inside = (blocks < BLOCKS)[:, None] & (experts < E)[None, :]
        at = blocks[:, None] * E + experts[None, :]
        counts = tl.load(counts_ptr + at, mask=inside, other=0)
        tl.store(before_ptr + at, tl.cumsum(counts, 0) - counts + carry[None, :], mask=inside)
        carry += tl.sum(counts, 0)
    tl.store(totals_ptr + experts, carry, mask=experts < E)


@triton.jit
def _write_spans(table_ptr, block, first, end, experts, length, E, ROWS: tl.constexpr, SPANS: tl.constexpr):
    """SPANS spans of the table, the experts' rows being [first, end)."""
    spans = (end - first + ROWS - 1) // ROWS
    upto = tl.cumsum(spans, 0)
    total = tl.sum(spans, 0)
    i = block * SPANS + tl.arange(0, SPANS)
    expert = tl.sum((upto[None, :] <= i[:, None]).to(tl.int32), 1)
    here = (expert[:, None] == experts[None, :]).to(tl.int32)
    row = i * ROWS + tl.sum(here * (first - (upto - spans) * ROWS)[None, :], 1)
    last = tl.sum(here * end[None, :], 1)
    there = (i < total) & (i < length)
    tl.store(table_ptr + i, expert, mask=there)
    tl.store(table_ptr + length + i, row, mask=there)
    tl.store(table_ptr + 2 * length + i, tl.minimum(row + ROWS, last), mask=there)
    if block == 0:
        tl.store(table_ptr + 3 * length + experts, upto - spans, mask=experts < E)
        tl.store(table_ptr + 3 * length + E, total)


@triton.jit(do_not_specialize=["S", "BLOCKS", "tiles", "chunks"])
def _place_kernel(
    ids_ptr,
    weights_ptr,
    before_ptr,
    totals_ptr,
    slot_ptr,
    row_ptr,
    weight_ptr,
    rows_ptr,
    tiles_ptr,
    chunks_ptr,
    S,
    E,
    BLOCKS,
    tiles,
    chunks,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPANS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    end = tl.cumsum(totals, 0)
    first = end - totals
    of_tiles = tl.cdiv(tiles, SPANS)
    if block < BLOCKS:
        slots = block * BLOCK + tl.arange(0, BLOCK)
        chosen = _chosen(ids_ptr, slots, S, E)
        hot = (chosen[:, None] == experts[None, :]).to(tl.int32)
        start = first + tl.load(before_ptr + block * E + experts, mask=experts < E, other=0)
        row = tl.sum(hot * (tl.cumsum(hot, 0) - hot + start[None, :]), 1)
        there = chosen >= 0
        tl.store(row_ptr + slots, tl.where(there, row, -1), mask=slots < S)
        tl.store(slot_ptr + row, slots, mask=there)
        weight = tl.load(weights_ptr + slots, mask=there, other=0.0)
        tl.store(weight_ptr + row, weight.to(tl.float32), mask=there)
        if block == 0:
            tl.store(rows_ptr, tl.sum(totals, 0))
    elif block < BLOCKS + of_tiles:
        _write_spans(tiles_ptr, block - BLOCKS, first, end, experts, tiles, E, TILE, SPANS)
    else:
        _write_spans(chunks_ptr, block - BLOCKS - of_tiles, first, end, experts, chunks, E, CHUNK, SPANS)


def route_launches(ids: Operand, weights: Operand, experts: int, route: Route, scratch: Scratch) -> list[Launch]:
    """Fill ``route``. ids [T, K], int32 or int64, and weights [T, K], floating, both contiguous."""
    slots = ids.shape[0] * ids.shape[1]
    padded = max(16, triton.next_power_of_2(experts))
    block = max(16, min(128, ONE_HOT // padded))
    blocks = triton.cdiv(slots, block)
    counts, before = (scratch.part((blocks, experts), torch.int32) for _ in range(2))
    totals = scratch.part((experts,), torch.int32)
    tiles, chunks = route.tiles, route.chunks
    of_tables = sum(triton.cdiv(table.length, SPANS) for table in (tiles, chunks))
    four_warps = {"num_warps": 4}
    return [
        launch(
            _count_kernel,
            (blocks,),
            four_warps,
            ids,
            ids_ptr=ids,
            counts_ptr=counts,
            S=slots,
            E=experts,
            EXPERTS=padded,
            BLOCK=block,
        ),
        launch(
            _scan_kernel,
            (triton.cdiv(experts, SCAN_EXPERTS),),
            four_warps,
            ids,
            counts_ptr=counts,
            before_ptr=before,
            totals_ptr=totals,
            BLOCKS=blocks,
            E=experts,
            EXPERTS=SCAN_EXPERTS,
            AT_ONCE=SCAN_BLOCKS,
        ),
        launch(
            _place_kernel,
            (blocks + of_tables,),
            four_warps,
            ids,
            ids_ptr=ids,
            weights_ptr=weights,
            before_ptr=before,
            totals_ptr=totals,
            slot_ptr=route.slot,
            row_ptr=route.row,
            weight_ptr=route.weight,
            rows_ptr=route.rows,
            tiles_ptr=tiles.at,
            chunks_ptr=chunks.at,
            S=slots,
            E=experts,
            BLOCKS=blocks,
            tiles=tiles.length,
            chunks=chunks.length,
            EXPERTS=padded,
            BLOCK=block,
            TILE=tiles.rows,
            CHUNK=chunks.rows,
            SPANS=SPANS,
        ),
    ]
