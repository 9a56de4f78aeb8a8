"""DoRA's row norms n = |W + s B A| from n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B G) * B), G = A A^T.

One read of W [N, K] gives both |W|^2 and W A^T [N, R]; neither B A nor the sum V is ever in memory. Where the terms
cancel, the rows of a program are read again and summed from V, tile by tile in registers.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import TL, acc_dtype, load_tile, mma, scalar, wait_for_stream
from lora_fast.kernels.launch import Plan, as_scaling, plan_for, scaling_kind, sig
from lora_fast.kernels.tiles import norm_tile, tma_fits

CANCELS = 1e-3  # below this share of its terms the factored sum has lost too much


@triton.jit
def _rank_terms(w, a_ptr, b_ptr, gram_ptr, row, rank, N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn,
                stride_br, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, TMA: tl.constexpr,
                ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of the ranks from ``rank`` on: rowsum((W A^T) * B), rowsum((B G) * B), and |W|^2, each [BLOCK_N]."""
    product = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for k in range(0, K, BLOCK_K):
        tile = load_tile(w, row, k, N, K, stride_wn, stride_wk, TMA, BLOCK_N, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, False, BLOCK_R, BLOCK_K)  # [BLOCK_R, BLOCK_K]
        product = mma(tile, a.T, product, PRECISION)
        wide = tile.to(ACC)
        squares += tl.sum(wide * wide, 1)
    b = load_tile(b_ptr, row, rank, N, R, stride_bn, stride_br, False, BLOCK_N, BLOCK_R).to(ACC)
    crossed = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    for other in range(0, R, BLOCK_R):
        left = load_tile(b_ptr, row, other, N, R, stride_bn, stride_br, False, BLOCK_N, BLOCK_R).to(ACC)
        gram = load_tile(gram_ptr, other, rank, R, R, R, 1, False, BLOCK_R, BLOCK_R)
        crossed += tl.dot(left, gram, input_precision="ieee")
    return tl.sum(product * b, 1), tl.sum(crossed * b, 1), squares


@triton.jit
def _norm_kernel(
    w, w_ptr, a_ptr, b_ptr, gram_ptr, n_ptr, scaling, cancels, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DENSE_K: tl.constexpr,
    SCALING_PTR: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    row = tl.program_id(0) * BLOCK_N
    s = scalar(scaling, SCALING_PTR)
    once, twice, squares = _rank_terms(w, a_ptr, b_ptr, gram_ptr, row, 0, N, K, R, stride_wn, stride_wk, stride_ar,
                                       stride_ak, stride_bn, stride_br, BLOCK_N, BLOCK_K, BLOCK_R, TMA, ACC,
                                       PRECISION)  # fmt: skip
    for rank in range(BLOCK_R, R, BLOCK_R):
        more, most, _ = _rank_terms(w, a_ptr, b_ptr, gram_ptr, row, rank, N, K, R, stride_wn, stride_wk, stride_ar,
                                    stride_ak, stride_bn, stride_br, BLOCK_N, BLOCK_K, BLOCK_R, TMA, ACC,
                                    PRECISION)  # fmt: skip
        once += more
        twice += most
    once *= 2 * s
    twice *= s * s
    square = squares + once + twice
    # Not "<": a NaN, as from an overflow of one term, is to be looked at, too.
    again = ((square >= cancels * (squares + tl.abs(once) + tl.abs(twice))) & (squares > 0)) == 0
    if tl.max(again.to(tl.int32), 0) > 0:
        dense = tl.zeros([BLOCK_N], dtype=ACC)
        for k in range(0, K, DENSE_K):
            v = tl.zeros([BLOCK_N, DENSE_K], dtype=ACC)
            for rank in range(0, R, BLOCK_R):
                b = load_tile(b_ptr, row, rank, N, R, stride_bn, stride_br, False, BLOCK_N, BLOCK_R).to(ACC)
                a = load_tile(a_ptr, rank, k, R, K, stride_ar, stride_ak, False, BLOCK_R, DENSE_K).to(ACC)
                v += tl.dot(b, a, input_precision="ieee")
            tile = load_tile(w_ptr, row, k, N, K, stride_wn, stride_wk, False, BLOCK_N, DENSE_K)
            v = tile.to(ACC) + s * v
            dense += tl.sum(v * v, 1)
        square = tl.where(again, dense, square)
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(n_ptr + rows, tl.sqrt(tl.maximum(square, 0.0)), mask=rows < N)


def _plan(w, a, b, scaling) -> Plan:
    (n, k), r, tma = w.shape, a.shape[0], tma_fits(w)
    tile, options = norm_tile(n, k, r, w.dtype, w.device, tma)
    precise = "ieee" if w.dtype != torch.float32 or k < 256 else "tf32x3"  # whatever torch's setting: terms cancel
    constants = {**tile, "SCALING_PTR": isinstance(scaling, torch.Tensor), "TMA": tma,
                 "ACC": acc_dtype(w.dtype), "PRECISION": precise}  # fmt: skip
    ints = (n, k, r, *w.stride(), *a.stride(), *b.stride())
    blocks = {0: [tile["BLOCK_N"], tile["BLOCK_K"]]} if tma else None
    return Plan(_norm_kernel, (triton.cdiv(n, tile["BLOCK_N"]),), constants, options, w, ints, blocks)


def norm_fwd(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float | torch.Tensor) -> torch.Tensor:
    """n [N] in float32 from w [N, K], a [R, K] and b [N, R] in any float dtypes. a is rounded to w's dtype, as in the
    layer's products; b is not."""
    assert w.dtype in TL
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    a = a.to(w.dtype)
    gram = (a.double() @ a.double().t()).to(wide)  # [R, R]; float64, since torch's tf32 setting must not reach it
    n = w.new_empty(w.shape[0], dtype=wide)
    if n.numel():
        scaling = as_scaling(scaling)
        plan = plan_for(("norm", sig(w), sig(a), sig(b), scaling_kind(scaling)), _plan, w, a, b, scaling)
        plan(w, w, a, b, gram, n, scaling, CANCELS)
    return n
