"""S = scaling * drop(x) A^T: x [M, K], A [R, K], S [M, padded R] in x's dtype, padding columns zero.

One read of x. The same kernel gives dS = scaling * dY B from A = B^T (strides exchanged) where the pass over dY that
also makes dB would need too large an accumulator.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import (
    TL,
    Plan,
    acc_dtype,
    descriptor,
    keep,
    load_tile,
    mask_words,
    mma,
    padded_rank,
    plan_for,
    precision,
    scalar,
    sig,
    wait_for_stream,
)
from lora_fast.kernels.tiles import down_tile, tma_fits


@triton.jit(do_not_specialize=["M"])
def _down_fwd_kernel(
    x, a_ptr, s_ptr, bits_ptr, scaling, keep_scale, M, K, R, RS,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    MASK: tl.constexpr, SCALING_PTR: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    row, rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    rows = row + tl.arange(0, BLOCK_M)
    ranks = rank + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for k in range(0, K, BLOCK_K):
        tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, TMA, BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K]
        a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, False, BLOCK_R, BLOCK_K)  # [BLOCK_R, BLOCK_K]
        if MASK:
            tile = tl.where(keep(mask_words(bits_ptr, tl.minimum(rows, M - 1), k, stride_bits, BLOCK_K)), tile, 0.0)
        acc = mma(tile, a.T, acc, PRECISION)
    s = acc * (scalar(scaling, SCALING_PTR) * keep_scale)
    s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
    tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < RS))


def _plan(x, a, scaling, bits, exact) -> Plan:
    (m, k), r, tma = x.shape, a.shape[0], tma_fits(x)
    tile, options = down_tile(m, k, r, x.dtype, x.device, tma)
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(padded_rank(r), tile["BLOCK_R"]))
    constants = {**tile, "MASK": bits is not None, "SCALING_PTR": isinstance(scaling, torch.Tensor), "TMA": tma,
                 "ACC": acc_dtype(x.dtype), "PRECISION": exact, "DTYPE": TL[x.dtype]}  # fmt: skip
    ints = (m, k, r, padded_rank(r), *x.stride(), *a.stride(), bits.stride(0) if bits is not None else 0)
    return Plan(_down_fwd_kernel, grid, constants, options, x.device,
                block=[tile["BLOCK_M"], tile["BLOCK_K"]] if tma else None, ints=ints)  # fmt: skip


def down_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """S [M, padded_rank(R)] from x [M, K], a [R, K] in x's dtype, mask bits of x or None, and what kept elements are
    multiplied by."""
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    if x.shape[0] == 0:
        return s
    exact = precision(x.dtype)
    key = ("down", sig(x), sig(a), bits is None, getattr(scaling, "dtype", None), exact, x.get_device())
    plan = plan_for(key, _plan, x, a, scaling, bits, exact)
    block = plan.info["block"]
    plan(descriptor(x, block) if block else x, a, s, bits, scaling, keep_scale, *plan.info["ints"])
    return s
