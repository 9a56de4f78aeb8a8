"""DoRA's norms n_j = |V_j| of the rows of V_j = W + s_j B_j A_j, and gains g_j = m_j / n_j, of all adapters.

As norm.py makes them, from the adapters as they lie beside each other. Programs of the same rows of W run side by side,
an adapter each, so that W comes from memory once. A rank that is not finite (see pack.py) makes its adapter's NaN.
"""

import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.batch.ranks import Ranks
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, wait_for_stream
from lora_fast.kernels.norm import constants, gain_of, row_norm
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch


@triton.jit
def _gains_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    m_ptr,
    firsts_ptr,
    low_ptr,
    scales_ptr,
    n_ptr,
    g_ptr,
    N,
    K,
    TOTAL,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUMS: tl.constexpr,
    ONE: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    adapter, row = tl.program_id(0), tl.program_id(1) * BLOCK_N
    first, end = tl.load(firsts_ptr + adapter), tl.load(firsts_ptr + adapter + 1)
    s = tl.load(low_ptr + first)
    for rank in range(first, end, 16):
        s += tl.sum(tl.load(scales_ptr + rank + tl.arange(0, 16)) * 0.0)
    rows = row + tl.arange(0, BLOCK_N)
    w, zero = Matrix(w_ptr, N, K, stride_wn, stride_wk), tl.full((), 0, tl.int64)
    a, b = Matrix(a_ptr + (zero + first) * K, end - first, K, K, 1), Matrix(b_ptr + first, N, end - first, TOTAL, 1)
    b_tile = load_tile(b, row, 0, BLOCK_N, BLOCK_R)
    norm = row_norm(w, a, b, b_tile, None, s.to(ACC), row, BLOCK_K, SUMS, ONE, ACC, PRECISION)
    if ROUND is not None:
        norm = norm.to(ROUND).to(ACC)
    to = (zero + adapter) * N
    tl.store(n_ptr + to + rows, norm, mask=rows < N)
    tl.store(g_ptr + to + rows, gain_of(m_ptr + to, norm, rows, N, ACC), mask=rows < N)


def gains(
    w: Operand,
    a: Operand,
    b: Operand,
    m: Operand,
    firsts: Operand,
    low: Operand,
    scales: Operand,
    n: Operand,
    gain: Operand,
    ranks: Ranks,
    round_norm: bool,
) -> Launch:
    """n and gain [adapters, N] from w [N, K], what ``pack`` made of the adapters, m [adapters, N], where each begins
    among all ranks (firsts [adapters + 1]), and for each rank the scaling that B does not carry, and the marked one."""
    (rows, k), kind, most = w.shape, w.dtype, max(ranks.of)
    tile = pass_tiles.norm(rows, most, dtype=kind, kind=kind, chip=Chip.of(w.device))
    return launch(
        _gains_kernel,
        (len(ranks.of), triton.cdiv(rows, tile.n)),
        tile.options,
        w,
        w_ptr=w,
        a_ptr=a,
        b_ptr=b,
        m_ptr=m,
        firsts_ptr=firsts,
        low_ptr=low,
        scales_ptr=scales,
        n_ptr=n,
        g_ptr=gain,
        N=rows,
        K=k,
        TOTAL=ranks.total,
        stride_wn=w.stride(0),
        stride_wk=w.stride(1),
        **constants(tile),
        ONE=max(ranks.padded) <= tile.r,
        ROUND=TL[kind] if round_norm else None,
        ACC=acc_dtype(kind),
        PRECISION="tf32x3" if kind.itemsize == 4 else "ieee",
    )
