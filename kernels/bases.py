"""Frozen weights W [N, K] as the programs of a layer read them: as they are, in e4m3, in 4 bits, as fp8 checkpoints
hold them.

A base is a row of ``BASES``. It says which tensors hold W (a call hands them over, in this order), which of them each
product reads, and whether the passes over x and dY must also write these in e4m3 for it. One whose tensors no product
can read has functions that make launches which write W into the program's memory first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from lora_fast.kernels import block_scales, four_bits
from lora_fast.kernels.block_scales import Scaled
from lora_fast.kernels.common import FP8
from lora_fast.kernels.nibbles import Stored
from lora_fast.kernels.operands import Operand, Scratch
from lora_fast.kernels.program import Launch


class Read(NamedTuple):
    """What a product reads of W, in x's dtype: W itself, for y and for dX; or in e4m3: W for y, its transpose for dX,
    with a scale for each row."""

    matrix: Operand
    scale: Operand | None = None
    launches: Sequence[Launch] = ()  # that write it, ahead of those that read it


class Wanted(NamedTuple):
    """What a launch that writes W must know."""

    n: int
    k: int
    kind: torch.dtype  # of the products
    room: Operand  # bytes, for one of what y and dX read at a time
    gain: Operand | None = None  # DoRA's; e4m3 for y again, in a backward: only rows whose gain is below ``weak``
    weak: float = 0.0


Unpack = Callable[[Sequence[Any], Wanted], Read]


@dataclass(frozen=True, eq=False)
class Base:
    name: str
    tensors: tuple[str, ...]
    for_y: slice  # those of them that the product of y reads, and DoRA's norm: a matrix, or that and its scales
    for_dx: slice  # and those that the product of dX reads
    e4m3: bool = False  # whether the products read x and dY in e4m3, with a scale for each row
    unpack_y: Unpack | None = None  # from these tensors; one launch
    unpack_dx: Unpack | None = None

    def size(self, n: int, k: int, kind: torch.dtype) -> int:
        """Bytes of W where it is written; none where it is not."""
        return n * k * (1 if self.e4m3 else kind.itemsize) if self.unpack_y else 0

    def room(self, n: int, k: int, kind: torch.dtype, scratch: Scratch) -> Operand:
        """Where W is written to."""
        return scratch.part((self.size(n, k, kind),), torch.uint8)

    def y(self, held: Sequence[Any], wanted: Wanted) -> Read:
        """W for the product of y: ``held`` are the base's tensors, of which it needs those ``for_y``."""
        tensors = held[self.for_y]
        return self.unpack_y(tensors, wanted) if self.unpack_y else Read(*tensors)

    def dx(self, held: Sequence[Any], wanted: Wanted) -> Read:
        """W for the product of dX, from those ``for_dx``."""
        tensors = held[self.for_dx]
        return self.unpack_dx(tensors, wanted) if self.unpack_dx else Read(*tensors)

    def read_by(self, *, y: bool, dx: bool) -> slice:
        """Which of the tensors these products read."""
        if y and dx:
            return slice(None)
        return self.for_y if y else self.for_dx if dx else slice(0)


@dataclass(frozen=True)
class Written:
    """How weights are kept that no product reads: the tensors' record, and what makes the launches that write W."""

    record: Callable[..., Any]
    whole: Callable[..., Launch]
    by_rows: Callable[..., Launch]
    by_columns: Callable[..., Launch]

    def write(self, stored: Sequence[Operand], wanted: Wanted) -> Read:
        out = wanted.room.seen_as((wanted.n, wanted.k), wanted.kind)
        return Read(out, launches=[self.whole(self.record(*stored), out)])

    def write_rows(self, held: Sequence[Operand], wanted: Wanted) -> Read:
        scale, *stored = held
        out = wanted.room.seen_as((wanted.n, wanted.k), FP8)
        gain = {"gain": wanted.gain, "weak": wanted.weak}
        return Read(out, scale, [self.by_rows(self.record(*stored), out, scale, kind=wanted.kind, **gain)])

    def write_columns(self, held: Sequence[Operand], wanted: Wanted) -> Read:
        *stored, scale = held
        out = wanted.room.seen_as((wanted.k, wanted.n), FP8)
        return Read(out, scale, [self.by_columns(self.record(*stored), out, scale, kind=wanted.kind)])

    def bases(self, name: str, stored: tuple[str, ...]) -> tuple[Base, Base]:
        """The rows of such a weight: for exact products, and for those of e4m3, which scales of rows and columns make
        of it, powers of two."""
        count = len(stored)
        exact = Base(name, stored, slice(count), slice(count), unpack_y=self.write, unpack_dx=self.write)
        tensors, for_y, for_dx = ("row_scale", *stored, "col_scale"), slice(count + 1), slice(1, count + 2)
        unpack = {"unpack_y": self.write_rows, "unpack_dx": self.write_columns}
        return exact, Base(f"{name}_e4m3", tensors, for_y, for_dx, e4m3=True, **unpack)


def _four_bits(low_first: bool) -> Written:
    written = four_bits.whole, four_bits.by_rows, four_bits.by_columns
    return Written(Stored, *(partial(write, low_first=low_first) for write in written))


SCALED = Written(Scaled, block_scales.whole, block_scales.by_rows, block_scales.by_columns)
PLAIN = Base("plain", ("weight",), for_y=slice(1), for_dx=slice(1))
# W [N, K] is the transpose of a tensor that lies as [K, N], and copies of A and B lie so, too.
TURNED = Base("turned", ("weight",), for_y=slice(1), for_dx=slice(1))
# Row n of W is row_scale[n] * rows[n], for dX column k is col_scale[k] * columns[k]: rows [N, K], columns [K, N].
E4M3 = Base("e4m3", ("rows", "row_scale", "columns", "col_scale"), for_y=slice(2), for_dx=slice(2, 4), e4m3=True)
BASES = {
    base.name: base
    for base in (
        PLAIN,
        TURNED,
        E4M3,
        *_four_bits(low_first=False).bases("four_bits", Stored._fields[:3]),
        *_four_bits(low_first=False).bases("four_bits_nested", Stored._fields),
        *_four_bits(low_first=True).bases("mxfp4", Stored._fields[:3]),
        *SCALED.bases("scaled_fp8", Scaled._fields),
    )
}
