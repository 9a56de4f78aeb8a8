"""y_i = g_i * (x W_i^T + S_i B_i^T) + bias_i: the outputs of layers with one input x, all in one launch.

x [M, C], W_i [N_i, C], S_i [M, R_i], B_i [N_i, R_i]. It is the product of gemm.py over the tiles of several results, in
one flat persistent loop over all their steps, as many for each: one for the ranks, then those along C. With few rows it
is the launches that count, and a processor that one result would leave idle works at the next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, load_tile, store_tile, wait_for_stream
from lora_fast.kernels.gemm import GROUP_M, halves, tile_of
from lora_fast.kernels.operands import Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import few_rows, tma_fits

MOST = 4  # results


@triton.jit
def _stored(out, acc, row, col, n, gain_ptr, bias_ptr, DTYPE: tl.constexpr):
    """The epilogue of a part of a tile's columns."""
    cols = col + tl.arange(0, acc.shape[1])
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + cols, mask=cols < n, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    store_tile(Matrix(out, 0, 0, 0, 1), acc, row, col, DTYPE, True)


@triton.jit(do_not_specialize=["M"])
def _fan_kernel(
    x,
    w0,
    p0,
    q0,
    out0,
    gain0,
    bias0,
    w1,
    p1,
    q1,
    out1,
    gain1,
    bias1,
    w2,
    p2,
    q2,
    out2,
    gain2,
    bias2,
    w3,
    p3,
    q3,
    out3,
    gain3,
    bias3,
    M,
    C,
    N0,
    N1,
    N2,
    N3,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    grid_m = tl.cdiv(M, BLOCK_M)
    # Where each result's columns begin among those of all, in tiles.
    first1 = tl.cdiv(N0, BLOCK_N)
    first2 = first1 + tl.cdiv(N1, BLOCK_N)
    first3 = first2 + tl.cdiv(N2, BLOCK_N)
    grid_n = first3 + tl.cdiv(N3, BLOCK_N)
    end = BLOCK_C + tl.cdiv(C, BLOCK_C) * BLOCK_C
    tile = tl.program_id(0) - PROGRAMS
    mine = tl.cdiv(grid_m * grid_n - tl.program_id(0), PROGRAMS)
    c = end - BLOCK_C
    row = 0
    block = 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(0, mine * (end // BLOCK_C)):
        c += BLOCK_C
        if c == end:
            c = 0
            tile += PROGRAMS
            pid_m, block = tile_of(tile, grid_m, grid_n, GROUP_M)
            row = pid_m * BLOCK_M
        w, p, q, first = w0, p0, q0, 0
        if w1 is not None:
            if block >= first1:
                w, p, q, first = w1, p1, q1, first1
        if w2 is not None:
            if block >= first2:
                w, p, q, first = w2, p2, q2, first2
        if w3 is not None:
            if block >= first3:
                w, p, q, first = w3, p3, q3, first3
        col = (block - first) * BLOCK_N
        xs, ws, at = x, w, c - BLOCK_C
        if c == 0:
            xs, ws, at = p, q, 0
        a = load_tile(Matrix(xs, M, C, C, 1), row, at, BLOCK_M, BLOCK_C, True)
        b = load_tile(Matrix(ws, M, C, C, 1), col, at, BLOCK_N, BLOCK_C, True).T
        acc = tl.dot(a, b, acc)
        if c == end - BLOCK_C:
            out, n, gain_ptr, bias_ptr = out0, N0, gain0, bias0
            if w1 is not None:
                if block >= first1:
                    out, n, gain_ptr, bias_ptr = out1, N1, gain1, bias1
            if w2 is not None:
                if block >= first2:
                    out, n, gain_ptr, bias_ptr = out2, N2, gain2, bias2
            if w3 is not None:
                if block >= first3:
                    out, n, gain_ptr, bias_ptr = out3, N3, gain3, bias3
            left, right = halves(acc)
            _stored(out, left, row, col, n, gain_ptr, bias_ptr, DTYPE)
            _stored(out, right, row, col + BLOCK_N // 2, n, gain_ptr, bias_ptr, DTYPE)
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)


class Result(NamedTuple):
    """One of them: w [N, C], p [M, padded R] (or columns of a wider matrix), q [N, at least R], the result [M, N], and
    gain in float32 and bias [N], if it has any."""

    w: Operand
    p: Operand
    q: Operand
    out: Operand
    gain: Operand | None = None
    bias: Operand | None = None


def fans(x: Operand, each: Sequence[Result]) -> bool:
    """Whether one launch makes these: of few rows, in 16 bits, alike in what they have."""
    if not 1 < len(each) <= MOST:
        return False
    r = max(one.q.shape[1] for one in each)
    alike = {(one.gain is None, one.bias and one.bias.dtype) for one in each}
    few = few_rows(len(x), r, dtype=x.dtype, chip=Chip.of(x.device), ranks=64)  # one step's
    return few and len(alike) == 1 and tma_fits(x, *(t for one in each for t in one[:4]))


def fan(x: Operand, each: Sequence[Result]) -> Launch:
    """Fill the results, up to ``MOST``, from x [M, C]; all but bias and gain are in one dtype of 16 bits."""
    (m, c), widths = x.shape, [one.out.shape[1] for one in each]
    chip = Chip.of(x.device)
    tile = tiles.product(m, sum(widths), dtype=x.dtype, kind=x.dtype, chip=chip, tma=True, masked=False)
    bm, bn, bc, programs = tile.m, tile.n, tile.k, int(chip.processors * tile.fill)
    given: dict[str, Operand | Tiles | int | None] = {}
    for i in range(MOST):
        one = each[i] if i < len(each) else None
        given |= {
            f"w{i}": one and Tiles(one.w, [bn, bc]),
            f"p{i}": one and Tiles(one.p, [bm, bc]),
            f"q{i}": one and Tiles(one.q, [bn, bc]),
            f"out{i}": one and Tiles(one.out, [bm, bn // 2]),
            f"gain{i}": one and one.gain,
            f"bias{i}": one and one.bias,
            f"N{i}": widths[i] if one else 0,
        }
    blocks = triton.cdiv(m, bm) * sum(triton.cdiv(n, bn) for n in widths)
    return launch(
        _fan_kernel,
        (min(programs, blocks),),
        tile.options,
        x,
        x=Tiles(x, [bm, bc]),
        **given,
        M=m,
        C=c,
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_C=bc,
        GROUP_M=GROUP_M,
        PROGRAMS=programs,
        DTYPE=TL[x.dtype],
    )
