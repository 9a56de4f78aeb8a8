"""Gradients that contract over rows: G = Z^T P [N, R] from Z [M, N] and P [M, R], in one read of Z.

For Z = dY, P = S it gives dB, and on the way dS = scaling * dY B (from the same tile) and dbias, the column sums (a
column of ones beside S). For Z = drop(x), P = dS it gives dA^T. A program owns BLOCK_N columns and a range of rows,
keeps its G in registers and steps through the rows; a second kernel adds up the programs' parts in a fixed order, so
two runs give the same bits.
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
from lora_fast.kernels.down import down_fwd
from lora_fast.kernels.launch import Plan, plan_for, sig
from lora_fast.kernels.tiles import grad_splits, grad_tile, tma_fits

FUSED_RANK = 64  # the largest rank at which dS comes from the same pass
SUM_BLOCK = 256  # elements that a program of the second kernel adds up


@triton.jit(do_not_specialize=["M", "rows_each"])
def _grad_kernel(
    z, p_ptr, b_ptr, bits_ptr, g_ptr, ds_ptr, sum_ptr, M, N, R, RS, rows_each,
    stride_zm, stride_zn, stride_bn, stride_br, stride_gs, stride_gn, stride_gr, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    WITH_G: tl.constexpr, WITH_DS: tl.constexpr, WITH_SUM: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    pid_n, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col, rank = pid_n * BLOCK_N, pid_r * BLOCK_R
    cols = col + tl.arange(0, BLOCK_N)
    ranks = rank + tl.arange(0, BLOCK_R)
    if WITH_DS:
        b = load_tile(b_ptr, col, rank, N, R, stride_bn, stride_br, False, BLOCK_N, BLOCK_R)
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    first = split * rows_each  # a multiple of BLOCK_M
    for m in range(first, tl.minimum(first + rows_each, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        tile = load_tile(z, m, col, M, N, stride_zm, stride_zn, TMA, BLOCK_M, BLOCK_N)
        if MASK:
            words = mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N)
            tile = tl.where(unpack_words(words), tile, 0.0)
        if WITH_G:
            p = load_tile(p_ptr, m, rank, M, RS, RS, 1, False, BLOCK_M, BLOCK_R)
        else:
            p = tl.zeros([BLOCK_M, BLOCK_R], dtype=DTYPE)
        if WITH_SUM:
            p = tl.where(ranks[None, :] == R, 1.0, p.to(ACC)).to(DTYPE)
        if WITH_G or WITH_SUM:
            g = mma(tile.T, p, g, PRECISION)
        if WITH_DS:
            ds = mma(tile, b, tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC), PRECISION)
            ds_ptrs = ds_ptr + (pid_n.to(tl.int64) * M + rows[:, None]) * RS + ranks[None, :]
            tl.store(ds_ptrs, ds, mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    if WITH_G:
        g_ptrs = g_ptr + split * stride_gs + cols.to(tl.int64)[:, None] * stride_gn + ranks[None, :] * stride_gr
        tl.store(g_ptrs, g, mask=(cols[:, None] < N) & (ranks[None, :] < R))
    if WITH_SUM:
        sum_ptrs = sum_ptr + split * N + cols[:, None] + ranks[None, :] * 0
        tl.store(sum_ptrs, g, mask=(cols[:, None] < N) & (ranks[None, :] == R))


@triton.jit
def _add_parts(src, dst, block, parts, size, scale, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """dst[i] = scale * sum over parts of src[part, i]; eight loads under way at a time."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([8, BLOCK], dtype=ACC)
    for first in range(0, parts, 8):
        part = first + tl.arange(0, 8).to(tl.int64)
        inside = (part[:, None] < parts) & (i[None, :] < size)
        total += tl.load(src + part[:, None] * size + i[None, :], mask=inside, other=0.0)
    tl.store(dst + i, (tl.sum(total, 0) * scale).to(dst.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["splits", "col_blocks", "ds_size"])
def _sum_kernel(
    g_src, g_dst, ds_src, ds_dst, sum_src, sum_dst, scaling, keep_scale, splits, col_blocks, g_size, ds_size, sum_size,
    WITH_G: tl.constexpr, WITH_DS: tl.constexpr, WITH_SUM: tl.constexpr, SCALING_PTR: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if WITH_G:
        n = tl.cdiv(g_size, BLOCK)
        if block < n:
            _add_parts(g_src, g_dst, block, splits, g_size, keep_scale, BLOCK, ACC)
        block -= n
    if WITH_DS:
        n = tl.cdiv(ds_size, BLOCK)
        if (block >= 0) & (block < n):
            _add_parts(ds_src, ds_dst, block, col_blocks, ds_size, scalar(scaling, SCALING_PTR), BLOCK, ACC)
        block -= n
    if WITH_SUM:
        if block >= 0:
            _add_parts(sum_src, sum_dst, block, splits, sum_size, 1.0, BLOCK, ACC)


def _plans_of(z, b, g, scaling, bias_dtype, bits, exact) -> tuple[Plan, Plan, tuple]:
    """The pass itself, the sum of its parts, and the shapes of the parts of G, of dS and of the sums."""
    m, n = z.shape
    like = b if b is not None else g
    r = like.shape[1] if like is not None else 0
    rs = padded_rank(max(r, 1))
    ranks = r + (bias_dtype is not None)
    tma = tma_fits(z)
    tile, options = grad_tile(m, n, ranks, z.dtype, z.device, tma, fused=b is not None)
    col_blocks, splits, rank_blocks, rows_each = grad_splits(m, n, ranks, tile, z.device)
    flags = {"WITH_G": g is not None, "WITH_DS": b is not None, "WITH_SUM": bias_dtype is not None}
    constants = {**tile, **flags, "MASK": bits is not None, "TMA": tma, "ACC": acc_dtype(z.dtype), "PRECISION": exact,
                 "DTYPE": TL[z.dtype]}  # fmt: skip
    g_shape = g_strides = (0, 0, 0)
    if g is not None:  # parts lie as the gradient does: [N, R], or [R, N] seen from the side
        g_shape = (splits, *g.shape)
        g_strides = (g.numel(), *g.stride())
    ints = (m, n, r, rs, rows_each, *z.stride(), *(b.stride() if b is not None else (0, 0)), *g_strides,
            bits.stride(0) if bits is not None else 0)  # fmt: skip
    blocks = {0: [tile["BLOCK_M"], tile["BLOCK_N"]]} if tma else None
    main = Plan(_grad_kernel, (col_blocks, splits, rank_blocks), constants, options, z, ints, blocks)
    sizes = (flags["WITH_G"] * n * r, flags["WITH_DS"] * m * rs, flags["WITH_SUM"] * n)
    constants = {**flags, "SCALING_PTR": isinstance(scaling, torch.Tensor), "BLOCK": SUM_BLOCK,
                 "ACC": acc_dtype(z.dtype)}  # fmt: skip
    grid = (sum(triton.cdiv(size, SUM_BLOCK) for size in sizes),)
    add = Plan(_sum_kernel, grid, constants, {"num_warps": 4}, z, (splits, col_blocks, *sizes))
    return main, add, (g_shape, (col_blocks, m, rs), (splits, n))


def _column_pass(z, p, g, b=None, scaling=1.0, bias_dtype=None, bits=None, keep_scale=1.0):
    """Fill g, the [N, R] view that Z^T P goes to, if given. Returns dS if b is given, column sums if bias_dtype is."""
    exact = precision(z.dtype, min(z.shape) if b is not None else z.shape[0])
    if exact == "tf32" and bias_dtype is not None:
        exact = "ieee"  # dbias is no product: it stays exact
    if not isinstance(scaling, torch.Tensor):
        scaling = float(scaling)  # Triton compiles some integers in
    scaling_dtype = getattr(scaling, "dtype", None)
    key = ("grad", sig(z), sig(b), sig(g), bias_dtype, bits is None, scaling_dtype, exact, z.get_device())
    main, add, shapes = plan_for(key, _plans_of, z, b, g, scaling, bias_dtype, bits, exact)
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    g_parts = z.new_empty(shapes[0], dtype=acc) if g is not None else None
    ds_parts = ds = sum_parts = sums = None
    if b is not None:
        ds_parts, ds = z.new_empty(shapes[1], dtype=acc), z.new_empty(shapes[1][1:])
    if bias_dtype is not None:
        sum_parts, sums = z.new_empty(shapes[2], dtype=acc), z.new_empty(shapes[2][1], dtype=bias_dtype)
    main(z, p, b, bits, g_parts, ds_parts, sum_parts)
    add(g_parts, g, ds_parts, ds, sum_parts, sums, scaling, keep_scale)
    return ds, sums


def dy_bwd(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float | torch.Tensor,
    grad_b: torch.Tensor | None,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The pass over dY [M, N]: returns (dS [M, padded R] if b [N, R] is given, dbias [N] if bias_dtype is given), and
    fills grad_b [N, R] from s [M, padded R] if they are given."""
    if dy.shape[0] == 0:
        if grad_b is not None:
            grad_b.zero_()
        ds = dy.new_empty(0, padded_rank(b.shape[1])) if b is not None else None
        return ds, dy.new_zeros(dy.shape[1], dtype=bias_dtype) if bias_dtype is not None else None
    ds = None
    if b is not None and (b.shape[1] > FUSED_RANK or grad_b is None):
        ds, b = down_fwd(dy, b.t(), scaling), None
    if b is None and grad_b is None and bias_dtype is None:
        return ds, None
    fused_ds, grad_bias = _column_pass(dy, s, grad_b, b, scaling, bias_dtype)
    return (ds if fused_ds is None else fused_ds), grad_bias


def a_bwd(
    x: torch.Tensor, ds: torch.Tensor, grad_a: torch.Tensor, bits: torch.Tensor | None = None, keep_scale: float = 1.0
) -> None:
    """Fill grad_a [R, K] with dS^T drop(x) from x [M, K] and ds [M, padded R]."""
    if x.shape[0] == 0:
        grad_a.zero_()
    else:
        _column_pass(x, ds, grad_a.t(), bits=bits, keep_scale=keep_scale)
