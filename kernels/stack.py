"""The adapters of layers with one input, as their shared launches read them: A's one below the other, [sum of padded
R, K] in x's dtype, rows between filled with zeros; for each rank its layer's scaling; and copies of B's, where the
products cannot read them.

In float16 (LIFTED) the copy of a B carries a power of two of its scaling, and the scales lack it: see ``lift_of``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels.cast import CAST_BLOCK, Copied, cast_block
from lora_fast.kernels.common import lift_of, low_scale, padded_rank, wait_for_stream
from lora_fast.kernels.operands import Number, Operand, launch
from lora_fast.kernels.program import Launch

MOST = 4  # layers that share launches


class Stack(NamedTuple):
    """The stack [.., K] and the scales of its rows as device code sees them."""

    ptr: Any
    scales_ptr: Any
    K: Any


class One(NamedTuple):
    """One layer's adapters as device code sees them, and where a copy of b goes."""

    a_ptr: Any
    b_ptr: Any
    b_copy_ptr: Any
    scaling: Any
    N: Any
    R: Any


@triton.jit
def _add(stack, block, first, one, BLOCK: tl.constexpr, LIFTED: tl.constexpr, SCALING_PTR: tl.constexpr):
    """One layer's share, from row ``first`` of the stack on. Returns (the block as the next layer counts it, the row
    where that begins)."""
    RS = (one.R + 15) // 16 * 16
    blocks = tl.cdiv(RS * stack.K, BLOCK)
    if (block >= 0) & (block < blocks):
        to = stack.ptr + first.to(tl.int64) * stack.K
        # As one row: what follows A is zero.
        cast_block(Copied(one.a_ptr, to, 1, one.R * stack.K, RS * stack.K), block, None, BLOCK, 1)
    if block == 0:
        scale = tl.full([16], 1, tl.float32) * low_scale(one.scaling, SCALING_PTR, LIFTED)
        for rank in range(0, RS, 16):
            tl.store(stack.scales_ptr + first + rank + tl.arange(0, 16), scale)
    block -= blocks
    if one.b_copy_ptr is not None:
        blocks = tl.cdiv(one.N * RS, BLOCK)
        if (block >= 0) & (block < blocks):
            lift = lift_of(one.scaling, SCALING_PTR) if LIFTED else None
            cast_block(Copied(one.b_ptr, one.b_copy_ptr, one.N, one.R, RS), block, lift, BLOCK, 1)
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
    block, first, stack = tl.program_id(0), tl.program_id(0) * 0, Stack(stacked_ptr, scales_ptr, K)
    block, first = _add(stack, block, first, One(a0, b0, b0_copy, scaling0, N0, R0), BLOCK, LIFTED, PTR0)
    if a1 is not None:
        block, first = _add(stack, block, first, One(a1, b1, b1_copy, scaling1, N1, R1), BLOCK, LIFTED, PTR1)
    if a2 is not None:
        block, first = _add(stack, block, first, One(a2, b2, b2_copy, scaling2, N2, R2), BLOCK, LIFTED, PTR2)
    if a3 is not None:
        block, first = _add(stack, block, first, One(a3, b3, b3_copy, scaling3, N3, R3), BLOCK, LIFTED, PTR3)


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
