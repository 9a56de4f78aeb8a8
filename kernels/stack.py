"""The adapters of layers with one input, as their shared launches read them: A's one below the other, [sum of padded
R, K] in x's dtype, rows between filled with zeros; for each rank its layer's scaling; and copies of B's, where the
products cannot read them.

In float16 (LIFTED) the copy of a B carries a power of two of its scaling, and the scales lack it: see ``lift_of``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels.cast import CAST_BLOCK, Copied, cast_block
from lora_fast.kernels.common import lift_of, low_scale, padded_rank, wait_for_stream
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch

MOST = 4  # layers that share launches


@triton.jit
def _one(
    block,
    first,
    a_ptr,
    b_ptr,
    b_copy_ptr,
    scaling,
    stacked_ptr,
    scales_ptr,
    K,
    N,
    R,
    BLOCK: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
):
    """One layer's share, from row ``first`` of the stack on. Returns (the block as the next layer counts it, the row
    where that begins)."""
    RS = (R + 15) // 16 * 16
    blocks = tl.cdiv(RS * K, BLOCK)
    if (block >= 0) & (block < blocks):
        to = stacked_ptr + first.to(tl.int64) * K
        cast_block(Copied(a_ptr, to, 1, R * K, RS * K), block, None, BLOCK, 1)  # as one row: what follows A is zero
    if block == 0:
        one = tl.full([16], 1, tl.float32) * low_scale(scaling, SCALING_PTR, LIFTED)
        for rank in range(0, RS, 16):
            tl.store(scales_ptr + first + rank + tl.arange(0, 16), one)
    block -= blocks
    if b_copy_ptr is not None:
        blocks = tl.cdiv(N * RS, BLOCK)
        if (block >= 0) & (block < blocks):
            if LIFTED:
                cast_block(Copied(b_ptr, b_copy_ptr, N, R, RS), block, lift_of(scaling, SCALING_PTR), BLOCK, 1)
            else:
                cast_block(Copied(b_ptr, b_copy_ptr, N, R, RS), block, None, BLOCK, 1)
        block -= blocks
    return block, first + RS


@triton.jit
def _stack_kernel(
    a0,
    b0,
    b0_copy,
    scaling0,
    a1,
    b1,
    b1_copy,
    scaling1,
    a2,
    b2,
    b2_copy,
    scaling2,
    a3,
    b3,
    b3_copy,
    scaling3,
    stacked_ptr,
    scales_ptr,
    K,
    N0,
    R0,
    N1,
    R1,
    N2,
    R2,
    N3,
    R3,
    BLOCK: tl.constexpr,
    LIFTED: tl.constexpr,
    PTR0: tl.constexpr,
    PTR1: tl.constexpr,
    PTR2: tl.constexpr,
    PTR3: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    block, first = tl.program_id(0), tl.program_id(0) * 0
    block, first = _one(
        block, first, a0, b0, b0_copy, scaling0, stacked_ptr, scales_ptr, K, N0, R0, BLOCK, LIFTED, PTR0
    )
    if a1 is not None:
        block, first = _one(
            block, first, a1, b1, b1_copy, scaling1, stacked_ptr, scales_ptr, K, N1, R1, BLOCK, LIFTED, PTR1
        )
    if a2 is not None:
        block, first = _one(
            block, first, a2, b2, b2_copy, scaling2, stacked_ptr, scales_ptr, K, N2, R2, BLOCK, LIFTED, PTR2
        )
    if a3 is not None:
        block, first = _one(
            block, first, a3, b3, b3_copy, scaling3, stacked_ptr, scales_ptr, K, N3, R3, BLOCK, LIFTED, PTR3
        )


class Adapter(NamedTuple):
    """A layer's a [R, K] and b [N, R], contiguous, in any float dtypes, its scaling, and where a copy of b goes."""

    a: Operand
    b: Operand
    b_copy: Operand | None
    scaling: Operand | Number


def stack(like: Operand, adapters: Sequence[Adapter], stacked: Operand, scales: Operand, lifted: bool) -> Launch:
    """Fill stacked [sum of padded R, K], scales, as many, in float32, and the copies [N, padded R], ahead of the launch
    that reads ``like``."""
    k, blocks = stacked.shape[1], 0
    given: dict[str, Operand | Number | int | bool | None] = {}
    for i in range(MOST):
        one = adapters[i] if i < len(adapters) else None
        n, r = (0, 0) if one is None else one.b.shape
        given |= {
            f"a{i}": one and one.a,
            f"b{i}": one and one.b,
            f"b{i}_copy": one and one.b_copy,
            f"scaling{i}": one and one.scaling,
            f"N{i}": n,
            f"R{i}": r,
            f"PTR{i}": one is not None and isinstance(one.scaling, Operand),
        }
        blocks += triton.cdiv(padded_rank(r) * k, CAST_BLOCK)
        if one is not None and one.b_copy is not None:
            blocks += triton.cdiv(n * padded_rank(r), CAST_BLOCK)
    return launch(
        _stack_kernel,
        (blocks,),
        {"num_warps": 4},
        like,
        **given,
        stacked_ptr=stacked,
        scales_ptr=scales,
        K=k,
        BLOCK=CAST_BLOCK,
        LIFTED=lifted,
    )
