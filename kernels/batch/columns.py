"""G_j = Z^T P over the rows of adapter j alone: dB from dY and S, dA^T from drop(x) and dS, for all adapters in one
launch; and on the way of dB, where ranks are few, dS = s dY B_j from the same tiles.

A program has some columns of Z and some ranks of one adapter and walks over the blocks of rows that hold rows of it
(places.py), or over a part of these: first those that are its own from end to end, which come tile by tile as they
are; then those that it shares, of which it loads its own rows alone. So what others' rows hold, NaN say, does not reach
it, and each row is read once. Parts are added up in a fixed order (sums.py, and ``_ds_kernel``). A gradient lies where
the adapter lies in A's one below the other, or B's one after the other; of an adapter without rows it is zero.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ranks import FIELDS, ROWS, UNIT, Ranks, Tables
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

DS_ROWS = 16  # rows that a program adds up the parts of dS for


@triton.jit
def _step(
    z,
    z_ptr,
    own_ptr,
    p_ptr,
    b,
    bits_ptr,
    ds_ptr,
    g,
    m,
    col,
    adapter,
    first,
    r,
    M,
    N,
    TOTAL,
    WIDTH,
    stride_zm,
    stride_zn,
    stride_bits,
    BLOCK_M: tl.constexpr,
    PURE: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """G after BLOCK_M more rows, of which those of other adapters are not read; PURE: there are none. With B's tile
    also their part of dS."""
    BLOCK_N: tl.constexpr = g.shape[0]
    BLOCK_R: tl.constexpr = g.shape[1]
    rows, cols, ranks = m + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    if PURE:
        mine = rows < M
        tile = load_tile(Matrix(z, M, N, stride_zm, stride_zn), m, col, BLOCK_M, BLOCK_N, TMA)
    else:
        mine = tl.load(own_ptr + rows, mask=rows < M, other=-2) == adapter
        z_ptrs = z_ptr + rows.to(tl.int64)[:, None] * stride_zm + cols.to(tl.int64)[None, :] * stride_zn
        tile = tl.load(z_ptrs, mask=mine[:, None] & (cols < N)[None, :], other=0.0)
    if bits_ptr is not None:
        words = mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N)
        tile = tl.where(unpack_words(words), tile, 0.0)
    p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * TOTAL + first + ranks[None, :]
    p = tl.load(p_ptrs, mask=mine[:, None] & (ranks < r)[None, :], other=0.0)
    g = mma(tile.T, p, g, PRECISION)
    if ds_ptr is not None:
        ds = mma(tile, b, tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC), PRECISION)
        ds_ptrs = ds_ptr + rows.to(tl.int64)[:, None] * WIDTH + ranks[None, :]
        tl.store(ds_ptrs, ds, mask=mine[:, None] & (ranks < WIDTH)[None, :])
    return g


@triton.jit(do_not_specialize=["M", "BLOCKS"])
def _batch_columns_kernel(
    z,
    z_ptr,
    p_ptr,
    b_ptr,
    own_ptr,
    lists_ptr,
    table_ptr,
    bits_ptr,
    lift_ptr,
    ds_ptr,
    g_ptr,
    M,
    N,
    TOTAL,
    WIDTH,
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
    blocks = lists_ptr + adapter * (2 + BLOCKS)
    pure, shared = tl.load(blocks), tl.load(blocks + 1)
    blocks += 2
    STEPS: tl.constexpr = ROWS // BLOCK_M
    b = 0.0
    if b_ptr is not None:
        b = load_tile(Matrix(b_ptr, N, first + r - rank, TOTAL, 1), col, first, BLOCK_N, BLOCK_R)
        ds_ptr += tl.program_id(0).to(tl.int64) * M * WIDTH
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    each = tl.cdiv(pure, SPLITS)
    begin, last = split * each * STEPS, tl.minimum((split + 1) * each, pure) * STEPS
    block = tl.load(blocks + begin // STEPS, mask=begin < last, other=0)
    for i in range(begin, last):
        m = block * ROWS + i % STEPS * BLOCK_M
        g = _step(
            z, z_ptr, own_ptr, p_ptr, b, bits_ptr, ds_ptr, g, m, col, adapter, first, r - rank, M, N, TOTAL, WIDTH,
            stride_zm, stride_zn, stride_bits, BLOCK_M, True, TMA, ACC, PRECISION, DTYPE,
        )  # fmt: skip
        block = tl.load(blocks + (i + 1) // STEPS, mask=i + 1 < last, other=0)
    each = tl.cdiv(shared, SPLITS)
    begin, last = split * each * STEPS, tl.minimum((split + 1) * each, shared) * STEPS
    block = tl.load(blocks + BLOCKS - 1 - begin // STEPS, mask=begin < last, other=0)
    for i in range(begin, last):
        m = block * ROWS + i % STEPS * BLOCK_M
        g = _step(
            z, z_ptr, own_ptr, p_ptr, b, bits_ptr, ds_ptr, g, m, col, adapter, first, r - rank, M, N, TOTAL, WIDTH,
            stride_zm, stride_zn, stride_bits, BLOCK_M, False, TMA, ACC, PRECISION, DTYPE,
        )  # fmt: skip
        block = tl.load(blocks + BLOCKS - 1 - (i + 1) // STEPS, mask=i + 1 < last, other=0)
    if lift_ptr is not None:
        g *= tl.load(lift_ptr + first)
    cols, zero = (col + tl.arange(0, BLOCK_N))[:, None], tl.full((), 0, tl.int64)
    if RANKS_FIRST:
        to = (zero + before + rank + ranks[None, :]) * N + cols
    else:
        to = (zero + before) * N + (zero + cols) * r + rank + ranks[None, :]
    g_ptrs = g_ptr + split.to(tl.int64) * SIZE + to
    tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols < N) & (ranks < r - rank)[None, :])


@triton.jit(do_not_specialize=["M"])
def _ds_kernel(
    parts_ptr,
    own_ptr,
    owner_ptr,
    within_ptr,
    units_ptr,
    scales_ptr,
    ds_ptr,
    M,
    PARTS,
    TOTAL,
    WIDTH,
    stride_units,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """dS of a unit of ranks that these rows use: its parts added up where a rank is of the row's adapter, else 0."""
    wait_for_stream(PDL)
    row, unit = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    if units_ptr is not None:
        units = units_ptr + row // ROWS * stride_units
        if unit >= tl.load(units):
            return
        unit = tl.load(units + 1 + unit)
    rows, ranks = row + tl.arange(0, BLOCK_M), unit * UNIT + tl.arange(0, UNIT)
    own = tl.load(own_ptr + rows, mask=rows < M, other=-1)
    owner = tl.load(owner_ptr + ranks, mask=ranks < TOTAL, other=-2)
    within = tl.load(within_ptr + ranks, mask=ranks < TOTAL, other=0)
    scale = tl.load(scales_ptr + ranks, mask=ranks < TOTAL, other=0.0)
    mine = own[:, None] == owner[None, :]
    at = parts_ptr + rows.to(tl.int64)[:, None] * WIDTH + within[None, :]
    total = tl.zeros([BLOCK_M, UNIT], dtype=ACC)
    for _ in range(0, PARTS):
        total += tl.load(at, mask=mine, other=0.0)
        at += M.to(tl.int64) * WIDTH
    ds = tl.where(mine, total * scale[None, :], 0.0)
    ds_ptrs = ds_ptr + rows.to(tl.int64)[:, None] * TOTAL + ranks[None, :]
    tl.store(ds_ptrs, ds.to(DTYPE), mask=(rows < M)[:, None] & (ranks < TOTAL)[None, :])


class Where(NamedTuple):
    """Whose rows are where: own [M], the lists [adapters, 2 + blocks of rows], units (see ``Places``), and what of
    ranks kernels look up."""

    own: Operand
    lists: Operand
    units: Operand | None
    tables: Tables


class LowRank(NamedTuple):
    """dS = scales * dY B, which is made on the way of dB: ds [M, ranks in all], b [N, ranks in all], scales [ranks in
    all]."""

    ds: Operand
    b: Operand
    scales: Operand


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
    low: LowRank | None = None,
) -> list[Launch]:
    """g, the gradients of all adapters [sum of R * N], from z [M, N], perhaps under a mask, and p [M, ranks in all].
    ranks_first: each is [R, N], else [N, R]. A lift, one for each rank, multiplies it."""
    (m, n), size, kind = z.shape, g.shape[0], z.dtype
    chip, tma = Chip.of(z.device), tma_fits(z)
    each = m // len(ranks.of)
    tile = pass_tiles.batch_columns(
        each, ranks.block, dtype=kind, chip=chip, tma=tma, masked=bits is not None, fused=low is not None
    )
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
    width, parts = max(ranks.padded), None
    if low is not None:
        parts = scratch.part((grid[0], m, width), wide(z))
    made = launch(
        _batch_columns_kernel,
        (grid[0], splits, grid[1]),
        tile.options,
        z,
        z=Tiles(z, [tile.m, tile.n]) if tma else z,
        z_ptr=z,
        p_ptr=p,
        b_ptr=low and low.b,
        own_ptr=where.own,
        lists_ptr=where.lists,
        table_ptr=where.tables.blocks,
        bits_ptr=bits,
        lift_ptr=lift,
        ds_ptr=parts,
        g_ptr=to,
        M=m,
        N=n,
        TOTAL=ranks.total,
        WIDTH=width,
        BLOCKS=where.lists.shape[1] - 2,
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
    launches = [made]
    if low is not None:
        launches.append(
            launch(
                _ds_kernel,
                (triton.cdiv(m, DS_ROWS), ranks.units),
                {"num_warps": 4},
                z,
                parts_ptr=parts,
                own_ptr=where.own,
                owner_ptr=where.tables.owner,
                within_ptr=where.tables.within,
                units_ptr=where.units,
                scales_ptr=low.scales,
                ds_ptr=low.ds,
                M=m,
                PARTS=grid[0],
                TOTAL=ranks.total,
                WIDTH=width,
                stride_units=0 if where.units is None else where.units.stride(0),
                BLOCK_M=DS_ROWS,
                ROWS=ROWS,
                UNIT=UNIT,
                ACC=acc_dtype(kind),
                DTYPE=TL[kind],
            )
        )
    return launches if splits == 1 else [*launches, add_parts(sums, to, z, kind, g=g)]
