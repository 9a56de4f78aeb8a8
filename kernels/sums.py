"""The second half of a pass over rows: its programs' float32 parts added up in a fixed order, so two runs agree.

Also the gradient of DoRA's magnitude from the pass's column sums: dm = sum(dY * z) / n. Where the forward kept y = g z
in place of z it is sum(dY * y) / (g n); columns whose g is too small for y to carry z get their z made again, here.
"""

from typing import Any, Generic, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.activations import gated
from lora_fast.kernels.common import (
    Matrix,
    acc_dtype,
    load_tile,
    low_scale,
    mma,
    padded_rank,
    precision,
    store_tile,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, T, launch
from lora_fast.kernels.program import Launch

SUM_BLOCK = 256  # elements that a program adds up
MAGNITUDE_BLOCK = 32  # columns of dm a program; half as many where the elements are wide


class Summed(NamedTuple):
    """Parts [count, size] as device code sees them."""

    ptr: Any
    count: Any
    size: Any


@triton.jit
def sum_of(parts, i, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum over parts of their elements i, BLOCK indices; eight loads under way at a time."""
    total = tl.zeros([8, BLOCK], dtype=ACC)
    for first in range(0, parts.count, 8):
        part = first + tl.arange(0, 8).to(tl.int64)
        inside = (part[:, None] < parts.count) & (i[None, :] < parts.size)
        total += tl.load(parts.ptr + part[:, None] * parts.size + i[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _add_parts(parts, dst, block, scale, cols, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """dst[i] = scale * the sum of parts' elements i; with ``cols`` dst is a matrix of so many, its rows ``stride``
    apart."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of(parts, i, BLOCK, ACC)
    to = i if cols is None else i // cols * stride + i % cols
    tl.store(dst + to, (total * scale).to(dst.dtype.element_ty), mask=i < parts.size)


class Again(NamedTuple):
    """What z is made of as device code sees it: x [M, K], with a gate like it act(x) * gate, W [N, K], whose rows may
    have scales, S [M, R] and B [N, R]."""

    x: Any
    gate_ptr: Any
    w: Any
    w_scale_ptr: Any
    s: Any
    b: Any


@triton.jit
def _column_dots(dy, of, col, BLOCK: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """sum over rows of dY * (x W^T + S B^T), for BLOCK columns from col on; with ACT x is act(x), or act(x) * gate."""
    x, total = of.x, tl.zeros([BLOCK], dtype=ACC)
    for m in range(0, dy.rows, BLOCK):
        z = tl.zeros([BLOCK, BLOCK], dtype=ACC)
        for k in range(0, x.cols, 16):
            x_tile, w_tile = load_tile(x, m, k, BLOCK, 16), load_tile(of.w, col, k, BLOCK, 16)
            if ACT is not None:
                gate = None
                if of.gate_ptr is not None:
                    gate = load_tile(Matrix(of.gate_ptr, x.rows, x.cols, x.stride_r, x.stride_c), m, k, BLOCK, 16)
                x_tile = gated(x_tile, gate, ACT, ACC, x_tile.dtype)
            if of.w_scale_ptr is not None:  # x as it is: y was too small to carry z, whose own rounding is no matter
                cols = col + tl.arange(0, BLOCK)
                scale = tl.load(of.w_scale_ptr + cols, mask=cols < of.w.rows, other=0.0)
                w_tile = (w_tile.to(ACC) * scale[:, None]).to(x_tile.dtype)
            z = mma(x_tile, w_tile.T, z, PRECISION)
        for rank in range(0, of.b.cols, 16):
            z = mma(load_tile(of.s, m, rank, BLOCK, 16), load_tile(of.b, col, rank, BLOCK, 16).T, z, PRECISION)
        total += tl.sum(load_tile(dy, m, col, BLOCK, BLOCK).to(ACC) * z, 0)
    return total


@triton.jit
def _scale_columns(t, scale, col, BLOCK: tl.constexpr):
    """Multiply BLOCK columns of a contiguous matrix, from col on."""
    for m in range(0, t.rows, BLOCK):
        tile = load_tile(t, m, col, BLOCK, BLOCK).to(scale.dtype) * scale[None, :]
        store_tile(t, tile, m, col, t.ptr.dtype.element_ty)


class Magnitude(NamedTuple):
    """DoRA's vectors [N], pointers: where dm goes, the gain, the norm."""

    dm: Any
    gain: Any
    norm: Any


@triton.jit
def magnitude(
    total,
    col,
    of,
    dy,
    again,
    WEAK: tl.constexpr,
    RESCALES: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dm of as many columns from col on as ``total`` has, which is the sums over rows of dY * z; of dY * y, where WEAK
    is not None. ``again``: what z is made of, where that is needed."""
    BLOCK: tl.constexpr = total.shape[0]
    cols = col + tl.arange(0, BLOCK)
    norm = tl.load(of.norm + cols, mask=cols < dy.cols, other=0.0)
    if WEAK is not None:
        gain = tl.load(of.gain + cols, mask=cols < dy.cols, other=0.0)
        unscaled = tl.abs(gain) < WEAK
        weak = unscaled & (norm != 0)
        total /= tl.where(unscaled, 1.0, gain)
        if tl.max(weak.to(tl.int32), 0) > 0:
            total = tl.where(weak, _column_dots(dy, again, col, BLOCK, ACT, total.dtype, PRECISION), total)
        if RESCALES:
            if tl.max((unscaled & (cols < dy.cols)).to(tl.int32), 0) > 0:
                tl.debug_barrier()  # all of it was read
                _scale_columns(dy, tl.where(unscaled, gain, 1.0), col, BLOCK)
    dm = tl.where(norm != 0, total / tl.where(norm != 0, norm, 1.0), 0.0)
    tl.store(of.dm + cols, dm.to(of.dm.dtype.element_ty), mask=cols < dy.cols)


@triton.jit(do_not_specialize=["M", "splits", "col_blocks", "ds_size"])
def _sum_kernel(
    parts_ptr,
    ds_ptr,
    sum_ptr,
    g_ptr,
    scaling,
    keep_scale,
    dm_ptr,
    gain_ptr,
    norm_ptr,
    dy_ptr,
    x_ptr,
    gate_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    w_scale_ptr,
    splits,
    col_blocks,
    ds_size,
    sum_size,
    dm_size,
    g_size,
    sum_at,
    dm_at,
    g_at,
    M,
    N,
    K,
    R,
    RS,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    stride_s,
    ds_cols,
    stride_ds,
    APART: tl.constexpr,
    WEAK: tl.constexpr,
    RESCALES: tl.constexpr,
    ACT: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    BLOCK: tl.constexpr,
    DM_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if ds_ptr is not None:
        n = tl.cdiv(ds_size, BLOCK)
        if block < n:
            scale = low_scale(scaling, SCALING_PTR, LIFTED) * keep_scale
            parts, cols = Summed(parts_ptr, col_blocks, ds_size), ds_cols if APART else None
            _add_parts(parts, ds_ptr, block, scale, cols, stride_ds, BLOCK, ACC)
        block -= n
    if sum_ptr is not None:
        n = tl.cdiv(sum_size, BLOCK)
        if (block >= 0) & (block < n):
            parts = Summed(parts_ptr + sum_at, splits, sum_size)
            _add_parts(parts, sum_ptr, block, 1.0, None, None, BLOCK, ACC)
        block -= n
    if dm_ptr is not None:
        n = tl.cdiv(dm_size, DM_BLOCK)
        if (block >= 0) & (block < n):
            cols = block * DM_BLOCK + tl.arange(0, DM_BLOCK)
            total = sum_of(Summed(parts_ptr + dm_at, splits, dm_size), cols, DM_BLOCK, ACC)
            dy, x = Matrix(dy_ptr, M, N, stride_ym, stride_yn), Matrix(x_ptr, M, K, stride_xm, stride_xk)
            w, s = Matrix(w_ptr, N, K, stride_wn, stride_wk), Matrix(s_ptr, M, RS, stride_s, 1)
            b = Matrix(b_ptr, N, R, stride_bn, stride_br)
            of, again = Magnitude(dm_ptr, gain_ptr, norm_ptr), Again(x, gate_ptr, w, w_scale_ptr, s, b)
            magnitude(total, block * DM_BLOCK, of, dy, again, WEAK, RESCALES, ACT, PRECISION)
        block -= n
    if g_ptr is not None:
        if block >= 0:
            _add_parts(Summed(parts_ptr + g_at, splits, g_size), g_ptr, block, 1.0, None, None, BLOCK, ACC)


def weak_gain(kind: torch.dtype) -> float:
    """Below this gain y = g z loses digits of z to underflow."""
    return 2**-6 if kind == torch.float16 else 1e-30


class Dora(NamedTuple, Generic[T]):
    """What a pass over dY takes and gives beyond LoRA's. dm needs norm and kept, dz nothing else."""

    gain: T  # g [N], float32 or wider, as norm
    norm: T | None = None  # n [N]
    kept: T | None = None  # z [M, N], or y without a bias, contiguous
    dz: T | None = None  # filled with dY * g, [M, N], contiguous
    dm: T | None = None  # filled, [N]
    # Where kept is y: of what z is made, and the scales of weight's rows if it is e4m3.
    x: T | None = None
    weight: T | None = None
    s: T | None = None
    b: T | None = None
    w_scale: T | None = None
    gate: T | None = None  # like x, and the activation: act(x) * gate is then what the layer was given
    act: str | None = None


class Parts(NamedTuple):
    """Where the parts of a pass lie, one kind after another: those of dS [column blocks, M, padded R], of the column
    sums [splits, N], of dm [splits, N] and of G [splits, N, R] (none where rows are not split)."""

    col_blocks: int
    splits: int
    ds: int  # how many numbers are a part of dS, and so on; 0 where there is none
    sums: int
    dm: int
    g: int

    # Where the others begin: at multiples of 16, which Triton compiles in.
    @property
    def sums_at(self) -> int:
        return self.col_blocks * self.ds

    @property
    def dm_at(self) -> int:
        return self.sums_at + -(-self.splits * self.sums // 16) * 16

    @property
    def g_at(self) -> int:
        return self.dm_at + -(-self.splits * self.dm // 16) * 16

    @property
    def numbers(self) -> int:
        """How many there are in all."""
        return self.g_at + self.splits * self.g


def add_parts(
    parts: Parts,
    memory: Operand,
    z: Operand,
    kind: torch.dtype,
    *,
    ds: Operand | None = None,
    sums: Operand | None = None,
    g: Operand | None = None,
    dora: Dora[Operand] | None = None,
    scaling: Operand | Number | None = None,
    keep: Number | None = None,
    lifted: bool = False,
    rescales: bool = False,
) -> Launch:
    """ds = scaling * keep * the sum of its parts, sums, dora.dm and g likewise, after a pass over z, whose products
    were made in this dtype; those without parts are not touched. ``rescales``: z, contiguous, has dora's gain already,
    but for the columns where it is weak, which get it here."""
    (m, n), (x, w, s, b, w_scale, gate, act) = z.shape, (None,) * 7 if dora is None else dora[5:]
    k = r = 0
    strides: dict[str, int] = dict.fromkeys((f"stride_{axes}" for axes in "ym yn xm xk wn wk bn br".split()), 0)
    if x is not None and w is not None and b is not None:
        k, r = x.shape[1], b.shape[1]
        given = *z.strides, *x.strides, *w.strides, *b.strides
        strides = dict(zip(strides, given, strict=True))
    columns = MAGNITUDE_BLOCK // (1 if kind.itemsize <= 2 else 2)
    sizes, blocks = parts[2:], (SUM_BLOCK, SUM_BLOCK, columns, SUM_BLOCK)
    return launch(
        _sum_kernel,
        (sum(map(triton.cdiv, sizes, blocks)),),
        {"num_warps": 4},
        z,
        parts_ptr=memory,
        ds_ptr=ds,
        sum_ptr=sums,
        g_ptr=g if parts.g else None,
        scaling=scaling,
        keep_scale=keep,
        dm_ptr=dora and dora.dm,
        gain_ptr=dora and dora.gain,
        norm_ptr=dora and dora.norm,
        dy_ptr=z,
        x_ptr=x,
        gate_ptr=gate,
        w_ptr=w,
        s_ptr=s,
        b_ptr=b,
        w_scale_ptr=w_scale,
        splits=parts.splits,
        col_blocks=parts.col_blocks,
        ds_size=parts.ds,
        sum_size=parts.sums,
        dm_size=parts.dm,
        g_size=parts.g,
        sum_at=parts.sums_at,
        dm_at=parts.dm_at,
        g_at=parts.g_at,
        M=m,
        N=n,
        K=k,
        R=r,
        RS=padded_rank(max(r, 1)),
        **strides,
        stride_s=0 if s is None else s.stride(0),
        ds_cols=0 if ds is None else ds.shape[1],
        stride_ds=0 if ds is None else ds.stride(0),
        APART=ds is not None and ds.stride(0) != ds.shape[1],
        WEAK=None if x is None else weak_gain(kind),
        RESCALES=rescales,
        ACT=act,
        LIFTED=lifted,
        SCALING_PTR=isinstance(scaling, Operand),
        BLOCK=SUM_BLOCK,
        DM_BLOCK=columns,
        ACC=acc_dtype(kind),
        PRECISION=precision(kind, k),
    )
