"""Tile choices, as functions of the problem and the chip: here what they share, and the products; those of the passes
over x, dY and W are in pass_tiles.py. Measured on H100 and H200 (benchmarks/NOTES.md); elsewhere chosen to fit shared
memory and registers, which the tests hold by compiling for each chip. Times are in microseconds.

M enters in few steps only, so that a batch size that changes from step to step compiles a bounded number of variants.

To change one: edit its row; ``tools/search_tiles.py`` says whether the new one is better, and finds better ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
import triton

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.program import forget_programs

if TYPE_CHECKING:
    from lora_fast.kernels.operands import Operand


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of a kernel takes at a time along each axis (0: the kernel's own business), and how it is
    compiled. A product's k is the axis that it contracts."""

    m: int = 0
    n: int = 0
    k: int = 0
    r: int = 0
    warps: int = 4
    stages: int = 3
    fill: float = 1.0  # programs a processor, at most, where a launch shares its work out by that
    # Of ``down`` alone: into how many ways side by side warps part the way along K (0: they do not); and the rows that
    # a program quantises, how many of them at once, and how many elements of each.
    ways: int = 0
    quant_rows: int = 0
    quant_step: int = 0
    quant_k: int = 0
    # Of ``decode`` alone: for so many steps W comes into the chip's cache while the launch before still runs.
    ahead: int = 0
    # Of ``grad`` alone: rows of sums in registers, as many as warps lie along the rows: a thread adds up its own.
    sum_rows: int = 8

    @property
    def options(self) -> dict[str, int]:
        """For the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# Kernels whose tiles are chosen, here, in pass_tiles.py and in experts/tiles.py, by functions of these names.
KERNELS = (
    "product",
    "product_with_s",
    "decode",
    "down",
    "down_quantised",
    "pair",
    "grad",
    "glu_down",
    "glu_grad",
    "norm",
    "norm_parts",
    "weight",
    "weight_grad",
    "experts_product",
    "experts_rows",
    "experts_gate",
    "experts_columns",
    "batch_columns",
    "batch_norm",
    "batch_gains",
)

_overridden: dict[str, Tile | None] = {}
P = ParamSpec("P")
Chosen = TypeVar("Chosen", Tile, Tile | None)


def choice(function: Callable[P, Chosen]) -> Callable[P, Chosen]:
    """What chooses a kernel's tile, unless it is overridden."""
    name = function.__name__
    assert name in KERNELS

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> Chosen:
        if name in _overridden:
            return _overridden[name]  # type: ignore[return-value]
        return function(*args, **kwargs)

    return chosen


@contextmanager
def override(**tiles: Tile | None) -> Iterator[None]:
    """Within, kernels of these names (see ``KERNELS``) take these tiles, whatever the problem: ``with
    override(product=Tile(m=128, n=128, k=64)): ...``. With ``product_with_s=None`` S has a launch of its own.

    Nothing checks that a tile suits the problem. Some follow another's: product_with_s product's, down_quantised
    down's, weight norm's. Programs that were made before are forgotten, and at the end those made within, so that
    neither uses the other's tiles; in all threads, for the backward has its own. A CUDA graph stays what was captured.
    """
    if unknown := tiles.keys() - set(KERNELS):
        raise TypeError(f"no kernel's tile is called {', '.join(sorted(unknown))}; they are {', '.join(KERNELS)}")
    before = dict(_overridden)
    _overridden.update(tiles)
    forget_programs()
    try:
        yield
    finally:
        _overridden.clear()
        _overridden.update(before)
        forget_programs()


def tma_fits(*tensors: "Operand") -> bool:
    """Whether tensor descriptors can read and write these matrices: Hopper or later, rows contiguous, strides and start
    multiples of 16 bytes."""
    return Chip.of(tensors[0].device).has_tma and all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def rank_block(r: int, most: int) -> int:
    """The tile of ranks that one instruction sequence takes: a power of two from 16 to ``most``."""
    return min(max(triton.next_power_of_2(r), 16), most)


FEW = 2048  # rows


def few_rows(m: int, r: int, *, dtype: torch.dtype, chip: Chip, most: int = FEW, ranks: int = 32) -> bool:
    """Whether the launches for few rows serve: those that leave most of the processors idle would, and those that pass
    over all rows in each program do not take too long for it. Of how many ranks depends on the launch."""
    return m <= most and r <= ranks and dtype.itemsize == 2 and chip.has_tma and not chip.small


# Tiles of a product's result in 16 bits, and what a step of 64 along the contraction costs the processor that makes it:
# in ns on an H200; on other chips the ratios are taken to be alike. What ``busiest`` picks of these was within 1% of
# the best of 17 tiles: the mean over 8 shapes, 128 to 2048 rows.
PRODUCT = {
    Tile(m=128, n=256, k=64, warps=8, stages=3): 770,  # reads the fewest bytes for an element of the result
    Tile(m=128, n=128, k=64, warps=4, stages=4): 410,
    Tile(m=64, n=128, k=64, warps=4, stages=6): 285,  # six stages: 22 -> 18 for 256 x 4096 x 4096
    Tile(m=64, n=64, k=128, warps=4, stages=4): 195,
}
LARGE, MIDDLE, LOW, LEAST = PRODUCT
# On newer chips 128 x 128 spills with four warps, and so do tiles of 64 rows.
NEWER_PRODUCT = {
    LARGE: PRODUCT[LARGE],
    replace(MIDDLE, warps=8): PRODUCT[MIDDLE],
    Tile(m=128, n=64, k=64, warps=4, stages=4): PRODUCT[LOW],
}


def busiest(tile: Tile, cost: int, m: int, n: int, chip: Chip) -> int:
    """What the processor that has the most to do takes for a product [M, N], a step along the contraction."""
    return triton.cdiv(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), chip.processors) * cost


@choice
def product(
    m: int,
    n: int,
    *,
    dtype: torch.dtype,
    kind: torch.dtype,
    chip: Chip,
    tma: bool,
    masked: bool,
    exact: str = "ieee",
    keep_z: bool = False,
    r: int = 0,
) -> Tile:
    """The product [M, N] of factors in ``dtype``, the result in ``kind``. In 16 bits that with which the processor that
    has the most to do has the least: M enters by the number of turns that the processors take."""
    if dtype == torch.float8_e4m3fn:
        if tma and not chip.small and kind.itemsize <= 2:  # the best of 53; r: ranks a step under a mask
            return Tile(m=128, n=256, k=128, r=rank_block(r, 64) if masked else 16, warps=8)
        return Tile(m=64, n=128 if tma or chip.capability < 120 else 64, k=64, r=16, warps=8)  # what fits
    if dtype.itemsize > 2:
        if exact == "ieee" or chip.small or not tma:  # without the matrix units, or in little memory
            return Tile(m=64, n=64, k=16 if exact == "ieee" and masked else 32, warps=8)
        return Tile(m=128, n=128, k=32, warps=8)
    if chip.small or not tma:
        return Tile(m=128, n=128, k=32, warps=8)  # what fits 100 KB, and loads by pointers
    tiles = NEWER_PRODUCT if chip.newer else PRODUCT
    if chip.newer and (masked or keep_z):  # which 256 columns spill there
        tiles = {tile: cost for tile, cost in tiles.items() if tile is not LARGE}
    return min(tiles, key=lambda tile: busiest(tile, tiles[tile], m, n, chip))


# The same where S is made on the way (few_rows.py), by what ``product`` picks. With 256 columns the second
# accumulator's share of the loop is least: 18.7 -> 15.9 for dX of 1024 x 2048 x 2048 beside 128 x 128.
WITH_S = {MIDDLE: Tile(m=64, n=256, k=64, warps=4, stages=4), LOW: LOW, LEAST: LEAST}


@choice
def product_with_s(m: int, n: int, c: int, *, dtype: torch.dtype, chip: Chip, masked: bool) -> Tile | None:
    """A product [M, N] over C that makes S, too. None where S is better made by a launch of its own: for the largest
    tile, whose loop the matrix units bound; where processors would make more than one tile, or much of the tiles lies
    outside; along a very long way; under a mask for many columns, which leave it no registers; and on chips where it
    was not tried."""
    tile = WITH_S.get(product(m, n, dtype=dtype, kind=dtype, chip=chip, tma=True, masked=masked))
    if tile is None or not chip.hopper or c > 8192 or (tile.n > 128 and (masked or n % tile.n)):
        return None
    return tile if triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) <= chip.processors else None


def decodes(m: int, n: int, k: int, r: int, *, dtype: torch.dtype, chip: Chip) -> bool:
    """Whether a forward alone is made with its operands the other way round: of up to 64 rows, or 128 where few columns
    have a long way along K, which programs share there."""
    few = m <= 64 or (m <= 128 and k >= 2 * n)
    return few and r <= 64 and dtype.itemsize == 2 and chip.hopper


@choice
def decode(m: int, n: int) -> Tile:
    """The forward of few rows without a backward; n counts rows of W."""
    block_m = rank_block(m, 128)
    block_n, block_k = (128, 64) if n >= 4096 else (64, 128)  # of few columns more programs
    stage = 2 * block_k * (block_n + block_m + 64)  # bytes
    # 1 KB of each row: 64 x 2048 x 2048 8.2 -> 7.8, 4096 -> 14336 41.9 -> 40.5; nothing where four programs share a way
    # that is longer.
    ahead = 0 if 4096 <= n <= 8192 else 512 // block_k
    return Tile(m=block_m, n=block_n, k=block_k, r=64, stages=min(6, 200_000 // stage), ahead=ahead)  # what fits


def decode_splits(n: int, k: int, *, tile: Tile, chip: Chip) -> tuple[int, int]:
    """(how many programs share the way along K, steps of each): one program a processor, four steps at least."""
    steps, programs = triton.cdiv(k, tile.k), int(chip.processors * tile.fill)
    splits = max(1, min(programs // triton.cdiv(n, tile.n), steps // 4))
    each = triton.cdiv(steps, splits)
    return triton.cdiv(steps, each), each
