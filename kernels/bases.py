"""Frozen weights W [N, K] as the programs of a layer read them: as they are, in e4m3.

A base is a row of ``BASES``. It says which tensors hold W (a call hands them over, in this order), which of them each
product reads, and whether the passes over x and dY must also write these in e4m3 for it. One whose tensors no product
can read has a function that makes launches which write W into the program's memory first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_fast.kernels.operands import Operand, Scratch
from lora_fast.kernels.program import Launch


class Read(NamedTuple):
    """What a product reads of W, in x's dtype: W itself, for y and for dX; or in e4m3: W for y, its transpose for dX,
    with a scale for each row."""

    matrix: Operand
    scale: Operand | None = None
    launches: Sequence[Launch] = ()  # that write it, ahead of those that read it


@dataclass(frozen=True, eq=False)
class Base:
    name: str
    tensors: tuple[str, ...]
    for_y: slice  # those of them that the product of y reads, and DoRA's norm: a matrix, or that and its scales
    for_dx: slice  # and those that the product of dX reads
    e4m3: bool = False  # whether the products read x and dY in e4m3, with a scale for each row
    unpack: Callable[..., Read] | None = None  # of these tensors and a Scratch

    def y(self, held: Sequence[Any], scratch: Scratch) -> Read:
        """W for the product of y: ``held`` are the base's tensors, of which it needs those ``for_y``."""
        return (self.unpack or _as_they_are)(held[self.for_y], scratch)

    def dx(self, held: Sequence[Any], scratch: Scratch) -> Read:
        """W for the product of dX, from those ``for_dx``."""
        return (self.unpack or _as_they_are)(held[self.for_dx], scratch)

    def read_by(self, *, y: bool, dx: bool) -> slice:
        """Which of the tensors these products read."""
        if y and dx:
            return slice(None)
        return self.for_y if y else self.for_dx if dx else slice(0)


def _as_they_are(tensors: Sequence[Operand], scratch: Scratch) -> Read:
    return Read(tensors[0], tensors[1] if len(tensors) > 1 else None)


PLAIN = Base("plain", ("weight",), for_y=slice(1), for_dx=slice(1))
# Row n of W is row_scale[n] * rows[n], for dX column k is col_scale[k] * columns[k]: rows [N, K], columns [K, N].
E4M3 = Base("e4m3", ("rows", "row_scale", "columns", "col_scale"), for_y=slice(2), for_dx=slice(2, 4), e4m3=True)
BASES = {base.name: base for base in (PLAIN, E4M3)}
