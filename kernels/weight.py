"""The adapted weight itself: LoRA's V = W + s B A, DoRA's m V / |V| (0 where |V| = 0), |V| by row.

The same sum with activations in the weight's place, X + P Q^T, and a bias to each row, is the second half of a
bottleneck adapter (lora_fast/ops/bottleneck.py).

Forward, one launch: a program owns BLOCK_N rows. For DoRA it walks over K for the norms (``row_norm``) and once more
for the result, when its rows of W are still in the cache; for LoRA once. B A is made by matrix instructions, tile by
tile in registers; the sum is float32 and rounded once.

Backward, G the result's gradient, the norm n a constant, g = m / n (1 for LoRA):
    dA = s B^T (g G),  dB = s g (G A^T),  dW = g G,  dm = rowsum(G V) / n = (rowsum(G W) + rowsum((s G A^T) B)) / n.
One launch that reads G (and W for DoRA) once and never forms V: a program owns BLOCK_K columns, steps through its share
of the rows with dA in registers, and stores for each step what its columns give to dB and dm. No atomics: the parts lie
in memory and are summed in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, mma, precision, store_tile, wait_for_stream, wide
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.norm import LowRank, constants, gain_of, low_rank_tile, row_norm
from lora_fast.kernels.operands import Number, Operand, launch, run
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import Tile


@triton.jit
def _weight_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    m_ptr,
    n_ptr,
    v_ptr,
    bias_ptr,
    scaling,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    w, a = Matrix(w_ptr, N, K, stride_wn, stride_wk), Matrix(a_ptr, R, K, stride_ar, stride_ak)
    b, v = Matrix(b_ptr, N, R, stride_bn, stride_br), Matrix(v_ptr, N, K, K, 1)
    row = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    b_tile = load_tile(b, row, 0, BLOCK_N, BLOCK_R).to(DTYPE)  # [BLOCK_N, BLOCK_R]
    gain, low = tl.full([BLOCK_N], 1, ACC), LowRank(a, b, b_tile, scaling)
    if m_ptr is not None:
        norm = row_norm(w, None, low, row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
        tl.store(n_ptr + rows, norm, mask=rows < N)
        gain = gain_of(m_ptr, norm, rows, N, ACC)
    for k in range(0, K, BLOCK_K):
        tile = load_tile(w, row, k, BLOCK_N, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        update = low_rank_tile(low, row, k, BLOCK_K, ONE, ACC, PRECISION)
        found = tile.to(ACC) + scaling * update
        if m_ptr is not None:
            found = found * gain[:, None]
        if bias_ptr is not None:
            cols = k + tl.arange(0, BLOCK_K)
            found += tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(ACC)[None, :]
        store_tile(v, found, row, k, OUT)


@triton.jit
def _weight_bwd_kernel(
    g_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    m_ptr,
    n_ptr,
    da_ptr,
    db_ptr,
    dm_ptr,
    dw_ptr,
    scaling,
    N,
    K,
    R,
    rows_each,
    stride_gn,
    stride_gk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block, split, rank_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col, rank = block * BLOCK_K, rank_block * BLOCK_R
    a = load_tile(Matrix(a_ptr, R, K, stride_ar, stride_ak), rank, col, BLOCK_R, BLOCK_K).to(DTYPE)
    da = tl.zeros([BLOCK_R, BLOCK_K], dtype=ACC)
    db_ptr += block.to(tl.int64) * N * R
    if dm_ptr is not None:
        dm_ptr += (rank_block * tl.num_programs(0) + block).to(tl.int64) * N
    for row in range(split * rows_each, min((split + 1) * rows_each, N), BLOCK_N):
        g = load_tile(Matrix(g_ptr, N, K, stride_gn, stride_gk), row, col, BLOCK_N, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        b = load_tile(Matrix(b_ptr, N, R, stride_bn, stride_br), row, rank, BLOCK_N, BLOCK_R)  # [BLOCK_N, BLOCK_R]
        db = mma(g, tl.trans(a), tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC), PRECISION) * scaling
        if dm_ptr is not None:
            rows = row + tl.arange(0, BLOCK_N)
            norm = tl.load(n_ptr + rows, mask=rows < N, other=0.0)
            gain = gain_of(m_ptr, norm, rows, N, ACC)
            dm = tl.sum(db * b.to(ACC), 1)
            if rank_block == 0:
                w = load_tile(Matrix(w_ptr, N, K, stride_wn, stride_wk), row, col, BLOCK_N, BLOCK_K)
                dm += tl.sum(g.to(ACC) * w.to(ACC), 1)
                if dw_ptr is not None:
                    store_tile(Matrix(dw_ptr, N, K, K, 1), g.to(ACC) * gain[:, None], row, col, DTYPE)
            dm = tl.where(norm != 0, dm / tl.where(norm != 0, norm, 1.0), 0.0)
            tl.store(dm_ptr + rows, dm, mask=rows < N)
            db *= gain[:, None]
            b = b.to(ACC) * gain[:, None]
        store_tile(Matrix(db_ptr, N, R, R, 1), db, row, rank, ACC)
        da = mma(tl.trans(b.to(DTYPE)), g, da, PRECISION)
    da_part = Matrix(da_ptr + split.to(tl.int64) * R * K, R, K, K, 1)
    store_tile(da_part, da * scaling, rank, col, ACC)


def weight(
    w: Operand,
    a: Operand,
    b: Operand,
    scaling: Number,
    v: Operand,
    *,
    m: Operand | None = None,
    n: Operand | None = None,
    bias: Operand | None = None,
) -> Launch:
    """The adapted weight v [N, K], contiguous, and with m [N] the norms n [N], from w [N, K], a [R, K] and b [N, R],
    each in any float dtype; b may have more columns. A bias [K], contiguous, is added to each row."""
    (rows, k), r = w.shape, a.shape[0]
    kind = torch.promote_types(a.dtype, b.dtype)
    tile = pass_tiles.weight(rows, r, dtype=w.dtype, kind=kind, chip=Chip.of(w.device))
    # Three tf32 products err by as much as float32 rounds: nothing beside the rounding to 16 bits.
    exact = kind != torch.float32 or w.dtype == kind
    return launch(
        _weight_kernel,
        (triton.cdiv(rows, tile.n),),
        tile.options,
        w,
        w_ptr=w,
        a_ptr=a,
        b_ptr=b,
        m_ptr=m,
        n_ptr=n,
        v_ptr=v,
        bias_ptr=bias,
        scaling=scaling,
        N=rows,
        K=k,
        R=r,
        stride_wn=w.stride(0),
        stride_wk=w.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        **constants(tile),
        ONE=r <= tile.r,
        ACC=acc_dtype(wide(w, a, b)),
        PRECISION="ieee" if exact else "tf32x3",
        DTYPE=TL[kind],
        OUT=TL[w.dtype],
    )


def weight_fwd(
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    m: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(v, n) as ``weight`` makes them, v in w's dtype."""
    v = torch.empty_like(w, memory_format=torch.contiguous_format)
    n = None if m is None else w.new_empty(w.shape[0], dtype=wide(w, a, b))
    if v.numel():
        run(weight, w=w, a=a, b=b, scaling=float(scaling), v=v, m=m, n=n, bias=bias)
    return v, n


class Shares(NamedTuple):
    """How a backward's work is shared out: its tile, and what ``weight_grad_splits`` says."""

    tile: Tile
    col_blocks: int
    splits: int
    rank_blocks: int
    rows_each: int


_known = Memo()


def _shares(n: int, k: int, r: int, dtype: torch.dtype, device: torch.device, dora: bool) -> Shares:
    key = n, k, r, dtype, device, dora
    if (found := _known.get(key)) is not None:
        return found
    chip = Chip.of(device)
    tile = pass_tiles.weight_grad(r, dtype=dtype, chip=chip, dora=dora)
    return _known.keep(key, Shares(tile, *pass_tiles.weight_grad_splits(n, k, r, tile=tile, chip=chip)))


def weight_gradients(
    g: Operand,
    a: Operand,
    b: Operand,
    scaling: Number,
    da: Operand,
    db: Operand,
    *,
    w: Operand | None = None,
    m: Operand | None = None,
    n: Operand | None = None,
    dm: Operand | None = None,
    dw: Operand | None = None,
) -> Launch:
    """The parts of dA [splits, R, K], of dB [column blocks, N, R] and for DoRA, whose w and norms n are then given, of
    dm [rank blocks * column blocks, N]; and dw [N, K], contiguous, if wanted."""
    (rows, k), r = g.shape, a.shape[0]
    shares, read = _shares(rows, k, r, g.dtype, g.device, w is not None), g if w is None else w
    return launch(
        _weight_bwd_kernel,
        (shares.col_blocks, shares.splits, shares.rank_blocks),
        shares.tile.options,
        g,
        g_ptr=g,
        w_ptr=w,
        a_ptr=a,
        b_ptr=b,
        m_ptr=m,
        n_ptr=n,
        da_ptr=da,
        db_ptr=db,
        dm_ptr=dm,
        dw_ptr=dw,
        scaling=scaling,
        N=rows,
        K=k,
        R=r,
        rows_each=shares.rows_each,
        stride_gn=g.stride(0),
        stride_gk=g.stride(1),
        stride_wn=read.stride(0),
        stride_wk=read.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        BLOCK_N=shares.tile.n,
        BLOCK_K=shares.tile.k,
        BLOCK_R=shares.tile.r,
        ACC=acc_dtype(g.dtype),
        PRECISION=precision(g.dtype, max(rows, k)),
        DTYPE=TL[g.dtype],
    )


def weight_bwd(
    g: torch.Tensor,
    w: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    m: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    need_w: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dA [R, K], dB [N, R] and dm [N] in float32 (float64 of such a g), and dW [N, K] if ``need_w``, from g [N, K]; for
    LoRA w, m and norm are None, there is no dm, and dW is g itself. Products are made in g's dtype."""
    (n, k), r = g.shape, a.shape[0]
    dora, kind = w is not None, wide(g)
    if not g.numel():
        none = g.new_zeros(n, dtype=kind) if dora else None
        return g.new_zeros(r, k, dtype=kind), g.new_zeros(n, r, dtype=kind), none, g if need_w else None
    shares = _shares(n, k, r, g.dtype, g.device, dora)
    da = g.new_empty(shares.splits, r, k, dtype=kind)
    db = g.new_empty(shares.col_blocks, n, r, dtype=kind)
    dm = g.new_empty(shares.rank_blocks * shares.col_blocks, n, dtype=kind) if dora else None
    dw = torch.empty_like(g, memory_format=torch.contiguous_format) if dora and need_w else None
    run(weight_gradients, g=g, a=a, b=b, scaling=float(scaling), da=da, db=db, w=w, m=m, n=norm, dm=dm, dw=dw)
    return da.sum(0), db.sum(0), None if dm is None else dm.sum(0), dw if dora or not need_w else g
