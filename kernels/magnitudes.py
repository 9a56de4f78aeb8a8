"""DoRA's dZ_i = dY_i * g_i and dm_i of layers with one input, for few rows: one launch writes dZ and leaves parts of
the column sums of dY_i * y_i (or z_i), one adds them up (sums.py). One layer by itself is a case of it.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from lora_fast.kernels.common import TL, Matrix, load_tile, precision, store_tile, wait_for_stream
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import MAGNITUDE_BLOCK, Again, Dora, Magnitude, Summed, magnitude, sum_of, weak_gain

MOST = 4
ROWS, COLS = 32, 256  # of a program that writes dZ


@triton.jit(do_not_specialize=["M"])
def _dz_kernel(
    dy0,
    kept0,
    dz0,
    parts0,
    gain0,
    dy1,
    kept1,
    dz1,
    parts1,
    gain1,
    dy2,
    kept2,
    dz2,
    parts2,
    gain2,
    dy3,
    kept3,
    dz3,
    parts3,
    gain3,
    M,
    N0,
    N1,
    N2,
    N3,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_y3,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block, row = tl.program_id(0), tl.program_id(1) * ROWS
    dy_ptr, kept_ptr, dz_ptr, parts_ptr, gain_ptr, n, stride_y, first = dy0, kept0, dz0, parts0, gain0, N0, stride_y0, 0
    if dy1 is not None:
        first1 = tl.cdiv(N0, COLS)
        if block >= first1:
            dy_ptr, kept_ptr, dz_ptr, parts_ptr, gain_ptr = dy1, kept1, dz1, parts1, gain1
            n, stride_y, first = N1, stride_y1, first1
    if dy2 is not None:
        first2 = first1 + tl.cdiv(N1, COLS)
        if block >= first2:
            dy_ptr, kept_ptr, dz_ptr, parts_ptr, gain_ptr = dy2, kept2, dz2, parts2, gain2
            n, stride_y, first = N2, stride_y2, first2
    if dy3 is not None:
        first3 = first2 + tl.cdiv(N2, COLS)
        if block >= first3:
            dy_ptr, kept_ptr, dz_ptr, parts_ptr, gain_ptr = dy3, kept3, dz3, parts3, gain3
            n, stride_y, first = N3, stride_y3, first3
    col = (block - first) * COLS
    cols = col + tl.arange(0, COLS)
    gain = tl.load(gain_ptr + cols, mask=cols < n, other=0.0)
    tile = load_tile(Matrix(dy_ptr, M, n, stride_y, 1), row, col, ROWS, COLS).to(tl.float32)
    if parts_ptr is not None:
        kept = load_tile(Matrix(kept_ptr, M, n, n, 1), row, col, ROWS, COLS).to(tl.float32)
        tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * n + cols, tl.sum(tile * kept, 0), mask=cols < n)
    store_tile(Matrix(dz_ptr, M, n, n, 1), tile * gain[None, :], row, col, DTYPE)


@triton.jit(do_not_specialize=["M", "splits"])
def _dm_kernel(
    x_ptr,
    gate_ptr,
    parts0,
    dm0,
    gain0,
    norm0,
    dy0,
    w0,
    s0,
    b0,
    parts1,
    dm1,
    gain1,
    norm1,
    dy1,
    w1,
    s1,
    b1,
    parts2,
    dm2,
    gain2,
    norm2,
    dy2,
    w2,
    s2,
    b2,
    parts3,
    dm3,
    gain3,
    norm3,
    dy3,
    w3,
    s3,
    b3,
    M,
    K,
    splits,
    N0,
    N1,
    N2,
    N3,
    R0,
    R1,
    R2,
    R3,
    stride_x,
    stride_s,
    stride_wk,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_y3,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_w3,
    stride_b0,
    stride_b1,
    stride_b2,
    stride_b3,
    WEAK: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    parts_ptr, dm_ptr, gain_ptr, norm_ptr, n, r, first = parts0, dm0, gain0, norm0, N0, R0, 0
    dy, w, s, b, stride_y, stride_w, stride_b = dy0, w0, s0, b0, stride_y0, stride_w0, stride_b0
    if dy1 is not None:
        first1 = tl.cdiv(N0, BLOCK)
        if block >= first1:
            parts_ptr, dm_ptr, gain_ptr, norm_ptr, n, r, first = parts1, dm1, gain1, norm1, N1, R1, first1
            dy, w, s, b, stride_y, stride_w, stride_b = dy1, w1, s1, b1, stride_y1, stride_w1, stride_b1
    if dy2 is not None:
        first2 = first1 + tl.cdiv(N1, BLOCK)
        if block >= first2:
            parts_ptr, dm_ptr, gain_ptr, norm_ptr, n, r, first = parts2, dm2, gain2, norm2, N2, R2, first2
            dy, w, s, b, stride_y, stride_w, stride_b = dy2, w2, s2, b2, stride_y2, stride_w2, stride_b2
    if dy3 is not None:
        first3 = first2 + tl.cdiv(N2, BLOCK)
        if block >= first3:
            parts_ptr, dm_ptr, gain_ptr, norm_ptr, n, r, first = parts3, dm3, gain3, norm3, N3, R3, first3
            dy, w, s, b, stride_y, stride_w, stride_b = dy3, w3, s3, b3, stride_y3, stride_w3, stride_b3
    col = (block - first) * BLOCK
    total = sum_of(Summed(parts_ptr, splits, n), col + tl.arange(0, BLOCK), BLOCK, tl.float32)
    of_x, of_w = Matrix(x_ptr, M, K, stride_x, 1), Matrix(w, n, K, stride_w, stride_wk)
    of_s, of_b = Matrix(s, M, (r + 15) // 16 * 16, stride_s, 1), Matrix(b, n, r, stride_b, 1)
    of, again = Magnitude(dm_ptr, gain_ptr, norm_ptr), Again(of_x, gate_ptr, of_w, None, of_s, of_b)
    magnitude(total, col, of, Matrix(dy, M, n, stride_y, 1), again, WEAK, False, ACT, PRECISION)


def dz_and_dm(each: Sequence[tuple[Operand, Dora[Operand]]], scratch: Scratch) -> list[Launch]:
    """What is asked for of up to ``MOST`` dys [M, N], the same of each: dz [M, N] = dy * gain, and dm if that is
    wanted. All rows are contiguous, but for a weight's where there is one dy."""
    dy, dora = each[0]
    m, splits = len(dy), triton.cdiv(len(dy), ROWS)
    parts: list[Operand | None] = [None] * len(each)
    if dora.dm is not None:
        parts = [scratch.part((splits, one.shape[1]), dora.gain.dtype) for one, _ in each]
    given: dict[str, Operand | int | None] = {}
    for i in range(MOST):
        one, what = each[i] if i < len(each) else (None, None)
        given |= {
            f"dy{i}": one,
            f"kept{i}": what and what.dm and what.kept,
            f"dz{i}": what and what.dz,
            f"parts{i}": parts[i] if one else None,
            f"gain{i}": what and what.gain,
            f"N{i}": one.shape[1] if one else 0,
            f"stride_y{i}": one.stride(0) if one else 0,
        }
    made = launch(
        _dz_kernel,
        (sum(triton.cdiv(one.shape[1], COLS) for one, _ in each), splits),
        {"num_warps": 4},
        dy,
        **given,
        M=m,
        ROWS=ROWS,
        COLS=COLS,
        DTYPE=TL[dy.dtype],
    )
    return [made] if dora.dm is None else [made, _dm(each, parts, splits)]


def _dm(each: Sequence[tuple[Operand, Dora[Operand]]], parts: Sequence[Operand | None], splits: int) -> Launch:
    dy, like = each[0]
    x, again = like.x, like.x is not None
    given: dict[str, Operand | int | None] = {}
    for i in range(MOST):
        one, what = each[i] if i < len(each) else (None, None)
        w, b = (what.weight, what.b) if what and again else (None, None)
        given |= {
            f"parts{i}": parts[i] if one else None,
            f"dm{i}": what and what.dm,
            f"gain{i}": what and what.gain,
            f"norm{i}": what and what.norm,
            f"dy{i}": one,
            f"w{i}": w,
            f"s{i}": what.s if what and again else None,
            f"b{i}": b,
            f"N{i}": one.shape[1] if one else 0,
            f"R{i}": b.shape[1] if b else 0,
            f"stride_y{i}": one.stride(0) if one else 0,
            f"stride_w{i}": w.stride(0) if w else 0,
            f"stride_b{i}": b.stride(0) if b else 0,
        }
    return launch(
        _dm_kernel,
        (sum(triton.cdiv(one.shape[1], MAGNITUDE_BLOCK) for one, _ in each),),
        {"num_warps": 4},
        dy,
        **given,
        x_ptr=x,
        gate_ptr=like.gate,
        M=len(dy),
        K=x.shape[1] if x else 0,
        splits=splits,
        stride_x=x.stride(0) if x else 0,
        stride_s=like.s.stride(0) if like.s else 0,
        stride_wk=like.weight.stride(1) if like.weight else 0,
        WEAK=weak_gain(dy.dtype) if again else None,
        ACT=like.act,
        BLOCK=MAGNITUDE_BLOCK,
        PRECISION=precision(dy.dtype, x.shape[1] if x else 0),
    )
