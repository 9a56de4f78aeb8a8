"""X = source[token] and P = scaling * X Q_e, by rows of experts: the gather pays for P. Also <X, bias_e> of each row:
what a bias of y adds to the gradient of the routing weight.

Forward: x and A of the first projection; the activation and A of the second, which lie by rows already. Backward: the
gradient of the output and B of the second projection, the other way round.

A program takes some rows of a tile of the table, and walks over all columns. Rows go to their expert only: what lies
past an expert's end is neither read nor written.
"""

import triton
import triton.language as tl

from lora_fast.kernels.common import late, mma, precision, wait_for_stream
from lora_fast.kernels.experts import tiles
from lora_fast.kernels.experts.pack import Stack, rank_block
from lora_fast.kernels.experts.route import Route, span_of
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch


@triton.jit(do_not_specialize=["length"])
def _experts_rows_kernel(
    src_ptr,
    slot_ptr,
    tiles_ptr,
    q_ptr,
    bias_ptr,
    out_ptr,
    p_ptr,
    dots_ptr,
    scaling,
    length,
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
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    expert, first, end = span_of(tiles_ptr, tl.program_id(0) // PIECES, length, E)
    first += (tl.program_id(0) % PIECES) * BLOCK_M
    if first >= end:
        return
    rank = tl.program_id(1) * BLOCK_R
    rows, ranks = first + tl.arange(0, BLOCK_M), rank + tl.arange(0, BLOCK_R)
    there = rows < end
    at = rows.to(tl.int64)
    if slot_ptr is not None:
        at = tl.load(slot_ptr + rows, mask=there, other=0).to(tl.int64) // K
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    dots = tl.zeros([BLOCK_M, BLOCK_C // 8], tl.float32)  # each thread adds up what it holds
    for col in range(0, C, BLOCK_C):
        cols = col + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (cols < C)[None, :]
        t = tl.load(src_ptr + at[:, None] * C + cols[None, :], mask=inside, other=0.0)
        if out_ptr is not None:
            tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], t, mask=inside & (rank == 0))
        if q_ptr is not None:
            q_at = expert.to(tl.int64) * stride_qe + ranks[None, :] * stride_qr + cols[:, None] * stride_qc
            q = tl.load(q_ptr + q_at, mask=(cols < C)[:, None], other=0.0)
            acc = mma(t, q, acc, PRECISION)
            if out_ptr is not None:
                acc = late(acc)  # Triton 3.7 loads the next tile over one that is stored, too, while it is multiplied
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert * C + cols, mask=cols < C, other=0.0).to(tl.float32)
            dots += tl.sum(tl.reshape(t.to(tl.float32) * bias[None, :], (BLOCK_M, BLOCK_C // 8, 8)), 2)
    if q_ptr is not None:
        p_at = rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
        tl.store(p_ptr + p_at, (acc * scaling).to(p_ptr.dtype.element_ty), mask=there[:, None])
    if bias_ptr is not None:
        tl.store(dots_ptr + rows, tl.sum(dots, 1), mask=there)


def by_rows(
    src: Operand,
    route: Route,
    experts: int,
    *,
    k: int,
    gathers: bool,
    out: Operand | None = None,
    q: Stack | None = None,
    p: Operand | None = None,
    scaling: Number | None = None,
    bias: Operand | None = None,
    dots: Operand | None = None,
) -> Launch:
    """out [S, C] = src [T, C] of each row's token (if ``gathers``, else src is [S, C]); p [S, padded ranks] = scaling *
    that times q; dots [S] = that times bias [E, C], float32. Each where it is given."""
    c, ranks = src.shape[1], 16 if p is None else p.shape[1]
    tile = tiles.experts_rows(c, rank_block(ranks), dtype=src.dtype)
    rows = min(tile.m, route.tiles.rows)
    pieces = route.tiles.rows // rows
    return launch(
        _experts_rows_kernel,
        (route.tiles.length * pieces, ranks // tile.r),
        tile.options,
        route.slot,
        src_ptr=src,
        slot_ptr=route.slot if gathers else None,
        tiles_ptr=route.tiles.at,
        q_ptr=q and q.at,
        bias_ptr=bias,
        out_ptr=out,
        p_ptr=p,
        dots_ptr=dots,
        scaling=scaling,
        length=route.tiles.length,
        E=experts,
        C=c,
        RANKS=ranks,
        stride_qe=q.expert if q else 0,
        stride_qr=q.rank if q else 0,
        stride_qc=q.c if q else 0,
        K=k,
        BLOCK_M=rows,
        BLOCK_C=min(tile.k, max(16, triton.next_power_of_2(c))),
        BLOCK_R=tile.r,
        PIECES=pieces,
        PRECISION=precision(src.dtype, c),
    )
