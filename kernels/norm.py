"""DoRA's gain: n = |V| for each row of V = W + s B A, and g = m / n (0 where n = 0).

One read of W. A program owns BLOCK_N rows and walks over K: B A of the tile by matrix instructions, V in registers, its
squares summed. Neither B A nor V is ever in memory. With many ranks B A is what takes the time: one pipelined loop over
the ranks of all tiles, larger tiles, and so columns that programs share, whose sums a second launch adds up.

The factored form n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + ... takes as many products and loses the rows whose terms
cancel; here none do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, low_scale, wait_for_stream, wide
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling, launch, run
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import Tile

MOST = 4  # layers that share a launch
SUMS = 64  # of squares a row, at most: what lies side by side in a row of a product's registers


class LowRank(NamedTuple):
    """Some rows of s B A as device code sees them: A, B, B's first tile of these rows, in whose dtype the product is
    made, and s."""

    a: Any
    b: Any
    first: Any
    s: Any


@triton.jit
def low_rank_tile(of, row, k, BLOCK_K: tl.constexpr, ONE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tile of B A at (row, k), BLOCK_K columns of it; ONE: all ranks are in B's first tile."""
    BLOCK_N: tl.constexpr = of.first.shape[0]
    BLOCK_R: tl.constexpr = of.first.shape[1]
    a_tile = load_tile(of.a, 0, k, BLOCK_R, BLOCK_K).to(of.first.dtype)
    v = tl.dot(of.first, a_tile, input_precision=PRECISION, out_dtype=ACC)
    if not ONE:
        for rank in range(BLOCK_R, of.a.rows, BLOCK_R):
            later = load_tile(of.b, row, rank, BLOCK_N, BLOCK_R).to(of.first.dtype)
            a_tile = load_tile(of.a, rank, k, BLOCK_R, BLOCK_K).to(of.first.dtype)
            v = tl.dot(later, a_tile, v, input_precision=PRECISION, out_dtype=ACC)
    return v


@triton.jit
def row_norm(
    w,
    w_scale,
    of,
    row,
    BLOCK_K: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The norms [BLOCK_N] of V's rows from ``row`` on. With a w_scale [BLOCK_N] W's rows are multiplied by it."""
    BLOCK_N: tl.constexpr = of.first.shape[0]
    squares = tl.zeros([BLOCK_N, SUMS], dtype=ACC)
    tile = load_tile(w, row, 0, BLOCK_N, BLOCK_K)  # [BLOCK_N, BLOCK_K]
    for k in range(0, w.cols, BLOCK_K):
        # The next step's, by hand: the compiler's pipeline takes the operands of products alone.
        later = load_tile(w, row, k + BLOCK_K, BLOCK_N, BLOCK_K)
        update = low_rank_tile(of, row, k, BLOCK_K, ONE, ACC, PRECISION)
        base = tile.to(ACC)
        if w_scale is not None:
            base *= w_scale[:, None]
        v = base + of.s * update
        squares += tl.sum(tl.reshape(v * v, (BLOCK_N, BLOCK_K // SUMS, SUMS)), 1)
        tile = later
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def gain_of(m_ptr, norm, rows, N, ACC: tl.constexpr):
    """m / norm of these rows, 0 where the norm is 0; NaN where it is NaN."""
    m = tl.load(m_ptr + rows, mask=rows < N, other=0.0).to(ACC)
    alive = norm != 0
    return tl.where(alive, m / tl.where(alive, norm, 1.0), 0.0)


@triton.jit
def _store_norm(norm, m_ptr, n_ptr, g_ptr, rows, N, ROUND: tl.constexpr, ACC: tl.constexpr):
    """The norms of these rows, rounded to a dtype or not, and their gains if wanted."""
    if ROUND is not None:
        norm = norm.to(ROUND).to(ACC)
    tl.store(n_ptr + rows, norm, mask=rows < N)
    if g_ptr is not None:
        tl.store(g_ptr + rows, gain_of(m_ptr, norm, rows, N, ACC), mask=rows < N)


@triton.jit
def _norm_kernel(
    w0,
    a0,
    b0,
    m0,
    n0,
    g0,
    w_scale0,
    scaling0,
    w1,
    a1,
    b1,
    m1,
    n1,
    g1,
    w_scale1,
    scaling1,
    w2,
    a2,
    b2,
    m2,
    n2,
    g2,
    w_scale2,
    scaling2,
    w3,
    a3,
    b3,
    m3,
    n3,
    g3,
    w_scale3,
    scaling3,
    K,
    N0,
    N1,
    N2,
    N3,
    R0,
    R1,
    R2,
    R3,
    stride_wn0,
    stride_wn1,
    stride_wn2,
    stride_wn3,
    stride_wk,
    stride_ar0,
    stride_ar1,
    stride_ar2,
    stride_ar3,
    stride_ak,
    stride_bn0,
    stride_bn1,
    stride_bn2,
    stride_bn3,
    stride_br0,
    stride_br1,
    stride_br2,
    stride_br3,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    LIFTED: tl.constexpr,
    PTR0: tl.constexpr,
    PTR1: tl.constexpr,
    PTR2: tl.constexpr,
    PTR3: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    w_ptr, a_ptr, b_ptr, m_ptr, n_ptr, g_ptr, w_scale_ptr = w0, a0, b0, m0, n0, g0, w_scale0
    N, R, stride_wn, stride_ar, stride_bn, stride_br = N0, R0, stride_wn0, stride_ar0, stride_bn0, stride_br0
    s, first = low_scale(scaling0, PTR0, LIFTED), 0
    if w1 is not None:
        first1 = tl.cdiv(N0, BLOCK_N)
        if block >= first1:
            w_ptr, a_ptr, b_ptr, m_ptr, n_ptr, g_ptr, w_scale_ptr = w1, a1, b1, m1, n1, g1, w_scale1
            N, R, stride_wn, stride_ar, stride_bn, stride_br = N1, R1, stride_wn1, stride_ar1, stride_bn1, stride_br1
            s, first = low_scale(scaling1, PTR1, LIFTED), first1
    if w2 is not None:
        first2 = first1 + tl.cdiv(N1, BLOCK_N)
        if block >= first2:
            w_ptr, a_ptr, b_ptr, m_ptr, n_ptr, g_ptr, w_scale_ptr = w2, a2, b2, m2, n2, g2, w_scale2
            N, R, stride_wn, stride_ar, stride_bn, stride_br = N2, R2, stride_wn2, stride_ar2, stride_bn2, stride_br2
            s, first = low_scale(scaling2, PTR2, LIFTED), first2
    if w3 is not None:
        first3 = first2 + tl.cdiv(N2, BLOCK_N)
        if block >= first3:
            w_ptr, a_ptr, b_ptr, m_ptr, n_ptr, g_ptr, w_scale_ptr = w3, a3, b3, m3, n3, g3, w_scale3
            N, R, stride_wn, stride_ar, stride_bn, stride_br = N3, R3, stride_wn3, stride_ar3, stride_bn3, stride_br3
            s, first = low_scale(scaling3, PTR3, LIFTED), first3
    w, a = Matrix(w_ptr, N, K, stride_wn, stride_wk), Matrix(a_ptr, R, K, stride_ar, stride_ak)
    b = Matrix(b_ptr, N, R, stride_bn, stride_br)
    row = (block - first) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    w_scale = None
    if w_scale_ptr is not None:
        w_scale = tl.load(w_scale_ptr + rows, mask=rows < N, other=0.0).to(ACC)
    b_tile = load_tile(b, row, 0, BLOCK_N, BLOCK_R).to(DTYPE)  # [BLOCK_N, BLOCK_R]
    norm = row_norm(w, w_scale, LowRank(a, b, b_tile, s), row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
    _store_norm(norm, m_ptr, n_ptr, g_ptr, rows, N, ROUND, ACC)


@triton.jit(do_not_specialize=["steps"])
def _norm_parts_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    parts_ptr,
    w_scale_ptr,
    scaling,
    N,
    K,
    R,
    steps,
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
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    ACC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums of squares of V's rows, over ``steps`` blocks of columns a program: parts [splits, N]."""
    wait_for_stream(PDL)
    w, a = Matrix(w_ptr, N, K, stride_wn, stride_wk), Matrix(a_ptr, R, K, stride_ar, stride_ak)
    b = Matrix(b_ptr, N, R, stride_bn, stride_br)
    row, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * steps
    s = low_scale(scaling, SCALING_PTR, LIFTED)
    rows = row + tl.arange(0, BLOCK_N)
    rank_blocks = tl.cdiv(R, BLOCK_R)
    squares = tl.zeros([BLOCK_N, SUMS], dtype=ACC)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    for step in range(0, steps * rank_blocks):
        k, rank = (first + step // rank_blocks) * BLOCK_K, (step % rank_blocks) * BLOCK_R
        acc = tl.dot(
            load_tile(b, row, rank, BLOCK_N, BLOCK_R), load_tile(a, rank, k, BLOCK_R, BLOCK_K), acc, out_dtype=ACC
        )
        if rank + BLOCK_R >= R:
            tile = load_tile(w, row, k, BLOCK_N, BLOCK_K).to(ACC)
            if w_scale_ptr is not None:
                tile *= tl.load(w_scale_ptr + rows, mask=rows < N, other=0.0).to(ACC)[:, None]
            v = tile + s * acc
            squares += tl.sum(tl.reshape(v * v, (BLOCK_N, BLOCK_K // SUMS, SUMS)), 1)
            acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=ACC)
    tl.store(parts_ptr + tl.program_id(1) * N + rows, tl.sum(squares, 1), mask=rows < N)


@triton.jit(do_not_specialize=["splits"])
def _gain_kernel(
    parts_ptr,
    m_ptr,
    n_ptr,
    g_ptr,
    splits,
    N,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=ACC)
    for split in range(0, splits):
        total += tl.load(parts_ptr + split * N + rows, mask=rows < N, other=0.0)
    norm = tl.sqrt(total)
    _store_norm(norm, m_ptr, n_ptr, g_ptr, rows, N, ROUND, ACC)


def constants(tile: Tile) -> dict[str, int]:
    """Of a kernel that makes the norms of rows of W."""
    return {"BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_R": tile.r, "SUMS": min(SUMS, tile.k)}


class Norm(NamedTuple):
    """What ``norms`` takes of a layer."""

    w: Operand
    a: Operand
    b: Operand
    scaling: Operand | Number
    n: Operand
    m: Operand | None = None
    gain: Operand | None = None
    w_scale: Operand | None = None

    @property
    def has_parts(self) -> bool:
        kind = torch.promote_types(self.a.dtype, self.b.dtype)
        return pass_tiles.norm_has_parts(len(self.a), dtype=self.w.dtype, kind=kind, chip=Chip.of(self.w.device))


def norms_of(each: Sequence[Norm], *, round_norm: bool = False, lifted: bool = False) -> Launch:
    """The norms of up to ``MOST`` layers with one input, alike but for their sizes, none of which has parts."""
    w, a, b, *_ = first = each[0]
    kind, count, k = torch.promote_types(a.dtype, b.dtype), sum(len(one.w) for one in each), w.shape[1]
    r = max(len(one.a) for one in each)
    tile = pass_tiles.norm(count, r, dtype=w.dtype, kind=kind, chip=Chip.of(w.device))
    given: dict[str, Operand | Number | int | bool | None] = {}
    for i in range(MOST):
        one = each[i] if i < len(each) else None
        given |= {
            f"w{i}": one and one.w,
            f"a{i}": one and one.a,
            f"b{i}": one and one.b,
            f"m{i}": one and one.m,
            f"n{i}": one and one.n,
            f"g{i}": one and one.gain,
            f"w_scale{i}": one and one.w_scale,
            f"scaling{i}": one and one.scaling,
            f"N{i}": len(one.w) if one else 0,
            f"R{i}": len(one.a) if one else 0,
            f"stride_wn{i}": one.w.stride(0) if one else 0,
            f"stride_ar{i}": one.a.stride(0) if one else 0,
            f"stride_bn{i}": one.b.stride(0) if one else 0,
            f"stride_br{i}": one.b.stride(1) if one else 0,
            f"PTR{i}": one is not None and isinstance(one.scaling, Operand),
        }
    return launch(
        _norm_kernel,
        (sum(triton.cdiv(len(one.w), tile.n) for one in each),),
        tile.options,
        w,
        **given,
        K=k,
        stride_wk=first.w.stride(1),
        stride_ak=first.a.stride(1),
        **constants(tile),
        ONE=r <= tile.r,
        LIFTED=lifted,
        ROUND=TL[w.dtype] if round_norm else None,
        ACC=acc_dtype(wide(w, a, b)),
        PRECISION="tf32x3" if kind == torch.float32 else "ieee",
        DTYPE=TL[kind],
    )


def norms(
    w: Operand,
    a: Operand,
    b: Operand,
    scaling: Operand | Number,
    n: Operand,
    *,
    m: Operand | None = None,
    gain: Operand | None = None,
    w_scale: Operand | None = None,
    round_norm: bool = False,
    scratch: Scratch | None = None,
    room: Operand | None = None,
    lifted: bool = False,
) -> list[Launch]:
    """The norms n [N] of the rows of w [N, K] + scaling * b a, rounded to w's dtype on request, and with m [N] the gain
    [N], from a [R, K] and b [N, R] (at least R columns), each in any float dtype. With w_scale [N] row i of W is
    w_scale[i] * w[i]. What lies between two launches takes the memory of ``room``, if there is enough of it,
    else of ``scratch``: the norms do not depend on which."""
    (rows, k), r = w.shape, a.shape[0]
    kind = torch.promote_types(a.dtype, b.dtype)
    read = {
        "w_ptr": w,
        "a_ptr": a,
        "b_ptr": b,
        "w_scale_ptr": w_scale,
        "scaling": scaling,
        "N": rows,
        "K": k,
        "R": r,
        "stride_wn": w.stride(0),
        "stride_wk": w.stride(1),
        "stride_ar": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_bn": b.stride(0),
        "stride_br": b.stride(1),
        "LIFTED": lifted,
        "SCALING_PTR": isinstance(scaling, Operand),
    }
    chip = Chip.of(w.device)
    if pass_tiles.norm_has_parts(r, dtype=w.dtype, kind=kind, chip=chip):
        tile = pass_tiles.norm_parts()
        blocks = triton.cdiv(k, tile.k)
        steps = triton.cdiv(blocks, pass_tiles.norm_splits(rows, k, tile=tile, chip=chip))
        splits = triton.cdiv(blocks, steps)
        shape = (splits, rows), torch.float32
        memory = room if room is not None and room.holds(*shape) else scratch or Scratch(w.device)
        parts = memory.part(*shape)
        return [
            launch(
                _norm_parts_kernel,
                (triton.cdiv(rows, tile.n), splits),
                tile.options,
                w,
                **read,
                parts_ptr=parts,
                steps=steps,
                **constants(tile),
                ACC=tl.float32,
            ),
            gains(w, parts, n, m=m, gain=gain, round_norm=round_norm),
        ]
    return [norms_of([Norm(w, a, b, scaling, n, m, gain, w_scale)], round_norm=round_norm, lifted=lifted)]


def gains(
    w: Operand,
    parts: Operand,
    n: Operand,
    *,
    m: Operand | None = None,
    gain: Operand | None = None,
    round_norm: bool = False,
) -> Launch:
    """The norms n [N] from parts [splits, N] of the sums of squares, rounded to w's dtype on request, and with m [N]
    the gain [N]."""
    return launch(
        _gain_kernel,
        (triton.cdiv(len(n), 128),),
        {"num_warps": 4},
        w,
        parts_ptr=parts,
        m_ptr=m,
        n_ptr=n,
        g_ptr=gain,
        splits=len(parts),
        N=len(n),
        BLOCK=128,
        ROUND=TL[w.dtype] if round_norm else None,
        ACC=acc_dtype(parts.dtype),
    )


def norm_fwd(
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    m: torch.Tensor | None = None,
    round_norm: bool = False,
    w_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n, gain) as ``norms`` makes them."""
    n = w.new_empty(w.shape[0], dtype=wide(w, a, b))
    gain = None if m is None else torch.empty_like(n)
    if n.numel():
        run(
            norms,
            w=w,
            a=a,
            b=b,
            scaling=as_scaling(scaling),
            n=n,
            m=m,
            gain=gain,
            w_scale=w_scale,
            round_norm=round_norm,
        )
    return n, gain
