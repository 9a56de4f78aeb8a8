"""DoRA's norms and gains of an embedding: of the columns of E + s (B A)^T (see rows.py)."""

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.common import Matrix, acc_dtype, load_tile, mma, precision, scalar, wait_for_stream, wide
from lora_fast.kernels.embedding.gather import kinds_of, told_of
from lora_fast.kernels.norm import gains
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch


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
    kind, told = kinds_of(a, b)
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
        **told_of(e, a, b, scaling),
    )
    return [made, gains(e, parts, norm, m=m, gain=gain, round_norm=round_norm)]
