"""dA = dS^T (mask * x) and dB = g * (dY^T S) in one launch, for few rows: a program owns 64 columns of x, or of dY, and
walks over all rows, so that there are no parts to be added up. On its way over dY it also makes dbias, the column sums.

With DoRA's gain g, dZ = dY * g goes to memory ahead of that, where dS and dX read it, and on the way parts of the
column sums of dY * z (or y, see sums.py), which make dm.
"""

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    late,
    lift_of,
    load_tile,
    mask_words,
    padded_rank,
    store_tile,
    unpack_words,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, Scratch, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Dora, Parts, add_parts
from lora_fast.kernels.tiles import few_rows, rank_block, tma_fits


@triton.jit
def _walk(
    t, p, bits_ptr, sum_ptr, col, stride_bits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """T^T P for BLOCK_N columns of T from col on, and their sums if wanted."""
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    sums = tl.zeros([8, BLOCK_N], dtype=tl.float32)
    tl.assume(t.rows > 0)
    for row in range(0, t.rows, BLOCK_M):
        tile = load_tile(t, row, col, BLOCK_M, BLOCK_N, True)
        if bits_ptr is not None:
            rows = tl.minimum(row + tl.arange(0, BLOCK_M), t.rows - 1)
            tile = tl.where(unpack_words(mask_words(bits_ptr, rows, col, stride_bits, BLOCK_N)), tile, 0.0)
        if sum_ptr is not None:
            sums += tl.sum(tl.reshape(tile.to(tl.float32), (BLOCK_M // 8, 8, BLOCK_N)), 0)
        g = tl.dot(tile.T, load_tile(p, row, 0, BLOCK_M, BLOCK_R), g)
        if sum_ptr is not None:
            g = late(g)  # Triton 3.7 loads the next tile over one that is summed, too, while it is multiplied
    if sum_ptr is not None:
        cols = col + tl.arange(0, BLOCK_N)
        tl.store(sum_ptr + cols, tl.sum(sums, 0).to(sum_ptr.dtype.element_ty), mask=cols < t.cols)
    return g


@triton.jit(do_not_specialize=["M"])
def _pair_kernel(
    x,
    dy,
    ds_ptr,
    s_ptr,
    bits_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_bias_ptr,
    gain_ptr,
    scaling,
    M,
    K,
    N,
    R,
    RS,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    program, ranks = tl.program_id(0), tl.arange(0, BLOCK_R)
    over_x = tl.cdiv(K, BLOCK_N)
    if program < over_x:
        col = program * BLOCK_N
        t, p = Matrix(x, M, K, K, 1), Matrix(ds_ptr, M, RS, RS, 1)
        g = _walk(t, p, bits_ptr, None, col, stride_bits, BLOCK_M, BLOCK_N, BLOCK_R)
        cols = col + tl.arange(0, BLOCK_N)
        ptrs = grad_a_ptr + ranks.to(tl.int64)[None, :] * K + cols[:, None]
        tl.store(ptrs, g.to(grad_a_ptr.dtype.element_ty), mask=(cols[:, None] < K) & (ranks[None, :] < R))
    else:
        col = (program - over_x) * BLOCK_N
        t, p = Matrix(dy, M, N, N, 1), Matrix(s_ptr, M, RS, RS, 1)
        g = _walk(t, p, None, grad_bias_ptr, col, 0, BLOCK_M, BLOCK_N, BLOCK_R)
        cols = col + tl.arange(0, BLOCK_N)
        if gain_ptr is not None:
            g *= tl.load(gain_ptr + cols, mask=cols < N, other=0.0)[:, None]
        if scaling is not None:  # the part of it that B carries
            g *= lift_of(scaling, SCALING_PTR)
        ptrs = grad_b_ptr + cols.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(ptrs, g.to(grad_b_ptr.dtype.element_ty), mask=(cols[:, None] < N) & (ranks[None, :] < R))


def takes_pair(x: Operand, dy: Operand, r: int, dora: bool) -> bool:
    """Whether these matrices have few rows and lie as ``pair`` reads them. With a gain, half as many are few: beyond,
    one pass that makes all from dY is better (grad.py)."""
    few = few_rows(len(x), r, dtype=x.dtype, chip=Chip.of(x.device), most=1024 if dora else 2048)
    return few and tma_fits(x, dy)


def pair(
    x: Operand,
    dy: Operand,
    ds: Operand,
    s: Operand,
    grad_a: Operand,
    grad_b: Operand,
    *,
    bits: Operand | None = None,
    grad_bias: Operand | None = None,
    gain: Operand | None = None,
    scaling: Operand | Number | None = None,
) -> Launch:
    """grad_a [R, K] = ds^T (mask * x), grad_b [N, R] = gain * (dy^T s) and grad_bias [N], the sums of dy's columns.

    x [M, K], dy [M, N], ds and s [M, padded R] are in one dtype; bits are of a mask of x's shape. The scaling is given
    where B carries a part of it."""
    (m, k), n, r = x.shape, dy.shape[1], len(grad_a)
    tile = pass_tiles.pair(masked=bits is not None)
    rows, cols = tile.m, tile.n
    return launch(
        _pair_kernel,
        (triton.cdiv(k, cols) + triton.cdiv(n, cols),),
        tile.options,
        x,
        x=Tiles(x, [rows, cols]),
        dy=Tiles(dy, [rows, cols]),
        ds_ptr=ds,
        s_ptr=s,
        bits_ptr=bits,
        grad_a_ptr=grad_a,
        grad_b_ptr=grad_b,
        grad_bias_ptr=grad_bias,
        gain_ptr=gain,
        scaling=scaling,
        M=m,
        K=k,
        N=n,
        R=r,
        RS=padded_rank(r),
        stride_bits=0 if bits is None else triton.cdiv(k, 32),
        BLOCK_M=rows,
        BLOCK_N=cols,
        BLOCK_R=rank_block(r, 32),
        SCALING_PTR=isinstance(scaling, Operand),
    )


@triton.jit(do_not_specialize=["M"])
def _dz_kernel(
    dy_ptr,
    kept_ptr,
    dz_ptr,
    parts_ptr,
    gain_ptr,
    M,
    N,
    stride_ym,
    stride_yn,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    row, col = tl.program_id(1) * ROWS, tl.program_id(0) * COLS
    cols = col + tl.arange(0, COLS)
    gain = tl.load(gain_ptr + cols, mask=cols < N, other=0.0)
    tile = load_tile(Matrix(dy_ptr, M, N, stride_ym, stride_yn), row, col, ROWS, COLS).to(tl.float32)
    if parts_ptr is not None:
        kept = load_tile(Matrix(kept_ptr, M, N, N, 1), row, col, ROWS, COLS).to(tl.float32)
        tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * N + cols, tl.sum(tile * kept, 0), mask=cols < N)
    store_tile(Matrix(dz_ptr, M, N, N, 1), tile * gain[None, :], row, col, DTYPE)


def dz_and_dm(dy: Operand, dora: Dora[Operand], scratch: Scratch) -> list[Launch]:
    """What ``dora`` asks for: dz [M, N] = dy * gain, and dm if that is wanted."""
    assert dora.dz is not None
    (m, n), rows, cols, memory = dy.shape, 32, 256, None
    parts = Parts(col_blocks=0, splits=triton.cdiv(m, rows), ds=0, sums=0, dm=0 if dora.dm is None else n, g=0)
    if dora.dm is not None:
        memory = scratch.part((parts.numbers,), dora.gain.dtype)
    made = launch(
        _dz_kernel,
        (triton.cdiv(n, cols), parts.splits),
        {"num_warps": 4},
        dy,
        dy_ptr=dy,
        kept_ptr=dora.kept,
        dz_ptr=dora.dz,
        parts_ptr=memory,
        gain_ptr=dora.gain,
        M=m,
        N=n,
        stride_ym=dy.stride(0),
        stride_yn=dy.stride(1),
        ROWS=rows,
        COLS=cols,
        DTYPE=TL[dy.dtype],
    )
    return [made] if memory is None else [made, add_parts(parts, memory, dy, dy.dtype, dora=dora)]
