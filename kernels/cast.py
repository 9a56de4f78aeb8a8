"""Copies of adapters in the dtype of the products that read them: A [R, K] as it is, B [N, R] padded with zeros to [N,
padded R]. Over a turned base (bases.py) the copies are turned, too: A's lies as [K, padded R], B's as [padded R, N].

In float16 (LIFTED) the copy of B carries a power of two of the scaling: see ``lift_of``. They are made by a launch of
their own, or by programs of the launch that makes S (down.py), on processors that would idle.
"""

from typing import Any, Generic, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import lift_of, padded_rank, wait_for_stream
from lora_fast.kernels.operands import Number, Operand, T, launch
from lora_fast.kernels.program import Launch

CAST_BLOCK = 4096
CAST_STEPS = 4  # in the launch that makes S, whose own programs come first
TURNED_BLOCK = 512  # of turned copies, whose elements are stored one by one: more would hold the launch up


class Copied(NamedTuple):
    """A contiguous matrix as device code sees it, and its copy, which has more columns, zero, where ``copy_cols`` is
    more than ``cols``; columns of a turned copy are so many elements apart."""

    ptr: Any
    copy: Any
    rows: Any
    cols: Any
    copy_cols: Any
    apart: Any = 0


@triton.jit
def cast_block(t, block, lift, BLOCK: tl.constexpr, STEPS: tl.constexpr, TURNED: tl.constexpr = False):
    """STEPS blocks of the copy of t. A ``lift`` multiplies it."""
    for step in range(STEPS):
        i = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        row, col, inside = i // t.copy_cols, i % t.copy_cols, i < t.rows * t.copy_cols
        value = tl.load(t.ptr + row.to(tl.int64) * t.cols + col, mask=inside & (col < t.cols), other=0.0)
        if lift is not None:
            value = value.to(tl.float32) * lift
        if TURNED:
            i = col * t.apart + row
        tl.store(t.copy + i, value.to(t.copy.dtype.element_ty), mask=inside)


@triton.jit
def cast_both(
    a,
    b,
    scaling,
    block,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    TURNED: tl.constexpr,
):
    """A and then B."""
    a_blocks = tl.cdiv(a.rows * a.cols, BLOCK * STEPS)
    if block < a_blocks:
        cast_block(a, block, None, BLOCK, STEPS, TURNED)
    elif LIFTED:
        cast_block(b, block - a_blocks, lift_of(scaling, SCALING_PTR), BLOCK, STEPS, TURNED)
    else:
        cast_block(b, block - a_blocks, None, BLOCK, STEPS, TURNED)


@triton.jit
def _cast_kernel(
    a_ptr,
    b_ptr,
    a_cast_ptr,
    b_cast_ptr,
    scaling,
    K,
    N,
    R,
    RS,
    CAST_BLOCK: tl.constexpr,
    CAST_STEPS: tl.constexpr,
    LIFTED: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    TURNED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    a, b = Copied(a_ptr, a_cast_ptr, R, K, K, RS), Copied(b_ptr, b_cast_ptr, N, R, RS, N)
    cast_both(a, b, scaling, tl.program_id(0), CAST_BLOCK, CAST_STEPS, LIFTED, SCALING_PTR, TURNED)


class Cast(NamedTuple, Generic[T]):
    """Adapters that need copies in x's dtype, and the copies: of A as it is, of B [N, R] padded with zeros to [N,
    padded R]. Either both copies are ``turned`` or none."""

    a: T
    b: T
    a_copy: T
    b_copy: T


def cast_blocks(cast: Cast[Operand], block: int) -> int:
    """How many programs make the copies, so many elements each."""
    (r, k), n = cast.a.shape, cast.b.shape[0]
    return sum(triton.cdiv(size, block) for size in (r * k, n * padded_rank(r)))


def cast_wanted(kinds: tuple[torch.dtype, torch.dtype, torch.dtype], r: int) -> bool:
    """Whether the product needs copies of the adapters, for these dtypes of x, a and b: in x's, b with rows of a
    multiple of 16 bytes, and with its padding where many ranks in 16 bits are no multiple of 16 (dS = dY B would load
    each of their elements by itself: 163 us instead of 40 at r = 40)."""
    size = kinds[0].itemsize
    return not kinds[0] == kinds[1] == kinds[2] or r * size % 16 != 0 or (size <= 2 and r > 32 and r % 16 != 0)


def cast_adapters(
    like: Operand, cast: Cast[Operand], scaling: Operand | Number | None = None, lifted: bool = False
) -> Launch:
    """The copies, by a launch of their own ahead of that which reads ``like``."""
    (r, k), n, turned = cast.a.shape, cast.b.shape[0], cast.a_copy.turned
    block = TURNED_BLOCK if turned else CAST_BLOCK
    return launch(
        _cast_kernel,
        (cast_blocks(cast, block),),
        {"num_warps": 4},
        like,
        a_ptr=cast.a,
        b_ptr=cast.b,
        a_cast_ptr=cast.a_copy,
        b_cast_ptr=cast.b_copy,
        scaling=scaling,
        K=k,
        N=n,
        R=r,
        RS=padded_rank(r),
        CAST_BLOCK=block,
        CAST_STEPS=1,
        LIFTED=lifted,
        SCALING_PTR=isinstance(scaling, Operand),
        TURNED=turned,
    )
