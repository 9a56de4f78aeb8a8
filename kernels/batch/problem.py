"""What the programs of a layer with several adapters in one batch are decided by, and what passes from its forward to
its backward. Nothing here depends on which row names which adapter: programs, and CUDA graphs of them, serve any."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import BASES, PLAIN, Base, Wanted
from lora_fast.kernels.batch.places import Places
from lora_fast.kernels.batch.ranks import ROWS, UNIT, Ranks
from lora_fast.kernels.down import Owned
from lora_fast.kernels.gemm import Units
from lora_fast.kernels.operands import Operand, Scratch, Size
from lora_fast.kernels.problem import Kinds, Needs, Shapes
from lora_fast.kernels.program import Program


class Room(NamedTuple):
    """The small things that a forward makes, in one piece of memory, which it leaves for the backward."""

    places: Places
    a: Operand  # [ranks in all, K] and [N, ranks in all], see pack.py
    b: Operand
    s: Operand  # [M, ranks in all]; not written where a block of rows does not use a unit of ranks
    norm: Operand | None  # DoRA's n and g [adapters, N]
    gain: Operand | None

    def owned(self, owner: Operand) -> Owned[Operand]:
        return Owned(self.places.own, owner, self.places.units, ROWS, UNIT)

    @property
    def units(self) -> Units[Operand] | None:
        return None if self.places.units is None else Units(self.places.units, ROWS, UNIT)


@dataclass(eq=False)
class Problem:
    """It serves calls whose tensors agree in dtype, shape, strides and device, and keeps the programs that were made
    for them. ``kinds``: of adapters the dtype that all fit in; ``needs.a``: of any A, and so on."""

    lead: Size  # x is [*lead, K]
    k: int
    n: int
    ranks: Ranks
    kinds: Kinds
    needs: Needs
    dora: bool = False
    round_norm: bool = False
    base_name: str = PLAIN.name  # see the problem of a single layer; of those that are not e4m3
    keep_z: bool = False  # for the gradients of magnitudes, which else read y
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.m, self.kind = math.prod(self.lead), self.kinds.x
        self.x_shape, self.y_shape = (*self.lead, self.k), (*self.lead, self.n)
        self.z_again = self.needs.m and not self.keep_z
        self.is_float32, self.lifted = self.kind == torch.float32, self.kind == torch.float16

    @cached_property
    def base(self) -> Base:
        return BASES[self.base_name]

    @property
    def reads_w(self) -> bool:
        """Whether the backward does."""
        return self.needs.x or self.z_again

    def wanted(self, scratch: Scratch) -> Wanted:
        """What a launch that writes W must know, and where it may."""
        return Wanted(self.n, self.k, self.kind, self.base.room(self.n, self.k, self.kind, scratch))

    @cached_property
    def shapes(self) -> Shapes:
        """Of the small things."""
        shapes, total = Shapes(Places.shapes(self.m, self.ranks)), self.ranks.total
        shapes |= {"a": ((total, self.k), self.kind), "b": ((self.n, total), self.kind)}
        shapes["s"] = (self.m, total), self.kind
        if self.dora:
            shapes |= dict.fromkeys(
                ("norm", "gain"), ((len(self.ranks.of), self.n), torch.promote_types(self.kind, torch.float32))
            )
        return shapes

    @cached_property
    def bytes(self) -> int:
        return self.shapes.bytes

    def room(self, memory: Operand) -> Room:
        found = self.shapes.parts(memory)
        places = Places(found["own"], found["whole"], found["here"], found.get("units"), found["scales"])
        return Room(places, found["a"], found["b"], found["s"], found.get("norm"), found.get("gain"))
