"""LoRA and DoRA on an embedding E [V, N]: y = g * z with z = c E[ids] + c s A^T[ids] B^T, A [R, V], B [N, R], a factor
c of the embedding's own (Gemma's) and DoRA's gain g = m / n, n the norms of the columns of E + s (B A)^T; without DoRA
y is z.

Rows are gathered where they are needed: y is one launch, which reads a row of E for each id, and nothing of A^T[ids] or
its product is ever in memory. The backward, of P = c s (dY * g) B [M, R] in float32:

    dB = c s g * (dY^T A^T[ids]), dm = colsum(dY * z) / n: parts over some of the rows each, which one launch adds up;
    dA^T[v] = the sum of P's rows whose id is v: the ids are sorted, and a block of them sums each of its runs of equal
    ids by a product with ones and zeros. What a run has in the blocks that follow is there by then, a row for each
    block. So the order of every sum is fixed, and of however many rows a run, no program takes them one by one.

An id outside of 0 to V reads nothing, and makes its row of y NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.binding import bound_program
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    acc_dtype,
    load_tile,
    mma,
    padded_rank,
    precision,
    scalar,
    wait_for_stream,
    wide,
)
from lora_fast.kernels.norm import gains
from lora_fast.kernels.operands import Number, Operand, Scratch, launch
from lora_fast.kernels.program import Launch, Program
from lora_fast.kernels.sums import SUM_BLOCK, sum_of

MaybeTensor = torch.Tensor | None


class Rows(NamedTuple):
    """Which rows of a matrix [V, ...] a tile is gathered from, as device code sees it."""

    ids: Any  # int64
    known: Any  # whether they are ids of the matrix


@triton.jit
def _rows(ids_ptr, row, M, V, BLOCK: tl.constexpr):
    """Those of BLOCK ids from ``row`` on."""
    at = row + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < M, other=-1).to(tl.int64)
    return Rows(ids, (ids >= 0) & (ids < V))


@triton.jit
def _gathered(t, rows, col, COLS: tl.constexpr):
    """COLS columns from ``col`` on of these rows of a matrix, zero where there is no such row or column."""
    cols = col + tl.arange(0, COLS)
    ptrs = t.ptr + rows.ids[:, None] * t.stride_r + cols[None, :].to(tl.int64) * t.stride_c
    return tl.load(ptrs, mask=rows.known[:, None] & (cols[None, :] < t.cols), other=0.0)


@triton.jit
def _factors(scaling, factor_ptr, SCALING_PTR: tl.constexpr, BASE: tl.constexpr):
    """(c of the rows of E, rounded to their dtype as the embedding does, c s)."""
    s = scalar(scaling, SCALING_PTR)
    c = tl.full((), 1, tl.float32)
    if factor_ptr is not None:
        c = tl.load(factor_ptr).to(tl.float32)
        s *= c
    return c.to(BASE), s


@triton.jit
def _z_tile(
    e,
    a,
    b,
    rows,
    col,
    base_factor,
    low_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):
    """z of these rows, BLOCK_N columns of it; a [V, R], b [N, R]."""
    low = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for rank in range(0, b.cols, BLOCK_R):
        left = _gathered(a, rows, rank, BLOCK_R).to(KIND)
        low = mma(left, load_tile(b, col, rank, BLOCK_N, BLOCK_R).to(KIND).T, low, PRECISION)
    return _gathered(e, rows, col, BLOCK_N).to(ACC) * base_factor.to(ACC) + low * low_factor


@triton.jit(do_not_specialize=["M"])
def _embedding_kernel(
    ids_ptr,
    e_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    gain_ptr,
    factor_ptr,
    scaling,
    M,
    N,
    V,
    R,
    stride_ev,
    stride_en,
    stride_ar,
    stride_av,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    at, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    rows = _rows(ids_ptr, row, M, V, BLOCK_M)
    base_factor, low_factor = _factors(scaling, factor_ptr, SCALING_PTR, DTYPE)
    z = _z_tile(
        Matrix(e_ptr, V, N, stride_ev, stride_en),
        Matrix(a_ptr, V, R, stride_av, stride_ar),
        Matrix(b_ptr, N, R, stride_bn, stride_br),
        rows,
        col,
        base_factor,
        low_factor,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        ACC,
        PRECISION,
        KIND,
    )
    if gain_ptr is not None:
        z *= tl.load(gain_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    z = tl.where(rows.known[:, None], z, float("nan"))
    tl.store(
        y_ptr + at.to(tl.int64)[:, None] * N + cols[None, :], z.to(DTYPE), mask=(at < M)[:, None] & (cols < N)[None, :]
    )


@triton.jit
def _embedding_norm_kernel(
    e_ptr,
    a_ptr,
    b_ptr,
    parts_ptr,
    scaling,
    N,
    V,
    R,
    steps,
    stride_ev,
    stride_en,
    stride_ar,
    stride_av,
    stride_bn,
    stride_br,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums of squares of the columns of E + s (B A)^T over ``steps`` blocks of rows a program: parts [splits, N]."""
    wait_for_stream(PDL)
    col, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * steps
    e, a = Matrix(e_ptr, V, N, stride_ev, stride_en), Matrix(a_ptr, V, R, stride_av, stride_ar)
    b = Matrix(b_ptr, N, R, stride_bn, stride_br)
    s = scalar(scaling, SCALING_PTR)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(V, BLOCK_V))):
        low = tl.zeros([BLOCK_V, BLOCK_N], dtype=ACC)
        for rank in range(0, R, BLOCK_R):
            left = load_tile(a, step * BLOCK_V, rank, BLOCK_V, BLOCK_R).to(KIND)
            low = mma(left, load_tile(b, col, rank, BLOCK_N, BLOCK_R).to(KIND).T, low, PRECISION)
        v = load_tile(e, step * BLOCK_V, col, BLOCK_V, BLOCK_N).to(ACC) + s * low
        squares += tl.sum(v * v, 0)
    cols = col + tl.arange(0, BLOCK_N)
    tl.store(parts_ptr + tl.program_id(1) * N + cols, squares, mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _embedding_down_kernel(
    dy_ptr,
    b_ptr,
    p_ptr,
    gain_ptr,
    factor_ptr,
    scaling,
    M,
    N,
    R,
    RS,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
    PDL: tl.constexpr,
):
    """P [M, padded R]."""
    wait_for_stream(PDL)
    row, rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    _, by = _factors(scaling, factor_ptr, SCALING_PTR, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for col in range(0, N, BLOCK_N):
        b = load_tile(Matrix(b_ptr, N, R, stride_bn, stride_br), col, rank, BLOCK_N, BLOCK_R)
        if gain_ptr is not None:
            cols = col + tl.arange(0, BLOCK_N)
            b = b.to(ACC) * tl.load(gain_ptr + cols, mask=cols < N, other=0.0).to(ACC)[:, None]
        dy = load_tile(Matrix(dy_ptr, M, N, N, 1), row, col, BLOCK_M, BLOCK_N)
        acc = mma(dy.to(KIND), b.to(KIND), acc, PRECISION)
    rows, ranks = row + tl.arange(0, BLOCK_M), rank + tl.arange(0, BLOCK_R)
    p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * RS + ranks[None, :]
    tl.store(p_ptrs, acc * by, mask=(rows < M)[:, None] & (ranks < RS)[None, :])


@triton.jit(do_not_specialize=["M", "rows_each"])
def _embedding_columns_kernel(
    dy_ptr,
    ids_ptr,
    e_ptr,
    a_ptr,
    b_ptr,
    g_parts_ptr,
    dm_parts_ptr,
    factor_ptr,
    scaling,
    M,
    N,
    V,
    R,
    rows_each,
    stride_ev,
    stride_en,
    stride_ar,
    stride_av,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    PDL: tl.constexpr,
):
    """dY^T A^T[ids], parts [splits, N, R], and the columns' sums of dY * z, parts [splits, N]."""
    wait_for_stream(PDL)
    col, split, rank = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_R
    e, a = Matrix(e_ptr, V, N, stride_ev, stride_en), Matrix(a_ptr, V, R, stride_av, stride_ar)
    b = Matrix(b_ptr, N, R, stride_bn, stride_br)
    base_factor, low_factor = _factors(scaling, factor_ptr, SCALING_PTR, BASE)
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    dm = tl.zeros([BLOCK_N], dtype=ACC)
    for row in range(split * rows_each, tl.minimum(split * rows_each + rows_each, M), BLOCK_M):
        rows = _rows(ids_ptr, row, M, V, BLOCK_M)
        dy = load_tile(Matrix(dy_ptr, M, N, N, 1), row, col, BLOCK_M, BLOCK_N)
        if g_parts_ptr is not None:
            g = mma(dy.to(KIND).T, _gathered(a, rows, rank, BLOCK_R).to(KIND), g, PRECISION)
        if dm_parts_ptr is not None and rank == 0:
            z = _z_tile(e, a, b, rows, col, base_factor, low_factor, BLOCK_M, BLOCK_N, BLOCK_R, ACC, PRECISION, KIND)
            dm += tl.sum(dy.to(ACC) * z, 0)
    cols, ranks = col + tl.arange(0, BLOCK_N), rank + tl.arange(0, BLOCK_R)
    if g_parts_ptr is not None:
        at = (split.to(tl.int64) * N + cols)[:, None] * R + ranks[None, :]
        tl.store(g_parts_ptr + at, g, mask=(cols < N)[:, None] & (ranks < R)[None, :])
    if dm_parts_ptr is not None and rank == 0:
        tl.store(dm_parts_ptr + split * N + cols, dm, mask=cols < N)


@triton.jit(do_not_specialize=["splits"])
def _embedding_sums_kernel(
    g_parts_ptr,
    dm_parts_ptr,
    norm_ptr,
    gain_ptr,
    factor_ptr,
    scaling,
    db_ptr,
    dm_ptr,
    N,
    R,
    splits,
    BLOCK: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PDL: tl.constexpr,
):
    """dB [N, R] and dm [N], contiguous, from their parts."""
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if db_ptr is not None:
        size, blocks = N * R, tl.cdiv(N * R, BLOCK)
        if block < blocks:
            i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            _, by = _factors(scaling, factor_ptr, SCALING_PTR, tl.float32)
            db = sum_of(g_parts_ptr, i, splits, size, BLOCK, ACC) * by
            if gain_ptr is not None:
                db *= tl.load(gain_ptr + i // R, mask=i < size, other=0.0)
            tl.store(db_ptr + i, db.to(db_ptr.dtype.element_ty), mask=i < size)
        block -= blocks
    if dm_ptr is not None:
        if block >= 0:
            cols = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            norm = tl.load(norm_ptr + cols, mask=cols < N, other=0.0)
            total = sum_of(dm_parts_ptr, cols, splits, N, BLOCK, ACC)
            dm = tl.where(norm != 0, total / tl.where(norm != 0, norm, 1.0), 0.0)
            tl.store(dm_ptr + cols, dm.to(dm_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["M"])
def _embedding_leads_kernel(
    ids_ptr, order_ptr, p_ptr, leads_ptr, M, RS, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr
):
    """Of each block of sorted ids the sum of P's rows for its first id: leads [blocks, padded R]."""
    wait_for_stream(PDL)
    block, ranks = tl.program_id(0), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = block * BLOCK + tl.arange(0, BLOCK)
    lead = (at < M) & (tl.load(ids_ptr + at, mask=at < M, other=-1) == tl.load(ids_ptr + block * BLOCK))
    order = tl.load(order_ptr + at, mask=lead, other=0)
    p = tl.load(p_ptr + order[:, None] * RS + ranks[None, :], mask=lead[:, None] & (ranks < RS)[None, :], other=0.0)
    tl.store(leads_ptr + block * RS + ranks, tl.sum(p, 0), mask=ranks < RS)


@triton.jit(do_not_specialize=["M", "padding"])
def _embedding_runs_kernel(
    ids_ptr,
    order_ptr,
    p_ptr,
    leads_ptr,
    da_ptr,
    padding,
    M,
    V,
    R,
    RS,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """dA [R, V] at the ids whose runs begin in this block of sorted ones."""
    wait_for_stream(PDL)
    block, ranks = tl.program_id(0), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at, blocks = block * BLOCK + tl.arange(0, BLOCK), tl.cdiv(M, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < M, other=-1)
    before = tl.load(ids_ptr + at - 1, mask=(at > 0) & (at < M), other=-1)
    order = tl.load(order_ptr + at, mask=at < M, other=0)
    mask = (at < M)[:, None] & (ranks < RS)[None, :]
    p = tl.load(p_ptr + order[:, None] * RS + ranks[None, :], mask=mask, other=0.0)
    same = ids[:, None] == ids[None, :]
    bad = tl.max((p - p != 0).to(tl.int32), 1)  # rows with what is infinite or NaN, which others' zeros would spread
    spoilt = tl.max(tl.where(same, bad[None, :], 0), 1)
    p = tl.where((bad > 0)[:, None], 0.0, p)
    total = tl.dot(same.to(p.dtype), p, input_precision="ieee", out_dtype=p.dtype)
    total = tl.where((spoilt > 0)[:, None], float("nan"), total)
    last = tl.max(ids, 0)
    rest = tl.zeros([BLOCK_R], dtype=p.dtype)
    next_block = block + 1
    later = tl.load(ids_ptr + next_block * BLOCK, mask=next_block < blocks, other=-1)
    goes_on = (next_block < blocks) & (later == last)
    while goes_on:  # the last run goes on ahead
        ahead = next_block + tl.arange(0, AHEAD)
        mine = (ahead < blocks) & (tl.load(ids_ptr + ahead * BLOCK, mask=ahead < blocks, other=-1) == last)
        leads = leads_ptr + ahead[:, None] * RS + ranks[None, :]
        rest += tl.sum(tl.load(leads, mask=mine[:, None] & (ranks < RS)[None, :], other=0.0), 0)
        next_block += AHEAD
        later = tl.load(ids_ptr + next_block * BLOCK, mask=next_block < blocks, other=-1)
        goes_on = (next_block < blocks) & (later == last)
    total += tl.where((ids == last)[:, None], rest[None, :], 0.0)
    begins = (at < M) & ((at == 0) | (ids != before)) & (ids >= 0) & (ids < V) & (ids != padding)
    da_ptrs = da_ptr + ranks.to(tl.int64)[None, :] * V + ids[:, None]
    tl.store(da_ptrs, total.to(da_ptr.dtype.element_ty), mask=begins[:, None] & (ranks < R)[None, :])


def _kinds(*read: Operand) -> tuple[torch.dtype, dict[str, Any]]:
    """The dtype in which products of these are made, and what a kernel is told of it."""
    kind = read[0].dtype
    for t in read[1:]:
        kind = torch.promote_types(kind, t.dtype)
    return kind, {"ACC": acc_dtype(kind), "KIND": TL[kind]}


def _adapted(e: Operand, a: Operand, b: Operand, scaling: Operand | Number) -> dict[str, Any]:
    """What kernels are told of the embedding and its adapter, by name."""
    return {
        "e_ptr": e,
        "V": e.shape[0],
        "N": e.shape[1],
        "stride_ev": e.stride(0),
        "stride_en": e.stride(1),
        "a_ptr": a,
        "b_ptr": b,
        "scaling": scaling,
        "R": a.shape[0],
        "stride_ar": a.stride(0),
        "stride_av": a.stride(1),
        "stride_bn": b.stride(0),
        "stride_br": b.stride(1),
        "SCALING_PTR": isinstance(scaling, Operand),
    }


def rows_of_y(
    y: Operand,
    ids: Operand,
    e: Operand,
    a: Operand,
    b: Operand,
    scaling: Operand | Number,
    factor: Operand | None,
    gain: Operand | None,
) -> Launch:
    """y [M, N], contiguous, from ids [M], e [V, N], a [R, V], b [N, R], any strides; factor one element, gain [N]."""
    (m, n), r = y.shape, a.shape[0]
    kind, told = _kinds(a, b)
    tile = pass_tiles.embedding(r)
    return launch(
        _embedding_kernel,
        (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n)),
        tile.options,
        y,
        ids_ptr=ids,
        y_ptr=y,
        gain_ptr=gain,
        factor_ptr=factor,
        M=m,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        PRECISION=precision(kind, r),
        DTYPE=TL[e.dtype],
        **(told | {"ACC": acc_dtype(wide(e, a, b))}),
        **_adapted(e, a, b, scaling),
    )


def column_norms(
    norm: Operand,
    e: Operand,
    a: Operand,
    b: Operand,
    scaling: Operand | Number,
    parts: Operand,
    m: Operand | None = None,
    gain: Operand | None = None,
    round_norm: bool = False,
) -> list[Launch]:
    """The norms [N] of the columns of e [V, N] + scaling * (b a)^T, rounded to e's dtype on request, and with m [N] the
    gain [N]; by way of parts [splits, N]."""
    (v, n), r = e.shape, a.shape[0]
    kind, told = _kinds(a, b)
    tile = pass_tiles.embedding_norm(r)
    steps = triton.cdiv(triton.cdiv(v, tile.k), parts.shape[0])
    made = launch(
        _embedding_norm_kernel,
        (triton.cdiv(n, tile.n), parts.shape[0]),
        tile.options,
        e,
        parts_ptr=parts,
        steps=steps,
        BLOCK_V=tile.k,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        PRECISION=precision(kind, r),
        **(told | {"ACC": acc_dtype(wide(e, a, b))}),
        **_adapted(e, a, b, scaling),
    )
    return [made, gains(e, parts, norm, m=m, gain=gain, round_norm=round_norm)]


def down_of_dy(
    p: Operand, dy: Operand, b: Operand, scaling: Operand | Number, factor: Operand | None, gain: Operand | None
) -> Launch:
    """P [M, padded R] in float32 or better from dy [M, N], contiguous, and b [N, R]."""
    (m, n), r = dy.shape, b.shape[1]
    kind, told = _kinds(dy, b)
    tile = pass_tiles.embedding_down(r)
    return launch(
        _embedding_down_kernel,
        (triton.cdiv(m, tile.m), triton.cdiv(p.shape[1], tile.r)),
        tile.options,
        dy,
        dy_ptr=dy,
        b_ptr=b,
        p_ptr=p,
        gain_ptr=gain,
        factor_ptr=factor,
        scaling=scaling,
        M=m,
        N=n,
        R=r,
        RS=p.shape[1],
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        SCALING_PTR=isinstance(scaling, Operand),
        PRECISION=precision(kind, n),
        **told,
    )


def column_sums(
    dy: Operand,
    ids: Operand,
    e: Operand,
    a: Operand,
    b: Operand,
    scaling: Operand | Number,
    factor: Operand | None,
    g_parts: Operand | None,
    dm_parts: Operand | None,
) -> Launch:
    """dY^T A^T[ids] in parts [splits, N, R], and colsum(dY * z) in parts [splits, N], from dy [M, N], contiguous."""
    (m, n), r = dy.shape, a.shape[0]
    kind, told = _kinds(dy, a, b)
    tile = pass_tiles.embedding_columns(r)
    parts: Any = dm_parts if g_parts is None else g_parts
    return launch(
        _embedding_columns_kernel,
        (triton.cdiv(n, tile.n), parts.shape[0], 1 if g_parts is None else triton.cdiv(r, tile.r)),
        tile.options,
        dy,
        dy_ptr=dy,
        ids_ptr=ids,
        g_parts_ptr=g_parts,
        dm_parts_ptr=dm_parts,
        factor_ptr=factor,
        M=m,
        rows_each=triton.cdiv(triton.cdiv(m, tile.m), parts.shape[0]) * tile.m,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=tile.r,
        PRECISION=precision(kind, m),
        BASE=TL[e.dtype],
        **told,
        **_adapted(e, a, b, scaling),
    )


def sums_of_parts(
    dy: Operand,
    count: int,
    g_parts: Operand | None,
    dm_parts: Operand | None,
    scaling: Operand | Number,
    factor: Operand | None,
    norm: Operand | None,
    gain: Operand | None,
    db: Operand | None,
    dm: Operand | None,
) -> Launch:
    """db [N, R] and dm [N], contiguous, from ``count`` parts each, as ``column_sums`` makes them."""
    n, r = dy.shape[1], 1 if db is None else db.shape[1]
    sizes = (0 if db is None else n * r), (0 if dm is None else n)
    return launch(
        _embedding_sums_kernel,
        (sum(triton.cdiv(size, SUM_BLOCK) for size in sizes),),
        {"num_warps": 4},
        dy,
        g_parts_ptr=g_parts,
        dm_parts_ptr=dm_parts,
        norm_ptr=norm,
        gain_ptr=gain,
        factor_ptr=factor,
        scaling=scaling,
        db_ptr=db,
        dm_ptr=dm,
        N=n,
        R=r,
        splits=count,
        BLOCK=SUM_BLOCK,
        SCALING_PTR=isinstance(scaling, Operand),
        ACC=acc_dtype((g_parts or dm_parts).dtype),  # type: ignore[union-attr]
    )


def runs_of_ids(da: Operand, ids: Operand, order: Operand, p: Operand, leads: Operand, padding: Number) -> list[Launch]:
    """dA [R, V], contiguous and zero before, from sorted ids [M] and their order, P [M, padded R]; by way of leads
    [blocks, padded R]. The id ``padding`` gets nothing."""
    (r, v), (m, rs) = da.shape, p.shape
    tile = pass_tiles.embedding_runs(r)
    grid = triton.cdiv(m, tile.m), triton.cdiv(rs, tile.r)
    read = {"ids_ptr": ids, "order_ptr": order, "p_ptr": p, "leads_ptr": leads, "M": m, "RS": rs}
    blocks = {"BLOCK": tile.m, "BLOCK_R": tile.r}
    return [
        launch(_embedding_leads_kernel, grid, tile.options, p, **read, **blocks),
        launch(
            _embedding_runs_kernel,
            grid,
            tile.options,
            p,
            da_ptr=da,
            V=v,
            R=r,
            padding=padding,
            AHEAD=64,
            **read,
            **blocks,
        ),
    ]


class Needs(NamedTuple):
    """Whose gradients a backward makes."""

    a: bool = True
    b: bool = True
    m: bool = False


ADAPTER = Needs()


@dataclass(eq=False)
class Problem:
    """Calls that are alike in the dtypes, shapes and strides of their tensors, and the programs made for them."""

    round_norm: bool = False
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)


class Forward(NamedTuple):
    """What a forward reads and fills: ids [M] of 32 or 64 bits, e [V, N], a [R, V], b [N, R] in any float dtypes and
    strides, a factor of one element, m [N]; y [M, N] in e's dtype, norm and gain [N] of DoRA."""

    e: Any
    ids: Any
    a: Any
    b: Any
    scaling: Any
    factor: Any
    m: Any
    y: Any
    norm: Any
    gain: Any
    rest: tuple = ()


class Backward(NamedTuple):
    """What a backward reads and fills: dy [M, N], contiguous, the ids and how they are sorted, the rest as a forward's;
    da [R, V], zero before, db [N, R], dm [N], each contiguous, or None if it is not needed."""

    dy: Any
    ids: Any
    found: Any
    order: Any
    e: Any
    a: Any
    b: Any
    scaling: Any
    factor: Any
    norm: Any
    gain: Any
    padding: Any
    da: Any
    db: Any
    dm: Any
    rest: tuple = ()


def forward_launches(at: Forward, problem: Problem) -> list[Launch]:
    e, a, b, launches = at.e, at.a, at.b, []
    if at.m is not None:
        (v, n), tile = e.shape, pass_tiles.embedding_norm(len(a))
        count = pass_tiles.splits(n, triton.cdiv(v, tile.k), tile=tile, chip=Chip.of(e.device))
        parts = Scratch(e.device).part((count, n), wide(e, a, b))
        launches = column_norms(at.norm, e, a, b, at.scaling, parts, at.m, at.gain, problem.round_norm)
    if len(at.ids):
        launches.append(rows_of_y(at.y, at.ids, e, a, b, at.scaling, at.factor, at.gain))
    return launches


def backward_launches(at: Backward, problem: Problem) -> list[Launch]:
    dy, e, a, b, by, factor = at.dy, at.e, at.a, at.b, at.scaling, at.factor
    (m, n), r, kind = dy.shape, len(a), wide(dy, a, b)
    scratch, launches = Scratch(dy.device), []
    if at.da is not None:
        p = scratch.part((m, padded_rank(r)), kind)
        leads = scratch.part((triton.cdiv(m, pass_tiles.embedding_runs(r).m), padded_rank(r)), kind)
        launches.append(down_of_dy(p, dy, b, by, factor, at.gain))
        launches += runs_of_ids(at.da, at.found, at.order, p, leads, at.padding)
    if at.db is not None or at.dm is not None:
        tile = pass_tiles.embedding_columns(r)
        columns, steps = n if at.db is None else n * triton.cdiv(r, tile.r), triton.cdiv(m, tile.m)
        count = pass_tiles.splits(columns, steps, tile=tile, chip=Chip.of(dy.device))
        g_parts = None if at.db is None else scratch.part((count, n, r), kind)
        dm_parts = None if at.dm is None else scratch.part((count, n), kind)
        launches.append(column_sums(dy, at.ids, e, a, b, by, factor, g_parts, dm_parts))
        launches.append(sums_of_parts(dy, count, g_parts, dm_parts, by, factor, at.norm, at.gain, at.db, at.dm))
    return launches


def forward(
    problem: Problem,
    ids: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    factor: MaybeTensor = None,
    m: MaybeTensor = None,
) -> tuple[torch.Tensor, MaybeTensor, MaybeTensor]:
    """(y [M, N], norm, gain), as :class:`Forward` says."""
    y, norm, gain = weight.new_empty(ids.numel(), weight.shape[1]), None, None
    if m is not None:
        norm = weight.new_empty(weight.shape[1], dtype=wide(weight, a, b))
        gain = torch.empty_like(norm)
    if m is not None or y.numel():
        program, bound = bound_program(
            problem, (forward_launches,), Forward, (weight, ids, a, b, scaling, factor, m, y, norm, gain)
        )
        program.run(bound)
    return y, norm, gain


def backward(
    problem: Problem,
    dy: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    factor: MaybeTensor = None,
    norm: MaybeTensor = None,
    gain: MaybeTensor = None,
    *,
    padding: int = -1,
    needs: Sequence[bool] = ADAPTER,
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
    """(dA [R, V], dB [N, R], dm [N]) in the dtypes of a, b and in float32 or better, each None if not needed; dy and
    the rest as :class:`Backward` says. dA is zero at the id ``padding``, as torch has it."""
    of_a, of_b, of_m = needs
    n, empty = dy.shape[1], not dy.numel()
    da = a.new_zeros(a.shape) if of_a else None
    db = (b.new_zeros if empty else b.new_empty)(b.shape) if of_b else None
    kind = wide(dy, a, b) if of_m else None
    dm = (dy.new_zeros if empty else dy.new_empty)(n, dtype=kind) if of_m else None
    if not empty and any(needs):
        found = order = None
        if of_a:
            found, order = torch.sort(ids, stable=True)
        given = dy, ids, found, order, weight, a, b, scaling, factor, norm, gain, padding, da, db, dm
        program, bound = bound_program(problem, (backward_launches, *needs), Backward, given)
        program.run(bound)
    return da, db, dm
