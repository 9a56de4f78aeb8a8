"""The middle of an MLP, h = act(e) * g, or act(e), element by element, with what else one read of e and g gives.

Forward: h, and S = scaling * drop(h) A^T of the layer that reads it. Backward, from dh: de = dh * g * act'(e) and dg =
dh * act(e), which may take the memory of e and g; h again, which takes that of dh. With DoRA's gains it is dZ = de *
gain that is written, which all that comes later reads, and the column sums of de * e and dg * g make the gradients of
the magnitudes. e and g may be the two halves of one matrix's columns.
"""

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.activations import act_and_slope, gated
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    acc_dtype,
    late,
    load_tile,
    mask_words,
    masked,
    mma,
    precision,
    store_tile,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import weak_gain
from lora_fast.kernels.tiles import tma_fits


@triton.jit(do_not_specialize=["M"])
def _glu_down_kernel(
    e,
    g,
    h,
    a_ptr,
    s_ptr,
    scales_ptr,
    bits_ptr,
    keep_scale,
    M,
    K,
    R,
    stride_e,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    ACT: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    row, rank, first, end = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R, 0, K
    if STEPS > 0:  # of few rows, without ranks: element by element, some columns a program
        rank, first = 0, tl.program_id(1) * BLOCK_K * STEPS
        end = tl.minimum(first + BLOCK_K * STEPS, K)
    rows, ranks = row + tl.arange(0, BLOCK_M), rank + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for k in range(first, end, BLOCK_K):
        e_tile, g_tile = load_tile(Matrix(e, M, K, stride_e, 1), row, k, BLOCK_M, BLOCK_K, TMA), None
        if g is not None:
            g_tile = load_tile(Matrix(g, M, K, stride_e, 1), row, k, BLOCK_M, BLOCK_K, TMA)
        if a_ptr is not None:
            a = load_tile(Matrix(a_ptr, R, K, K, 1), rank, k, BLOCK_R, BLOCK_K, TMA)
        tile = late(gated(e_tile, g_tile, ACT, ACC, DTYPE))  # else Triton makes it once for each of its uses
        if rank == 0:
            store_tile(Matrix(h, M, K, K, 1), tile, row, k, DTYPE, TMA)
        if bits_ptr is not None:
            words = mask_words(bits_ptr, tl.minimum(rows, M - 1), k, stride_bits, BLOCK_K)
            tile = masked(tile, words)
        if a_ptr is not None:
            acc = mma(tile, a.T, acc, PRECISION)
    if a_ptr is not None:
        s = acc * (tl.load(scales_ptr + ranks, mask=ranks < R, other=0.0) * keep_scale)[None, :]
        s_ptrs = s_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(s_ptrs, s.to(DTYPE), mask=(rows[:, None] < M) & (ranks[None, :] < R))


def glu_down(
    e: Operand,
    g: Operand | None,
    h: Operand,
    a: Operand | None,
    s: Operand | None,
    scales: Operand | None,
    keep: Number,
    *,
    act: str,
    bits: Operand | None = None,
) -> Launch:
    """h [M, K] = act(e) * g, act(e) without g, and with a [R, K], R a multiple of 16, s [M, R] = scales * keep *
    drop(h) a^T, from the bits of a mask on h. All are in one dtype, scales [R] in float32, and contiguous, but for the
    rows of e and g, which may be further apart, alike in both."""
    (m, k), r = e.shape, 0 if a is None else len(a)
    tma, masked = tma_fits(*(t for t in (e, g, h, a) if t is not None)), bits is not None
    tile = pass_tiles.glu_down(m, r, dtype=e.dtype, chip=Chip.of(e.device), tma=tma)
    block, of_a, steps = [tile.m, tile.k], [tile.r, tile.k], tile.n // tile.k
    return launch(
        _glu_down_kernel,
        (triton.cdiv(m, tile.m), triton.cdiv(k, tile.n) if steps else triton.cdiv(max(r, 1), tile.r)),
        tile.options,
        e,
        e=Tiles(e, block) if tma else e,
        g=g and Tiles(g, block) if tma else g,
        h=Tiles(h, block) if tma else h,
        a_ptr=a and Tiles(a, of_a) if tma else a,
        s_ptr=s,
        scales_ptr=scales,
        bits_ptr=bits,
        keep_scale=keep,
        M=m,
        K=k,
        R=max(r, 16),
        stride_e=e.stride(0),
        stride_bits=triton.cdiv(k, 32) if masked else 0,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        BLOCK_R=tile.r,
        STEPS=steps,
        ACT=act,
        TMA=tma,
        ACC=acc_dtype(e.dtype),
        PRECISION=precision(e.dtype, k),
        DTYPE=TL[e.dtype],
    )


@triton.jit
def _gain_of(gain_ptr, parts_ptr, cols, N, WEAK: tl.constexpr):
    """What de of these columns is multiplied by."""
    gain = tl.load(gain_ptr + cols, mask=cols < N, other=0.0)
    if parts_ptr is not None:  # whoever adds them up reads weak columns as they are, and then scales them
        gain = tl.where(tl.abs(gain) < WEAK, 1.0, gain)
    return gain[None, :]


@triton.jit(do_not_specialize=["M"])
def _glu_grad_kernel(
    dh_ptr,
    e_ptr,
    g_ptr,
    de_ptr,
    dg_ptr,
    h_ptr,
    e_gain_ptr,
    g_gain_ptr,
    e_parts_ptr,
    g_parts_ptr,
    M,
    N,
    stride_e,
    stride_de,
    stride_parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    WEAK: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    col, first = tl.program_id(0) * COLS, tl.program_id(1) * ROWS * STEPS
    cols = col + tl.arange(0, COLS)
    if e_gain_ptr is not None:
        e_gain = _gain_of(e_gain_ptr, e_parts_ptr, cols, N, WEAK)
    if g_gain_ptr is not None:
        g_gain = _gain_of(g_gain_ptr, g_parts_ptr, cols, N, WEAK)
    if e_parts_ptr is not None:
        e_dots = tl.zeros([ROWS, COLS], dtype=ACC)
    if g_parts_ptr is not None:
        g_dots = tl.zeros([ROWS, COLS], dtype=ACC)
    for row in range(first, tl.minimum(first + ROWS * STEPS, M), ROWS):
        dh = load_tile(Matrix(dh_ptr, M, N, N, 1), row, col, ROWS, COLS).to(ACC)
        e = load_tile(Matrix(e_ptr, M, N, stride_e, 1), row, col, ROWS, COLS).to(ACC)
        f, slope = act_and_slope(e, ACT)
        f = f.to(DTYPE).to(ACC)
        de = dh * slope
        if g_ptr is not None:
            g = load_tile(Matrix(g_ptr, M, N, stride_e, 1), row, col, ROWS, COLS).to(ACC)
            de = dh * g * slope
            dg = dh * f
            f *= g
            if g_parts_ptr is not None:
                g_dots += dg * g
            if g_gain_ptr is not None:
                dg *= g_gain
            store_tile(Matrix(dg_ptr, M, N, stride_de, 1), dg, row, col, DTYPE)
        if e_parts_ptr is not None:
            e_dots += de * e
        if e_gain_ptr is not None:
            de *= e_gain
        store_tile(Matrix(de_ptr, M, N, stride_de, 1), de, row, col, DTYPE)
        if h_ptr is not None:
            store_tile(Matrix(h_ptr, M, N, N, 1), f, row, col, DTYPE)
    part = tl.program_id(1).to(tl.int64) * stride_parts
    if e_parts_ptr is not None:
        tl.store(e_parts_ptr + part + cols, tl.sum(e_dots, 0), mask=cols < N)
    if g_parts_ptr is not None:
        tl.store(g_parts_ptr + part + cols, tl.sum(g_dots, 0), mask=cols < N)


Pair = tuple[Operand | None, Operand | None]  # of e and of g


def glu_splits(m: int) -> int:
    """How many parts ``glu_grad`` leaves of a column's sums."""
    tile = pass_tiles.glu_grad(m, dora=True)
    return triton.cdiv(m, tile.m * tile.k)


def glu_grad(
    dh: Operand,
    e: Operand,
    g: Operand | None,
    de: Operand,
    dg: Operand | None,
    *,
    act: str,
    gains: Pair = (None, None),
    parts: Pair = (None, None),
    with_h: bool = True,
) -> Launch:
    """de and dg [M, N] from dh, e and g, which they may lie over, and h over dh, if wanted; without g there is no dg.
    All are in one dtype and contiguous, but rows may be further apart in e and g, alike in both, and in de and dg.

    ``gains`` [1, N] in float32: of DoRA, which de and dg get. ``parts`` [``glu_splits``, N], whose rows may be further
    apart, alike in both: filled with those of the column sums of de * e and of dg * g, without gains. Columns whose
    gain is weak wait for it where there are parts: ``add_parts`` scales them.
    """
    m, n = dh.shape
    tile = pass_tiles.glu_grad(m, dora=any(t is not None for t in (*gains, *parts)))
    some_parts = parts[0] or parts[1]
    return launch(
        _glu_grad_kernel,
        (triton.cdiv(n, tile.n), triton.cdiv(m, tile.m * tile.k)),
        {"num_warps": tile.warps},
        dh,
        dh_ptr=dh,
        e_ptr=e,
        g_ptr=g,
        de_ptr=de,
        dg_ptr=dg,
        h_ptr=dh if with_h else None,
        e_gain_ptr=gains[0],
        g_gain_ptr=gains[1],
        e_parts_ptr=parts[0],
        g_parts_ptr=parts[1],
        M=m,
        N=n,
        stride_e=e.stride(0),
        stride_de=de.stride(0),
        stride_parts=0 if some_parts is None else some_parts.stride(0),
        ROWS=tile.m,
        COLS=tile.n,
        STEPS=tile.k,
        WEAK=weak_gain(dh.dtype),
        ACT=act,
        ACC=acc_dtype(dh.dtype),
        DTYPE=TL[dh.dtype],
    )
