"""out = [mask *] P Q + sum over i of X_i W_i: the gradient of an input that several layers share, as one product.

X_i [M, C_i] are the gradients of their outputs and W_i [C_i, N] their weights; P [M, R] is dS of them all, side by
side, and Q [R, N] their A's, one below the other. It is the product of gemm.py over a contraction that has several
sources: one flat persistent loop, in which each step takes the tiles of one of them, and one accumulator, which is
rounded once. Choosing among the descriptors does not serialise the products.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Bits,
    Matrix,
    acc_dtype,
    load_tile,
    masked,
    mma,
    precision,
    store_tile,
    wait_for_stream,
)
from lora_fast.kernels.gemm import GROUP_M, halves, mask_of_tile, tile_of
from lora_fast.kernels.operands import Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import tma_fits

MOST = 4  # sources beside the low-rank product


@triton.jit(do_not_specialize=["M"])
def _products_kernel(
    x0,
    w0,
    x1,
    w1,
    x2,
    w2,
    x3,
    w3,
    p,
    q,
    out,
    bits_ptr,
    M,
    N,
    R,
    C0,
    C1,
    C2,
    C3,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_x3,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_w3,
    stride_p,
    stride_q,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    MASK: tl.constexpr = bits_ptr is not None
    whole_out = Matrix(out, M, N, N, 1)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    n_rank = tl.cdiv(R, BLOCK_C) * BLOCK_C
    end0 = n_rank + tl.cdiv(C0, BLOCK_C) * BLOCK_C
    end1 = end0 + tl.cdiv(C1, BLOCK_C) * BLOCK_C
    end2 = end1 + tl.cdiv(C2, BLOCK_C) * BLOCK_C
    end = end2 + tl.cdiv(C3, BLOCK_C) * BLOCK_C
    tile = tl.program_id(0) - PROGRAMS
    mine = tl.cdiv(grid_m * grid_n - tl.program_id(0), PROGRAMS)
    c = end - BLOCK_C
    row = 0
    col = 0
    pid_m, pid_n = tile_of(tl.program_id(0), grid_m, grid_n, GROUP_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    words = 0
    if MASK:
        words = mask_of_tile(Bits(bits_ptr, stride_bits, M), pid_m * BLOCK_M, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
    for _ in range(0, mine * (end // BLOCK_C)):
        c += BLOCK_C
        if c == end:
            c = 0
            tile += PROGRAMS
            pid_m, pid_n = tile_of(tile, grid_m, grid_n, GROUP_M)
            row = pid_m * BLOCK_M
            col = pid_n * BLOCK_N
        xs, ws, at, to, stride_x, stride_w = x0, w0, c - n_rank, C0, stride_x0, stride_w0
        if c < n_rank:
            xs, ws, at, to, stride_x, stride_w = p, q, c, R, stride_p, stride_q
        if x1 is not None:
            if c >= end0:
                xs, ws, at, to, stride_x, stride_w = x1, w1, c - end0, C1, stride_x1, stride_w1
        if x2 is not None:
            if c >= end1:
                xs, ws, at, to, stride_x, stride_w = x2, w2, c - end1, C2, stride_x2, stride_w2
        if x3 is not None:
            if c >= end2:
                xs, ws, at, to, stride_x, stride_w = x3, w3, c - end2, C3, stride_x3, stride_w3
        a = load_tile(Matrix(xs, M, to, stride_x, 1), row, at, BLOCK_M, BLOCK_C, TMA)
        b = load_tile(Matrix(ws, to, N, stride_w, 1), at, col, BLOCK_C, BLOCK_N, TMA)
        acc = mma(a, b, acc, PRECISION)
        if MASK:
            turn = (c == n_rank - BLOCK_C) | (c == end - BLOCK_C)
        else:
            turn = c == end - BLOCK_C
        if turn:
            if c == end - BLOCK_C:
                left, right = halves(acc)
                store_tile(whole_out, left, row, col, DTYPE, TMA)
                store_tile(whole_out, right, row, col + BLOCK_N // 2, DTYPE, TMA)
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            elif MASK:
                acc = masked(acc, words)
                pid_m, pid_n = tile_of(tile + PROGRAMS, grid_m, grid_n, GROUP_M)
                words = mask_of_tile(Bits(bits_ptr, stride_bits, M), pid_m * BLOCK_M, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)


def products(
    sources: Sequence[tuple[Operand, Operand]],
    p: Operand | None,
    q: Operand | None,
    out: Operand,
    *,
    bits: Operand | None = None,
) -> Launch:
    """out [M, N] = mask * (p q) + the sum of x w over the sources (x [M, C], w [C, N]), up to ``MOST``.

    p [M, R] and q [R, N], or neither, all in one dtype with contiguous rows; out is contiguous; bits are of a mask of
    its shape.
    """
    (m, n), r, kind, masked = out.shape, 0 if q is None else len(q), out.dtype, bits is not None
    if p is None or q is None:
        p, q = sources[0]  # of which nothing is read as such
    exact = precision(kind, sum(x.shape[1] for x, _ in sources))
    tma = tma_fits(p, q, out, *(t for pair in sources for t in pair))
    chip = Chip.of(out.device)
    tile = tiles.product(m, n, dtype=kind, kind=kind, chip=chip, tma=tma, masked=masked, exact=exact, r=r)
    bm, bn, bc, programs = tile.m, tile.n, tile.k, int(chip.processors * tile.fill)

    def read(t: Operand, block: list[int]) -> Operand | Tiles:
        return Tiles(t, block) if tma else t

    given: dict[str, Operand | Tiles | int | None] = {}
    for i in range(MOST):
        x, w = sources[i] if i < len(sources) else (None, None)
        given |= {
            f"x{i}": None if x is None else read(x, [bm, bc]),
            f"w{i}": None if w is None else read(w, [bc, bn]),
            f"C{i}": 0 if x is None else x.shape[1],
            f"stride_x{i}": 0 if x is None else x.stride(0),
            f"stride_w{i}": 0 if w is None else w.stride(0),
        }
    return launch(
        _products_kernel,
        (min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn)),),
        tile.options,
        out,
        **given,
        p=read(p, [bm, bc]),
        q=read(q, [bc, bn]),
        out=read(out, [bm, bn // 2]),
        bits_ptr=bits,
        M=m,
        N=n,
        R=r,
        stride_p=p.stride(0),
        stride_q=q.stride(0),
        stride_bits=triton.cdiv(n, 32) if masked else 0,
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_C=bc,
        GROUP_M=GROUP_M,
        PROGRAMS=programs,
        TMA=tma,
        ACC=acc_dtype(kind),
        PRECISION=exact,
        DTYPE=TL[kind],
    )
