"""dS_i = scale_i * keep * dZ_i B_i of layers with one input, all in one launch, for few rows: dZ_i [M, N_i], B_i [N_i,
at least R_i], dS [M, sum of padded R], side by side.

A program makes a block of rows and of ranks of one of them, by warps that take the way along N side by side (down.py).
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Bits, Matrix, padded_rank, wait_for_stream
from lora_fast.kernels.down import side_by_side
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.pair import RANKS
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import few_rows

MOST = 4


@triton.jit(do_not_specialize=["M"])
def _downs_kernel(
    z0,
    b0,
    z1,
    b1,
    z2,
    b2,
    z3,
    b3,
    ds_ptr,
    scales_ptr,
    keep_scale,
    M,
    N0,
    N1,
    N2,
    N3,
    R0,
    R1,
    R2,
    R3,
    stride_z0,
    stride_z1,
    stride_z2,
    stride_z3,
    stride_b0,
    stride_b1,
    stride_b2,
    stride_b3,
    stride_ds,
    WAYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    row, which, rank = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_R
    z, b, n, r, stride_z, stride_b, first = z0, b0, N0, R0, stride_z0, stride_b0, 0
    if z1 is not None:
        first1 = (R0 + 15) // 16 * 16
        if which == 1:
            z, b, n, r, stride_z, stride_b, first = z1, b1, N1, R1, stride_z1, stride_b1, first1
    if z2 is not None:
        first2 = first1 + (R1 + 15) // 16 * 16
        if which == 2:
            z, b, n, r, stride_z, stride_b, first = z2, b2, N2, R2, stride_z2, stride_b2, first2
    if z3 is not None:
        first3 = first2 + (R2 + 15) // 16 * 16
        if which == 3:
            z, b, n, r, stride_z, stride_b, first = z3, b3, N3, R3, stride_z3, stride_b3, first3
    of_z, of_b = Matrix(z, M, n, stride_z, 1), Matrix(b + rank, r - rank, n, 1, stride_b)
    acc = side_by_side(of_z, of_b, Bits(None, 0, M), row, WAYS, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE)
    rows, ranks = row + tl.arange(0, BLOCK_M), rank + tl.arange(0, BLOCK_R)
    there = ranks < (r + 15) // 16 * 16
    ds = acc * (tl.load(scales_ptr + first + ranks, mask=there, other=0.0) * keep_scale)[None, :]
    ptrs = ds_ptr + rows.to(tl.int64)[:, None] * stride_ds + (first + ranks)[None, :]
    tl.store(ptrs, ds.to(DTYPE), mask=(rows < M)[:, None] & there[None, :])


def takes_downs(m: int, r: int, like: Operand) -> bool:
    """Whether ranks of up to r are made by warps side by side, from so many rows like these."""
    chip = Chip.of(like.device)
    few = few_rows(m, r, dtype=like.dtype, chip=chip, ranks=RANKS)
    return few and pass_tiles.down(m, r, dtype=like.dtype, kind=like.dtype, chip=chip, tma=True, masked=False).ways > 0


def downs(each: Sequence[tuple[Operand, Operand, int]], ds: Operand, scales: Operand, keep: Number) -> Launch:
    """Fill ds [M, sum of padded R] from (dZ [M, N], B [N, at least R], R) of up to ``MOST`` layers of few rows, and the
    scales of all ranks in float32; the others are in one dtype of 16 bits, their rows contiguous."""
    like = each[0][0]
    m, widest = len(ds), max(r for *_, r in each)
    tile = pass_tiles.down(
        m, widest, dtype=like.dtype, kind=like.dtype, chip=Chip.of(like.device), tma=True, masked=False
    )
    given: dict[str, Operand | int | None] = {}
    for i in range(MOST):
        z, b, r = each[i] if i < len(each) else (None, None, 0)
        given |= {
            f"z{i}": z,
            f"b{i}": b,
            f"N{i}": 0 if z is None else z.shape[1],
            f"R{i}": r,
            f"stride_z{i}": 0 if z is None else z.stride(0),
            f"stride_b{i}": 0 if b is None else b.stride(0),
        }
    return launch(
        _downs_kernel,
        (triton.cdiv(m, tile.m), len(each), triton.cdiv(padded_rank(widest), tile.r)),
        tile.options,
        like,
        **given,
        ds_ptr=ds,
        scales_ptr=scales,
        keep_scale=keep,
        M=m,
        stride_ds=ds.stride(0),
        WAYS=tile.ways,
        BLOCK_M=tile.m,
        BLOCK_N=tile.k,
        BLOCK_R=tile.r,
        DTYPE=TL[ds.dtype],
    )
