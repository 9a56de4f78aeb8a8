"""G_j = Z^T P over the rows of adapter j alone: dB from dY and S, dA^T from drop(x) and dS, for all adapters in one
launch; and on the way of dB, where ranks are few, dS = s dY B_j from the same tiles. With DoRA's gains dZ = g_j * dY
takes dY's place, as in grad.py: it is written, and sums over an adapter's rows of dY * z make dm_j (magnitudes.py).

A program has some columns of Z and some ranks of one adapter and walks over the blocks of rows that hold rows of it
(places.py), or over a part of these: first those that are its own from end to end, which come tile by tile as they
are; then those that it shares, of which it loads its own rows alone. So what others' rows hold, NaN say, does not reach
it, and each row is read once. Parts are added up in a fixed order (sums.py, and ds.py). A gradient lies where
the adapter lies in A's one below the other, or B's one after the other; of an adapter without rows it is zero.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ds import LowRank, add_ds
from lora_fast.kernels.batch.magnitudes import Again, magnitudes
from lora_fast.kernels.batch.places import Where
from lora_fast.kernels.batch.ranks import FIELDS, ROWS, Ranks
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    acc_dtype,
    late,
    load_tile,
    mask_words,
    masked,
    mma,
    precision,
    store_tile,
    wait_for_stream,
    wide,
)
from lora_fast.kernels.operands import Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Parts, add_parts
from lora_fast.kernels.tiles import tma_fits


class Rows(NamedTuple):
    """What a program of ``_batch_columns_kernel`` walks over, as device code sees it: Z, its rows' adapters, P, and
    what is written on the way."""

    z: Any  # or a tensor descriptor
    z_ptr: Any
    kept_ptr: Any
    own_ptr: Any
    p_ptr: Any
    bits_ptr: Any
    dz: Any
    dz_ptr: Any
    ds_ptr: Any
    m: Any
    n: Any
    stride_m: Any
    stride_n: Any
    stride_p: Any
    stride_bits: Any
    stride_ds: Any


@triton.jit
def _mine(at, adapter, m, BLOCK_M: tl.constexpr, PURE: tl.constexpr):
    """Whether rows from m on are the adapter's [BLOCK_M]; PURE: all are that there are."""
    rows = m + tl.arange(0, BLOCK_M)
    if PURE:
        mine = rows < at.m
    else:
        mine = tl.load(at.own_ptr + rows, mask=rows < at.m, other=-2) == adapter
    return mine


class Steps(NamedTuple):
    """Steps of a walk, BLOCK_M rows each: from the first to the last over the blocks of rows in a list (a pointer),
    ``STRIDE`` apart in it, for an adapter. PURE: there are no rows of others."""

    blocks: Any
    first: Any
    last: Any
    adapter: Any
    STRIDE: Any
    PURE: Any


class OneAdapter(NamedTuple):
    """What a walk reads of it: columns of P from ``first`` on, so many, its B [BLOCK_N, BLOCK_R] and gain [BLOCK_N]."""

    first: Any
    count: Any
    b: Any
    gain: Any


class Constants(NamedTuple):
    """Those of ``_walk``."""

    BLOCK_M: Any
    ROWS: Any
    TMA: Any
    ACC: Any
    PRECISION: Any
    DTYPE: Any


@triton.jit
def _walk(at, steps, col, of, g, dm, by):
    """G and dm after these steps; rows of other adapters are not read."""
    first, last, adapter, rank, r = steps.first, steps.last, steps.adapter, of.first, of.count
    BLOCK_M: tl.constexpr = by.BLOCK_M
    ROWS: tl.constexpr = by.ROWS
    STRIDE: tl.constexpr = steps.STRIDE
    PURE: tl.constexpr = steps.PURE
    TMA: tl.constexpr = by.TMA
    ACC: tl.constexpr = by.ACC
    PRECISION: tl.constexpr = by.PRECISION
    DTYPE: tl.constexpr = by.DTYPE
    BLOCK_N: tl.constexpr = g.shape[0]
    BLOCK_R: tl.constexpr = g.shape[1]
    DM_ROWS: tl.constexpr = dm.shape[0]
    STEPS: tl.constexpr = ROWS // BLOCK_M
    local, ranks = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_R)
    cols, zero = tl.arange(0, BLOCK_N)[None, :], tl.full((), 0, tl.int64)
    inside = cols < at.n - col
    whole = local * at.n + cols  # where a tile's elements lie in a contiguous matrix, from its first on: 32 bits do
    # Where a step lies is looked up one ahead: looked up in it, that would take a stage of the pipeline.
    m = tl.load(steps.blocks + first // STEPS * STRIDE, mask=first < last, other=0) * ROWS + first % STEPS * BLOCK_M
    if at.kept_ptr is not None and PURE:
        here = (_mine(at, adapter, m, BLOCK_M, PURE) & (first < last))[:, None] & inside
        kept = tl.load(at.kept_ptr + (zero + m) * at.n + col + whole, mask=here, other=0.0)
    for i in range(first, last):
        rows, mine = m + tl.arange(0, BLOCK_M), _mine(at, adapter, m, BLOCK_M, PURE)
        later = tl.load(steps.blocks + (i + 1) // STEPS * STRIDE, mask=i + 1 < last, other=0)
        later = later * ROWS + (i + 1) % STEPS * BLOCK_M
        if PURE:
            tile = load_tile(Matrix(at.z, at.m, at.n, at.stride_m, at.stride_n), m, col, BLOCK_M, BLOCK_N, TMA)
        else:
            z_ptrs = at.z_ptr + rows.to(tl.int64)[:, None] * at.stride_m + (zero + col + cols) * at.stride_n
            tile = tl.load(z_ptrs, mask=mine[:, None] & inside, other=0.0)
        if at.kept_ptr is not None:
            if not PURE:
                start = at.kept_ptr + (zero + m) * at.n + col
                kept = tl.load(start + whole, mask=mine[:, None] & inside, other=0.0)
            dm += tl.sum(tl.reshape(tile.to(ACC) * kept.to(ACC), (BLOCK_M // DM_ROWS, DM_ROWS, BLOCK_N)), 0)
            if PURE:  # the next step's, by hand: the compiler's pipeline takes the operands of products alone
                here = (_mine(at, adapter, later, BLOCK_M, PURE) & (i + 1 < last))[:, None] & inside
                kept = tl.load(at.kept_ptr + (zero + later) * at.n + col + whole, mask=here, other=0.0)
        if at.dz_ptr is not None:
            dz = (tile.to(ACC) * of.gain[None, :]).to(DTYPE)
            if PURE:
                store_tile(Matrix(at.dz, at.m, at.n, at.n, 1), dz, m, col, DTYPE, TMA)
            else:
                tl.store(at.dz_ptr + (zero + m) * at.n + col + whole, dz, mask=mine[:, None] & inside)
        if at.bits_ptr is not None:
            words = mask_words(at.bits_ptr, tl.minimum(rows, at.m - 1), col, at.stride_bits, BLOCK_N)
            tile = masked(tile, words)
        if at.p_ptr is not None:
            p_ptrs = at.p_ptr + rows.to(tl.int64)[:, None] * at.stride_p + rank + ranks[None, :]
            # Rows of others hold zeros at these ranks.
            p = tl.load(p_ptrs, mask=(rows < at.m)[:, None] & (ranks < r)[None, :], other=0.0)
            g = mma(tile.T, p, g, PRECISION)
            if at.kept_ptr is not None or at.dz_ptr is not None:
                g = late(g)  # Triton 3.7 loads the next tile over one that is read twice while it is multiplied
        if at.ds_ptr is not None:
            ds = mma(tile, of.b, tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC), PRECISION)
            ds_ptrs = at.ds_ptr + rows.to(tl.int64)[:, None] * at.stride_ds + ranks[None, :]
            tl.store(ds_ptrs, ds, mask=mine[:, None] & (ranks < at.stride_ds)[None, :])
        m = later
    return g, dm


@triton.jit(do_not_specialize=["M", "BLOCKS"])
def _batch_columns_kernel(
    z,
    dz,
    z_ptr,
    dz_ptr,
    kept_ptr,
    p_ptr,
    b_ptr,
    own_ptr,
    lists_ptr,
    table_ptr,
    bits_ptr,
    lift_ptr,
    gain_ptr,
    ds_ptr,
    dm_ptr,
    g_ptr,
    M,
    N,
    TOTAL,
    WIDTH,
    BLOCKS,
    ADAPTERS,
    SIZE,
    stride_zm,
    stride_zn,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DM_ROWS: tl.constexpr,
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
    first = tl.multiple_of(first, 16)
    padded = tl.cdiv(r - rank, 16) * 16  # known to divide: else P is loaded by single elements, and not ahead
    none = adapter == ADAPTERS  # rows without an adapter
    cols, ranks, zero = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), tl.full((), 0, tl.int64)
    blocks = lists_ptr + adapter * (2 + BLOCKS)
    pure, shared = tl.load(blocks), tl.load(blocks + 1)
    STEPS: tl.constexpr = ROWS // BLOCK_M
    b, gain = None, None
    if gain_ptr is not None:
        inside = (cols < N) & (adapter < ADAPTERS)
        gain = tl.load(gain_ptr + (zero + adapter) * N + cols, mask=inside, other=1.0)
    if b_ptr is not None:
        b = load_tile(Matrix(b_ptr, N, first + r - rank, TOTAL, 1), col, first, BLOCK_N, BLOCK_R)
        if gain_ptr is not None:
            b = (b.to(ACC) * gain[:, None]).to(DTYPE)  # type: ignore[index]
        ds_ptr += (zero + tl.program_id(0)) * M * WIDTH
    at = Rows(
        z,
        z_ptr,
        kept_ptr,
        own_ptr,
        p_ptr,
        bits_ptr,
        dz,
        dz_ptr,
        ds_ptr,
        M,
        N,
        stride_zm,
        stride_zn,
        TOTAL,
        stride_bits,
        WIDTH,
    )
    g, dm = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC), tl.zeros([DM_ROWS, BLOCK_N], dtype=ACC)
    each = tl.cdiv(pure, SPLITS)
    begin, last = split * each * STEPS, tl.minimum((split + 1) * each, pure) * STEPS
    g, dm = _walk(
        at,
        Steps(blocks + 2, begin, last, adapter, 1, True),
        col,
        OneAdapter(first, padded, b, gain),
        g,
        dm,
        Constants(BLOCK_M, ROWS, TMA, ACC, PRECISION, DTYPE),
    )
    each = tl.cdiv(shared, SPLITS)
    begin, last = split * each * STEPS, tl.minimum((split + 1) * each, shared) * STEPS
    own = tl.where(none, -1, adapter)
    g, dm = _walk(
        at,
        Steps(blocks + 1 + BLOCKS, begin, last, own, -1, False),
        col,
        OneAdapter(first, padded, b, gain),
        g,
        dm,
        Constants(BLOCK_M, ROWS, TMA, ACC, PRECISION, DTYPE),
    )
    if dm_ptr is not None:
        to = (zero + adapter) * N + cols
        to += split.to(tl.int64) * ADAPTERS * N
        tl.store(dm_ptr + to, tl.sum(dm, 0), mask=(cols < N) & (rank == 0) & (adapter < ADAPTERS))
    if g_ptr is not None:
        if lift_ptr is not None:
            g *= tl.load(lift_ptr + first)
        if gain_ptr is not None:
            g *= gain[:, None]  # type: ignore[index]
        if RANKS_FIRST:
            to = (zero + before + rank + ranks[None, :]) * N + cols[:, None]
        else:
            to = (zero + before) * N + (zero + cols)[:, None] * r + rank + ranks[None, :]
        g_ptrs = g_ptr + split.to(tl.int64) * SIZE + to
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols < N)[:, None] & (ranks < r - rank)[None, :])


class Gains(NamedTuple):
    """DoRA's, with which dZ = g * dY takes the place of Z = dY: gain and norm [adapters, N]; dz [M, N] is filled, and
    dm [adapters, N], from kept [M, N], contiguous: z, or y where z can be made ``again`` (magnitudes.py)."""

    gain: Operand
    norm: Operand
    kept: Operand | None
    dm: Operand | None
    dz: Operand | None
    again: Again | None


def columns(
    z: Operand,
    p: Operand | None,
    g: Operand | None,
    where: Where,
    ranks: Ranks,
    *,
    ranks_first: bool,
    scratch: Scratch,
    bits: Operand | None = None,
    lift: Operand | None = None,
    low: LowRank | None = None,
    dora: Gains | None = None,
) -> list[Launch]:
    """g, the gradients of all adapters [sum of R * N], from z [M, N], perhaps under a mask, and p [M, ranks in all].
    ranks_first: each is [R, N], else [N, R]. A lift, one for each rank, multiplies it."""
    (m, n), kind, count = z.shape, z.dtype, len(ranks.of)
    kept = dm = dz = sums_to = None
    if dora is not None:
        dz, dm = dora.dz, dora.dm
        kept = None if dm is None else dora.kept
    chip, tma = Chip.of(z.device), tma_fits(z, *(() if dz is None else (dz,)))
    tile = pass_tiles.batch_columns(
        m,
        ranks.block,
        dtype=kind,
        chip=chip,
        tma=tma,
        masked=bits is not None,
        fused=low is not None,
        dora=dora is not None,
    )
    exact = precision(kind, m)
    if kind == torch.float32 and exact == "ieee":  # as in ``down``
        tile = replace(tile, m=16)
    blocks = len(ranks.blocks(ranks.block))
    grid = triton.cdiv(n, tile.n), blocks + (dz is not None)  # rows without an adapter matter to dZ alone
    splits = int(chip.processors * tile.fill) // (grid[0] * blocks)
    splits = max(1, min(splits, triton.cdiv(m, 4 * ROWS)))
    size, width, parts = 0 if g is None else g.shape[0], max(ranks.padded), None
    g_to, sums = g, list[Launch]()
    if splits > 1 and g is not None:
        g_to = scratch.part((splits * size,), wide(z))
        sums.append(add_parts(Parts(0, splits, 0, 0, 0, size), g_to, z, kind, g=g))
    if dora is not None and dm is not None:
        sums_to = scratch.part((splits, count, n), wide(z))
        sums.append(magnitudes(sums_to, dora.norm, dora.gain, dm, z, where.own, dora.again))
    added = list[Launch]()
    if low is not None:
        parts = scratch.part((grid[0], m, width), wide(z))
        added.append(add_ds(parts, z, where, low, ranks))
    block = [tile.m, tile.n]
    made = launch(
        _batch_columns_kernel,
        (grid[0], splits, grid[1]),
        tile.options,
        z,
        z=Tiles(z, block) if tma else z,
        dz=Tiles(dz, block) if tma and dz is not None else dz,
        z_ptr=z,
        dz_ptr=dz,
        kept_ptr=kept,
        p_ptr=p,
        b_ptr=low and low.b,
        own_ptr=where.own,
        lists_ptr=where.lists,
        table_ptr=where.tables.blocks,
        bits_ptr=bits,
        lift_ptr=lift,
        gain_ptr=dora and dora.gain,
        ds_ptr=parts,
        dm_ptr=sums_to,
        g_ptr=g_to,
        M=m,
        N=n,
        TOTAL=ranks.total,
        WIDTH=width,
        BLOCKS=where.lists.shape[1] - 2,
        ADAPTERS=count,
        SIZE=size,
        stride_zm=z.stride(0),
        stride_zn=z.stride(1),
        stride_bits=0 if bits is None else triton.cdiv(n, 32),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        DM_ROWS=min(tile.sum_rows, tile.m),
        ROWS=ROWS,
        FIELDS=FIELDS,
        SPLITS=splits,
        RANKS_FIRST=ranks_first,
        TMA=tma,
        ACC=acc_dtype(kind),
        PRECISION=exact,
        DTYPE=TL[kind],
    )
    return [made, *added, *sums]
