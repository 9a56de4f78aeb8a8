"""Which rows are whose: tables that are made on the device, so that ``which`` may change from step to step.

For each row its adapter (-1: none); for each block of ROWS rows the one that all of them have, and the units of ranks
that its rows use, at least one; for each adapter the blocks that hold rows of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.batch.ranks import ROWS, UNIT, Ranks, Tables
from lora_fast.kernels.common import wait_for_stream
from lora_fast.kernels.gemm import MIXED
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch

AT_ONCE = 64  # adapters that a program looks for at a time


class Places(NamedTuple):
    """int32 each, but for the scales."""

    own: Operand  # [M], the adapter of each row
    whole: Operand  # [blocks of rows], that of all rows of a block; MIXED where they differ
    here: Operand  # [blocks of rows, adapters + 1]: 0 where none of the rows is that one's, 1 some, 2 all; last none's
    units: Operand | None  # [blocks of rows, 1 + units]: how many its rows use, then these; None where there is one
    scales: Operand  # [ranks in all] float32: those given, NaN for a rank of A or B that is not finite

    @staticmethod
    def shapes(m: int, ranks: Ranks) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = triton.cdiv(m, ROWS)
        found = {
            "own": ((m,), torch.int32),
            "whole": ((blocks,), torch.int32),
            "here": ((blocks, len(ranks.of) + 1), torch.int32),
            "scales": ((ranks.total,), torch.float32),
        }
        if ranks.units > 1:
            found["units"] = (blocks, 1 + ranks.units), torch.int32
        return found


class Where(NamedTuple):
    """Whose rows are where: own [M], the lists [adapters, 2 + blocks of rows], units (see ``Places``), and what of
    ranks kernels look up."""

    own: Operand
    lists: Operand
    units: Operand | None
    tables: Tables


@triton.jit(do_not_specialize=["M", "EACH"])
def _places_kernel(
    which_ptr,
    firsts_ptr,
    own_ptr,
    whole_ptr,
    here_ptr,
    units_ptr,
    bad_ptr,
    given_ptr,
    scales_ptr,
    M,
    EACH,
    ADAPTERS,
    TOTAL,
    BAD,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    blocks = tl.cdiv(M, ROWS)
    if block < blocks:
        rows = block * ROWS + tl.arange(0, ROWS)
        which = tl.load(which_ptr + rows // EACH, mask=rows < M, other=0)
        known = (rows < M) & (which >= 0) & (which < ADAPTERS)
        own = tl.where(known, which, -1).to(tl.int32)  # past the last, too
        tl.store(own_ptr + rows, own, mask=rows < M)
        least = tl.min(tl.where(rows < M, own, ADAPTERS), 0)
        tl.store(whole_ptr + block, tl.where(least == tl.max(tl.where(rows < M, own, -1), 0), least, MIXED))
        there = tl.minimum(M - block * ROWS, ROWS)
        for first in range(0, ADAPTERS + 1, AT_ONCE):
            adapters = first + tl.arange(0, AT_ONCE)
            mine = own[:, None] == tl.where(adapters == ADAPTERS, -1, adapters)[None, :]
            count = tl.sum((mine & (rows < M)[:, None]).to(tl.int32), 0)
            here = (count > 0).to(tl.int32) + (count == there).to(tl.int32)
            tl.store(here_ptr + block * (ADAPTERS + 1) + adapters, here, mask=adapters <= ADAPTERS)
        if units_ptr is not None:
            # The units of a row's adapter are those from its first rank's to its last one's.
            low = tl.load(firsts_ptr + own, mask=own >= 0, other=0) // UNIT
            high = (tl.load(firsts_ptr + own + 1, mask=own >= 0, other=0) - 1) // UNIT
            found = block * 0
            at = units_ptr + block * (1 + UNITS)
            for first in range(0, UNITS, AT_ONCE):
                units = first + tl.arange(0, AT_ONCE)
                uses = (own >= 0)[:, None] & (low[:, None] <= units[None, :]) & (units[None, :] <= high[:, None])
                used = tl.max(uses.to(tl.int32), 0)
                tl.store(at + found + tl.cumsum(used, 0), units, mask=used > 0)
                found += tl.sum(used, 0)
            tl.store(at + 1, 0, mask=found == 0)
            tl.store(at, tl.maximum(found, 1))
    else:
        ranks = (block - blocks) * UNIT + tl.arange(0, UNIT)
        inside = ranks < TOTAL
        bad = tl.zeros([UNIT], tl.int32)
        for first in range(0, BAD, 32):
            parts = first + tl.arange(0, 32)
            marks = tl.load(bad_ptr + parts[:, None] * TOTAL + ranks, mask=(parts < BAD)[:, None] & inside, other=0)
            bad += tl.sum(marks, 0)
        scale = tl.load(given_ptr + ranks, mask=inside, other=0.0)
        tl.store(scales_ptr + ranks, tl.where(bad > 0, float("nan"), scale), mask=inside)


@triton.jit(do_not_specialize=["BLOCKS"])
def _lists_kernel(here_ptr, lists_ptr, BLOCKS, ADAPTERS, AT_ONCE: tl.constexpr, PDL: tl.constexpr):
    wait_for_stream(PDL)
    adapter = tl.program_id(0)
    at = lists_ptr + adapter * (2 + BLOCKS)
    pure, shared = adapter * 0, adapter * 0
    for first in range(0, BLOCKS, AT_ONCE):
        blocks = first + tl.arange(0, AT_ONCE)
        here = tl.load(here_ptr + blocks * ADAPTERS + adapter, mask=blocks < BLOCKS, other=0)
        all_of, some = (here == 2).to(tl.int32), (here == 1).to(tl.int32)
        tl.store(at + 1 + pure + tl.cumsum(all_of, 0), blocks, mask=here == 2)
        tl.store(at + 2 + BLOCKS - shared - tl.cumsum(some, 0), blocks, mask=here == 1)
        pure += tl.sum(all_of, 0)
        shared += tl.sum(some, 0)
    tl.store(at, pure)
    tl.store(at + 1, shared)


def places(
    which: Operand, x: Operand, firsts: Operand, bad: Operand, given: Operand, ranks: Ranks, found: Places
) -> Launch:
    """Fill ``found`` for the rows of x from ``which``, contiguous, an element for as many rows each, and from where
    adapters begin among all ranks; and from the marks of ranks that are not finite, bad [parts, ranks in all]."""
    m = x.shape[0]
    return launch(
        _places_kernel,
        (triton.cdiv(m, ROWS) + ranks.units,),
        {"num_warps": 4},
        x,
        which_ptr=which,
        firsts_ptr=firsts,
        own_ptr=found.own,
        whole_ptr=found.whole,
        here_ptr=found.here,
        units_ptr=found.units,
        bad_ptr=bad,
        given_ptr=given,
        scales_ptr=found.scales,
        M=m,
        EACH=m // which.shape[0],
        ADAPTERS=len(ranks.of),
        TOTAL=ranks.total,
        BAD=bad.shape[0],
        ROWS=ROWS,
        UNIT=UNIT,
        UNITS=ranks.units,
        AT_ONCE=AT_ONCE,
    )


def lists(here: Operand, scratch: Scratch) -> tuple[Launch, Operand]:
    """What makes [adapters, 2 + blocks] int32: how many blocks are an adapter's alone and how many hold rows of it
    beside others, then which, those from the front and these from the back; and that."""
    blocks, adapters = here.shape
    found = scratch.part((adapters, 2 + blocks), torch.int32)
    made = launch(
        _lists_kernel,
        (adapters,),
        {"num_warps": 4},
        here,
        here_ptr=here,
        lists_ptr=found,
        BLOCKS=blocks,
        ADAPTERS=adapters,
        AT_ONCE=128,
    )
    return made, found
