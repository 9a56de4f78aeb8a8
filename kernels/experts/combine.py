"""out_t = sum over a token's K slots of [w] Y[row of the slot]: y from the second projection, dx from the gradients of
the gathered x. Sums in float32, in the order of the slots; a slot without a row adds nothing."""

import triton
import triton.language as tl

from lora_fast.kernels.common import wait_for_stream
from lora_fast.kernels.experts.route import Route
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

COLUMNS = 1024  # a program


@triton.jit
def _combine_kernel(y_ptr, row_ptr, weights_ptr, out_ptr, C, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_stream(PDL)
    token, cols = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token * K + k)
        y = tl.load(y_ptr + row.to(tl.int64) * C + cols, mask=(cols < C) & (row >= 0), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + token * K + k, mask=row >= 0, other=0.0).to(tl.float32)
        total += y
    tl.store(out_ptr + token.to(tl.int64) * C + cols, total.to(out_ptr.dtype.element_ty), mask=cols < C)


def combine(y: Operand, route: Route, out: Operand, k: int, weights: Operand | None = None) -> Launch:
    """out [T, C] from y [S, C], both contiguous, and weights [T, K], if given."""
    t, c = out.shape
    block = min(COLUMNS, triton.next_power_of_2(c))
    return launch(
        _combine_kernel,
        (t, triton.cdiv(c, block)),
        {"num_warps": 4},
        y,
        y_ptr=y,
        row_ptr=route.row,
        weights_ptr=weights,
        out_ptr=out,
        C=c,
        K=k,
        BLOCK=block,
    )
