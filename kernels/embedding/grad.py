"""The gradients of an embedding's adapter (see rows.py for the equations)."""

from typing import Any

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, mma, precision, wait_for_stream
from lora_fast.kernels.embedding.gather import Adapted, factors, gathered, kinds_of, rows_of, told_of, z_tile
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import SUM_BLOCK, Summed, sum_of


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
    _, by = factors(scaling, factor_ptr, SCALING_PTR, tl.float32)
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
    base_factor, low_factor = factors(scaling, factor_ptr, SCALING_PTR, BASE)
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    dm = tl.zeros([BLOCK_N], dtype=ACC)
    for row in range(split * rows_each, tl.minimum(split * rows_each + rows_each, M), BLOCK_M):
        rows = rows_of(ids_ptr, row, M, V, BLOCK_M)
        dy = load_tile(Matrix(dy_ptr, M, N, N, 1), row, col, BLOCK_M, BLOCK_N)
        if g_parts_ptr is not None:
            g = mma(dy.to(KIND).T, gathered(a, rows, rank, BLOCK_R).to(KIND), g, PRECISION)
        if dm_parts_ptr is not None and rank == 0:
            of = Adapted(e, a, b, base_factor, low_factor)
            z = z_tile(of, rows, col, BLOCK_N, BLOCK_R, ACC, PRECISION, KIND)
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
            _, by = factors(scaling, factor_ptr, SCALING_PTR, tl.float32)
            db = sum_of(Summed(g_parts_ptr, splits, size), i, BLOCK, ACC) * by
            if gain_ptr is not None:
                db *= tl.load(gain_ptr + i // R, mask=i < size, other=0.0)
            tl.store(db_ptr + i, db.to(db_ptr.dtype.element_ty), mask=i < size)
        block -= blocks
    if dm_ptr is not None:
        if block >= 0:
            cols = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            norm = tl.load(norm_ptr + cols, mask=cols < N, other=0.0)
            total = sum_of(Summed(dm_parts_ptr, splits, N), cols, BLOCK, ACC)
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


def down_of_dy(
    p: Operand, dy: Operand, b: Operand, scaling: Operand | Number, factor: Operand | None, gain: Operand | None
) -> Launch:
    """P [M, padded R] in float32 or better from dy [M, N], contiguous, and b [N, R]."""
    (m, n), r = dy.shape, b.shape[1]
    kind, told = kinds_of(dy, b)
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
    kind, told = kinds_of(dy, a, b)
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
        **told_of(e, a, b, scaling),
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
    *,
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
