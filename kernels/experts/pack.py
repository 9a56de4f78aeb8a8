"""Adapters of experts between PEFT's layout and that which the kernels read, and their gradients on the way back.

PEFT keeps lora_A [E * r, in], rows expert-slowest, and lora_B [out, r * E], columns expert-fastest. Kernels read for
each expert a matrix of all its ranks in the products' dtype, as the product over W_e wants it: [E, ranks, C] or [E, C,
ranks], ranks padded with zeros (``padded_ranks``).

Gradients come as float32 parts, [chunk of rows, C, padded ranks]: those of an expert are added up in their order, and
go to PEFT's layout in the adapter's dtype; an expert without rows has no chunks and gets zeros.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels.common import padded_rank, wait_for_stream
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

RANKS = 64  # the most that a program has in registers, and a product takes in one step


def padded_ranks(r: int) -> int:
    """A power of two from 16 to 64, or a multiple of 64: what blocks of ranks divide."""
    return -(-r // RANKS) * RANKS if r > RANKS else max(triton.next_power_of_2(r), padded_rank(1))


def rank_block(ranks: int) -> int:
    """Ranks that a program takes, of so many padded ones."""
    return min(ranks, RANKS)


class Stack(NamedTuple):
    """An expert's matrices [expert, rank, C] in memory, by strides: of PEFT's or of ours."""

    at: Operand
    expert: int
    rank: int
    c: int

    @staticmethod
    def of_a(a: Operand, experts: int) -> "Stack":
        """PEFT's lora_A [E * r, in]."""
        c = a.shape[1]
        return Stack(a, a.shape[0] // experts * c, c, 1)

    @staticmethod
    def of_b(b: Operand, experts: int) -> "Stack":
        """PEFT's lora_B [out, r * E]."""
        return Stack(b, 1, experts, b.shape[1])

    @staticmethod
    def packed(at: Operand, ranks_first: bool) -> "Stack":
        """[E, ranks, C] if ranks_first else [E, C, ranks]."""
        return Stack(at, at.stride(0), at.stride(1 if ranks_first else 2), at.stride(2 if ranks_first else 1))

    def block(self, ranks: int) -> dict[str, int]:
        """What a program takes of a stack that lies in memory as this one does."""
        experts, c = (1, 64) if self.c == 1 else (32, 16)
        return {"BLOCK_E": experts, "BLOCK_C": c, "BLOCK_R": min(ranks, 16)}


class Ranked(NamedTuple):
    """A stack as device code sees it."""

    ptr: Any
    expert: Any
    rank: Any
    c: Any


@triton.jit
def _places(t, experts, ranks, c):
    """[experts, C, ranks] pointers."""
    at = experts.to(tl.int64)[:, None, None] * t.expert + ranks.to(tl.int64)[None, None, :] * t.rank
    return t.ptr + (at + c.to(tl.int64)[None, :, None] * t.c)


@triton.jit
def _pack_kernel(
    src_ptr,
    dst_ptr,
    E,
    C,
    R,
    src_expert,
    src_rank,
    src_c,
    dst_expert,
    dst_rank,
    dst_c,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (experts < E)[:, None, None] & (c < C)[None, :, None]
    src, dst = Ranked(src_ptr, src_expert, src_rank, src_c), Ranked(dst_ptr, dst_expert, dst_rank, dst_c)
    t = tl.load(_places(src, experts, ranks, c), mask=inside & (ranks < R)[None, None, :], other=0.0)
    tl.store(_places(dst, experts, ranks, c), t.to(dst_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _collect_kernel(
    parts_ptr,
    chunks_ptr,
    grad_ptr,
    length,
    E,
    C,
    R,
    RANKS,
    grad_expert,
    grad_rank,
    grad_c,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.load(chunks_ptr + 3 * length + experts, mask=experts < E, other=0)
    chunks = tl.load(chunks_ptr + 3 * length + experts + 1, mask=experts < E, other=0) - first
    inside = (experts < E)[:, None, None] & (c < C)[None, :, None] & (ranks < R)[None, None, :]
    total = tl.zeros([BLOCK_E, BLOCK_C, BLOCK_R], tl.float32)
    for i in range(0, tl.max(chunks, 0)):
        at = ((first + i).to(tl.int64)[:, None, None] * C + c[None, :, None]) * RANKS + ranks[None, None, :]
        total += tl.load(parts_ptr + at, mask=inside & (i < chunks)[:, None, None], other=0.0)
    grad = Ranked(grad_ptr, grad_expert, grad_rank, grad_c)
    tl.store(_places(grad, experts, ranks, c), total.to(grad_ptr.dtype.element_ty), mask=inside)


def pack(src: Stack, dst: Operand, *, ranks_first: bool, r: int) -> Launch:
    """dst, [E, padded ranks, C] if ranks_first else [E, C, padded ranks], from an adapter of r ranks."""
    experts, c = dst.shape[0], dst.shape[2 if ranks_first else 1]
    ranks, to = dst.shape[1 if ranks_first else 2], Stack.packed(dst, ranks_first)
    block = src.block(ranks)
    return launch(
        _pack_kernel,
        _grid(experts, c, ranks, block),
        {"num_warps": 4},
        src.at,
        src_ptr=src.at,
        dst_ptr=dst,
        E=experts,
        C=c,
        R=r,
        src_expert=src.expert,
        src_rank=src.rank,
        src_c=src.c,
        dst_expert=to.expert,
        dst_rank=to.rank,
        dst_c=to.c,
        **block,
    )


def collect(parts: Operand, chunks: Any, grad: Stack, experts: int, r: int) -> Launch:
    """grad = the sums of parts [chunks, C, padded ranks] over each expert's chunks."""
    _, c, ranks = parts.shape
    block = grad.block(ranks)
    return launch(
        _collect_kernel,
        _grid(experts, c, r, block),
        {"num_warps": 4},
        grad.at,
        parts_ptr=parts,
        chunks_ptr=chunks.at,
        grad_ptr=grad.at,
        length=chunks.length,
        E=experts,
        C=c,
        R=r,
        RANKS=ranks,
        grad_expert=grad.expert,
        grad_rank=grad.rank,
        grad_c=grad.c,
        **block,
    )


def _grid(experts: int, c: int, ranks: int, block: dict[str, int]) -> tuple[int, int, int]:
    return (
        triton.cdiv(c, block["BLOCK_C"]),
        triton.cdiv(experts, block["BLOCK_E"]),
        triton.cdiv(ranks, block["BLOCK_R"]),
    )
