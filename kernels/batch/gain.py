"""DoRA's norms n_j = |V_j| of the rows of V_j = W + s_j B_j A_j, and gains g_j = m_j / n_j, of all adapters.

In 16 bits, with up to 64 ranks each, from n^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W and b of B: one
launch makes each A A^T, one W A^T for all adapters at once, of which b (A w) alone is written, and on the way |w|^2; a
third adds up. Where the ranks are more than a program of the second has, |w|^2 comes with A A^T, of another read of W.
Rows whose terms cancel are made again in the third, as V itself. So are all rows elsewhere, as norm.py makes them, an
adapter a program: that costs a read of W and a square of each of its elements for each adapter. A rank that is not
finite (see pack.py) makes its adapter's norms NaN.
"""

from dataclasses import replace

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.pack import Given, lying
from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.terms import GRAMS, GROUP, Packed, Terms, terms_of
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, wait_for_stream
from lora_fast.kernels.norm import LowRank, constants, gain_of, row_norm
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Summed, sum_of
from lora_fast.kernels.tiles import rank_block

WEAK = tl.constexpr(2.0**-4)  # of its terms' sum: below it what cancels is made again


@triton.jit
def _store_gains(norm, m_ptr, n_ptr, g_ptr, rows, there, N, ROUND: tl.constexpr, ACC: tl.constexpr):
    if ROUND is not None:
        norm = norm.to(ROUND).to(ACC)
    tl.store(n_ptr + rows, norm, mask=there)
    tl.store(g_ptr + rows, gain_of(m_ptr, norm, rows, N, ACC), mask=there)


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
    DOTS,
    SQUARES,
    GRAMS,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FEW: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    M_KIND: tl.constexpr,
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
    to = (zero + adapter) * N
    n_ptr, g_ptr = n_ptr + to, g_ptr + to
    m_ptr = m_ptr + to if M_KIND is None else lying(m_ptr, adapter, M_KIND)
    if dots_ptr is None:
        norm = row_norm(w, None, LowRank(a, b, b_tile, s), row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
        _store_gains(norm, m_ptr, n_ptr, g_ptr, rows, rows < N, N, ROUND, ACC)
    else:
        at = tl.arange(0, BLOCK_R)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        b_wide, gram = b_tile.to(tl.float32), tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        for part in tl.range(0, GRAMS, loop_unroll_factor=8 if BLOCK_R < 64 else 1):
            gram += tl.load(gram_ptr + (part * tl.num_programs(0) + adapter) * BLOCK_R * BLOCK_R + at)
        low = tl.sum(tl.dot(b_wide, gram, input_precision="tf32x3") * b_wide, 1) * s * s
        dots = tl.zeros([BLOCK_N], tl.float32)
        for rank in range(first, end, GROUP):
            of_rank = (zero + rank // GROUP) * N + rows
            dots += sum_of(Summed(dots_ptr, DOTS, (zero + TOTAL // GROUP) * N), of_rank, BLOCK_N, tl.float32)
        base = sum_of(Summed(squares_ptr, SQUARES, zero + N), zero + rows, BLOCK_N, tl.float32)
        square = base + 2 * s * dots + low
        weak = ((square < (base + low) * WEAK) & (rows < N)).to(tl.int32)
        norm = tl.sqrt(tl.where(square < 0, 0.0, square))
        _store_gains(norm, m_ptr, n_ptr, g_ptr, rows, (rows < N) & (weak == 0), N, ROUND, ACC)
        if tl.max(weak, 0) > 0:
            each = tl.reshape(weak, (BLOCK_N // FEW, FEW))
            for i in range(0, BLOCK_N // FEW):
                mine = tl.sum(tl.where(tl.arange(0, BLOCK_N // FEW)[:, None] == i, each, 0), 0)
                if tl.max(mine, 0) > 0:
                    few = row + i * FEW
                    b_few = load_tile(b, few, 0, FEW, BLOCK_R)
                    again = row_norm(w, None, LowRank(a, b, b_few, s), few, BLOCK_K, SUMS, ONE, ACC, PRECISION)
                    _store_gains(again, m_ptr, n_ptr, g_ptr, few + tl.arange(0, FEW), mine > 0, N, ROUND, ACC)


def gains(
    w: Operand,
    of: Packed,
    given: Given,
    n: Operand,
    gain: Operand,
    problem: Problem,
    scratch: Scratch,
) -> list[Launch]:
    """n and gain [adapters, N] from w [N, K] and the magnitudes; norms rounded to w's dtype where the problem says
    so."""
    ranks = problem.ranks
    (rows, k), kind, most, count = w.shape, w.dtype, max(ranks.padded), len(ranks.of)
    tile = pass_tiles.norm(rows, most, dtype=kind, kind=kind, chip=Chip.of(w.device))
    launches, terms = list[Launch](), Terms(None, None, None)
    if kind.itemsize == 2 and most <= 64:
        block = rank_block(most, 64)
        tile = pass_tiles.batch_gains(block, chip=Chip.of(w.device))
        made, terms = terms_of(w, of, ranks, block, scratch)
        launches += made
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
            m_ptr=given.m,
            firsts_ptr=of.tables.firsts,
            low_ptr=of.low,
            scales_ptr=of.scales,
            squares_ptr=terms.squares,
            dots_ptr=terms.dots,
            gram_ptr=terms.gram,
            n_ptr=n,
            g_ptr=gain,
            N=rows,
            K=k,
            TOTAL=ranks.total,
            DOTS=terms.dots.shape[0] if terms.dots else 0,
            SQUARES=terms.squares.shape[0] if terms.squares else 0,
            GRAMS=GRAMS,
            stride_wn=w.stride(0),
            stride_wk=w.stride(1),
            **constants(tile),
            FEW=16,
            ONE=most <= tile.r,
            M_KIND=given.kinds[2],
            GROUP=GROUP,
            ROUND=TL[kind] if problem.round_norm else None,
            ACC=acc_dtype(kind),
            PRECISION="tf32x3" if kind.itemsize == 4 else "ieee",
        )
    )
    return launches
