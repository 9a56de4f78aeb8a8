"""Dropout mask bits: bit c % 32 of word [m, c // 32] says whether element (m, c) stays, with P(stays) = count / 2^12.

32 Bernoulli bits are made at once: with count / 2^12 = 0.b1 b2 ... b12 in binary, start from zeros and take the digits
from the last to the first, or-ing a random word where the digit is 1 and and-ing it where it is 0. Each step halves the
distance, so every bit is 1 with probability count / 2^12 exactly. The random words come from calls of Philox
(Salmon et al. 2011), four words each, whose key is the seed and whose counter is the word's index: no state, any order.

The first 8 digits decide all but one bit in 256, so four neighbouring words share the call for the other 4: of two bits
at the same place of such words, both hang on it once in 65536, and their correlation is no more than that.
"""

import math

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import wait_for_stream
from lora_fast.kernels.operands import Number, Operand, launch, run
from lora_fast.kernels.program import Launch


@triton.jit
def _digit(acc, word, count, D: tl.constexpr):
    ones = (0 - ((count >> D) & 1)).to(tl.uint32)  # all of them where the digit is 1
    return (word & acc) | ((word | acc) & ones)  # one instruction


@triton.jit
def _philox(seed, c0, c1, c2, c3, ROUNDS: tl.constexpr):
    """The words of ``tl.philox``, from products of 64 bits: one instruction gives both halves."""
    key = seed.to(tl.uint64)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(seed, index, call):
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return _philox(seed, low, high, low * 0 + call, low * 0, 7)


@triton.jit
def _take(acc, w0, w1, w2, w3, count, D: tl.constexpr):
    """Take in digits D to D + 3."""
    acc = _digit(acc, w0, count, D)
    acc = _digit(acc, w1, count, D + 1)
    acc = _digit(acc, w2, count, D + 2)
    return _digit(acc, w3, count, D + 3)


@triton.jit
def _four_digits(acc, seed, index, call, count, D: tl.constexpr):
    """The same with one call of Philox."""
    w0, w1, w2, w3 = _words(seed, index, call)
    return _take(acc, w0, w1, w2, w3, count, D)


@triton.jit(do_not_specialize=["seed", "count", "n_words"])
def _mask_kernel(
    seed,
    bits_ptr,
    count,
    n_words,
    own_ptr,
    counts_ptr,
    WORDS,
    ADAPTERS,
    SEED_PTR: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    if SEED_PTR:
        seed = tl.load(seed)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = group[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
    if counts_ptr is not None:  # a count for each row, by its adapter: four words may lie in two rows
        own = tl.load(own_ptr + index // WORDS, mask=index < n_words, other=-1)
        count = tl.load(counts_ptr + tl.where(own < 0, ADAPTERS, own))
        w0, w1, w2, w3 = _words(seed, group, 2)
        acc = _take(tl.zeros([BLOCK, 4], dtype=tl.uint32), w0[:, None], w1[:, None], w2[:, None], w3[:, None], count, 0)
    else:
        shared = _four_digits(tl.zeros([BLOCK], dtype=tl.uint32), seed, group, 2, count, 0)
        acc = tl.broadcast_to(shared[:, None], (BLOCK, 4))
    acc = _four_digits(acc, seed, index, 1, count, 4)
    acc = _four_digits(acc, seed, index, 0, count, 8)
    bits = acc.to(tl.int32, bitcast=True)
    if counts_ptr is not None:
        bits = tl.where(count == 4096, -1, bits)
    tl.store(bits_ptr + index, bits, mask=index < n_words)


def keep_count(p: float) -> int:
    """1 - p in units of 2^-12, within 1 and 4095."""
    return min(max(round((1 - p) * 4096), 1), 4095)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by, so that the expectation is exact: about 1 / (1 - p)."""
    return 4096 / keep_count(p)


def mask(
    seed: Operand | Number,
    bits: Operand,
    count: Number | None,
    words: Number,
    *,
    own: Operand | None = None,
    counts: Operand | None = None,
) -> Launch:
    """bits [M, ceil(K / 32)] from the seed, see ``mask_bits``; count is ``keep_count``, words their number. With
    ``own`` [M] row i has the count counts[own[i]], the last of them where that is negative; 4096 keeps all."""
    return launch(
        _mask_kernel,
        (triton.cdiv(math.prod(bits.shape), 4 * 256),),
        {"num_warps": 4},
        bits,
        seed=seed,
        bits_ptr=bits,
        count=count,
        n_words=words,
        own_ptr=own,
        counts_ptr=counts,
        WORDS=bits.shape[1],
        ADAPTERS=0 if counts is None else counts.shape[0] - 1,
        SEED_PTR=isinstance(seed, Operand),
        BLOCK=256,
    )


def mask_bits(seed: torch.Tensor | int, p: float, m: int, k: int, device: torch.device | None = None) -> torch.Tensor:
    """int32 [m, ceil(k / 32)] mask bits for an [m, k] input, from a one-element int64 tensor, or from a number of at
    least 2^32 and under 2^63 for that device."""
    if isinstance(seed, torch.Tensor):
        device = seed.device
    bits = torch.empty(m, triton.cdiv(k, 32), dtype=torch.int32, device=device)
    n = bits.numel()
    if n:
        run(mask, bits=bits, seed=seed, count=keep_count(p), words=n)
    return bits


def unpack(bits: torch.Tensor, k: int) -> torch.Tensor:
    """The same mask as a boolean [m, k] tensor, for tests and for whoever wants to look at it."""
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :k].bool()
