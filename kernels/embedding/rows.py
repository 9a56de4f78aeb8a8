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

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.common import TL, Matrix, acc_dtype, precision, wait_for_stream, wide
from lora_fast.kernels.embedding.gather import Adapted, factors, kinds_of, rows_of, told_of, z_tile
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch


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
    rows = rows_of(ids_ptr, row, M, V, BLOCK_M)
    e, a = Matrix(e_ptr, V, N, stride_ev, stride_en), Matrix(a_ptr, V, R, stride_av, stride_ar)
    b = Matrix(b_ptr, N, R, stride_bn, stride_br)
    base_factor, low_factor = factors(scaling, factor_ptr, SCALING_PTR, DTYPE)
    of = Adapted(e, a, b, base_factor, low_factor)
    z = z_tile(of, rows, col, BLOCK_N, BLOCK_R, ACC, PRECISION, KIND)
    if gain_ptr is not None:
        z *= tl.load(gain_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    z = tl.where(rows.known[:, None], z, float("nan"))
    tl.store(
        y_ptr + at.to(tl.int64)[:, None] * N + cols[None, :], z.to(DTYPE), mask=(at < M)[:, None] & (cols < N)[None, :]
    )


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
    kind, told = kinds_of(a, b)
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
        **told_of(e, a, b, scaling),
    )
