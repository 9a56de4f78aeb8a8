"""y = g * (x W^T + s (x A^T) B^T) + bias for few rows and without a backward, as in decoding, where reading W is what
takes the time.

The operands stand the other way round, y^T = W x^T + B S^T with S^T = s A x^T, so that rows of W, and not the few rows
of x, fill a tile of the matrix units. S is made on the way, by each program for itself. Where the columns of y are too
few to keep all processors reading, programs share the way along K, and a second launch adds up their parts, in a fixed
order.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, late, low_scale, wait_for_stream
from lora_fast.kernels.operands import Number, Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import decodes, tma_fits

ADDED = 4096  # numbers that a program adds up, all of which it loads at once


@triton.jit
def _finish(acc, y_ptr, gain_ptr, bias_ptr, cols, rows, M, N):
    """y of these columns and rows from the sums [columns, rows]."""
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + cols, mask=cols < N, other=0.0)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + rows.to(tl.int64)[None, :] * N + cols[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(cols[:, None] < N) & (rows[None, :] < M))


@triton.jit
def _fetch_ahead(ptr, rows, cols, stride, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Have the cache of the chip fetch these rows and columns of a matrix in 16 bits. It is where all that is written
    goes, so this may stand before the wait for what came before, whoever wrote the matrix."""
    HALF: tl.constexpr = COLS // 2
    inside = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None] * stride
    start = col + HALF * tl.arange(0, 2)[None, :]
    ptrs = (ptr + inside + tl.minimum(start, cols - 8)).to(tl.int64)  # multiples of 16 bytes
    size = 2 * tl.minimum(tl.maximum(cols - start, 8), HALF)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [ptrs, tl.broadcast_to(size, (ROWS, 2))],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["M"])
def _decode_kernel(
    x,
    w,
    w_ptr,
    a,
    b_ptr,
    y_ptr,
    parts_ptr,
    gain_ptr,
    bias_ptr,
    scaling,
    M,
    N,
    K,
    R,
    steps,
    stride_wn,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    split, col = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_N
    if PDL and AHEAD:
        _fetch_ahead(w_ptr, N, K, stride_wn, col, split * steps * BLOCK_K, BLOCK_N, AHEAD * BLOCK_K)
    wait_for_stream(PDL)
    rows, cols, ranks = tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    b_ptrs = b_ptr + cols.to(tl.int64)[:, None] * stride_bn + ranks[None, :] * stride_br
    b = tl.load(b_ptrs, mask=(cols[:, None] < N) & (ranks[None, :] < R), other=0.0)  # [BLOCK_N, BLOCK_R]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    low = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    tl.assume(last > first)  # where the loop might not run, ptxas serialises the products of some tiles
    for step in range(first, last):
        k = step * BLOCK_K
        tile = x.load([0, k])  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(w.load([col, k]), tile.T, acc)
        low = tl.dot(a.load([0, k]), tile.T, low)
    low *= low_scale(scaling, SCALING_PTR, LIFTED)
    acc = tl.dot(late(b), low.to(DTYPE), acc)
    if SPLITS == 1:
        _finish(acc, y_ptr, gain_ptr, bias_ptr, cols, rows, M, N)
    else:
        parts_ptrs = parts_ptr + (split.to(tl.int64) * N + cols[:, None]) * BLOCK_M + rows[None, :]
        tl.store(parts_ptrs, acc, mask=cols[:, None] < N)


@triton.jit(do_not_specialize=["M"])
def _add_kernel(
    parts_ptr,
    y_ptr,
    gain_ptr,
    bias_ptr,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    rows, cols = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, PARTS)[:, None, None]
    columns = splits.to(tl.int64) * N + cols[None, :, None]
    inside = (splits < SPLITS) & (cols[None, :, None] < N)
    parts = tl.load(parts_ptr + columns * BLOCK_M + rows[None, None, :], mask=inside, other=0.0)
    _finish(tl.sum(parts, 0), y_ptr, gain_ptr, bias_ptr, cols, rows, M, N)


def takes_decode(x: Operand, w: Operand, a: Operand) -> bool:
    """Whether x [M, K], w [N, K] and a [R, K] have so few rows and lie so that ``decode`` can read them."""
    few = decodes(len(x), len(w), x.shape[1], len(a), dtype=x.dtype, chip=Chip.of(x.device))
    return few and tma_fits(x, w, a)


def decode(
    x: Operand,
    w: Operand,
    a: Operand,
    b: Operand,
    y: Operand,
    scaling: Operand | Number,
    scratch: Scratch,
    *,
    bias: Operand | None = None,
    gain: Operand | None = None,
    lifted: bool = False,
) -> list[Launch]:
    """y [M, N] = gain * (x w^T + scaling * (x a^T) b^T) + bias; x, w [N, K], a [R, K] and b [N, R] in one dtype of 16
    bits. ``lifted``: b carries a part of the scaling."""
    (m, k), n = x.shape, len(w)
    tile = tiles.decode(m, n)
    splits, steps = tiles.decode_splits(n, k, tile=tile, chip=Chip.of(x.device))
    epilogue = {"y_ptr": y, "gain_ptr": gain, "bias_ptr": bias, "M": m, "N": n, "BLOCK_M": tile.m, "SPLITS": splits}
    parts = scratch.part((splits, n, tile.m), torch.float32) if splits > 1 else None
    made = launch(
        _decode_kernel,
        (triton.cdiv(n, tile.n) * splits,),
        tile.options,
        x,
        x=Tiles(x, [tile.m, tile.k]),
        w=Tiles(w, [tile.n, tile.k]),
        w_ptr=w,
        a=Tiles(a, [tile.r, tile.k]),
        b_ptr=b,
        parts_ptr=parts,
        scaling=scaling,
        K=k,
        R=b.shape[1],
        steps=steps,
        stride_wn=w.stride(0),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=tile.r,
        AHEAD=tile.ahead,
        LIFTED=lifted,
        SCALING_PTR=isinstance(scaling, Operand),
        DTYPE=TL[x.dtype],
        **epilogue,
    )
    if parts is None:
        return [made]
    padded = triton.next_power_of_2(splits)
    cols = max(4, min(16, ADDED // (padded * tile.m)))
    added = launch(
        _add_kernel,
        (triton.cdiv(n, cols),),
        {"num_warps": max(1, min(4, cols * tile.m // 128))},  # each thread has the parts of a number
        x,
        parts_ptr=parts,
        BLOCK_N=cols,
        PARTS=padded,
        **epilogue,
    )
    return [made, added]
