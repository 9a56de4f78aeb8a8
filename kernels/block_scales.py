"""Weights as fp8 checkpoints hold them, written out for a product: ``W[n, k] = stored[n, k] * scale``, stored in e4m3,
a scale for each block of 128 x 128, at the edges of what is left of one, or for each row.

One read of a byte an element, one write of W: in the products' dtype [N, K], or in e4m3 once more, over powers of two,
by rows [N, K] for y and by columns [K, N] for dX, as the matrix units want it: with one scale along the contraction.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import COMPILED, FP8, TL, wait_for_stream
from lora_fast.kernels.nibbles import NAMES, e4m3_assembly, e4m3_bits, half_bits, power_of
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

BLOCK = 128  # of rows and columns that share a scale
TILE = 32, 128  # within a block, so that it has one scale
TURNED = 64, 64  # of a tile that is written by columns: whole sectors of 32 bytes either way


class Scaled(NamedTuple):
    """Such a weight's tensors."""

    stored: Any  # [N, K] bytes
    scale: Any  # [N / 128, K / 128], rounded up, or [N, 1]; floats, or bytes: exponents of powers of two, plus 127


@triton.jit
def _value_of(byte, UNITS: tl.constexpr):
    """e4m3 in float32: where the chip has no UNITS for it, its exponent and digits in the place of float32's, times
    what the exponents are apart."""
    if UNITS:
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = byte.to(tl.int32)
        size = bits & 0x7F
        value = ((size << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        value = tl.where(size == 0x7F, float("nan"), value)
    return value


@triton.jit
def _scaled_kernel(
    stored_ptr,
    scale_ptr,
    over_ptr,
    gain_ptr,
    out_ptr,
    N,
    K,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    UNITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TURNED: tl.constexpr,
    WEAK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``over``: the scales of the rows, TURNED of the columns, over which W, rounded to KIND, goes to e4m3; without
    them W stays in KIND. With a gain only the rows for which it is below WEAK. BLOCK None: a scale for each row."""
    wait_for_stream(PDL)
    across = tl.cdiv(K, COLUMNS)  # programs; a second axis of the grid would end at 65535 of them
    row, col = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < N) & (cols < K)
    if gain_ptr is not None:
        inside &= tl.abs(tl.load(gain_ptr + rows, mask=rows < N, other=WEAK)) < WEAK
    at = rows.to(tl.int64) * K + cols
    byte = tl.load(stored_ptr + at, mask=inside, other=0)
    if BLOCK is None:
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=0)
    else:
        scale = tl.load(scale_ptr + row // BLOCK * tl.cdiv(K, BLOCK) + col // BLOCK)
    if scale_ptr.dtype.element_ty == tl.uint8:
        scale = power_of(scale.to(tl.int32))
    w = _value_of(byte, UNITS) * scale.to(tl.float32)
    if over_ptr is None:
        if KIND == tl.bfloat16 and not COMPILED:
            tl.store(out_ptr + at, half_bits(w, KIND).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            tl.store(out_ptr + at, w.to(KIND), mask=inside)
    else:
        if TURNED:
            over = tl.load(over_ptr + cols, mask=cols < K, other=1.0)
        else:
            over = tl.load(over_ptr + rows, mask=rows < N, other=1.0)
        if ASSEMBLY is not None:
            small = tl.inline_asm_elementwise(
                ASSEMBLY, "=r,f,f,f,f,f,f,f,f", [w, 1 / over], dtype=tl.uint8, is_pure=True, pack=4
            )
        else:
            small = e4m3_bits(w, 1 / over, KIND).to(tl.uint8)
        if TURNED:
            at = tl.trans(cols).to(tl.int64) * N + tl.trans(rows)
            tl.store(out_ptr + at, tl.trans(small), mask=tl.trans(inside))
        else:
            tl.store(out_ptr + at, small, mask=inside)


def whole(w: Scaled, out: Operand) -> Launch:
    """out [N, K], 16 or 32 bits wide, is filled with W."""
    return _written(w, out, out.dtype, TILE)


def by_rows(w: Scaled, out: Operand, scale: Operand, *, kind: torch.dtype, gain: Operand | None, weak: float) -> Launch:
    """out [N, K], e4m3, is filled with W, rounded to ``kind``, over the scales [N] of its rows, powers of two; with a
    gain [N] only in rows where that is below ``weak``."""
    return _written(w, out, kind, TILE, scale, gain=gain, weak=weak)


def by_columns(w: Scaled, out: Operand, scale: Operand, *, kind: torch.dtype) -> Launch:
    """out [K, N], e4m3, is filled with W^T, rounded to ``kind``, over the scales [K] of its rows, powers of two."""
    return _written(w, out, kind, TURNED, scale, turned=True)


def _written(
    w: Scaled,
    out: Operand,
    kind: torch.dtype,
    tile: tuple[int, int],
    over: Operand | None = None,
    *,
    turned: bool = False,
    gain: Operand | None = None,
    weak: float = 0.0,
) -> Launch:
    n, k = out.shape[::-1] if turned else out.shape
    rows, columns = tile
    units = COMPILED.value and Chip.of(out.device).capability >= 89
    return launch(
        _scaled_kernel,
        (triton.cdiv(k, columns) * triton.cdiv(n, rows),),
        {"num_warps": 4},
        out,
        short=True,
        stored_ptr=w.stored,
        scale_ptr=w.scale,
        over_ptr=over,
        gain_ptr=gain,
        out_ptr=out.seen_as((n * k,), torch.uint8) if out.dtype == FP8 else out,
        N=n,
        K=k,
        BLOCK=None if w.scale.shape == (n, 1) else BLOCK,
        KIND=TL[kind],
        UNITS=units,
        ASSEMBLY=e4m3_assembly(NAMES[kind]) if units and over is not None else None,
        TURNED=turned,
        WEAK=weak,
        ROWS=rows,
        COLUMNS=columns,
    )
