"""S = scaling * drop(x) A^T: x [M, K], A [R, K], S [M, padded R] in x's dtype, padding columns zero.

One read of x. The same kernel gives dS = scaling * dY B from A = B^T (strides exchanged) where the pass over dY that
also makes dB would need too large an accumulator. Adapters kept in float32 on a 16-bit base are cast on the way. In
float16 (LIFTED) the copy of B carries a power of two of the scaling, and S lacks it: see ``lift_of``.

For an fp8 base the same launch writes x (or x * gain) in e4m3 with a scale for each row: between any two programs that
make S are those that quantise the same rows, so that one of the two reads comes from the cache.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import (
    FP8,
    TL,
    acc_dtype,
    fp8_scale,
    lift_of,
    load_tile,
    low_scale,
    mask_words,
    mma,
    padded_rank,
    precision,
    store_tile,
    unpack_words,
    wait_for_stream,
)
from lora_fast.kernels.launch import Block, Plan, as_scaling, plan_for, scaling_kind, sig
from lora_fast.kernels.tiles import casts_first, down_tile, tma_fits

CAST_BLOCK = 4096
CAST_STEPS = 4  # in the launch that makes S, whose own programs come first


@triton.jit
def _cast(src, dst, block, rows, cols, dst_cols, lift, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """dst [rows, dst_cols] from src [rows, cols], the columns beyond those of src zero; both contiguous. A ``lift``
    multiplies it."""
    for step in range(STEPS):
        i = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        row, col, inside = i // dst_cols, i % dst_cols, i < rows * dst_cols
        value = tl.load(src + row.to(tl.int64) * cols + col, mask=inside & (col < cols), other=0.0)
        if lift is not None:
            value = value.to(tl.float32) * lift
        tl.store(dst + i, value.to(dst.dtype.element_ty), mask=inside)


@triton.jit
def _cast_both(a_ptr, a_cast_ptr, b_ptr, b_cast_ptr, scaling, block, K, N, R, RS, BLOCK: tl.constexpr,
               STEPS: tl.constexpr, LIFTED: tl.constexpr, SCALING_PTR: tl.constexpr):  # fmt: skip
    """A [R, K] and then B [N, R], which is padded to [N, RS]."""
    a_blocks = tl.cdiv(R * K, BLOCK * STEPS)
    if block < a_blocks:
        _cast(a_ptr, a_cast_ptr, block, R, K, K, None, BLOCK, STEPS)
    elif LIFTED:
        _cast(b_ptr, b_cast_ptr, block - a_blocks, N, R, RS, lift_of(scaling, SCALING_PTR), BLOCK, STEPS)
    else:
        _cast(b_ptr, b_cast_ptr, block - a_blocks, N, R, RS, None, BLOCK, STEPS)


@triton.jit
def _gain(gain_ptr, k, K, BLOCK_K: tl.constexpr, GAIN: tl.constexpr, ACC: tl.constexpr):
    """A row [1, BLOCK_K] of gains from k on; ones without."""
    gain = tl.full([1, BLOCK_K], 1, ACC)
    if GAIN:
        ks = k + tl.arange(0, BLOCK_K)
        gain = tl.load(gain_ptr + ks, mask=ks < K, other=0.0).to(ACC)[None, :]
    return gain


@triton.jit
def _quantise(x_ptr, x8_ptr, row_scale_ptr, gain_ptr, first, M, K, stride_xm, stride_xk, ROWS: tl.constexpr,
              STEP: tl.constexpr, BLOCK_K: tl.constexpr, ONE: tl.constexpr, GAIN: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """x * gain over its rows' scales in e4m3, for ROWS rows, STEP at a time; ONE: a row fits BLOCK_K, is read once."""
    gain = _gain(gain_ptr, 0, K, BLOCK_K, GAIN, ACC)
    for row in range(first, first + ROWS, STEP):
        rows = row + tl.arange(0, STEP)
        tile = load_tile(x_ptr, row, 0, M, K, stride_xm, stride_xk, False, STEP, BLOCK_K).to(ACC) * gain
        peak = tl.max(tl.abs(tile), 1)
        if not ONE:
            for k in range(BLOCK_K, K, BLOCK_K):
                later = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, False, STEP, BLOCK_K).to(ACC)
                peak = tl.maximum(peak, tl.max(tl.abs(later * _gain(gain_ptr, k, K, BLOCK_K, GAIN, ACC)), 1))
        scale = fp8_scale(peak)
        tl.store(row_scale_ptr + rows, scale, mask=rows < M)
        by = (1 / scale)[:, None]
        store_tile(x8_ptr, tile * by, row, 0, M, K, tl.float8e4nv, False)
        if not ONE:
            for k in range(BLOCK_K, K, BLOCK_K):
                later = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, False, STEP, BLOCK_K).to(ACC)
                later *= _gain(gain_ptr, k, K, BLOCK_K, GAIN, ACC) * by
                store_tile(x8_ptr, later, row, k, M, K, tl.float8e4nv, False)


@triton.jit(do_not_specialize=["M"])
def _down_fwd_kernel(
    x, a_ptr, s_ptr, bits_ptr, b_ptr, a_cast_ptr, b_cast_ptr, scaling, keep_scale,
    x_ptr, x8_ptr, row_scale_ptr, gain_ptr, M, K, R, RS, N,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    QUANT_ROWS: tl.constexpr, QUANT_STEP: tl.constexpr, QUANT_K: tl.constexpr, ONE: tl.constexpr, GAIN: tl.constexpr,
    CAST_BLOCK: tl.constexpr, CAST_STEPS: tl.constexpr,
    MASK: tl.constexpr, CAST: tl.constexpr, LIFTED: tl.constexpr, SCALING_PTR: tl.constexpr, TMA: tl.constexpr,
    A_TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
            _quantise(x_ptr, x8_ptr, row_scale_ptr, gain_ptr, row + (part - 1) * QUANT_ROWS, M, K, stride_xm, stride_xk,
                      QUANT_ROWS, QUANT_STEP, QUANT_K, ONE, GAIN, ACC)  # fmt: skip
    elif row < M:
        rows = row + tl.arange(0, BLOCK_M)
        ranks = rank + tl.arange(0, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
        for k in range(0, K, BLOCK_K):
            tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, TMA, BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K]
            a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, A_TMA, BLOCK_R, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            if GAIN:
                a = a.to(ACC) * _gain(gain_ptr, k, K, BLOCK_K, GAIN, ACC)
            if MASK:
                words = mask_words(bits_ptr, tl.minimum(rows, M - 1), k, stride_bits, BLOCK_K)
                tile = tl.where(unpack_words(words), tile, 0.0)
            acc = mma(tile, a.to(DTYPE).T, acc, PRECISION)
        s = acc * (low_scale(scaling, SCALING_PTR, LIFTED) * keep_scale)
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
        tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    elif CAST:  # the programs past the last rows, on processors that would idle
        if rank == 0:
            _cast_both(a_ptr, a_cast_ptr, b_ptr, b_cast_ptr, scaling, program - tl.cdiv(M, BLOCK_M), K, N, R, RS,
                       CAST_BLOCK, CAST_STEPS, LIFTED, SCALING_PTR)  # fmt: skip


@triton.jit
def _cast_kernel(a_ptr, b_ptr, a_cast_ptr, b_cast_ptr, scaling, K, N, R, RS, CAST_BLOCK: tl.constexpr,
                 CAST_STEPS: tl.constexpr, LIFTED: tl.constexpr, SCALING_PTR: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    wait_for_stream(PDL)
    _cast_both(a_ptr, a_cast_ptr, b_ptr, b_cast_ptr, scaling, tl.program_id(0), K, N, R, RS, CAST_BLOCK, CAST_STEPS,
               LIFTED, SCALING_PTR)  # fmt: skip


def _cast_blocks(k: int, n: int, r: int, steps: int) -> int:
    return sum(triton.cdiv(size, CAST_BLOCK * steps) for size in (r * k, n * padded_rank(r)))


def cast_plan(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float | torch.Tensor = 1.0, lifted: bool = False
) -> Plan:
    """The launch that casts contiguous a and b for products with x, called with (a, b, a_cast, b_cast, scaling)."""
    (r, k), n = a.shape, b.shape[0]
    constants = {"CAST_BLOCK": CAST_BLOCK, "CAST_STEPS": 1, "LIFTED": lifted,
                 "SCALING_PTR": isinstance(scaling, torch.Tensor)}  # fmt: skip
    return Plan(_cast_kernel, (_cast_blocks(k, n, r, 1),), constants, {"num_warps": 4}, x, (k, n, r, padded_rank(r)))


def down_plan(x: torch.Tensor, a: torch.Tensor, scaling: float | torch.Tensor, masked: bool,
              b: torch.Tensor | None = None, quantised: bool = False, with_gain: bool = False,
              lifted: bool = False) -> Plan:  # fmt: skip
    """The launch for these tensors (see the functions below); with b it also casts a and b. Called with (x, a, s, bits,
    b, a_cast, b_cast, scaling, keep_scale, and x, x8, row_scale, gain if quantised)."""
    (m, k), r, tma = x.shape, a.shape[0], tma_fits(x)
    a_tma = tma and b is None and a.dtype == x.dtype and tma_fits(a)
    tile, options = down_tile(m, k, r, x.dtype, a.dtype, x.device, tma, masked, quantised, with_gain)
    blocks, n = triton.cdiv(m, tile["BLOCK_M"]), 0
    if b is not None:
        n = b.shape[0]
        blocks += _cast_blocks(k, n, r, CAST_STEPS)
    if quantised:
        blocks *= 1 + tile["BLOCK_M"] // tile["QUANT_ROWS"]
    constants = {**tile, "ONE": k <= tile["QUANT_K"], "GAIN": with_gain,
                 "CAST_BLOCK": CAST_BLOCK, "CAST_STEPS": CAST_STEPS, "MASK": masked,
                 "CAST": b is not None, "LIFTED": lifted, "SCALING_PTR": isinstance(scaling, torch.Tensor),
                 "TMA": tma, "A_TMA": a_tma, "ACC": acc_dtype(x.dtype), "PRECISION": precision(x.dtype, k),
                 "DTYPE": TL[x.dtype]}  # fmt: skip
    ints = (m, k, r, padded_rank(r), n, *x.stride(), *a.stride(), triton.cdiv(k, 32) if masked else 0)
    descriptors = {0: Block.of(x, [tile["BLOCK_M"], tile["BLOCK_K"]])} if tma else {}
    if a_tma:
        descriptors[1] = Block.of(a, [tile["BLOCK_R"], tile["BLOCK_K"]])
    grid = (blocks, triton.cdiv(padded_rank(r), tile["BLOCK_R"]))
    return Plan(_down_fwd_kernel, grid, constants, options, x, ints, descriptors)


def down_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """S [M, padded_rank(R)] from x [M, K], a [R, K] in any float dtype, mask bits of x or None, and what kept elements
    are multiplied by."""
    s, scaling = x.new_empty(x.shape[0], padded_rank(a.shape[0])), as_scaling(scaling)
    if x.shape[0]:
        key = ("down", sig(x), sig(a), bits is None, scaling_kind(scaling), precision(x.dtype, x.shape[1]))
        plan = plan_for(key, down_plan, x, a, scaling, bits is not None)
        plan(x, a, s, bits, None, None, None, scaling, keep_scale, None, None, None, None)
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
    s, scaling = x.new_empty(x.shape[0], padded_rank(a.shape[0])), as_scaling(scaling)
    x8, row_scale = quantised_space(x)
    if x.shape[0]:
        key = ("quantise", sig(x), sig(a), bits is None, gain is None, scaling_kind(scaling),
               precision(x.dtype, x.shape[1]))  # fmt: skip
        plan = plan_for(key, down_plan, x, a, scaling, bits is not None, None, True, gain is not None)
        plan(x, a, s, bits, None, None, None, scaling, keep_scale, x, x8, row_scale, gain)
    return s, x8, row_scale


def quantised_space(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)


def cast_wanted(kinds: tuple[torch.dtype, torch.dtype, torch.dtype], r: int) -> bool:
    """Whether the product needs copies of the adapters, for these dtypes of x, a and b: in x's, b with rows of a
    multiple of 16 bytes."""
    return not kinds[0] == kinds[1] == kinds[2] or r * kinds[0].itemsize % 16 != 0


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
    s, scaling = x.new_empty(x.shape[0], padded_rank(a.shape[0])), as_scaling(scaling)
    a_cast, b_cast = cast_space(x, a, b)
    if casts_first(len(x), len(a), x.dtype, bits is not None):
        plan_for(("cast", sig(x), sig(a), sig(b)), cast_plan, x, a, b)(a, b, a_cast, b_cast, 1.0)
        return down_fwd(x, a_cast, scaling, bits, keep_scale), a_cast, b_cast
    key = ("down", sig(x), sig(a), sig(b), bits is None, scaling_kind(scaling), precision(x.dtype, x.shape[1]))
    plan = plan_for(key, down_plan, x, a, scaling, bits is not None, b)
    plan(x, a, s, bits, b, a_cast, b_cast, scaling, keep_scale, None, None, None, None)
    return s, a_cast, b_cast


def cast_space(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(a.shape), x.new_empty(b.shape[0], padded_rank(b.shape[1]))
