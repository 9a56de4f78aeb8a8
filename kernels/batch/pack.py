"""The adapters of a batch as its products read them: A's one below the other [ranks in all, K], B's one beside the
other [N, ranks in all], in the products' dtype, each padded with zeros (ranks.py).

A product multiplies every row by all ranks that its block of rows uses, those of other adapters by zeros: so what is
not finite becomes zero here, and its rank is marked. The scales of marked ranks become NaN (places.py), and so S and dS
of the rows that name the adapter, and of no other.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.batch.ranks import FIELDS, Ranks
from lora_fast.kernels.common import TL, wait_for_stream
from lora_fast.kernels.operands import Operand, Scratch, launch
from lora_fast.kernels.program import Launch

BLOCK = 128


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
    ranks = rank + tl.arange(0, 16)  # of the adapter
    to = group * 16 + tl.arange(0, 16)  # of all
    bad = tl.zeros([16], tl.int32)
    a_blocks = tl.cdiv(K, BLOCK * STEPS)
    if block < a_blocks:
        for step in range(STEPS):
            cols = (block * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            inside = (ranks < r)[:, None] & (cols < K)[None, :]
            a = tl.load(a_ptr + (before + ranks).to(tl.int64)[:, None] * K + cols[None, :], mask=inside, other=0.0)
            a = a.to(KIND)
            fine = _finite(a)
            a_ptrs = a_all_ptr + to.to(tl.int64)[:, None] * K + cols[None, :]
            tl.store(a_ptrs, tl.where(fine, a, 0.0), mask=(cols < K)[None, :] & (to >= 0)[:, None])
            bad = tl.maximum(bad, tl.max(1 - fine.to(tl.int32), 1))
    else:
        first = b_ptr + before.to(tl.int64) * N  # each B is contiguous
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
    a: Operand,
    b: Operand,
    groups: Operand,
    lift: Operand,
    a_all: Operand,
    b_all: Operand,
    ranks: Ranks,
    lifted: bool,
    scratch: Scratch,
) -> tuple[Launch, Operand]:
    """What fills a_all [ranks in all, K] and b_all [N, ranks in all] from A's one below the other, a [sum of R, K], and
    B's one after the other, each contiguous, b [N * sum of R]; and the marks that it leaves [parts, ranks in all]."""
    (total, k), n = a_all.shape, b_all.shape[0]
    steps = 2 if total <= 256 else 8  # of few ranks more programs
    parts = triton.cdiv(k, BLOCK * steps) + triton.cdiv(n, BLOCK * steps)
    bad = scratch.part((parts, total), torch.int32)
    made = launch(
        _pack_kernel,
        (ranks.lengths[0], parts),
        {"num_warps": 4},
        a_all,
        a_ptr=a,
        b_ptr=b,
        groups_ptr=groups,
        lift_ptr=lift,
        a_all_ptr=a_all,
        b_all_ptr=b_all,
        bad_ptr=bad,
        K=k,
        N=n,
        TOTAL=total,
        FIELDS=FIELDS,
        KIND=TL[a_all.dtype],
        LIFTED=lifted,
        BLOCK=BLOCK,
        STEPS=steps,
    )
    return made, bad
