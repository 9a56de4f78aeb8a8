"""How the adapters of a batch lie beside each other: their ranks, one adapter's after the other's, each padded to 16 as
matrix instructions take them; and what of this kernels look up.

Rows are counted in blocks of ``ROWS``, ranks in units of ``UNIT``: what tiles of products and passes divide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.mask import keep_count, keep_scale
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.operands import Operand
from lora_fast.kernels.tiles import rank_block

ROWS = 128
UNIT = 64
FIELDS = 5  # numbers of a block of ranks


class Tables(NamedTuple):
    """What kernels look up, int32: the adapter of each rank [total], and which of its own that is; where each adapter
    begins among all ranks, and the end [adapters + 1]; and blocks of ranks [blocks, 5] that are one adapter's, of 16
    and of ``Ranks.block``: the adapter, where the block begins among all ranks and among its own, how many ranks the
    adapter has, and how many those before it have; last a block of no ranks for rows without an adapter."""

    owner: Any
    within: Any
    firsts: Any
    groups: Any
    blocks: Any


@dataclass(frozen=True)
class Ranks:
    of: tuple[int, ...]  # each adapter's

    @cached_property
    def padded(self) -> tuple[int, ...]:
        return tuple(map(padded_rank, self.of))

    @cached_property
    def total(self) -> int:
        return sum(self.padded)

    @cached_property
    def units(self) -> int:
        return -(-self.total // UNIT)

    @cached_property
    def block(self) -> int:
        """Ranks of one adapter that a pass by columns has in its accumulator."""
        return rank_block(max(self.of), UNIT)

    def blocks(self, size: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        first = before = 0
        for i, (r, padded) in enumerate(zip(self.of, self.padded, strict=True)):
            found += [(i, first + rank, rank, r, before) for rank in range(0, padded, size)]
            first, before = first + padded, before + r
        return found

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """How many blocks of 16 ranks there are, and of ``block``, with one for rows without an adapter."""
        return self.total // 16, len(self.blocks(self.block)) + 1

    def tables(self, at: Operand) -> Tables:
        (groups, blocks), adapters = self.lengths, len(self.of)
        firsts = 8 * self.total
        starts = firsts + 4 * (adapters + 1), firsts + 4 * (adapters + 1 + FIELDS * groups)
        return Tables(
            at.part((self.total,), torch.int32),
            at.part((self.total,), torch.int32, 4 * self.total),
            at.part((adapters + 1,), torch.int32, firsts),
            at.part((groups, FIELDS), torch.int32, starts[0]),
            at.part((blocks, FIELDS), torch.int32, starts[1]),
        )


@cache  # a few KB for each set of ranks; CUDA graphs read it
def tables_on(ranks: Ranks, device: torch.device) -> torch.Tensor:
    """What ``Ranks.tables`` are parts of."""
    owner = [i for i, padded in enumerate(ranks.padded) for _ in range(padded)]
    owner += [rank for padded in ranks.padded for rank in range(padded)]
    owner += [0, *accumulate(ranks.padded)]
    numbers = [number for size in (16, ranks.block) for block in ranks.blocks(size) for number in block]
    numbers += [len(ranks.of), 0, 0, 0, 0]
    return _on(device, owner + numbers, torch.int32)


def _on(device: torch.device, numbers: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """For calls of any kind: a tensor made in inference mode could not be saved for a backward."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype).to(device)


@lru_cache(maxsize=4096)
def _keep_scales(rates: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return _on(device, [keep_scale(p) if p else 1.0 for p in rates], torch.float32)


@lru_cache(maxsize=4096)
def _counts(rates: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
    """``Numbers.counts``; 4096 keeps all."""
    if not any(rates):
        return None
    return _on(device, [keep_count(p) if p else 4096 for p in (*rates, 0.0)], torch.int32)


class Numbers(NamedTuple):
    """What ranks and rows are multiplied by and dropped with.

    scales [3, total] float32: of S and dS for each rank; what its column of B is multiplied by (in float16 a power of
    two of the scaling, see ``lift_of``); and the scaling, or what of it B does not carry; counts [adapters + 1] int32:
    ``keep_count`` of each adapter's rows, last that of rows without one; None without dropout.
    """

    scales: torch.Tensor
    counts: torch.Tensor | None


def numbers_of(
    ranks: Ranks,
    scalings: Sequence[float | torch.Tensor],
    rates: Sequence[float],
    lifted: bool,
    device: torch.device,
) -> Numbers:
    """For these scalings and rates of dropout. Numbers come from the host, once; tensors are not read back to it."""
    rates = tuple(rates)
    if not any(isinstance(one, torch.Tensor) for one in scalings):
        scales = _known(ranks, tuple(map(float, scalings)), rates, lifted, device)
    else:
        each = [one if isinstance(one, torch.Tensor) else torch.full((), one, device=device) for one in scalings]
        together = torch.stack([one.detach().float() for one in each])
        owner = tables_on(ranks, device)[: ranks.total]
        scales = _scales(together, _keep_scales(rates, device), lifted)[:, owner]
    found = Numbers(scales, _counts(rates, device))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


def addresses_on(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """Where these tensors lie, int64, for kernels that read them there. None where one does not start at a multiple of
    16 bytes, or where a CUDA graph is recorded, which cannot take along what the host has not sent before."""
    found = [t.data_ptr() for t in tensors]
    bits = 0
    for address in found:
        bits |= address
    if bits % 16:
        return None
    key, recorded = (device, *found), device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        if recorded:
            return None
        table = _tables.keep(key, _on(device, found, torch.int64))
    if recorded:
        _captured.append(table)
    return table


_tables = Memo()  # of addresses, by these
_captured: list[Numbers | torch.Tensor] = []  # what CUDA graphs read


@lru_cache(maxsize=4096)
def _known(
    ranks: Ranks, scalings: tuple[float, ...], rates: tuple[float, ...], lifted: bool, device: torch.device
) -> torch.Tensor:
    cpu = torch.device("cpu")
    scales = _scales(_on(cpu, scalings, torch.float32), _keep_scales(rates, cpu), lifted)
    of_ranks = scales.repeat_interleave(torch.tensor(ranks.padded), 1).flatten().tolist()
    return _on(device, of_ranks, torch.float32).view(3, ranks.total)


def _scales(scalings: torch.Tensor, keeps: torch.Tensor, lifted: bool) -> torch.Tensor:
    """``Numbers.scales``, one for each adapter."""
    lift = torch.ones_like(scalings)
    if lifted:  # the least power of two that is |scaling| or more
        mantissa, exponent = torch.frexp(scalings.abs().clamp(min=1))
        lift = torch.ldexp(lift, exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.stack([scalings * keeps / lift, lift, scalings / lift])
