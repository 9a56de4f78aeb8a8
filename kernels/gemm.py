"""out = g * (X W' + [mask *] P Q') + bias: one kernel body for y = g * (x W^T + S B^T) + bias, with DoRA's gain g or
without, and for dX = dY W + mask * (dS A).

X [M, C], W [N, C] (W_T) or [C, N], P [M, R], Q [N, R] (W_T) or [R, N]. A layer whose W is stored as [K, N] (a turned
base) has the other one of the two.
The low-rank product is the first step (or more, of BLOCK_C ranks each) of the same pipelined contraction: its operands
come from P and Q instead of X and W, and after it a dropout mask is applied to the accumulator, which then goes on with
the base product.

Over an fp8 base, X and W are e4m3 with a scale for each row of X and each of W, and W is given with the contraction
along its rows for dX, too. The accumulator begins with the 16-bit low-rank product over these scales, which are powers
of two, and the epilogue multiplies by them. Under a mask the low-rank product is made in the epilogue.

Where each row has an adapter of its own among many, P's row is zero but for that one's ranks, and a tile takes those
units of ranks alone that its rows use (``Units``): its first steps follow from a table.

Persistent: a program walks over tiles of the result in one flat loop over all their steps, so that the loads of the
next tile are under way while this one is stored. The accumulator is touched outside the products in one place only
(``turn``): where ptxas finds two, it makes all products wait for each other.
"""

from dataclasses import replace
from typing import Any, Generic, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    FP8,
    TL,
    Bits,
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
from lora_fast.kernels.launchers import INTERPRETED
from lora_fast.kernels.operands import Operand, T, Tiles, launch, run
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import tma_fits

MIXED = tl.constexpr(-2)  # see ``Own``
GROUP_M = 16  # row blocks that are walked together; 8 and 12 are no worse


@triton.jit
def tile_of(tile, grid_m, grid_n, GROUP_M: tl.constexpr):
    """Where a tile lies (the last one for those past it). Walk GROUP_M row blocks at a time, so that neighbouring
    programs share tiles of X and W in the cache."""
    tile = tl.minimum(tile, grid_m * grid_n - 1)
    group = tile // (GROUP_M * grid_n)
    first = group * GROUP_M
    size = tl.minimum(grid_m - first, GROUP_M)
    return first + (tile % size), (tile % (GROUP_M * grid_n)) // size


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


class Epilogue(NamedTuple):
    """What becomes of a tile, each None where it does not: to z goes the tile as it is before gain and bias; ``own`` is
    of ``Own``, None where there is one row of gains."""

    z: Any  # a pointer or a descriptor
    gain_ptr: Any
    own: Any
    bias_ptr: Any


@triton.jit
def _store(out, of, acc, row, col, ADDS: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr):
    """The epilogue of a tile or a part of its columns."""
    cols = col + tl.arange(0, acc.shape[1])
    gained, shifted = cols < out.cols, cols < out.cols
    if ADDS:
        acc += load_tile(out, row, col, acc.shape[0], acc.shape[1], TMA).to(acc.dtype)
    if of.z is not None:
        store_tile(Matrix(of.z, out.rows, out.cols, out.cols, 1), acc, row, col, DTYPE, TMA)
    gain_ptr = of.gain_ptr
    if of.own is not None:
        gain_ptr += of.own.to(tl.int64) * out.cols
        gained, shifted = gained & (of.own >= 0), shifted & (of.own > MIXED)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + cols, mask=gained, other=1.0).to(acc.dtype)[None, :]
    if of.bias_ptr is not None:
        acc += tl.load(of.bias_ptr + cols, mask=shifted, other=0.0).to(acc.dtype)[None, :]
    store_tile(out, acc, row, col, DTYPE, TMA)


@triton.jit
def _part(ptr, first, end, SIZE: tl.constexpr):
    """SIZE elements of a vector from ``first`` on, ones past its end."""
    i = first + tl.arange(0, SIZE)
    return tl.load(ptr + i, mask=i < end, other=1.0)


class Low(NamedTuple):
    """The two matrices of a low-rank product P Q'."""

    p: Any
    q: Any


class Scales(NamedTuple):
    """Of the rows of an e4m3 x and of those of w: pointers, or a tile's."""

    x: Any
    w: Any


class Masked(NamedTuple):
    """The constants of ``_store_masked``."""

    BLOCK_R: Any
    RANK_STEPS: Any
    Q_T: Any
    ADDS: Any
    PRECISION: Any
    DTYPE: Any
    TMA: Any


@triton.jit
def mask_of_tile(bits, row, col, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The mask words of a tile or a part of its columns."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), bits.rows - 1)
    return mask_words(bits.ptr, rows, col, bits.stride, WIDTH)


@triton.jit
def _ranks(
    low,
    row,
    col,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    Q_T: tl.constexpr,
    TMA: tl.constexpr = False,
):
    """A tile's rows of P and columns of Q', BLOCK_R ranks of them."""
    a = load_tile(low.p, row, rank, BLOCK_M, BLOCK_R, TMA)
    if Q_T:
        b = load_tile(low.q, col, rank, BLOCK_N, BLOCK_R, TMA).T
    else:
        b = load_tile(low.q, rank, col, BLOCK_R, BLOCK_N, TMA)
    return a, b


@triton.jit
def _store_masked(out, acc, low, bits, scales, row, col, by):
    """A tile of an fp8 product under a mask, a part of its columns at a time: scales, and their low-rank product."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    PIECES: tl.constexpr = 4 if acc.shape[1] >= 128 else 2  # that fit the registers beside a low-rank product
    WIDTH: tl.constexpr = acc.shape[1] // PIECES
    left, right = halves(acc)
    for i in tl.static_range(PIECES):
        piece = left if i < PIECES // 2 else right
        if PIECES == 4:
            first, second = halves(piece)
            piece = first if i % 2 == 0 else second
        added = tl.zeros([BLOCK_M, WIDTH], dtype=acc.dtype)
        for step in tl.static_range(by.RANK_STEPS):  # at run time it would make ptxas serialise the base product
            a, b = _ranks(low, row, col, step * by.BLOCK_R, BLOCK_M, WIDTH, by.BLOCK_R, by.Q_T, by.TMA)
            added = mma(a, b, added, by.PRECISION)
        added = masked(added, mask_of_tile(bits, row, col, BLOCK_M, WIDTH))
        x_scale = _part(scales.x, row, out.rows, BLOCK_M).to(acc.dtype)
        w_scale = _part(scales.w, col, out.cols, WIDTH).to(acc.dtype)
        piece = piece * x_scale[:, None] * w_scale[None, :] + added
        if by.ADDS:
            piece += load_tile(out, row, col, BLOCK_M, WIDTH, by.TMA).to(acc.dtype)
        store_tile(out, piece, row, col, by.DTYPE, by.TMA)
        col += WIDTH


@triton.jit
def _over(t, scale, AXIS: tl.constexpr, KIND: tl.constexpr):
    """t divided by one power of two for each of its rows (AXIS 1) or columns, which is exact."""
    return (t.to(tl.float32) * (1 / tl.expand_dims(scale, AXIS))).to(KIND)


@triton.jit
def _low_rank(
    first,
    scales,
    low,
    row,
    col,
    Q_T: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):
    """P Q' of a tile over its scales: where an fp8 product begins. ``first``: the first ranks of both."""
    a, b = first
    BLOCK_M: tl.constexpr = a.shape[0]
    BLOCK_R: tl.constexpr = a.shape[1]
    BLOCK_N: tl.constexpr = b.shape[1]
    acc = mma(
        _over(a, scales.x, 1, KIND), _over(b, scales.w, 0, KIND), tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC), PRECISION
    )
    if low.p.cols > BLOCK_R:
        for rank in tl.range(BLOCK_R, low.p.cols, BLOCK_R, num_stages=1):
            a, b = _ranks(low, row, col, rank, BLOCK_M, BLOCK_N, BLOCK_R, Q_T)
            acc = mma(_over(a, scales.x, 1, KIND), _over(b, scales.w, 0, KIND), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    x,
    w,
    p,
    q,
    out,
    z,
    gain_ptr,
    bias_ptr,
    bits_ptr,
    x_scale_ptr,
    w_scale_ptr,
    units_ptr,
    own_ptr,
    M,
    N,
    C,
    R,
    stride_units,
    stride_xm,
    stride_xc,
    stride_wr,
    stride_wc,
    stride_p,
    stride_qr,
    stride_qc,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    W_T: tl.constexpr,
    Q_T: tl.constexpr,
    ADDS: tl.constexpr,
    TMA: tl.constexpr,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    FP8: tl.constexpr = x_scale_ptr is not None
    MASK: tl.constexpr = bits_ptr is not None
    LOW_FIRST: tl.constexpr = FP8 and not MASK
    low = Low(Matrix(p, M, R, stride_p, 1), Matrix(q, N if Q_T else R, R if Q_T else N, stride_qr, stride_qc))
    whole_out = Matrix(out, M, N, N, 1)
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    UNITS: tl.constexpr = units_ptr is not None
    n_rank = 0 if FP8 else tl.cdiv(R, BLOCK_C) * BLOCK_C
    end = n_rank + tl.cdiv(C, BLOCK_C) * BLOCK_C
    tile = tl.program_id(0) - PROGRAMS
    mine = tl.cdiv(grid_m * grid_n - tl.program_id(0), PROGRAMS)
    steps = mine * (end // BLOCK_C)
    if UNITS:  # a tile takes the units of ranks that its rows use
        steps = mine * tl.cdiv(C, BLOCK_C)
        for first in range(0, mine, 64):
            more = first + tl.arange(0, 64)
            of, _ = tile_of(tl.program_id(0) + more * PROGRAMS, grid_m, grid_n, GROUP_M)
            counts = tl.load(units_ptr + of * BLOCK_M // UNIT_ROWS * stride_units, mask=more < mine, other=0)
            steps += tl.sum(counts, 0) * (UNIT // BLOCK_C)
    c = end - BLOCK_C
    row = 0
    col = 0
    pid_m, pid_n = tile_of(tl.program_id(0), grid_m, grid_n, GROUP_M)
    row_next = pid_m * BLOCK_M
    col_next = pid_n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    words, x_scale, w_scale = 0, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    if MASK and not FP8:
        words = mask_of_tile(Bits(bits_ptr, stride_bits, M), row_next, col_next, BLOCK_M, BLOCK_N)
    if LOW_FIRST:
        x_scale, w_scale = _part(x_scale_ptr, row_next, M, BLOCK_M), _part(w_scale_ptr, col_next, N, BLOCK_N)
        p0, q0 = _ranks(low, row_next, col_next, 0, BLOCK_M, BLOCK_N, BLOCK_R, Q_T)
        acc = _low_rank((p0, q0), Scales(x_scale, w_scale), low, row_next, col_next, Q_T, ACC, PRECISION, KIND)
    for _ in range(0, steps):
        c += BLOCK_C
        if c == end:
            c = 0
            tile += PROGRAMS
            pid_m, pid_n = tile_of(tile, grid_m, grid_n, GROUP_M)
            row = pid_m * BLOCK_M
            col = pid_n * BLOCK_N
            if UNITS:
                n_rank = tl.load(units_ptr + row // UNIT_ROWS * stride_units) * UNIT
                end = n_rank + tl.cdiv(C, BLOCK_C) * BLOCK_C
        xs, ws, at, to = x, w, c - n_rank, C
        xr, xc, wr, wc = stride_xm, stride_xc, stride_wr, stride_wc
        if not FP8:
            if c < n_rank:
                xs, ws, at, to = p, q, c, R
                if UNITS:
                    unit = tl.load(units_ptr + row // UNIT_ROWS * stride_units + 1 + c // UNIT)
                    at = unit * UNIT + c % UNIT
                xr, xc, wr, wc = stride_p, 1, stride_qr, stride_qc
        a = load_tile(Matrix(xs, M, to, xr, xc), row, at, BLOCK_M, BLOCK_C, TMA)
        if W_T:
            b = load_tile(Matrix(ws, N, to, wr, wc), col, at, BLOCK_N, BLOCK_C, TMA).T
        else:
            b = load_tile(Matrix(ws, to, N, wr, wc), at, col, BLOCK_C, BLOCK_N, TMA)
        acc = mma(a, b, acc, PRECISION)
        if MASK and not FP8:
            turn = (c == n_rank - BLOCK_C) | (c == end - BLOCK_C)
        else:
            turn = c == end - BLOCK_C
        if turn:
            pid_m, pid_n = tile_of(tile + PROGRAMS, grid_m, grid_n, GROUP_M)
            row_next = pid_m * BLOCK_M
            col_next = pid_n * BLOCK_N
            if c == end - BLOCK_C:
                if LOW_FIRST:  # comes in while this tile is stored
                    x_next, w_next = _part(x_scale_ptr, row_next, M, BLOCK_M), _part(w_scale_ptr, col_next, N, BLOCK_N)
                    p0, q0 = _ranks(low, row_next, col_next, 0, BLOCK_M, BLOCK_N, BLOCK_R, Q_T)
                    acc *= x_scale.to(ACC)[:, None]
                    acc *= late(w_scale).to(ACC)[None, :]
                    x_scale, w_scale = x_next, w_next
                if FP8 and MASK:
                    _store_masked(
                        whole_out,
                        acc,
                        low,
                        Bits(bits_ptr, stride_bits, M),
                        Scales(x_scale_ptr, w_scale_ptr),
                        row,
                        col,
                        Masked(BLOCK_R, RANK_STEPS, Q_T, ADDS, PRECISION, DTYPE, TMA),
                    )
                else:
                    own = None
                    if own_ptr is not None:
                        own = tl.load(own_ptr + row // OWN_ROWS)
                    left_half, right_half = halves(acc)
                    epilogue = Epilogue(z, gain_ptr, own, bias_ptr)
                    _store(whole_out, epilogue, left_half, row, col, ADDS, DTYPE, TMA)
                    _store(whole_out, epilogue, right_half, row, col + BLOCK_N // 2, ADDS, DTYPE, TMA)
                if LOW_FIRST:
                    acc = _low_rank(
                        (late(p0), late(q0)),
                        Scales(late(x_scale), late(w_scale)),
                        low,
                        row_next,
                        col_next,
                        Q_T,
                        ACC,
                        PRECISION,
                        KIND,
                    )
                else:
                    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            elif MASK and not FP8:
                acc = masked(acc, words)
                words = mask_of_tile(Bits(bits_ptr, stride_bits, M), row_next, col_next, BLOCK_M, BLOCK_N)


class Units(NamedTuple, Generic[T]):
    """Which ranks a product's rows use: ``at`` [blocks of ``rows`` rows, 1 + units] int32, how many units of ``ranks``
    ranks, at least one, then which."""

    at: T
    rows: int
    ranks: int


class Own(NamedTuple, Generic[T]):
    """The row of gains that each block of ``rows`` rows has: ``at`` [blocks] int32, -1 for none, and MIXED where its
    rows have several, or some have none: there the sum is left as it is before gain and bias."""

    at: T
    rows: int


def product(
    x: Operand,
    w: Operand,
    p: Operand | None,
    q: Operand | None,
    out: Operand,
    *,
    transposed: bool,
    bias: Operand | None = None,
    bits: Operand | None = None,
    gain: Operand | None = None,
    own: Own[Operand] | None = None,
    z: Operand | None = None,
    adds: bool = False,
    x_scale: Operand | None = None,
    w_scale: Operand | None = None,
    units: Units[Operand] | None = None,
) -> Launch:
    """out = gain * (x w^T + p q^T) + bias if transposed (w [N, C], q [N, R]), else x w + mask * (p q) ([C, N], [R, N]).

    x [M, C], w, p [M, padded R] (or columns of a wider matrix) and q in one dtype, rows of p and q contiguous; bits are
    of a mask of out's shape (transposed has none). Without p and q there is no low-rank product. With ``own`` a
    block of rows has one row of many gains [adapters, N]. With z, [M, N] and contiguous, that is filled with
    the sum before gain and bias. ``adds``: to what out holds. Where w and q are ``turned``, their columns contiguous
    and not their rows, they are read as their transposes. With scales, [M] of x's rows and [N] of w's, x and w are
    e4m3, w [N, C] in both cases, p and q and out in a wider dtype. With ``units`` each tile takes some of the ranks
    alone.
    """
    (m, c), n, r = x.shape, out.shape[1], 0 if q is None else q.shape[transposed]
    if p is None or q is None:
        p, q = x, w  # of which nothing is read as such
    fp8, kind, masked = x.dtype == FP8, out.dtype, bits is not None
    q_t, w_t = transposed, transposed or fp8
    if w.turned and q.turned:
        w, q, q_t, w_t = w.t(), q.t(), not q_t, not w_t
    exact, tma = precision(kind, r if fp8 else c), tma_fits(x, w, out, q)
    chip = Chip.of(x.device)
    tile = tiles.product(
        m, n, dtype=x.dtype, kind=kind, chip=chip, tma=tma, masked=masked, exact=exact, keep_z=z is not None, r=r
    )
    if units is not None:  # of which a step is a part
        tile = replace(tile, k=min(tile.k, units.ranks))
    bm, bn, bc, br, programs = tile.m, tile.n, tile.k, tile.r, int(chip.processors * tile.fill)
    # float16 over a scale leaves its range; beside an fp8 product bfloat16's digits are enough.
    over = torch.float32 if INTERPRETED else torch.bfloat16
    steps = triton.cdiv(r, br) if fp8 and masked else 0
    read: dict[str, Operand | Tiles | None] = {"x": x, "w": w, "p": p, "q": q, "out": out, "z": z}
    if tma:
        stored, left, right = (
            [bm, bn // (4 if steps else 2)],
            [bm, bc],
            [bn, bc] if w_t else [bc, bn],
        )
        read |= {"x": Tiles(x, left), "w": Tiles(w, right), "out": Tiles(out, stored)}
        if steps:
            left, right = [bm, br], [br, bn // 4]
        if steps or not fp8:
            read |= {"p": Tiles(p, left), "q": Tiles(q, right)}
        if z is not None:
            read["z"] = Tiles(z, stored)
    return launch(
        _gemm_kernel,
        (min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn)),),
        tile.options,
        x,
        **read,
        gain_ptr=gain,
        bias_ptr=bias,
        bits_ptr=bits,
        x_scale_ptr=x_scale,
        w_scale_ptr=w_scale,
        units_ptr=units and units.at,
        own_ptr=own and own.at,
        M=m,
        N=n,
        C=c,
        R=r,
        stride_units=0 if units is None else units.at.stride(0),
        stride_xm=x.stride(0),
        stride_xc=x.stride(1),
        stride_wr=w.stride(0),
        stride_wc=w.stride(1),
        stride_p=p.stride(0),
        stride_qr=q.stride(0),
        stride_qc=q.stride(1),
        stride_bits=triton.cdiv(n, 32) if masked else 0,
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_C=bc,
        BLOCK_R=br,
        GROUP_M=GROUP_M,
        PROGRAMS=programs,
        RANK_STEPS=steps,
        UNIT=0 if units is None else units.ranks,
        UNIT_ROWS=0 if units is None else units.rows,
        OWN_ROWS=0 if own is None else own.rows,
        W_T=w_t,
        Q_T=q_t,
        ADDS=adds,
        TMA=tma,
        KIND=TL[over if kind == torch.float16 else kind],
        ACC=acc_dtype(kind),
        PRECISION=exact,
        DTYPE=TL[kind],
    )


def gemm(x: torch.Tensor, w: torch.Tensor, p: torch.Tensor, q: torch.Tensor, **others: Any) -> torch.Tensor:
    """The result of ``product``, which says what else it takes."""
    by_rows = others["transposed"] or x.dtype == FP8
    out = p.new_empty(x.shape[0], w.shape[0 if by_rows else 1])
    if x.shape[0]:
        run(product, out=out, x=x, w=w, p=p, q=q, **others)
    return out
