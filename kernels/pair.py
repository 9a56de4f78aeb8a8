"""dA = dS^T (mask * x) and dB = g * (dY^T S) in one launch, for few rows: a program owns 64 columns of x and up to 128
ranks of dA, or 64 columns of dY, and walks over all rows, so that there are no parts to be added up. On its way over dY
it also makes dbias, the column sums. Of layers with one input x, dS of all lie side by side and dA of all one below the
other, and there are several dY.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    Matrix,
    late,
    lift_of,
    load_tile,
    mask_words,
    masked,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import few_rows, rank_block, tma_fits

MOST, RANKS = 4, 128  # dys, ranks of one layer, at most


@triton.jit
def _walk(
    t, p, bits_ptr, sum_ptr, col, stride_bits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """T^T P for BLOCK_N columns of T from col on, and their sums if wanted."""
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    sums = tl.zeros([8, BLOCK_N], dtype=tl.float32)
    tl.assume(t.rows > 0)
    for row in range(0, t.rows, BLOCK_M):
        tile = load_tile(t, row, col, BLOCK_M, BLOCK_N, True)
        if bits_ptr is not None:
            rows = tl.minimum(row + tl.arange(0, BLOCK_M), t.rows - 1)
            tile = masked(tile, mask_words(bits_ptr, rows, col, stride_bits, BLOCK_N))
        if sum_ptr is not None:
            sums += tl.sum(tl.reshape(tile.to(tl.float32), (BLOCK_M // 8, 8, BLOCK_N)), 0)
        g = tl.dot(tile.T, load_tile(p, row, 0, BLOCK_M, BLOCK_R), g)
        if sum_ptr is not None:
            g = late(g)  # Triton 3.7 loads the next tile over one that is summed, too, while it is multiplied
    if sum_ptr is not None:
        cols = col + tl.arange(0, BLOCK_N)
        tl.store(sum_ptr + cols, tl.sum(sums, 0).to(sum_ptr.dtype.element_ty), mask=cols < t.cols)
    return g


@triton.jit
def _over_x(
    x, ds, bits_ptr, grad_a, col, stride_bits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """dA for BLOCK_N columns of x from col on, of as many ranks as ``grad_a`` has, up to BLOCK_R."""
    g = _walk(x, ds, bits_ptr, None, col, stride_bits, BLOCK_M, BLOCK_N, BLOCK_R)
    cols, ranks = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    ptrs = grad_a.ptr + ranks.to(tl.int64)[None, :] * grad_a.cols + cols[:, None]
    inside = (cols[:, None] < grad_a.cols) & (ranks[None, :] < grad_a.rows)
    tl.store(ptrs, g.to(grad_a.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _pair_kernel(
    x,
    ds_ptr,
    bits_ptr,
    grad_a_ptr,
    dy0,
    s0_ptr,
    grad_b0_ptr,
    grad_bias0_ptr,
    gain0_ptr,
    scaling0,
    dy1,
    s1_ptr,
    grad_b1_ptr,
    grad_bias1_ptr,
    gain1_ptr,
    scaling1,
    dy2,
    s2_ptr,
    grad_b2_ptr,
    grad_bias2_ptr,
    gain2_ptr,
    scaling2,
    dy3,
    s3_ptr,
    grad_b3_ptr,
    grad_bias3_ptr,
    gain3_ptr,
    scaling3,
    M,
    K,
    R,
    N0,
    N1,
    N2,
    N3,
    R0,
    R1,
    R2,
    R3,
    stride_ds,
    stride_s,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PTR0: tl.constexpr,
    PTR1: tl.constexpr,
    PTR2: tl.constexpr,
    PTR3: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    program = tl.program_id(0)
    over_x = tl.cdiv(K, BLOCK_N) * tl.cdiv(R, BLOCK_A)
    if program < over_x:
        rank = program // tl.cdiv(K, BLOCK_N) * BLOCK_A
        _over_x(
            Matrix(x, M, K, K, 1),
            Matrix(ds_ptr + rank, M, stride_ds - rank, stride_ds, 1),
            bits_ptr,
            Matrix(grad_a_ptr + rank.to(tl.int64) * K, R - rank, K, K, 1),
            program % tl.cdiv(K, BLOCK_N) * BLOCK_N,
            stride_bits,
            BLOCK_M,
            BLOCK_N,
            BLOCK_A,
        )
    else:
        block, ranks = program - over_x, tl.arange(0, BLOCK_R)
        dy, s_ptr, grad_b_ptr, n, r = dy0, s0_ptr, grad_b0_ptr, N0, R0
        sum_ptr, gain_ptr, first = grad_bias0_ptr, gain0_ptr, 0
        if scaling0 is not None:  # the part of it that B carries
            lift = lift_of(scaling0, PTR0)
        if dy1 is not None:
            first1 = tl.cdiv(N0, BLOCK_N)
            if block >= first1:
                dy, s_ptr, grad_b_ptr, n, r = dy1, s1_ptr, grad_b1_ptr, N1, R1
                sum_ptr, gain_ptr, first = grad_bias1_ptr, gain1_ptr, first1
                if scaling0 is not None:
                    lift = lift_of(scaling1, PTR1)
        if dy2 is not None:
            first2 = first1 + tl.cdiv(N1, BLOCK_N)
            if block >= first2:
                dy, s_ptr, grad_b_ptr, n, r = dy2, s2_ptr, grad_b2_ptr, N2, R2
                sum_ptr, gain_ptr, first = grad_bias2_ptr, gain2_ptr, first2
                if scaling0 is not None:
                    lift = lift_of(scaling2, PTR2)
        if dy3 is not None:
            first3 = first2 + tl.cdiv(N2, BLOCK_N)
            if block >= first3:
                dy, s_ptr, grad_b_ptr, n, r = dy3, s3_ptr, grad_b3_ptr, N3, R3
                sum_ptr, gain_ptr, first = grad_bias3_ptr, gain3_ptr, first3
                if scaling0 is not None:
                    lift = lift_of(scaling3, PTR3)
        col = (block - first) * BLOCK_N
        t, p = Matrix(dy, M, n, n, 1), Matrix(s_ptr, M, r, stride_s, 1)
        g = _walk(t, p, None, sum_ptr, col, 0, BLOCK_M, BLOCK_N, BLOCK_R)
        cols = col + tl.arange(0, BLOCK_N)
        if gain_ptr is not None:
            g *= tl.load(gain_ptr + cols, mask=cols < n, other=0.0)[:, None]
        if scaling0 is not None:
            g *= lift
        ptrs = grad_b_ptr + cols.to(tl.int64)[:, None] * r + ranks[None, :]
        tl.store(ptrs, g.to(grad_b_ptr.dtype.element_ty), mask=(cols[:, None] < n) & (ranks[None, :] < r))


class OverDy(NamedTuple):
    """What is made of one dy [M, N]: grad_b [N, R] = gain * (dy^T s) from s [M, padded R] (or columns of a wider
    matrix, the same for all) and gain [N], and grad_bias [N], the sums of dy's columns. The scaling is given where B
    carries a part of it."""

    dy: Operand
    s: Operand
    grad_b: Operand
    grad_bias: Operand | None = None
    gain: Operand | None = None
    scaling: Operand | Number | None = None


def takes_pair(x: Operand, dys: Sequence[Operand], r: int, dora: bool) -> bool:
    """Whether these matrices have few rows and lie as ``pair`` reads them. With a gain, half as many are few: beyond,
    one pass that makes all from dY is better (grad.py)."""
    most = 1024 if dora else 2048
    return few_rows(len(x), r, dtype=x.dtype, chip=Chip.of(x.device), most=most, ranks=RANKS) and tma_fits(x, *dys)


def pair(x: Operand, ds: Operand, grad_a: Operand, each: Sequence[OverDy], *, bits: Operand | None = None) -> Launch:
    """grad_a [R, K] = ds^T (mask * x), and what is wanted of up to ``MOST`` dys, which are alike in that.

    x [M, K], dys, ds [M, at least R] and s are in one dtype; bits are of a mask of x's shape."""
    m, k = x.shape
    widths = [one.dy.shape[1] for one in each]
    columns = k + sum(widths)
    ranks = [rank_block(r, RANKS) for r in (len(grad_a), max(one.grad_b.shape[1] for one in each))]
    tile = pass_tiles.pair(m, columns, max(ranks), chip=Chip.of(x.device), masked=bits is not None)
    rows, cols = tile.m, tile.n
    given: dict[str, Operand | Tiles | Number | int | bool | None] = {}
    for i in range(MOST):
        one = each[i] if i < len(each) else None
        given |= {
            f"dy{i}": one and Tiles(one.dy, [rows, cols]),
            f"s{i}_ptr": one and one.s,
            f"grad_b{i}_ptr": one and one.grad_b,
            f"grad_bias{i}_ptr": one and one.grad_bias,
            f"gain{i}_ptr": one and one.gain,
            f"scaling{i}": one and one.scaling,
            f"N{i}": one.dy.shape[1] if one else 0,
            f"R{i}": one.grad_b.shape[1] if one else 0,
            f"PTR{i}": one is not None and isinstance(one.scaling, Operand),
        }
    return launch(
        _pair_kernel,
        (triton.cdiv(k, cols) * triton.cdiv(len(grad_a), ranks[0]) + sum(triton.cdiv(n, cols) for n in widths),),
        tile.options,
        x,
        x=Tiles(x, [rows, cols]),
        ds_ptr=ds,
        bits_ptr=bits,
        grad_a_ptr=grad_a,
        **given,
        M=m,
        K=k,
        R=len(grad_a),
        stride_ds=ds.stride(0),
        stride_s=each[0].s.stride(0),
        stride_bits=0 if bits is None else triton.cdiv(k, 32),
        BLOCK_M=rows,
        BLOCK_N=cols,
        BLOCK_A=ranks[0],
        BLOCK_R=ranks[1],
    )
