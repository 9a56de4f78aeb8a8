"""Weights as fp8 checkpoints hold them, written out for a product: ``W[n, k] = stored[n, k] * scale``, stored in e4m3,
scale of each block of 128 x 128 or of each row.

One read of a byte an element, one write of W: in the products' dtype [N, K], or in e4m3 once more, over powers of two,
by rows [N, K] for y and by columns [K, N] for dX, as the matrix units want it: with one scale along the contraction.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import COMPILED, FP8, TL, wait_for_stream
from lora_fast.kernels.nibbles import e4m3_bits, half_bits
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

BLOCK = 128  # of rows and columns that share a scale
ROWS, COLUMNS = 32, 128  # of a tile


@triton.jit
def _value_of(bits):
    """e4m3 in float32: its exponent and digits in the place of float32's, times what the exponents are apart."""
    size = bits & 0x7F
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def _stored_kernel(
    stored_ptr,
    scale_ptr,
    over_ptr,
    gain_ptr,
    out_ptr,
    N,
    K,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEAK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``over``: the scales of the rows, TRANSPOSED of the columns, over which W, rounded to KIND, goes to e4m3; without
    them W stays in KIND. With a gain only the rows for which it is below WEAK."""
    wait_for_stream(PDL)
    row, col = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < N) & (cols < K)
    if gain_ptr is not None:
        inside &= tl.abs(tl.load(gain_ptr + rows, mask=rows < N, other=WEAK)) < WEAK
    at = rows.to(tl.int64) * K + cols
    bits = tl.load(stored_ptr + at, mask=inside, other=0).to(tl.int32)
    if BLOCK is None:
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    else:  # a tile lies in one block
        scale = tl.load(scale_ptr + row // BLOCK * tl.cdiv(K, BLOCK) + col // BLOCK)
    w = _value_of(bits) * scale
    if over_ptr is None:
        if KIND == tl.bfloat16 and not COMPILED:
            tl.store(out_ptr + at, half_bits(w, KIND).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store(out_ptr + at, w.to(KIND), mask=inside)
    else:
        if TRANSPOSED:
            over = tl.load(over_ptr + cols, mask=cols < K, other=1.0)
        else:
            over = tl.load(over_ptr + rows, mask=rows < N, other=1.0)
        if COMPILED:
            small = (w.to(KIND).to(tl.float32) * (1 / over)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            small = e4m3_bits(w, 1 / over, KIND).to(tl.uint8)
        if TRANSPOSED:
            at = tl.trans(cols).to(tl.int64) * N + tl.trans(rows)
            tl.store(out_ptr + at, tl.trans(small), mask=tl.trans(inside))
        else:
            tl.store(out_ptr + at, small, mask=inside)


def written(
    stored: Operand,
    scale: Operand,
    out: Operand,
    *,
    kind: torch.dtype,
    over: Operand | None = None,
    transposed: bool = False,
    gain: Operand | None = None,
    weak: float = 0.0,
) -> Launch:
    """out is filled with W, stored [N, K] as bytes times scale [N / 128, K / 128] (rounded up) or [N]: in ``kind``; or
    in e4m3 over scales, [N, K] over those [N] of W's rows, transposed [K, N] over those [K] of its columns. With a
    gain [N] only in rows where that is below ``weak``."""
    n, k = stored.shape
    return launch(
        _stored_kernel,
        (triton.cdiv(n, ROWS), triton.cdiv(k, COLUMNS)),
        {"num_warps": 4},
        stored,
        stored_ptr=stored,
        scale_ptr=scale,
        over_ptr=over,
        gain_ptr=gain,
        out_ptr=out.seen_as((n * k,), torch.uint8) if out.dtype == FP8 else out,
        N=n,
        K=k,
        BLOCK=None if len(scale.shape) == 1 else BLOCK,
        KIND=TL[kind],
        TRANSPOSED=transposed,
        WEAK=weak,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
