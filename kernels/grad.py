"""Gradients that contract over rows: G = Z^T P [N, R] from Z [M, N] and P [M, R], in one read of Z.

For Z = dY, P = S it gives dB, and on the way dS = scaling * dY B (from the same tile) and dbias, the column sums (a
column of ones beside S). For Z = drop(x), P = dS it gives dA^T. A program owns BLOCK_N columns and a range of rows,
keeps its G in registers and steps through the rows; a second kernel adds up the programs' parts in a fixed order, so
two runs give the same bits.
"""

from typing import NamedTuple

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
from lora_fast.kernels.launch import Plan, as_scaling, plan_for, scaling_kind, sig
from lora_fast.kernels.tiles import grad_splits, grad_tile, tma_fits

FUSED_RANK = 64  # the largest rank at which dS comes from the same pass
SUM_BLOCK = 256  # elements that a program of the second kernel adds up


@triton.jit(do_not_specialize=["M", "rows_each"])
def _grad_kernel(
    z, p_ptr, b_ptr, bits_ptr, g_ptr, parts_ptr, M, N, R, RS, rows_each, sum_at, g_at,
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
            ds_ptrs = parts_ptr + (pid_n.to(tl.int64) * M + rows[:, None]) * RS + ranks[None, :]
            tl.store(ds_ptrs, ds, mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    if WITH_G:
        g_ptrs = g_ptr + g_at + split * stride_gs + cols.to(tl.int64)[:, None] * stride_gn + ranks[None, :] * stride_gr
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols[:, None] < N) & (ranks[None, :] < R))
    if WITH_SUM:
        sum_ptrs = parts_ptr + sum_at + split * N + cols[:, None] + ranks[None, :] * 0
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
    parts_ptr, ds_ptr, sum_ptr, g_ptr, scaling, keep_scale, splits, col_blocks, ds_size, sum_size, g_size, sum_at, g_at,
    WITH_G: tl.constexpr, WITH_DS: tl.constexpr, WITH_SUM: tl.constexpr, SCALING_PTR: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if WITH_DS:
        n = tl.cdiv(ds_size, BLOCK)
        if block < n:
            scale = scalar(scaling, SCALING_PTR) * keep_scale
            _add_parts(parts_ptr, ds_ptr, block, col_blocks, ds_size, scale, BLOCK, ACC)
        block -= n
    if WITH_SUM:
        n = tl.cdiv(sum_size, BLOCK)
        if (block >= 0) & (block < n):
            _add_parts(parts_ptr + sum_at, sum_ptr, block, splits, sum_size, 1.0, BLOCK, ACC)
        block -= n
    if WITH_G:
        if block >= 0:
            _add_parts(parts_ptr + g_at, g_ptr, block, splits, g_size, 1.0, BLOCK, ACC)


class ColumnPass(NamedTuple):
    """The launches for a pass, and the float32 parts between them: those of dS [column blocks, M, padded R], of the
    column sums [splits, N] and of G [splits, N, R] (none where rows are not split), one after another."""

    main: Plan
    add: Plan | None
    parts: int  # how many numbers
    summed: bool  # whether G has parts

    def __call__(self, z, p, b, bits, g, ds, sums, scaling, keep_scale, parts) -> None:
        self.main(z, p, b, bits, parts if g is None or self.summed else g, parts)
        if self.add is not None:
            self.add(parts, ds, sums, g, scaling, keep_scale)


def column_plan(
    z: torch.Tensor, r: int, g: torch.Tensor | None, b: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0, with_sum: bool = False, masked: bool = False,
) -> ColumnPass:  # fmt: skip
    """The launches for Z = z [M, N]: g is the [N, R] view that G goes to, b [N, at least R] what dS is made with."""
    m, n = z.shape
    rs, ranks = padded_rank(max(r, 1)), r + with_sum
    exact = precision(z.dtype, min(z.shape) if b is not None else m)
    if exact == "tf32" and with_sum:
        exact = "ieee"  # dbias is no product: it stays exact
    tma = tma_fits(z)
    tile, options = grad_tile(m, n, ranks, z.dtype, z.device, tma, b is not None, masked)
    col_blocks, splits, rank_blocks, rows_each = grad_splits(m, n, ranks, tile, z.device)
    summed = g is not None and splits > 1
    ds_size, sum_size, g_size = (b is not None) * m * rs, with_sum * n, summed * n * r
    sum_at = col_blocks * ds_size  # both multiples of 16, which Triton compiles in
    g_at = sum_at + -(-splits * sum_size // 16) * 16
    flags = {"WITH_G": g is not None, "WITH_DS": b is not None, "WITH_SUM": with_sum}
    constants = {**tile, **flags, "MASK": masked, "TMA": tma, "ACC": acc_dtype(z.dtype), "PRECISION": exact,
                 "DTYPE": TL[z.dtype]}  # fmt: skip
    # Parts of G lie as the gradient does: [N, R], or [R, N] seen from the side.
    g_strides = (n * r, *g.stride()) if g is not None else (0, 0, 0)
    b_strides = b.stride() if b is not None else (0, 0)
    ints = (m, n, r, rs, rows_each, sum_at, g_at if summed else 0, *z.stride(), *b_strides, *g_strides,
            triton.cdiv(n, 32) if masked else 0)  # fmt: skip
    blocks = {0: [tile["BLOCK_M"], tile["BLOCK_N"]]} if tma else None
    main = Plan(_grad_kernel, (col_blocks, splits, rank_blocks), constants, options, z, ints, blocks)
    sizes = ds_size, sum_size, g_size
    add = None
    if any(sizes):
        constants = {**flags, "WITH_G": summed, "SCALING_PTR": isinstance(scaling, torch.Tensor), "BLOCK": SUM_BLOCK,
                     "ACC": acc_dtype(z.dtype)}  # fmt: skip
        grid = (sum(triton.cdiv(size, SUM_BLOCK) for size in sizes),)
        add = Plan(_sum_kernel, grid, constants, {"num_warps": 4}, z, (splits, col_blocks, *sizes, sum_at, g_at))
    return ColumnPass(main, add, g_at + splits * g_size, summed)


def new_parts(z: torch.Tensor, size: int) -> torch.Tensor:
    return z.new_empty(size, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def _column_pass(z, p, g, b=None, scaling=1.0, sums=None, bits=None, keep_scale=1.0) -> torch.Tensor | None:
    """Fill g, the [N, R] view that Z^T P goes to, and sums, those of z's columns, if given. Returns dS if b is."""
    like = b if b is not None else g
    r = like.shape[1] if like is not None else 0
    ds = z.new_empty(z.shape[0], padded_rank(r)) if b is not None else None
    scaling = as_scaling(scaling)
    key = ("grad", sig(z), sig(b), sig(g), sig(sums), bits is None, scaling_kind(scaling),
           precision(z.dtype, 256), r)  # fmt: skip
    plan = plan_for(key, column_plan, z, r, g, b, scaling, sums is not None, bits is not None)
    plan(z, p, b, bits, g, ds, sums, scaling, keep_scale, new_parts(z, plan.parts))
    return ds


def dy_bwd(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float | torch.Tensor,
    grad_b: torch.Tensor | None,
    grad_bias: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor | None:
    """The pass over dY [M, N]: returns dS = scaling * keep_scale * dY B [M, padded R] if b [N, R] is given, and fills
    grad_b [N, R] from s [M, padded R] and grad_bias [N] if they are given."""
    if dy.shape[0] == 0:
        for grad in (grad_b, grad_bias):
            if grad is not None:
                grad.zero_()
        return dy.new_empty(0, padded_rank(b.shape[1])) if b is not None else None
    ds = None
    if b is not None and not fuses(b.shape[1], grad_b is not None):
        ds, b = down_fwd(dy, b.t(), scaling, None, keep_scale), None
    if b is None and grad_b is None and grad_bias is None:
        return ds
    fused_ds = _column_pass(dy, s, grad_b, b, scaling, grad_bias, None, keep_scale)
    return ds if fused_ds is None else fused_ds


def fuses(r: int, need_b: bool) -> bool:
    """Whether dS comes from the pass that makes dB, too, rather than from a read of dY by itself."""
    return need_b and r <= FUSED_RANK


def a_bwd(x: torch.Tensor, ds: torch.Tensor, grad_a: torch.Tensor, bits: torch.Tensor | None = None) -> None:
    """Fill grad_a [R, K] with dS^T (mask * x) from x [M, K] and ds [M, padded R]."""
    if x.shape[0] == 0:
        grad_a.zero_()
    else:
        _column_pass(x, ds, grad_a.t(), bits=bits)
