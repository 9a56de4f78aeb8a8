"""S = scaling * drop(x) A^T: x [M, K], A [R, K], S [M, padded R] in x's dtype, padding columns zero.

One read of x. The same kernel gives dS = scaling * dY B from A = B^T (strides exchanged) where the pass over dY that
also makes dB would need too large an accumulator.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import (
    TL,
    acc_dtype,
    descriptor,
    keep_bits,
    launch,
    layout,
    load_tile,
    mma,
    padded_rank,
    precision,
    scalar,
)
from lora_fast.kernels.tiles import down_tile, tma_fits


@triton.jit(do_not_specialize=["M"])
def _down_fwd_kernel(
    x, a_ptr, s_ptr, bits_ptr, scaling, keep_scale, M, K, R, RS,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    MASK: tl.constexpr, SCALING_PTR: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row, rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    rows = row + tl.arange(0, BLOCK_M)
    ranks = rank + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for k in range(0, K, BLOCK_K):
        tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, TMA, BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K]
        a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, False, BLOCK_R, BLOCK_K)  # [BLOCK_R, BLOCK_K]
        if MASK:
            safe_rows = tl.minimum(rows, M - 1).to(tl.int64)
            tile = tl.where(keep_bits(bits_ptr, safe_rows, k, stride_bits, BLOCK_K) == 1, tile, 0.0)
        acc = mma(tile, a.to(DTYPE).T, acc, PRECISION)
    s = acc * (scalar(scaling, SCALING_PTR) * keep_scale)
    s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
    tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < RS))


def down_fwd(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float | torch.Tensor,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """S [M, padded_rank(R)] from x [M, K], a [R, K], mask bits of x or None, and what kept elements are multiplied by."""
    (m, k), r = x.shape, a.shape[0]
    rs = padded_rank(r)
    s = torch.empty(m, rs, dtype=x.dtype, device=x.device)
    if m == 0:
        return s
    by_pointer = isinstance(scaling, torch.Tensor)
    exact = precision(x.dtype)
    tma = tma_fits(x)
    tile, options = down_tile(m, k, r, x.dtype, x.device, tma)

    def make():
        grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(rs, tile["BLOCK_R"]))
        constants = {**tile, "MASK": bits is not None, "SCALING_PTR": by_pointer, "TMA": tma,
                     "ACC": acc_dtype(x.dtype), "PRECISION": exact, "DTYPE": TL[x.dtype]}  # fmt: skip
        return grid, constants, options

    key = (layout(x), layout(a), bits is None, scaling.dtype if by_pointer else None, exact, x.device)
    args = (
        descriptor(x, tile["BLOCK_M"], tile["BLOCK_K"]) if tma else x, a, s, bits, scaling, keep_scale, m, k, r, rs,
        *x.stride(), *a.stride(), bits.stride(0) if bits is not None else 0,
    )  # fmt: skip
    launch(_down_fwd_kernel, key, make, args)
    return s
