"""S = scaling * drop(x) A^T: x [M, K], A [R, K], S [M, padded R] in x's dtype, padding columns zero.

One read of x. The same kernel gives dS = scaling * dY B from A = B^T (strides exchanged) where the pass over dY that
also makes dB would need too large an accumulator. Adapters kept in float32 on a 16-bit base are cast on the way. In
float16 (LIFTED) the copy of B carries a power of two of the scaling, and S lacks it: see ``lift_of``.

With few rows there are few programs, and each has a long way along K. There the warps take it side by side (WAYS), each
with a sum of its own: 8.7 -> 4.5 us for 256 x 4096 and 16 ranks on an H200.

For an fp8 base the same launch writes x (or x * gain) in e4m3 with a scale for each row: between any two programs that
make S are those that quantise the same rows, so that one of the two reads comes from the cache.

Where each row has an adapter of its own (``Owned``), A's lie one below the other, and S is zero, selected and not
multiplied, at ranks of other adapters than the row's. Of many ranks a block of rows makes the units that it uses alone.
"""

from dataclasses import replace
from typing import Generic, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.cast import (
    CAST_BLOCK,
    CAST_STEPS,
    TURNED_BLOCK,
    Cast,
    Copied,
    cast_adapters,
    cast_blocks,
    cast_both,
)
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    FP8,
    TL,
    Bits,
    Matrix,
    acc_dtype,
    fp8_scale,
    load_tile,
    low_scale,
    mask_words,
    masked,
    mma,
    padded_rank,
    precision,
    store_tile,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, T, Tiles, as_scaling, launch, run
from lora_fast.kernels.pass_tiles import casts_first
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import tma_fits


@triton.jit
def _gain(gain_ptr, k, K, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """A row [1, BLOCK_K] of gains from k on; ones without."""
    gain = tl.full([1, BLOCK_K], 1, ACC)
    if gain_ptr is not None:
        ks = k + tl.arange(0, BLOCK_K)
        gain = tl.load(gain_ptr + ks, mask=ks < K, other=0.0).to(ACC)[None, :]
    return gain


@triton.jit
def _quantise(
    x,
    to,
    gain_ptr,
    first,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
):
    """``to`` (Quantised) = x * gain over its rows' scales, for ROWS rows, STEP at a time; ONE: a row fits BLOCK_K, is
    read once."""
    gain = _gain(gain_ptr, 0, x.cols, BLOCK_K, ACC)
    for row in range(first, first + ROWS, STEP):
        rows = row + tl.arange(0, STEP)
        tile = load_tile(x, row, 0, STEP, BLOCK_K).to(ACC) * gain
        peak = tl.max(tl.abs(tile), 1)
        if not ONE:
            for k in range(BLOCK_K, x.cols, BLOCK_K):
                later = load_tile(x, row, k, STEP, BLOCK_K).to(ACC)
                peak = tl.maximum(peak, tl.max(tl.abs(later * _gain(gain_ptr, k, x.cols, BLOCK_K, ACC)), 1))
        scale = fp8_scale(peak)
        tl.store(to.row_scale + rows, scale, mask=rows < x.rows)
        by = (1 / scale)[:, None]
        store_tile(to.x8, tile * by, row, 0, tl.float8e4nv)
        if not ONE:
            for k in range(BLOCK_K, x.cols, BLOCK_K):
                later = load_tile(x, row, k, STEP, BLOCK_K).to(ACC)
                later *= _gain(gain_ptr, k, x.cols, BLOCK_K, ACC) * by
                store_tile(to.x8, later, row, k, tl.float8e4nv)


@triton.jit
def side_by_side(
    x,
    a,
    bits,
    row,
    WAYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """drop(x) A^T [BLOCK_M, BLOCK_R] for these rows and the first of A's, each of so many WAYS making a part of each
    step."""
    rows, ks, ranks = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    way = tl.arange(0, WAYS)[:, None, None] * BLOCK_K
    x_ptrs = x.ptr + rows.to(tl.int64)[None, :, None] * x.stride_r + (way + ks[None, None, :]) * x.stride_c
    a_ptrs = a.ptr + ranks.to(tl.int64)[None, None, :] * a.stride_r + (way + ks[None, :, None]) * a.stride_c
    acc = tl.zeros([WAYS, BLOCK_M, BLOCK_R], dtype=tl.float32)
    zero = tl.full((), 0, tl.int64)
    for k in range(0, x.cols, WAYS * BLOCK_K):
        inside = (rows < x.rows)[None, :, None] & (k + way + ks[None, None, :] < x.cols)
        tile = tl.load(x_ptrs + (zero + k) * x.stride_c, mask=inside, other=0.0)  # [WAYS, BLOCK_M, BLOCK_K]
        inside = (k + way + ks[None, :, None] < x.cols) & (ranks < a.rows)[None, None, :]
        a_tile = tl.load(a_ptrs + (zero + k) * a.stride_c, mask=inside, other=0.0)  # [WAYS, BLOCK_K, BLOCK_R]
        if bits.ptr is not None:
            word = (k + way) // 32 + tl.arange(0, BLOCK_K // 32)[None, None, :]
            bits_ptrs = bits.ptr + tl.minimum(rows, bits.rows - 1).to(tl.int64)[None, :, None] * bits.stride + word
            words = tl.load(bits_ptrs, mask=word < bits.stride, other=0)  # [WAYS, BLOCK_M, BLOCK_K // 32]
            tile = masked(tile, words)
        acc = tl.dot(tile, a_tile.to(DTYPE), acc)
    return tl.sum(acc, 0)


@triton.jit
def _owned(s, own_ptr, owner_ptr, row, rank, M, R):
    """A tile of S, zero at ranks of other adapters than the row's."""
    rows, ranks = row + tl.arange(0, s.shape[0]), rank + tl.arange(0, s.shape[1])
    own = tl.load(own_ptr + rows, mask=rows < M, other=-1)
    owner = tl.load(owner_ptr + ranks, mask=ranks < R, other=-2)
    return tl.where(own[:, None] == owner[None, :], s, 0.0)


@triton.jit(do_not_specialize=["M"])
def _down_fwd_kernel(
    x,
    a_ptr,
    s_ptr,
    bits_ptr,
    b_ptr,
    a_cast_ptr,
    b_cast_ptr,
    scaling,
    keep_scale,
    x_ptr,
    x8_ptr,
    row_scale_ptr,
    gain_ptr,
    scales_ptr,
    own_ptr,
    owner_ptr,
    units_ptr,
    M,
    K,
    R,
    RS,
    N,
    stride_units,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_s,
    stride_bits,
    WAYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    QUANT_ROWS: tl.constexpr,
    QUANT_STEP: tl.constexpr,
    QUANT_K: tl.constexpr,
    ONE: tl.constexpr,
    CAST_BLOCK: tl.constexpr,
    CAST_STEPS: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    TMA: tl.constexpr,
    A_TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    program, rank = tl.program_id(0), tl.program_id(1) * BLOCK_R
    if QUANT_ROWS > 0:
        part = program % (1 + BLOCK_M // QUANT_ROWS)
        program //= 1 + BLOCK_M // QUANT_ROWS
        quantises = part > 0
    else:
        quantises: tl.constexpr = False  # type: ignore[no-redef]
    row = program * BLOCK_M
    if quantises:
        if rank == 0:
            _quantise(
                Matrix(x_ptr, M, K, stride_xm, stride_xk),
                Quantised(Matrix(x8_ptr, M, K, K, 1), row_scale_ptr),
                gain_ptr,
                row + (part - 1) * QUANT_ROWS,
                QUANT_ROWS,
                QUANT_STEP,
                QUANT_K,
                ONE,
                ACC,
            )
    elif row < M:
        whole_x, whole_a = Matrix(x, M, K, stride_xm, stride_xk), Matrix(a_ptr, R, K, stride_ar, stride_ak)
        bits, count, units = Bits(bits_ptr, stride_bits, M), 1, units_ptr
        if units_ptr is not None:
            units += row // UNIT_ROWS * stride_units
            count = tl.load(units)
        for unit in range(0, count):
            if units_ptr is not None:
                rank = tl.load(units + 1 + unit) * BLOCK_R
            rows, ranks = row + tl.arange(0, BLOCK_M), rank + tl.arange(0, BLOCK_R)
            if WAYS:
                here = tl.full((), 0, tl.int64) + rank
                from_here = Matrix(a_ptr + here * stride_ar, R - rank, K, stride_ar, stride_ak)
                acc = side_by_side(whole_x, from_here, bits, row, WAYS, BLOCK_M, BLOCK_K, BLOCK_R, DTYPE)
            else:
                acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
                for k in range(0, K, BLOCK_K):
                    tile = load_tile(whole_x, row, k, BLOCK_M, BLOCK_K, TMA)  # [BLOCK_M, BLOCK_K]
                    a_tile = load_tile(whole_a, rank, k, BLOCK_R, BLOCK_K, A_TMA)  # [BLOCK_R, BLOCK_K]
                    if gain_ptr is not None:
                        a_tile = a_tile.to(ACC) * _gain(gain_ptr, k, K, BLOCK_K, ACC)
                    if bits_ptr is not None:
                        words = mask_words(bits_ptr, tl.minimum(rows, M - 1), k, stride_bits, BLOCK_K)
                        tile = masked(tile, words)
                    acc = mma(tile, a_tile.to(DTYPE).T, acc, PRECISION)
            if scales_ptr is not None:
                scales = tl.load(scales_ptr + ranks, mask=ranks < R, other=0.0)
                if keep_scale is not None:
                    scales *= keep_scale
                s = acc * scales[None, :]
            else:
                s = acc * (low_scale(scaling, SCALING_PTR, LIFTED) * keep_scale)
            if own_ptr is not None:
                s = _owned(s, own_ptr, owner_ptr, row, rank, M, R)
            s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * stride_s + ranks[None, :]
            tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    elif b_ptr is not None:  # the programs past the last rows, on processors that would idle
        if rank == 0:
            cast_both(
                Copied(a_ptr, a_cast_ptr, R, K, K, RS),
                Copied(b_ptr, b_cast_ptr, N, R, RS, N),
                scaling,
                program - tl.cdiv(M, BLOCK_M),
                CAST_BLOCK,
                CAST_STEPS,
                LIFTED,
                SCALING_PTR,
                TURNED,
            )


class Quantised(NamedTuple, Generic[T]):
    """A matrix [M, K] in e4m3, and the scales of its rows [M] in float32."""

    x8: T
    row_scale: T


class Owned(NamedTuple, Generic[T]):
    """Whose the rows and the ranks are, int32: own [M], owner [R]; and units [blocks of ``rows`` rows, 1 + units], how
    many units of ``ranks`` ranks a block uses, then which, None where one holds all ranks."""

    own: T
    owner: T
    units: T | None
    rows: int
    ranks: int


def down(
    x: Operand,
    a: Operand,
    s: Operand,
    scaling: Operand | Number | None,
    keep: Number | None,
    *,
    bits: Operand | None = None,
    cast: Cast[Operand] | None = None,
    quantised: Quantised[Operand] | None = None,
    gain: Operand | None = None,
    lifted: bool = False,
    scales: Operand | None = None,
    owned: Owned[Operand] | None = None,
) -> Launch:
    """S [M, padded R] = scaling * keep * drop(x) A^T from x [M, K], a [R, K] in any float dtype, and the mask's bits.
    With ``cast`` a is its A, and the copies are made on the way; with ``quantised`` that is filled from x, or from x *
    gain [K], of which S is then made, too. ``lifted``: B carries a part of the scaling. ``scales`` [R] in its place
    are one for each rank. s may be columns of a wider matrix. With ``owned`` it is not written where a block of rows
    does not use a unit."""
    (m, k), r, tma = x.shape, a.shape[0], tma_fits(x)
    units = None if owned is None else owned.units
    a_tma = tma and cast is None and a.dtype == x.dtype and tma_fits(a)
    chip, masked = Chip.of(x.device), bits is not None
    if quantised is None:
        at_once = r if owned is None else min(r, owned.ranks)
        tile = pass_tiles.down(
            m, at_once, dtype=x.dtype, kind=a.dtype, chip=chip, tma=tma, masked=masked, parts=units is None
        )
    else:
        tile = pass_tiles.down_quantised(
            m, k, r, dtype=x.dtype, kind=a.dtype, chip=chip, tma=tma, masked=masked, with_gain=gain is not None
        )
    exact = precision(x.dtype, k)
    if owned is not None and x.dtype == torch.float32 and exact == "ieee":
        # Each step is one chain of sums: long ones are less exact than eager's where few rows are an adapter's.
        tile = replace(tile, k=32 if masked else 16)
    if tile.ways:
        tma = a_tma = False
    blocks, n = triton.cdiv(m, tile.m), 0
    turned = cast is not None and cast.a_copy.turned
    cast_block, cast_steps = (TURNED_BLOCK, 1) if turned else (CAST_BLOCK, CAST_STEPS)
    if cast is not None:
        n = cast.b.shape[0]
        blocks += cast_blocks(cast, cast_block * cast_steps)
    if quantised is not None:
        blocks *= 1 + tile.m // tile.quant_rows
    return launch(
        _down_fwd_kernel,
        (blocks, 1 if units is not None else triton.cdiv(padded_rank(r), tile.r)),
        tile.options,
        x,
        x=Tiles(x, [tile.m, tile.k]) if tma else x,
        a_ptr=Tiles(a, [tile.r, tile.k]) if a_tma else a,
        s_ptr=s,
        bits_ptr=bits,
        scaling=scaling,
        keep_scale=keep,
        b_ptr=cast and cast.b,
        a_cast_ptr=cast and cast.a_copy,
        b_cast_ptr=cast and cast.b_copy,
        x_ptr=quantised and x,
        x8_ptr=quantised and quantised.x8,
        row_scale_ptr=quantised and quantised.row_scale,
        gain_ptr=gain,
        scales_ptr=scales,
        own_ptr=owned and owned.own,
        owner_ptr=owned and owned.owner,
        units_ptr=units,
        M=m,
        K=k,
        R=r,
        RS=padded_rank(r),
        N=n,
        stride_units=0 if units is None else units.stride(0),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_s=s.stride(0),
        stride_bits=0 if bits is None else triton.cdiv(k, 32),
        WAYS=tile.ways,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        BLOCK_R=tile.r,
        QUANT_ROWS=tile.quant_rows,
        QUANT_STEP=tile.quant_step,
        QUANT_K=tile.quant_k,
        ONE=k <= tile.quant_k,
        CAST_BLOCK=cast_block,
        CAST_STEPS=cast_steps,
        LIFTED=lifted,
        SCALING_PTR=isinstance(scaling, Operand),
        UNIT_ROWS=0 if owned is None else owned.rows,
        TURNED=turned,
        TMA=tma,
        A_TMA=a_tma,
        ACC=acc_dtype(x.dtype),
        PRECISION=exact,
        DTYPE=TL[x.dtype],
    )


def down_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """S [M, padded_rank(R)] from x [M, K], a [R, K] in any float dtype, mask bits of x or None, and what kept elements
    are multiplied by."""
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    if x.shape[0]:
        run(down, x=x, a=a, s=s, scaling=as_scaling(scaling), keep=float(keep_scale), bits=bits)
    return s


def quantise_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S as ``down_fwd`` gives it, of x * gain [K] if that is given, and x (or that product) in e4m3: [M, K], and the
    scales of its rows [M] in float32."""
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    quantised = x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.shape[0]:
        run(
            down,
            x=x,
            a=a,
            s=s,
            scaling=as_scaling(scaling),
            keep=float(keep_scale),
            bits=bits,
            quantised=Quantised(*quantised),
            gain=gain,
        )
    return s, *quantised


def down_cast_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S as ``down_fwd`` gives it, and copies in x's dtype of contiguous a [R, K] and of b [N, R], which is padded with
    zeros to [N, padded_rank(R)]. x has rows."""
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    cast = Cast(a, b, x.new_empty(a.shape), x.new_empty(b.shape[0], padded_rank(b.shape[1])))
    run(cast_and_down, x=x, cast=cast, s=s, scaling=as_scaling(scaling), keep=float(keep_scale), bits=bits)
    return s, cast.a_copy, cast.b_copy


def cast_and_down(
    x: Operand,
    cast: Cast[Operand],
    s: Operand,
    scaling: Operand | Number,
    keep: Number,
    *,
    bits: Operand | None = None,
    quantised: Quantised[Operand] | None = None,
    lifted: bool = False,
) -> list[Launch]:
    """``down`` for adapters that need copies, which are made with it or ahead of it."""
    if casts_first(len(x), len(cast.a), dtype=x.dtype, masked=bits is not None):
        made = down(x, cast.a_copy, s, scaling, keep, bits=bits, quantised=quantised, lifted=lifted)
        return [cast_adapters(x, cast, scaling, lifted), made]
    return [down(x, cast.a, s, scaling, keep, bits=bits, cast=cast, quantised=quantised, lifted=lifted)]
