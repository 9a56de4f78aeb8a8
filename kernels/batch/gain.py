"""DoRA's gain of each row's adapter: y = g_j * z + bias with j = which_i (g = 1 without an adapter), and likewise dz =
g_j * dy; and for each adapter sum over its rows of dy * z, of which dm is made. Rows are selected, as everywhere.

z [M, N] is read once each. The sums come as float32 parts that are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, acc_dtype, load_tile, store_tile, wait_for_stream, wide
from lora_fast.kernels.operands import Operand, launch, run
from lora_fast.kernels.program import Launch

BLOCK_M, BLOCK_N, ROWS = 16, 256, 32


@triton.jit
def _own(which_ptr, rows, M, EACH, ADAPTERS):
    """The adapters of these rows, -1 where none."""
    which = tl.load(which_ptr + rows // EACH, mask=rows < M, other=0)
    return tl.where((rows < M) & (which >= 0) & (which < ADAPTERS), which, -1).to(tl.int32)


@triton.jit(do_not_specialize=["M", "EACH"])
def _row_gain_kernel(
    z_ptr,
    which_ptr,
    gain_ptr,
    bias_ptr,
    y_ptr,
    M,
    EACH,
    N,
    ADAPTERS,
    stride_z,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    own = _own(which_ptr, row + tl.arange(0, BLOCK_M), M, EACH, ADAPTERS)
    there = (own >= 0)[:, None] & (cols < N)[None, :]
    gain = tl.load(gain_ptr + own.to(tl.int64)[:, None] * N + cols[None, :], mask=there, other=1.0)
    y = load_tile(Matrix(z_ptr, M, N, stride_z, 1), row, col, BLOCK_M, BLOCK_N).to(ACC) * gain.to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    store_tile(Matrix(y_ptr, M, N, N, 1), y, row, col, DTYPE)


@triton.jit(do_not_specialize=["M", "EACH", "rows_each"])
def _dots_kernel(
    dy_ptr,
    z_ptr,
    which_ptr,
    parts_ptr,
    M,
    EACH,
    rows_each,
    N,
    ADAPTERS,
    stride_dy,
    stride_z,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    col, adapter, split = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    cols = col + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], ACC)
    for row in range(split * rows_each, tl.minimum((split + 1) * rows_each, M), ROWS):
        mine = _own(which_ptr, row + tl.arange(0, ROWS), M, EACH, ADAPTERS) == adapter
        if tl.max(mine.to(tl.int32), 0) > 0:
            dy = load_tile(Matrix(dy_ptr, M, N, stride_dy, 1), row, col, ROWS, BLOCK_N).to(ACC)
            z = load_tile(Matrix(z_ptr, M, N, stride_z, 1), row, col, ROWS, BLOCK_N).to(ACC)
            total += tl.sum(tl.where(mine[:, None], dy * z, 0.0), 0)
    to = (split * ADAPTERS + adapter).to(tl.int64) * N + cols
    tl.store(parts_ptr + to, total, mask=cols < N)


def _scaled(z: Operand, which: Operand, gain: Operand, bias: Operand | None, y: Operand) -> Launch:
    m, n = z.shape
    return launch(
        _row_gain_kernel,
        (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)),
        {"num_warps": 4},
        z,
        z_ptr=z,
        which_ptr=which,
        gain_ptr=gain,
        bias_ptr=bias,
        y_ptr=y,
        M=m,
        EACH=m // which.shape[0],
        N=n,
        ADAPTERS=gain.shape[0],
        stride_z=z.stride(0),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        ACC=acc_dtype(z.dtype),
        DTYPE=TL[z.dtype],
    )


def _dots(dy: Operand, z: Operand, which: Operand, parts: Operand) -> Launch:
    (m, n), (splits, adapters, _) = z.shape, parts.shape
    return launch(
        _dots_kernel,
        (triton.cdiv(n, 128), adapters, splits),
        {"num_warps": 4},
        z,
        dy_ptr=dy,
        z_ptr=z,
        which_ptr=which,
        parts_ptr=parts,
        M=m,
        EACH=m // which.shape[0],
        rows_each=triton.cdiv(triton.cdiv(m, splits), ROWS) * ROWS,
        N=n,
        ADAPTERS=adapters,
        stride_dy=dy.stride(0),
        stride_z=z.stride(0),
        ROWS=ROWS,
        BLOCK_N=128,
        ACC=acc_dtype(z.dtype),
    )


def scaled(z: torch.Tensor, which: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y [M, N] from z [M, N], rows contiguous; which contiguous, an element for as many rows each; gain [adapters, N],
    float32 or wider, and bias [N] contiguous."""
    y = z.new_empty(z.shape)
    if z.shape[0]:
        run(_scaled, z=z, which=which, gain=gain, bias=bias, y=y)
    return y


def dots(dy: torch.Tensor, z: torch.Tensor, which: torch.Tensor, adapters: int) -> torch.Tensor:
    """[adapters, N], float32 or wider: for each the sum over its rows of dy * z, both [M, N], rows contiguous."""
    m, n = z.shape
    splits = max(1, min(8 * Chip.of(z.device).processors // (triton.cdiv(n, 128) * adapters), triton.cdiv(m, 2 * ROWS)))
    parts = z.new_empty(splits, adapters, n, dtype=wide(z))
    if m == 0:
        return parts.zero_()[0]
    run(_dots, dy=dy, z=z, which=which, parts=parts)
    return parts.sum(0)
