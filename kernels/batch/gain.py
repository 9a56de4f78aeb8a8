"""DoRA's norms n_j = |V_j| of the rows of V_j = W + s_j B_j A_j, and gains g_j = m_j / n_j, of all adapters.

In 16 bits, with up to 64 ranks each, from n^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W and b of B: one
launch makes |w|^2 and each A A^T, one W A^T for all adapters at once, of which b (A w) alone is written; a third adds
up. Rows whose terms cancel are made again in it, as V itself. So are all rows elsewhere, as norm.py makes them, an
adapter a program: that costs a read of W and a square of each of its elements for each adapter. A rank that is not
finite (see pack.py) makes its adapter's norms NaN.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ranks import Ranks, Tables
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, mma, wait_for_stream
from lora_fast.kernels.gemm import halves
from lora_fast.kernels.norm import LowRank, constants, gain_of, row_norm
from lora_fast.kernels.operands import Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import Tile, rank_block, tma_fits

GROUP = 16  # ranks, all of one adapter
WEAK = tl.constexpr(2.0**-4)  # of its terms' sum: below it what cancels is made again


@triton.jit
def _squares_kernel(
    w_ptr,
    a_ptr,
    firsts_ptr,
    squares_ptr,
    gram_ptr,
    N,
    K,
    ADAPTERS,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    GRAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """|w|^2 [N], and parts of A A^T over STEPS blocks of columns each: [parts, adapters, GRAM, GRAM]."""
    wait_for_stream(PDL)
    block = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    if block < blocks:
        w, rows = Matrix(w_ptr, N, K, stride_wn, stride_wk), block * BLOCK_N + tl.arange(0, BLOCK_N)
        squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        tile = load_tile(w, block * BLOCK_N, 0, BLOCK_N, BLOCK_K)
        for k in range(0, K, BLOCK_K):
            later = load_tile(w, block * BLOCK_N, k + BLOCK_K, BLOCK_N, BLOCK_K)  # the next step's, as in norm.py
            squares += tile.to(tl.float32) * tile.to(tl.float32)
            tile = later
        tl.store(squares_ptr + rows, tl.sum(squares, 1), mask=rows < N)
    else:
        adapter, part = (block - blocks) % ADAPTERS, (block - blocks) // ADAPTERS
        first, end = tl.load(firsts_ptr + adapter), tl.load(firsts_ptr + adapter + 1)
        a = Matrix(a_ptr + first.to(tl.int64) * K, end - first, K, K, 1)
        gram = tl.zeros([GRAM, GRAM], tl.float32)
        for step in range(0, STEPS):
            tile = load_tile(a, 0, (part * STEPS + step) * BLOCK_K, GRAM, BLOCK_K)
            gram = tl.dot(tile, tile.T, gram)
        at = tl.arange(0, GRAM)[:, None] * GRAM + tl.arange(0, GRAM)[None, :]
        tl.store(gram_ptr + (block - blocks).to(tl.int64) * GRAM * GRAM + at, gram)


@triton.jit
def _dots_kernel(
    w,
    a,
    b_ptr,
    dots_ptr,
    N,
    K,
    TOTAL,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """b (A w) for each group of ranks [groups, N]."""
    wait_for_stream(PDL)
    row, rank = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_R
    rows = row + tl.arange(0, BLOCK_N)
    whole_w, whole_a = Matrix(w, N, K, stride_wn, stride_wk), Matrix(a, TOTAL, K, K, 1)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        tile = load_tile(whole_w, row, k, BLOCK_N, BLOCK_K, TMA)
        acc = mma(tile, load_tile(whole_a, rank, k, BLOCK_R, BLOCK_K, TMA).T, acc, "ieee")
    left, right = halves(acc)
    HALF: tl.constexpr = BLOCK_R // 2
    for i in tl.static_range(2):
        half = left if i == 0 else right
        half *= load_tile(Matrix(b_ptr, N, TOTAL, TOTAL, 1), row, rank, BLOCK_N, HALF).to(tl.float32)
        dots = tl.sum(tl.reshape(half, (BLOCK_N, HALF // GROUP, GROUP)), 2)
        groups = rank // GROUP + tl.arange(0, HALF // GROUP)
        dots_ptrs = dots_ptr + groups[None, :] * N + rows[:, None]
        tl.store(dots_ptrs, dots, mask=(groups * GROUP < TOTAL)[None, :] & (rows < N)[:, None])
        rank += HALF


@triton.jit
def _gains_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    m_ptr,
    firsts_ptr,
    low_ptr,
    scales_ptr,
    squares_ptr,
    dots_ptr,
    gram_ptr,
    n_ptr,
    g_ptr,
    N,
    K,
    TOTAL,
    PARTS,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    GROUP: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    adapter, row = tl.program_id(0), tl.program_id(1) * BLOCK_N
    first, end = tl.load(firsts_ptr + adapter), tl.load(firsts_ptr + adapter + 1)
    s = tl.load(low_ptr + first)
    for rank in range(first, end, GROUP):
        s += tl.sum(tl.load(scales_ptr + rank + tl.arange(0, GROUP)) * 0.0)
    s = s.to(ACC)
    rows = row + tl.arange(0, BLOCK_N)
    w, zero = Matrix(w_ptr, N, K, stride_wn, stride_wk), tl.full((), 0, tl.int64)
    a, b = Matrix(a_ptr + (zero + first) * K, end - first, K, K, 1), Matrix(b_ptr + first, N, end - first, TOTAL, 1)
    b_tile = load_tile(b, row, 0, BLOCK_N, BLOCK_R)
    if dots_ptr is None:
        norm = row_norm(w, None, LowRank(a, b, b_tile, s), row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
    else:
        at = tl.arange(0, BLOCK_R)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        b_wide, gram = b_tile.to(tl.float32), tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        for part in range(0, PARTS):
            gram += tl.load(gram_ptr + (part * tl.num_programs(0) + adapter) * BLOCK_R * BLOCK_R + at)
        low = tl.sum(tl.dot(b_wide, gram, input_precision="tf32x3") * b_wide, 1) * s * s
        dots = tl.zeros([BLOCK_N], tl.float32)
        for rank in range(first, end, GROUP):
            dots += tl.load(dots_ptr + (zero + rank // GROUP) * N + rows, mask=rows < N, other=0.0)
        base = tl.load(squares_ptr + rows, mask=rows < N, other=0.0)
        square = base + 2 * s * dots + low
        weak = square < (base + low) * WEAK
        norm = tl.sqrt(tl.where(square < 0, 0.0, square))
        if tl.max(weak.to(tl.int32), 0) > 0:
            again = row_norm(w, None, LowRank(a, b, b_tile, s), row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
            norm = tl.where(weak, again, norm)
    if ROUND is not None:
        norm = norm.to(ROUND).to(ACC)
    to = (zero + adapter) * N
    tl.store(n_ptr + to + rows, norm, mask=rows < N)
    tl.store(g_ptr + to + rows, gain_of(m_ptr + to, norm, rows, N, ACC), mask=rows < N)


class Packed(NamedTuple):
    """What norms are made of beside W: a [ranks in all, K] and b [N, ranks in all], as ``pack`` made them; for each
    rank the scaling that b does not carry, and the scale that is NaN where a rank is marked; and tables."""

    a: Operand
    b: Operand
    low: Operand
    scales: Operand
    tables: Tables


def gains(
    w: Operand,
    of: Packed,
    m: Operand,
    n: Operand,
    gain: Operand,
    ranks: Ranks,
    round_norm: bool,
    scratch: Scratch,
) -> list[Launch]:
    """n and gain [adapters, N] from w [N, K] and m [adapters, N]; norms rounded to w's dtype on request."""
    (rows, k), kind, most, count = w.shape, w.dtype, max(ranks.padded), len(ranks.of)
    tile = pass_tiles.norm(rows, most, dtype=kind, kind=kind, chip=Chip.of(w.device))
    launches = list[Launch]()
    parts, squares, dots, gram = 0, None, None, None
    if kind.itemsize == 2 and most <= 64:
        block = rank_block(most, 64)
        # What spills nowhere; 64 rows and their sums do not compile for sm_100 (Triton 3.7).
        few = block == 64 or Chip.of(w.device).small
        tile = Tile(n=16 if few else 32, k=64 if block == 64 else 128, r=block, stages=2)
        squares = scratch.part((rows,), torch.float32)
        dots = scratch.part((ranks.total // GROUP, rows), torch.float32)
        parts = triton.cdiv(k, 8 * 128)
        gram = scratch.part((parts, count, block, block), torch.float32)
        launches += [_squares(w, of, squares, gram), _dots(w, of, dots, ranks)]
    elif tile.r == 64:  # with 256 columns it spills where rows begin anywhere
        tile = replace(tile, k=min(tile.k, 128 if kind.itemsize == 2 else 16))
    launches.append(
        launch(
            _gains_kernel,
            (count, triton.cdiv(rows, tile.n)),
            tile.options,
            w,
            w_ptr=w,
            a_ptr=of.a,
            b_ptr=of.b,
            m_ptr=m,
            firsts_ptr=of.tables.firsts,
            low_ptr=of.low,
            scales_ptr=of.scales,
            squares_ptr=squares,
            dots_ptr=dots,
            gram_ptr=gram,
            n_ptr=n,
            g_ptr=gain,
            N=rows,
            K=k,
            TOTAL=ranks.total,
            PARTS=parts,
            stride_wn=w.stride(0),
            stride_wk=w.stride(1),
            **constants(tile),
            ONE=most <= tile.r,
            GROUP=GROUP,
            ROUND=TL[kind] if round_norm else None,
            ACC=acc_dtype(kind),
            PRECISION="tf32x3" if kind.itemsize == 4 else "ieee",
        )
    )
    return launches


def _squares(w: Operand, of: Packed, squares: Operand, gram: Operand) -> Launch:
    (rows, k), (parts, count, size, _) = w.shape, gram.shape
    return launch(
        _squares_kernel,
        (triton.cdiv(rows, 16) + parts * count,),
        {"num_warps": 4},
        w,
        w_ptr=w,
        a_ptr=of.a,
        firsts_ptr=of.tables.firsts,
        squares_ptr=squares,
        gram_ptr=gram,
        N=rows,
        K=k,
        ADAPTERS=count,
        stride_wn=w.stride(0),
        stride_wk=w.stride(1),
        BLOCK_N=16,
        BLOCK_K=128,
        STEPS=8,
        GRAM=size,
    )


def _dots(w: Operand, of: Packed, dots: Operand, ranks: Ranks) -> Launch:
    (rows, k), total = w.shape, ranks.total
    tma = tma_fits(w, of.a)
    tile = pass_tiles.batch_norm(total, chip=Chip.of(w.device), tma=tma)
    return launch(
        _dots_kernel,
        (triton.cdiv(rows, tile.n), triton.cdiv(total, tile.r)),
        tile.options,
        w,
        w=Tiles(w, [tile.n, tile.k]) if tma else w,
        a=Tiles(of.a, [tile.r, tile.k]) if tma else of.a,
        b_ptr=of.b,
        dots_ptr=dots,
        N=rows,
        K=k,
        TOTAL=total,
        stride_wn=w.stride(0),
        stride_wk=w.stride(1),
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tile.r,
        GROUP=GROUP,
        TMA=tma,
    )
