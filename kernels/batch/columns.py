"""G_j = Z^T P over the rows of adapter j alone: dB from dY and S, dA^T from drop(x) and dS, for all adapters in one
launch.

A program has some columns of Z and some ranks of one adapter, walks over the blocks of rows that hold rows of it
(places.py), or over a part of these, and selects its rows: what others' rows hold, NaN say, does not reach it. Parts
are added up in a fixed order (sums.py). A gradient lies where the adapter lies in A's one below the other, or B's one
after the other; of an adapter without rows it is zero.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ranks import FIELDS, ROWS, Ranks
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    acc_dtype,
    load_tile,
    mask_words,
    mma,
    precision,
    unpack_words,
    wait_for_stream,
    wide,
)
from lora_fast.kernels.operands import Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Parts, add_parts
from lora_fast.kernels.tiles import tma_fits


@triton.jit(do_not_specialize=["M", "BLOCKS"])
def _batch_columns_kernel(
    z,
    p_ptr,
    own_ptr,
    lists_ptr,
    table_ptr,
    bits_ptr,
    lift_ptr,
    g_ptr,
    M,
    N,
    TOTAL,
    BLOCKS,
    SIZE,
    stride_zm,
    stride_zn,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLITS: tl.constexpr,
    RANKS_FIRST: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    col, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    at = table_ptr + tl.program_id(2) * FIELDS
    adapter, first, rank = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    r, before = tl.load(at + 3), tl.load(at + 4)
    ranks = tl.arange(0, BLOCK_R)
    inside = ranks < r - rank
    blocks = lists_ptr + adapter * (1 + BLOCKS)
    STEPS: tl.constexpr = ROWS // BLOCK_M
    each = tl.cdiv(tl.load(blocks), SPLITS)
    last = tl.minimum((split + 1) * each, tl.load(blocks))
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    for i in range(split * each * STEPS, last * STEPS):
        m = tl.load(blocks + 1 + i // STEPS) * ROWS + i % STEPS * BLOCK_M
        rows = m + tl.arange(0, BLOCK_M)
        tile = load_tile(Matrix(z, M, N, stride_zm, stride_zn), m, col, BLOCK_M, BLOCK_N, TMA)
        stays = (tl.load(own_ptr + rows, mask=rows < M, other=-1) == adapter)[:, None]
        p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * TOTAL + first + ranks[None, :]
        p = tl.load(p_ptrs, mask=stays & inside[None, :], other=0.0)
        if bits_ptr is not None:
            stays = stays & unpack_words(mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N))
        g = mma(tl.where(stays, tile, 0.0).to(DTYPE).T, p, g, PRECISION)
    if lift_ptr is not None:
        g *= tl.load(lift_ptr + first)
    cols, zero = (col + tl.arange(0, BLOCK_N))[:, None], tl.full((), 0, tl.int64)
    if RANKS_FIRST:
        to = (zero + before + rank + ranks[None, :]) * N + cols
    else:
        to = (zero + before) * N + (zero + cols) * r + rank + ranks[None, :]
    g_ptrs = g_ptr + split.to(tl.int64) * SIZE + to
    tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols < N) & inside[None, :])


class Where(NamedTuple):
    """Whose rows are where: own [M], the lists [adapters, 1 + blocks of rows], and blocks of ranks."""

    own: Operand
    lists: Operand
    table: Operand


def columns(
    z: Operand,
    p: Operand,
    g: Operand,
    where: Where,
    ranks: Ranks,
    *,
    ranks_first: bool,
    scratch: Scratch,
    bits: Operand | None = None,
    lift: Operand | None = None,
) -> list[Launch]:
    """g, the gradients of all adapters [sum of R * N], from z [M, N], perhaps under a mask, and p [M, ranks in all].
    ranks_first: each is [R, N], else [N, R]. A lift, one for each rank, multiplies it."""
    (m, n), size, kind = z.shape, g.shape[0], z.dtype
    chip, tma = Chip.of(z.device), tma_fits(z)
    tile = pass_tiles.batch_columns(ranks.block, dtype=kind, chip=chip, tma=tma)
    exact = precision(kind, m)
    if kind == torch.float32 and exact == "ieee":  # as in ``down``
        tile = replace(tile, m=16)
    grid = triton.cdiv(n, tile.n), len(ranks.blocks(ranks.block))
    splits = int(chip.processors * tile.fill) // (grid[0] * grid[1])
    splits = max(1, min(splits, triton.cdiv(m, 4 * ROWS)))
    to, sums = g, Parts(0, 0, 0, 0, 0, 0)
    if splits > 1:
        to = scratch.part((splits * size,), wide(z))
        sums = Parts(0, splits, 0, 0, 0, size)
    made = launch(
        _batch_columns_kernel,
        (grid[0], splits, grid[1]),
        tile.options,
        z,
        z=Tiles(z, [tile.m, tile.n]) if tma else z,
        p_ptr=p,
        own_ptr=where.own,
        lists_ptr=where.lists,
        table_ptr=where.table,
        bits_ptr=bits,
        lift_ptr=lift,
        g_ptr=to,
        M=m,
        N=n,
        TOTAL=ranks.total,
        BLOCKS=where.lists.shape[1] - 1,
        SIZE=size,
        stride_zm=z.stride(0),
        stride_zn=z.stride(1),
        stride_bits=0 if bits is None else triton.cdiv(n, 32),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        ROWS=ROWS,
        FIELDS=FIELDS,
        SPLITS=splits,
        RANKS_FIRST=ranks_first,
        TMA=tma,
        ACC=acc_dtype(kind),
        PRECISION=exact,
        DTYPE=TL[kind],
    )
    return [made] if splits == 1 else [made, add_parts(sums, to, z, kind, g=g)]
