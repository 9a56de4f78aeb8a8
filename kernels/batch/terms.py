"""The terms of DoRA's n^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for all adapters, in 16 bits (see gain.py)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ranks import Ranks, Tables
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import Matrix, late, load_tile, mma, wait_for_stream
from lora_fast.kernels.gemm import halves
from lora_fast.kernels.operands import Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import tma_fits

GROUP = 16  # ranks, all of one adapter
GRAMS = 8  # parts of A A^T


@triton.jit
def _squares_kernel(
    w_ptr,
    a_ptr,
    firsts_ptr,
    squares_ptr,
    gram_ptr,
    N,
    K,
    ADAPTERS,
    STEPS,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRAM_K: tl.constexpr,
    GRAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Parts of A A^T over STEPS blocks of columns each [parts, adapters, GRAM, GRAM], and |w|^2 [N] where asked."""
    wait_for_stream(PDL)
    block, blocks = tl.program_id(0), 0
    if squares_ptr is not None:
        blocks = tl.cdiv(N, BLOCK_N)
        if block < blocks:
            w, rows = Matrix(w_ptr, N, K, stride_wn, stride_wk), block * BLOCK_N + tl.arange(0, BLOCK_N)
            squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            tile = load_tile(w, block * BLOCK_N, 0, BLOCK_N, BLOCK_K)
            for k in range(0, K, BLOCK_K):
                later = load_tile(w, block * BLOCK_N, k + BLOCK_K, BLOCK_N, BLOCK_K)  # the next step's, as in norm.py
                squares += tile.to(tl.float32) * tile.to(tl.float32)
                tile = later
            tl.store(squares_ptr + rows, tl.sum(squares, 1), mask=rows < N)
    if block >= blocks:
        adapter, part = (block - blocks) % ADAPTERS, (block - blocks) // ADAPTERS
        first, end = tl.load(firsts_ptr + adapter), tl.load(firsts_ptr + adapter + 1)
        a = Matrix(a_ptr + first.to(tl.int64) * K, end - first, K, K, 1)
        gram = tl.zeros([GRAM, GRAM], tl.float32)
        for step in range(0, STEPS):
            tile = load_tile(a, 0, (part * STEPS + step) * GRAM_K, GRAM, GRAM_K)
            gram = tl.dot(tile, tile.T, gram)
        at = tl.arange(0, GRAM)[:, None] * GRAM + tl.arange(0, GRAM)[None, :]
        tl.store(gram_ptr + (block - blocks).to(tl.int64) * GRAM * GRAM + at, gram)


@triton.jit
def _dots_kernel(
    w,
    a,
    b_ptr,
    dots_ptr,
    squares_ptr,
    N,
    K,
    TOTAL,
    EACH,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Parts, over EACH columns, of b (A w) for each group of ranks [parts, groups, N]; of |w|^2 [parts, N] where
    asked."""
    wait_for_stream(PDL)
    row, rank, part = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    rows, zero = row + tl.arange(0, BLOCK_N), tl.full((), 0, tl.int64)
    whole_w, whole_a = Matrix(w, N, K, stride_wn, stride_wk), Matrix(a, TOTAL, K, K, 1)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)  # a thread adds up what it loads
    for k in range(part * EACH, tl.minimum((part + 1) * EACH, K), BLOCK_K):
        tile = load_tile(whole_w, row, k, BLOCK_N, BLOCK_K, TMA)
        acc = mma(tile, load_tile(whole_a, rank, k, BLOCK_R, BLOCK_K, TMA).T, acc, "ieee")
        if squares_ptr is not None:
            wide = tl.reshape(tile.to(tl.float32), (BLOCK_N, BLOCK_K // 8, 8))
            squares += tl.sum(wide * wide, 2)
            acc = late(acc)  # see columns.py
    if squares_ptr is not None:
        tl.store(squares_ptr + (zero + part) * N + rows, tl.sum(squares, 1), mask=rows < N)
    dots_ptr += (zero + part) * (TOTAL // GROUP) * N
    left, right = halves(acc)
    HALF: tl.constexpr = BLOCK_R // 2
    for i in tl.static_range(2):
        half = left if i == 0 else right
        half *= load_tile(Matrix(b_ptr, N, TOTAL, TOTAL, 1), row, rank, BLOCK_N, HALF).to(tl.float32)
        dots = tl.sum(tl.reshape(half, (BLOCK_N, HALF // GROUP, GROUP)), 2)
        groups = rank // GROUP + tl.arange(0, HALF // GROUP)
        dots_ptrs = dots_ptr + groups[None, :] * N + rows[:, None]
        tl.store(dots_ptrs, dots, mask=(groups * GROUP < TOTAL)[None, :] & (rows < N)[:, None])
        rank += HALF


class Packed(NamedTuple):
    """What norms are made of beside W: a [ranks in all, K] and b [N, ranks in all], as ``pack`` made them; for each
    rank the scaling that b does not carry, and the scale that is NaN where a rank is marked; and tables."""

    a: Operand
    b: Operand
    low: Operand
    scales: Operand
    tables: Tables


class Terms(NamedTuple):
    """Of n^2, each in parts: |w|^2 [parts, N], b (A w) [parts, groups of ranks, N], A A^T [parts, adapters, r, r]."""

    squares: Operand | None
    dots: Operand | None
    gram: Operand | None


def terms_of(w: Operand, of: Packed, ranks: Ranks, block: int, scratch: Scratch) -> tuple[list[Launch], Terms]:
    """The terms from w [N, K], in 16 bits, and the launches that make them; ``block``: the r of A A^T."""
    (rows, k), total, count, chip = w.shape, ranks.total, len(ranks.of), Chip.of(w.device)
    tma = tma_fits(w, of.a)
    tile = pass_tiles.batch_norm(total, chip=chip, tma=tma)
    grid = triton.cdiv(rows, tile.n), triton.cdiv(total, tile.r)
    splits = pass_tiles.splits(rows * grid[1], triton.cdiv(k, 4 * tile.k), tile=tile, chip=chip)
    each = triton.cdiv(triton.cdiv(k, min(splits, 8)), tile.k) * tile.k
    splits, apart = triton.cdiv(k, each), grid[1] > 1  # a product of many ranks would wait for squares
    squares = scratch.part((1 if apart else splits, rows), torch.float32)
    dots = scratch.part((splits, total // GROUP, rows), torch.float32)
    gram = scratch.part((GRAMS, count, block, block), torch.float32)
    strides = {"stride_wn": w.stride(0), "stride_wk": w.stride(1)}
    first = launch(
        _squares_kernel,
        ((triton.cdiv(rows, 8) if apart else 0) + GRAMS * count,),
        {"num_warps": 4},
        w,
        w_ptr=w,
        a_ptr=of.a,
        firsts_ptr=of.tables.firsts,
        squares_ptr=squares if apart else None,
        gram_ptr=gram,
        N=rows,
        K=k,
        ADAPTERS=count,
        STEPS=triton.cdiv(k, GRAMS * 128),
        **strides,
        BLOCK_N=8,
        BLOCK_K=512,
        GRAM_K=128,
        GRAM=block,
    )
    second = launch(
        _dots_kernel,
        (*grid, splits),
        tile.options,
        w,
        w=Tiles(w, [tile.n, tile.k]) if tma else w,
        a=Tiles(of.a, [tile.r, tile.k]) if tma else of.a,
        b_ptr=of.b,
        dots_ptr=dots,
        squares_ptr=None if apart else squares,
        N=rows,
        K=k,
        TOTAL=total,
        EACH=each,
        **strides,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tile.r,
        GROUP=GROUP,
        TMA=tma,
    )
    return [first, second], Terms(squares, dots, gram)
