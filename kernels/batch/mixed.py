"""y = g_j * z + bias, j = which_i, in the blocks of rows that adapters share: there the product, whose tiles have one
row of gains each, leaves z in y. Other blocks cost a look at a table.

z was rounded to y's dtype, as in plain torch.
"""

import triton
import triton.language as tl

from lora_fast.kernels.batch.ranks import ROWS
from lora_fast.kernels.common import acc_dtype, wait_for_stream
from lora_fast.kernels.gemm import MIXED
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch


@triton.jit(do_not_specialize=["M"])
def _mixed_kernel(
    y_ptr,
    gain_ptr,
    bias_ptr,
    own_ptr,
    whole_ptr,
    M,
    N,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block = tl.program_id(0)
    if tl.load(whole_ptr + block) == MIXED:
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = cols < N
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=there, other=0.0).to(ACC)
        for first in range(0, ROWS, BLOCK_M):
            rows = block * ROWS + first + tl.arange(0, BLOCK_M)
            inside = (rows < M)[:, None] & there[None, :]
            own = tl.load(own_ptr + rows, mask=rows < M, other=-1)
            gains = gain_ptr + own.to(tl.int64)[:, None] * N + cols[None, :]
            gain = tl.load(gains, mask=inside & (own >= 0)[:, None], other=1.0)
            at = y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
            y = tl.load(at, mask=inside, other=0.0).to(ACC) * gain
            if bias is not None:
                y += bias[None, :]
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def gain_mixed(y: Operand, gain: Operand, bias: Operand | None, own: Operand, whole: Operand) -> Launch:
    """For y [M, N], contiguous, and gain [adapters, N]; own and whole as in ``Places``."""
    (m, n), block = y.shape, 128 if y.dtype.itemsize > 2 else 256
    return launch(
        _mixed_kernel,
        (whole.shape[0], triton.cdiv(n, block)),
        {"num_warps": 4},
        y,
        y_ptr=y,
        gain_ptr=gain,
        bias_ptr=bias,
        own_ptr=own,
        whole_ptr=whole,
        M=m,
        N=n,
        ROWS=ROWS,
        BLOCK_M=16,
        BLOCK_N=block,
        ACC=acc_dtype(y.dtype),
    )
