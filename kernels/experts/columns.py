"""G_e = sum over an expert's rows of X^T P: the gradients of all four adapters, in parts for each chunk of rows that
``pack.collect`` adds up.

A program takes some columns of X and one chunk of the table: experts with many rows have many chunks, so that skewed
routings take no longer. X lies by rows, or by tokens and is gathered while it is read (from L2). P may be multiplied
by the routing weight on the way. With Q, also parts of X Q_e, which later become dP: X is then read once for both.

``add_rows`` adds up what lies by rows: the parts of dP, and those of the routing weight's gradient, which goes to its
slot; slots without a row get zero.
"""

import triton
import triton.language as tl

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import mma, precision, wait_for_stream
from lora_fast.kernels.experts import tiles
from lora_fast.kernels.experts.pack import Stack, rank_block
from lora_fast.kernels.experts.route import Route, span_of
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import Tile

SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["length", "S"])
def _experts_columns_kernel(
    src_ptr,
    slot_ptr,
    weight_ptr,
    p_ptr,
    q_ptr,
    chunks_ptr,
    parts_ptr,
    low_ptr,
    length,
    S,
    E,
    C,
    RANKS,
    stride_qe,
    stride_qr,
    stride_qc,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    chunk = tl.program_id(1)
    expert, first, end = span_of(chunks_ptr, chunk, length, E)
    if first >= end:
        return
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    if q_ptr is not None:
        q_at = expert.to(tl.int64) * stride_qe + ranks[None, :] * stride_qr + cols[:, None] * stride_qc
        q = tl.load(q_ptr + q_at, mask=(cols < C)[:, None], other=0.0)
    for row in range(first, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        there = rows < end
        at = rows.to(tl.int64)
        if slot_ptr is not None:
            at = tl.load(slot_ptr + rows, mask=there, other=0).to(tl.int64) // K
        t = tl.load(src_ptr + at[:, None] * C + cols[None, :], mask=there[:, None] & (cols < C)[None, :], other=0.0)
        p_at = rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
        p = tl.load(p_ptr + p_at, mask=there[:, None], other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + rows, mask=there, other=0.0)
            p = (p.to(tl.float32) * weight[:, None]).to(t.dtype)
        acc = mma(tl.trans(t), p, acc, PRECISION)
        if q_ptr is not None:
            low = mma(t, q, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            part = low_ptr + tl.program_id(0).to(tl.int64) * S * RANKS
            tl.store(part + p_at, low, mask=there[:, None])
    at = (chunk.to(tl.int64) * C + cols[:, None]) * RANKS + ranks[None, :]
    tl.store(parts_ptr + at, acc, mask=(cols < C)[:, None])


@triton.jit(do_not_specialize=["S"])
def _add_rows_kernel(
    low_ptr,
    p_ptr,
    dw_parts_ptr,
    dots_ptr,
    row_ptr,
    rows_ptr,
    dw_ptr,
    scaling,
    S,
    RANKS,
    LOW_PARTS: tl.constexpr,
    DW_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if low_ptr is not None:
        size = tl.full((), 1, tl.int64) * S * RANKS
        blocks = tl.cdiv(size, BLOCK).to(tl.int32)
        if block < blocks:
            i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = i < tl.load(rows_ptr).to(tl.int64) * RANKS
            total = tl.zeros([BLOCK], tl.float32)
            for part in range(0, LOW_PARTS):
                total += tl.load(low_ptr + part * size + i, mask=inside, other=0.0)
            tl.store(p_ptr + i, (total * scaling).to(p_ptr.dtype.element_ty), mask=inside)
        block -= blocks
    if dw_ptr is not None:
        if block >= 0:
            slots = block * BLOCK + tl.arange(0, BLOCK)
            row = tl.load(row_ptr + slots, mask=slots < S, other=-1)
            there = row >= 0
            total = tl.zeros([BLOCK], tl.float32)
            for part in range(0, DW_PARTS):
                total += tl.load(dw_parts_ptr + tl.full((), 1, tl.int64) * part * S + row, mask=there, other=0.0)
            if dots_ptr is not None:
                total += tl.load(dots_ptr + row, mask=there, other=0.0)
            tl.store(dw_ptr + slots, total.to(dw_ptr.dtype.element_ty), mask=slots < S)


def _tile(src: Operand, c: int, ranks: int, low: bool) -> Tile:
    return tiles.experts_columns(c, rank_block(ranks), dtype=src.dtype, chip=Chip.of(src.device), low=low)


def low_parts(src: Operand, ranks: int) -> int:
    """Parts of X Q_e that ``by_columns`` leaves."""
    return triton.cdiv(src.shape[1], _tile(src, src.shape[1], ranks, True).n)


def by_columns(
    src: Operand,
    p: Operand,
    parts: Operand,
    route: Route,
    experts: int,
    *,
    k: int,
    gathers: bool,
    weighted: bool = False,
    q: Stack | None = None,
    low: Operand | None = None,
) -> Launch:
    """parts [chunks, C, ranks] = X^T P for each chunk of rows, float32. X [S, C] is src, or (``gathers``) the rows of
    src [T, C] of the tokens; p [S, ranks], times each row's routing weight if ``weighted``. With q also low [parts, S,
    ranks], float32."""
    (s, ranks), c = p.shape, src.shape[1]
    tile = _tile(src, c, ranks, q is not None)
    return launch(
        _experts_columns_kernel,
        (triton.cdiv(c, tile.n), route.chunks.length, ranks // tile.r),
        tile.options,
        p,
        src_ptr=src,
        slot_ptr=route.slot if gathers else None,
        weight_ptr=route.weight if weighted else None,
        p_ptr=p,
        q_ptr=q and q.at,
        chunks_ptr=route.chunks.at,
        parts_ptr=parts,
        low_ptr=low,
        length=route.chunks.length,
        S=s,
        E=experts,
        C=c,
        RANKS=ranks,
        stride_qe=q.expert if q else 0,
        stride_qr=q.rank if q else 0,
        stride_qc=q.c if q else 0,
        K=k,
        BLOCK_M=tile.m,
        BLOCK_C=tile.n,
        BLOCK_R=tile.r,
        PRECISION=precision(src.dtype, route.chunks.rows),
    )


def add_rows(
    route: Route,
    *,
    low: Operand | None = None,
    p: Operand | None = None,
    scaling: Number | None = None,
    dw_parts: Operand | None = None,
    dots: Operand | None = None,
    dw: Operand | None = None,
) -> Launch:
    """p [S, ranks] = scaling * the sum of low [parts, S, ranks]; dw [T, K] = the sum of dw_parts [parts, S] and dots
    [S], by slots. Each where it is given."""
    s = len(route.slot)
    elements = (s * p.shape[1] if low is not None and p is not None else 0), (0 if dw is None else s)
    return launch(
        _add_rows_kernel,
        (sum(triton.cdiv(n, SUM_BLOCK) for n in elements),),
        {"num_warps": 4},
        route.slot,
        low_ptr=low,
        p_ptr=p,
        dw_parts_ptr=dw_parts,
        dots_ptr=dots,
        row_ptr=route.row,
        rows_ptr=route.rows,
        dw_ptr=dw,
        scaling=scaling,
        S=s,
        RANKS=16 if p is None else p.shape[1],
        LOW_PARTS=0 if low is None else low.shape[0],
        DW_PARTS=0 if dw_parts is None else dw_parts.shape[0],
        BLOCK=SUM_BLOCK,
    )
