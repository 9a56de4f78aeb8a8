"""S = scaling * drop(x) A^T: x [M, K], A [R, K], S [M, padded R] in x's dtype, padding columns zero.

One read of x. The same kernel gives dS = scaling * dY B from A = B^T (strides exchanged) where the pass over dY that
also makes dB would need too large an accumulator. Adapters kept in float32 on a 16-bit base are cast on the way.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import (
    TL,
    acc_dtype,
    load_tile,
    mask_words,
    mma,
    padded_rank,
    precision,
    scalar,
    unpack_words,
    wait_for_stream,
)
from lora_fast.kernels.launch import Plan, plan_for, sig
from lora_fast.kernels.tiles import down_tile, tma_fits

CAST_BLOCK = 4096
CAST_STEPS = 4


@triton.jit
def _cast(src, dst, block, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    for step in range(STEPS):
        i = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        tl.store(dst + i, tl.load(src + i, mask=i < size, other=0.0).to(dst.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["M"])
def _down_fwd_kernel(
    x, a_ptr, s_ptr, bits_ptr, b_ptr, a_cast_ptr, b_cast_ptr, scaling, keep_scale, M, K, R, RS, b_size,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CAST_BLOCK: tl.constexpr, CAST_STEPS: tl.constexpr,
    MASK: tl.constexpr, CAST: tl.constexpr, SCALING_PTR: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    row, rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    if row < M:
        rows = row + tl.arange(0, BLOCK_M)
        ranks = rank + tl.arange(0, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
        for k in range(0, K, BLOCK_K):
            tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, TMA, BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K]
            a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, False, BLOCK_R, BLOCK_K)  # [BLOCK_R, BLOCK_K]
            if MASK:
                kept = unpack_words(mask_words(bits_ptr, tl.minimum(rows, M - 1), k, stride_bits, BLOCK_K))
                tile = tl.where(kept, tile, 0.0)
            acc = mma(tile, a.to(DTYPE).T, acc, PRECISION)
        s = acc * (scalar(scaling, SCALING_PTR) * keep_scale)
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
        tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    elif CAST:  # the programs past the last rows, on processors that would idle
        block = tl.program_id(0) - tl.cdiv(M, BLOCK_M)
        a_blocks = tl.cdiv(R * K, CAST_BLOCK * CAST_STEPS)
        if rank == 0:
            if block < a_blocks:
                _cast(a_ptr, a_cast_ptr, block, R * K, CAST_BLOCK, CAST_STEPS)
            else:
                _cast(b_ptr, b_cast_ptr, block - a_blocks, b_size, CAST_BLOCK, CAST_STEPS)


def _plan(x, a, scaling, bits, b, exact) -> Plan:
    (m, k), r, tma = x.shape, a.shape[0], tma_fits(x)
    tile, options = down_tile(m, k, r, x.dtype, x.device, tma)
    blocks = triton.cdiv(m, tile["BLOCK_M"])
    if b is not None:
        blocks += sum(triton.cdiv(t.numel(), CAST_BLOCK * CAST_STEPS) for t in (a, b))
    constants = {**tile, "CAST_BLOCK": CAST_BLOCK, "CAST_STEPS": CAST_STEPS, "MASK": bits is not None,
                 "CAST": b is not None, "SCALING_PTR": isinstance(scaling, torch.Tensor), "TMA": tma,
                 "ACC": acc_dtype(x.dtype), "PRECISION": exact, "DTYPE": TL[x.dtype]}  # fmt: skip
    ints = (m, k, r, padded_rank(r), b.numel() if b is not None else 0, *x.stride(), *a.stride(),
            bits.stride(0) if bits is not None else 0)  # fmt: skip
    descriptors = {0: [tile["BLOCK_M"], tile["BLOCK_K"]]} if tma else None
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
    return _down(x, a, scaling, bits, keep_scale, None, None, None)


def down_cast_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S as ``down_fwd`` gives it, and a [R, K] and b [N, R] in x's dtype, in the same launch."""
    flat = a.is_contiguous() and b.is_contiguous()
    if a.dtype == x.dtype or a.dtype != b.dtype or not flat or x.shape[0] == 0:
        a, b = a.to(x.dtype), b.to(x.dtype)
        return down_fwd(x, a, scaling, bits, keep_scale), a, b
    a_cast, b_cast = torch.empty_like(a, dtype=x.dtype), torch.empty_like(b, dtype=x.dtype)
    return _down(x, a, scaling, bits, keep_scale, b, a_cast, b_cast), a_cast, b_cast


def _down(x, a, scaling, bits, keep_scale, b, a_cast, b_cast) -> torch.Tensor:
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    if x.shape[0] == 0:
        return s
    exact = precision(x.dtype, x.shape[1])
    if not isinstance(scaling, torch.Tensor):
        scaling = float(scaling)  # Triton compiles some integers in
    key = ("down", sig(x), sig(a), sig(b), bits is None, getattr(scaling, "dtype", None), exact, x.get_device())
    plan = plan_for(key, _plan, x, a, scaling, bits, b, exact)
    plan(x, a, s, bits, b, a_cast, b_cast, scaling, keep_scale)
    return s
