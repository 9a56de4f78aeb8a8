"""dm_j = sum over the rows of adapter j of dY * z / n_j, from what a pass over dY summed: parts of the sums of dY * z
or, where the forward kept y = g_j z in its place, of dY * y. Columns whose g_j is too small for y to carry z get the z
of the adapter's rows made again, here (see sums.py, which does so for one adapter).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels.common import Matrix, acc_dtype, load_tile, mma, precision, wait_for_stream
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Summed, sum_of, weak_gain

STEP = 16  # of what is contracted where z is made again


@triton.jit
def _rows_of(of, rows, mine, col, COLS: tl.constexpr):
    """A tile of these rows, zeros for others than mine, whatever they hold."""
    cols = col + tl.arange(0, COLS)
    at = of.ptr + rows.to(tl.int64)[:, None] * of.stride_r + cols.to(tl.int64)[None, :] * of.stride_c
    return tl.load(at, mask=mine[:, None] & (cols < of.cols)[None, :], other=0.0)


class Z(NamedTuple):
    """What z is made of as device code sees it: x [M, K], W [N, K], and of one adapter S [M, R], B [N, R]."""

    x: Any
    w: Any
    s: Any
    b: Any


@triton.jit
def _dots_of_rows(
    dy,
    of,
    own_ptr,
    adapter,
    col,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum over the adapter's rows of dY * (x W^T + S B^T), for BLOCK columns from col on."""
    total = tl.zeros([BLOCK], dtype=ACC)
    for m in range(0, dy.rows, BLOCK):
        rows = m + tl.arange(0, BLOCK)
        mine = tl.load(own_ptr + rows, mask=rows < dy.rows, other=-2) == adapter
        if tl.max(mine.to(tl.int32), 0) > 0:
            z = tl.zeros([BLOCK, BLOCK], dtype=ACC)
            for k in range(0, of.x.cols, STEP):
                z = mma(_rows_of(of.x, rows, mine, k, STEP), load_tile(of.w, col, k, BLOCK, STEP).T, z, PRECISION)
            for rank in range(0, of.b.cols, STEP):
                z = mma(_rows_of(of.s, rows, mine, rank, STEP), load_tile(of.b, col, rank, BLOCK, STEP).T, z, PRECISION)
            total += tl.sum(_rows_of(dy, rows, mine, col, BLOCK).to(ACC) * z, 0)
    return total


@triton.jit(do_not_specialize=["M", "PARTS"])
def _magnitudes_kernel(
    parts_ptr,
    norm_ptr,
    gain_ptr,
    dm_ptr,
    dy_ptr,
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    own_ptr,
    firsts_ptr,
    PARTS,
    M,
    N,
    K,
    ADAPTERS,
    TOTAL,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    WEAK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    col, adapter, zero = tl.program_id(0) * BLOCK, tl.program_id(1), tl.full((), 0, tl.int64)
    cols = col + tl.arange(0, BLOCK)
    at = (zero + adapter) * N + cols
    total = sum_of(Summed(parts_ptr, PARTS, (zero + ADAPTERS) * N), at, BLOCK, ACC)
    norm = tl.load(norm_ptr + at, mask=cols < N, other=0.0)
    if WEAK is not None:
        gain = tl.load(gain_ptr + at, mask=cols < N, other=1.0)
        unscaled = tl.abs(gain) < WEAK
        weak = unscaled & (norm != 0)
        total /= tl.where(unscaled, 1.0, gain)
        if tl.max(weak.to(tl.int32), 0) > 0:
            first, end = tl.load(firsts_ptr + adapter), tl.load(firsts_ptr + adapter + 1)
            dy, x = Matrix(dy_ptr, M, N, stride_ym, stride_yn), Matrix(x_ptr, M, K, stride_xm, stride_xk)
            w, s = Matrix(w_ptr, N, K, stride_wn, stride_wk), Matrix(s_ptr + first, M, end - first, TOTAL, 1)
            b = Matrix(b_ptr + first, N, end - first, TOTAL, 1)
            again = _dots_of_rows(dy, Z(x, w, s, b), own_ptr, adapter, col, BLOCK, STEP, ACC, PRECISION)
            total = tl.where(weak, again, total)
    dm = tl.where(norm != 0, total / tl.where(norm != 0, norm, 1.0), 0.0)
    tl.store(dm_ptr + at, dm.to(dm_ptr.dtype.element_ty), mask=cols < N)


class Again(NamedTuple):
    """What z is made again of: x [M, K], weight [N, K], s [M, ranks in all] and b [N, ranks in all], and where adapters
    begin among all ranks."""

    x: Operand
    weight: Operand
    s: Operand
    b: Operand
    firsts: Operand


def magnitudes(
    parts: Operand, norm: Operand, gain: Operand, dm: Operand, dy: Operand, own: Operand, again: Again | None
) -> Launch:
    """dm [adapters, N], from parts [splits, adapters, N] of the sums of dY * z; of dY * y, if z can be made ``again``.
    norm and gain [adapters, N], dy [M, N]; own as in ``Places``."""
    (splits, count, n), kind = parts.shape, dy.dtype
    x, w, s, b, firsts = (None,) * 5 if again is None else again
    block, k = 32 if kind.itemsize <= 2 else 16, 0 if x is None else x.shape[1]
    return launch(
        _magnitudes_kernel,
        (triton.cdiv(n, block), count),
        {"num_warps": 2},
        dy,
        parts_ptr=parts,
        norm_ptr=norm,
        gain_ptr=gain,
        dm_ptr=dm,
        dy_ptr=dy,
        x_ptr=x,
        w_ptr=w,
        s_ptr=s,
        b_ptr=b,
        own_ptr=own,
        firsts_ptr=firsts,
        PARTS=splits,
        M=dy.shape[0],
        N=n,
        K=k,
        ADAPTERS=count,
        TOTAL=0 if s is None else s.shape[1],
        stride_ym=dy.stride(0),
        stride_yn=dy.stride(1),
        stride_xm=0 if x is None else x.stride(0),
        stride_xk=0 if x is None else x.stride(1),
        stride_wn=0 if w is None else w.stride(0),
        stride_wk=0 if w is None else w.stride(1),
        WEAK=None if again is None else weak_gain(kind),
        BLOCK=block,
        STEP=STEP,
        ACC=acc_dtype(kind),
        PRECISION=precision(kind, k),
    )
