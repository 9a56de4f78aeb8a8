"""The adapters of a batch as its products read them: A's one below the other [ranks in all, K], B's one beside the
other [N, ranks in all], in the products' dtype, each padded with zeros (ranks.py).

A product multiplies every row by all ranks that its block of rows uses, those of other adapters by zeros: so what is
not finite becomes zero here, and its rank is marked. The scales of marked ranks become NaN (places.py), and so S and dS
of the rows that name the adapter, and of no other.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.ranks import FIELDS
from lora_fast.kernels.common import TL, wait_for_stream
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch

BLOCK = 128
Maybe = Any  # an operand, None where the problem has none


class Given(NamedTuple):
    """The adapters as a call gives them: A's one below the other, a [sum of R, K], and B's one after the other, each
    contiguous, b [N * sum of R], and DoRA's magnitudes m [adapters, N]; or where each of them lies, int64 [adapters],
    in these dtypes."""

    a: Operand
    b: Operand
    m: Maybe
    kinds: tuple[Any, Any, Any] = (None, None, None)

    @classmethod
    def at(cls, addresses: Operand, problem: Problem) -> "Given":
        """By their addresses, all A's, all B's, all magnitudes."""
        n, kinds = len(problem.ranks.of), problem.kinds
        a, b, m = (addresses.part((n,), torch.int64, 8 * n * i) for i in range(3))
        return cls(a, b, m if problem.dora else None, (TL[kinds.a], TL[kinds.b], kinds.m and TL[kinds.m]))


@triton.jit
def lying(ptr, i, KIND: tl.constexpr):
    """The i-th pointer among those to numbers of this kind, each at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(ptr + i).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _finite(t):
    return tl.abs(t.to(tl.float32)) < float("inf")


@triton.jit
def _pack_kernel(
    a_ptr,
    b_ptr,
    groups_ptr,
    lift_ptr,
    a_all_ptr,
    b_all_ptr,
    bad_ptr,
    K,
    N,
    TOTAL,
    FIELDS: tl.constexpr,
    A_KIND: tl.constexpr,
    B_KIND: tl.constexpr,
    KIND: tl.constexpr,
    LIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    group, block = tl.program_id(0), tl.program_id(1)
    at = groups_ptr + group * FIELDS
    rank, r, before = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    if A_KIND is not None:
        a_ptr, b_ptr, before = lying(a_ptr, tl.load(at), A_KIND), lying(b_ptr, tl.load(at), B_KIND), 0
    ranks = rank + tl.arange(0, 16)  # of the adapter
    to = group * 16 + tl.arange(0, 16)  # of all
    bad = tl.zeros([16], tl.int32)
    a_blocks = tl.cdiv(K, BLOCK * STEPS)
    if block < a_blocks:
        for step in range(STEPS):
            cols = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            inside = (ranks < r)[:, None] & (cols < K)[None, :]
            a = tl.load(a_ptr + (ranks + before).to(tl.int64)[:, None] * K + cols[None, :], mask=inside, other=0.0)
            a = a.to(KIND)
            fine = _finite(a)
            a_ptrs = a_all_ptr + to.to(tl.int64)[:, None] * K + cols[None, :]
            tl.store(a_ptrs, tl.where(fine, a, 0.0), mask=(cols < K)[None, :] & (to >= 0)[:, None])
            bad = tl.maximum(bad, tl.max(1 - fine.to(tl.int32), 1))
    else:
        first = b_ptr + tl.full((), 1, tl.int64) * before * N  # each B is contiguous
        for step in range(STEPS):
            rows = ((block - a_blocks) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            inside = (rows < N)[:, None] & (ranks < r)[None, :]
            b = tl.load(first + rows.to(tl.int64)[:, None] * r + ranks[None, :], mask=inside, other=0.0)
            if LIFTED:
                b = b.to(tl.float32) * tl.load(lift_ptr + group * 16)
            b = b.to(KIND)
            fine = _finite(b)
            b_ptrs = b_all_ptr + rows.to(tl.int64)[:, None] * TOTAL + to[None, :]
            tl.store(b_ptrs, tl.where(fine, b, 0.0), mask=(rows < N)[:, None] & (to >= 0)[None, :])
            bad = tl.maximum(bad, tl.max(1 - fine.to(tl.int32), 0))
    tl.store(bad_ptr + block * TOTAL + to, bad)


def pack(
    given: Given, groups: Operand, lift: Operand, a_all: Operand, b_all: Operand, problem: Problem, scratch: Scratch
) -> tuple[Launch, Operand]:
    """What fills a_all [ranks in all, K] and b_all [N, ranks in all]; and the marks that it leaves [parts, ranks in
    all]."""
    (total, k), n = a_all.shape, b_all.shape[0]
    steps = 2 if total <= 256 else 8  # of few ranks more programs
    parts = triton.cdiv(k, BLOCK * steps) + triton.cdiv(n, BLOCK * steps)
    bad = scratch.part((parts, total), torch.int32)
    a_kind, b_kind, _ = given.kinds
    made = launch(
        _pack_kernel,
        (problem.ranks.lengths[0], parts),
        {"num_warps": 4},
        a_all,
        a_ptr=given.a,
        b_ptr=given.b,
        groups_ptr=groups,
        lift_ptr=lift,
        a_all_ptr=a_all,
        b_all_ptr=b_all,
        bad_ptr=bad,
        K=k,
        N=n,
        TOTAL=total,
        FIELDS=FIELDS,
        A_KIND=a_kind,
        B_KIND=b_kind,
        KIND=TL[a_all.dtype],
        LIFTED=problem.lifted,
        BLOCK=BLOCK,
        STEPS=steps,
    )
    return made, bad
