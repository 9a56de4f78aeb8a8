"""What the kernels of an embedding share: rows gathered by their ids, z made of them, and what a kernel is told of it
all."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import TL, acc_dtype, load_tile, mma, scalar
from lora_fast.kernels.operands import Number, Operand


class Rows(NamedTuple):
    """Which rows of a matrix [V, ...] a tile is gathered from, as device code sees it."""

    ids: Any  # int64
    known: Any  # whether they are ids of the matrix


@triton.jit
def rows_of(ids_ptr, row, M, V, BLOCK: tl.constexpr):
    """Those of BLOCK ids from ``row`` on."""
    at = row + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < M, other=-1).to(tl.int64)
    return Rows(ids, (ids >= 0) & (ids < V))


@triton.jit
def gathered(t, rows, col, COLS: tl.constexpr):
    """COLS columns from ``col`` on of these rows of a matrix, zero where there is no such row or column."""
    cols = col + tl.arange(0, COLS)
    ptrs = t.ptr + rows.ids[:, None] * t.stride_r + cols[None, :].to(tl.int64) * t.stride_c
    return tl.load(ptrs, mask=rows.known[:, None] & (cols[None, :] < t.cols), other=0.0)


@triton.jit
def factors(scaling, factor_ptr, SCALING_PTR: tl.constexpr, BASE: tl.constexpr):
    """(c of the rows of E, rounded to their dtype as the embedding does, c s)."""
    s = scalar(scaling, SCALING_PTR)
    c = tl.full((), 1, tl.float32)
    if factor_ptr is not None:
        c = tl.load(factor_ptr).to(tl.float32)
        s *= c
    return c.to(BASE), s


class Adapted(NamedTuple):
    """The matrices of an adapted embedding as device code sees them, e [V, N], a [V, R] and b [N, R], and what rows of
    e and of A^T B^T are multiplied by."""

    e: Any
    a: Any
    b: Any
    base_factor: Any
    low_factor: Any


@triton.jit
def z_tile(
    of,
    rows,
    col,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):
    """z of these rows, BLOCK_N columns of it."""
    BLOCK_M: tl.constexpr = rows.ids.shape[0]
    low = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for rank in range(0, of.b.cols, BLOCK_R):
        left = gathered(of.a, rows, rank, BLOCK_R).to(KIND)
        low = mma(left, load_tile(of.b, col, rank, BLOCK_N, BLOCK_R).to(KIND).T, low, PRECISION)
    return gathered(of.e, rows, col, BLOCK_N).to(ACC) * of.base_factor.to(ACC) + low * of.low_factor


def kinds_of(*read: Operand) -> tuple[torch.dtype, dict[str, Any]]:
    """The dtype in which products of these are made, and what a kernel is told of it."""
    kind = read[0].dtype
    for t in read[1:]:
        kind = torch.promote_types(kind, t.dtype)
    return kind, {"ACC": acc_dtype(kind), "KIND": TL[kind]}


def told_of(e: Operand, a: Operand, b: Operand, scaling: Operand | Number) -> dict[str, Any]:
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
