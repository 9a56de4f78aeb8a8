"""out = g * (X W' + [mask *] S U') + bias with S = s X D', all in one launch, for few rows: the forward
y = g * (x W^T + S B^T) + bias with D = A and U = B, and dX = dY W + mask * (dS A) with D = B and U = A. S, or dS, stays
in memory for other launches.

X [M, C], W [N, C] (transposed) or [C, N], D [R, C] (transposed) or [C, R], U [N, R] (transposed) or [R, N].

A program makes one tile of out, and on its way along the contraction also S of its rows, in a second accumulator; the
low-rank step comes last. All programs of a row block make the same S. Where the loads of X and W bound the loop that
costs less than a launch that makes S once; where the matrix units do, it does not (gemm.py).
"""

import triton
import triton.language as tl

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, late, low_scale, mask_words, masked, padded_rank, wait_for_stream
from lora_fast.kernels.operands import Number, Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import few_rows, rank_block, tma_fits


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x,
    w,
    d,
    u_ptr,
    out,
    s_ptr,
    z,
    gain_ptr,
    bias_ptr,
    bits_ptr,
    scaling,
    keep_scale,
    M,
    N,
    C,
    R,
    RS,
    stride_un,
    stride_ur,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    grid_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_n = tl.program_id(0) % grid_m, tl.program_id(0) // grid_m
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    rows, cols, ranks = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    u_ptrs = u_ptr + cols.to(tl.int64)[:, None] * stride_un + ranks.to(tl.int64)[None, :] * stride_ur
    u = tl.load(u_ptrs, mask=(cols[:, None] < N) & (ranks[None, :] < R), other=0.0)  # [BLOCK_N, BLOCK_R]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    tl.assume(C > 0)  # where the loop might not run, ptxas serialises the products of some tiles
    for c in range(0, C, BLOCK_C):
        tile = x.load([row, c])
        if TRANSPOSED:
            acc = tl.dot(tile, w.load([col, c]).T, acc)
            low = tl.dot(tile, d.load([0, c]).T, low)
        else:
            acc = tl.dot(tile, w.load([c, col]), acc)
            low = tl.dot(tile, d.load([c, 0]), low)
    s = (low * (low_scale(scaling, SCALING_PTR, LIFTED) * keep_scale)).to(DTYPE)
    if bits_ptr is not None:
        words = mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N)
        acc += masked(tl.dot(s, late(u).T), words)
    else:
        acc = tl.dot(s, late(u).T, acc)
    if z is not None:
        z.store([row, col], acc.to(DTYPE))
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + cols, mask=cols < N, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    out.store([row, col], acc.to(DTYPE))
    if pid_n == 0:
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
        tl.store(s_ptrs, s, mask=(rows[:, None] < M) & (ranks[None, :] < RS))


def product_with_s(
    x: Operand,
    w: Operand,
    d: Operand,
    u: Operand,
    out: Operand,
    *,
    s: Operand,
    scaling: Operand | Number,
    keep: Number,
    transposed: bool,
    bias: Operand | None = None,
    bits: Operand | None = None,
    gain: Operand | None = None,
    z: Operand | None = None,
    lifted: bool = False,
) -> Launch | None:
    """s [M, padded R] = scaling * keep * x d' and out: if transposed gain * (x w^T + s u^T) + bias with w [N, C], d [R,
    C] and u [N, R], else x w + mask * (s u) with w [C, N], d [C, R] and u [R, N]. None where two launches are better,
    or one cannot do it.

    All but bias and gain are in one dtype of 16 bits. bits are of a mask of out's shape. With z, [M, N] and contiguous,
    that is filled with the sum before gain and bias. ``lifted``: d or u carries a part of the scaling.
    """
    (m, c), n, r = x.shape, out.shape[1], d.shape[0 if transposed else 1]
    chip = Chip.of(x.device)
    if not few_rows(m, r, dtype=x.dtype, chip=chip) or not tma_fits(x, w, d, out):
        return None
    tile = tiles.product_with_s(m, n, c, dtype=x.dtype, chip=chip, masked=bits is not None)
    if tile is None:
        return None
    bm, bn, bc, br = tile.m, tile.n, tile.k, rank_block(r, 32)
    return launch(
        _few_rows_kernel,
        (triton.cdiv(m, bm) * triton.cdiv(n, bn),),
        tile.options,
        x,
        x=Tiles(x, [bm, bc]),
        w=Tiles(w, [bn, bc] if transposed else [bc, bn]),
        d=Tiles(d, [br, bc] if transposed else [bc, br]),
        u_ptr=u,
        out=Tiles(out, [bm, bn]),
        s_ptr=s,
        z=None if z is None else Tiles(z, [bm, bn]),
        gain_ptr=gain,
        bias_ptr=bias,
        bits_ptr=bits,
        scaling=scaling,
        keep_scale=keep,
        M=m,
        N=n,
        C=c,
        R=u.shape[1 if transposed else 0],
        RS=padded_rank(r),
        stride_un=u.stride(0 if transposed else 1),
        stride_ur=u.stride(1 if transposed else 0),
        stride_bits=0 if bits is None else triton.cdiv(n, 32),
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_C=bc,
        BLOCK_R=br,
        TRANSPOSED=transposed,
        LIFTED=lifted,
        SCALING_PTR=isinstance(scaling, Operand),
        DTYPE=TL[x.dtype],
    )
