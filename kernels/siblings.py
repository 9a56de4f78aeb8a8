"""What the programs of layers with one input are decided by, and what passes from their forward to their backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import BASES, PLAIN, TURNED, Base, Wanted
from lora_fast.kernels.cast import cast_wanted
from lora_fast.kernels.common import FP8, padded_rank
from lora_fast.kernels.down import Quantised
from lora_fast.kernels.operands import Operand, Scratch, Size
from lora_fast.kernels.passes import needs_dz
from lora_fast.kernels.problem import Kinds, MaybeTensor, Needs, Shapes, Small
from lora_fast.kernels.program import Bound, Program
from lora_fast.kernels.sums import weak_gain

Spec = tuple[Size, torch.dtype] | None  # of a tensor, None where it is not wanted


@dataclass(frozen=True)
class Sibling:
    """One of the layers, of rank 0 where it has no adapters. ``needs.x`` is not looked at: the group says that."""

    n: int
    r: int
    kinds: Kinds
    needs: Needs
    dora: bool = False
    keep_z: bool = False  # the forward keeps z for the magnitude's gradient
    round_norm: bool = False
    base_name: str = PLAIN.name
    scaled: bool = False  # DoRA's dY comes as dZ = dY * gain, and the magnitude's gradient is made elsewhere

    @property
    def ranks(self) -> int:
        return padded_rank(self.r)

    @cached_property
    def base(self) -> Base:
        return BASES[self.base_name]

    @cached_property
    def for_y(self) -> slice:
        """Those of its base's tensors that y is made of."""
        return self.base.for_y

    @cached_property
    def held(self) -> int:
        """How many tensors its base has."""
        return len(self.base.tensors)

    @cached_property
    def casts(self) -> bool:
        """Whether products need a copy of B; and of A, if W is turned."""
        return self.r > 0 and (self.kinds.x == torch.float16 or self.turned or cast_wanted(self.kinds[:3], self.r))

    @property
    def turned(self) -> bool:
        """Whether products read W, A and B turned."""
        return self.base_name == TURNED.name

    @cached_property
    def z_again(self) -> bool:
        """Whether the magnitude's gradient comes from y, which may have to make z again."""
        return self.needs.m and not self.keep_z


class Shared(NamedTuple):
    """The small things of a group, in one piece of memory, the room."""

    stacked: Operand  # [sum of padded R, K], all A's
    scales: Operand  # [sum of padded R]
    s: Operand  # [M, sum of padded R]
    # Parts of these, and b where the products need a copy, norm and gain of DoRA; nothing without adapters. Where W is
    # turned a and b are copies that are, too.
    each: tuple[Small, ...]


@dataclass(eq=False)
class Siblings:
    """A group of layers with adapters or without, with one x [*lead, K] and one dropout mask. It serves calls whose
    tensors agree in dtype, shape, strides and device, and keeps the programs that were made for them."""

    lead: Size
    k: int
    each: tuple[Sibling, ...]
    needs_x: bool
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.m, self.kind = math.prod(self.lead), self.each[0].kinds.x
        self.x_shape = *self.lead, self.k
        self.is_float32, self.lifted = self.kind == torch.float32, self.kind == torch.float16
        self.ranks_of = [one.ranks for one in self.each]
        self.ranks = sum(self.ranks_of)
        self.needs_a = any(one.needs.a for one in self.each)
        self.z_again = any(one.z_again for one in self.each)
        self.needs_ds = self.ranks > 0 and (self.needs_x or self.needs_a)
        self.adapted = [one for one in self.each if one.r]
        self.packed = any(one.base_name != PLAIN.name for one in self.each)  # each then reads its base by itself
        kinds = [one.kinds.a for one in self.adapted]
        self.a_kind = reduce(torch.promote_types, kinds, kinds[0]) if kinds else self.kind  # of all dA, in one matrix

    def rooms(self, scratch: Scratch) -> "Rooms":
        size = max(one.base.size(one.n, self.k, self.kind) for one in self.each)
        wide = max((one.n for one in self.each if one.base.e4m3 and self.needs_x), default=0)
        kinds = ((size,), torch.uint8), ((self.m * wide,), FP8), ((self.m if wide else 0,), torch.float32)
        return Rooms(*(scratch.part(*kind) for kind in kinds))

    @cached_property
    def shapes(self) -> Shapes:
        """Of the small things."""
        gains = torch.float64 if self.kind == torch.float64 else torch.float32
        shapes = Shapes()
        shapes["stacked"] = (self.ranks, self.k), self.kind
        shapes["scales"] = (self.ranks,), torch.float32
        shapes["s"] = (self.m, self.ranks), self.kind
        for i, one in enumerate(self.each):
            if one.casts and one.turned:
                shapes |= {f"a{i}": ((self.k, one.ranks), self.kind), f"b{i}": ((one.ranks, one.n), self.kind)}
            elif one.casts:
                shapes[f"b{i}"] = (one.n, one.ranks), self.kind
            if one.dora:
                shapes |= {f"norm{i}": ((one.n,), gains), f"gain{i}": ((one.n,), gains)}
        return shapes

    @cached_property
    def bytes(self) -> int:
        return self.shapes.bytes

    def parted(
        self, flat: Sequence[Any], fields: int, read: Sequence[slice]
    ) -> tuple[list[Sequence[Any]], list[list[Any]], Sequence[Any]]:
        """Of a program's arguments: so many of each layer, each base's tensors, of which those are there that ``read``
        says, and what is left."""
        n = len(self.each)
        own, held, flat = [flat[i * fields : (i + 1) * fields] for i in range(n)], [], flat[n * fields :]
        for one, there in zip(self.each, read, strict=True):
            tensors: list[Any] = [None] * one.held
            count = len(tensors[there])
            tensors[there], flat = flat[:count], flat[count:]
            held.append(tensors)
        return own, held, flat

    @cached_property
    def specs(self) -> list[list[Spec]]:
        """Of dB, dbias, dm and dZ of each layer."""
        found: list[list[Spec]] = []
        for one in self.each:
            _, _, need_b, need_bias, need_m = one.needs
            by_itself = self.needs_x and not one.base.e4m3  # else dZ is quantised, and read so
            dz = one.dora and not one.scaled and (by_itself or needs_dz(one.r, self.needs_ds, need_b))
            all_of_them = (
                (need_b, (one.n, one.r), one.kinds.b),
                (need_bias, (one.n,), one.kinds.bias),
                (need_m, (one.n,), one.kinds.m),
                (dz, (self.m, one.n), self.kind),
            )
            found.append([(shape, kind) if wanted and kind else None for wanted, shape, kind in all_of_them])
        return found

    @cached_property
    def wanted(self) -> list[Spec]:
        """Of what a backward makes: dX, all dA one below the other, and dB, dbias and dm of each layer."""
        dx = (self.x_shape, self.kind) if self.needs_x else None
        stacked = ((self.ranks, self.k), self.a_kind) if self.needs_a else None
        return [dx, stacked, *(spec for four in self.specs for spec in four[:3])]

    def wanted_of(self, there: Sequence[bool]) -> list[Spec]:
        """The same where the dY of some layers alone are there."""
        if all(there):
            return self.wanted
        found = list(self.wanted)
        if not any([one.needs.a and has for one, has in zip(self.each, there, strict=True)]):
            found[1] = None
        for i, has in enumerate(there):
            if not has:
                found[2 + 3 * i : 5 + 3 * i] = None, None, None
        return found

    @cached_property
    def for_y(self) -> list[slice]:
        return [one.for_y for one in self.each]

    @cached_property
    def saved(self) -> list[slice]:
        """Those of each layer's base's tensors that the backward reads."""
        return [one.base.read_by(y=one.z_again, dx=self.needs_x) for one in self.each]

    def small(self, room: Operand) -> Shared:
        parts, each, first = self.shapes.parts(room), [], 0
        for i, one in enumerate(self.each):
            if not one.r:
                each.append(Small())
                continue
            found: dict[str, Any] = {name: parts.get(f"{name}{i}") for name in ("b", "norm", "gain")}
            found["a"] = parts["stacked"].block(first, 0, one.r, self.k)
            if one.turned:
                found |= {"a": parts[f"a{i}"].block(0, 0, self.k, one.r).t(), "b": found["b"].t()}
            found["s"] = parts["s"].block(0, first, self.m, one.ranks)
            each.append(Small(**found))
            first += one.ranks
        return Shared(parts["stacked"], parts["scales"], parts["s"], tuple(each))

    def columns(self, ds: Operand) -> list[Operand | None]:
        """Each layer's of a [M, sum of padded R]."""
        first, found = 0, []
        for one in self.each:
            found.append(ds.block(0, first, self.m, one.ranks) if one.r else None)
            first += one.ranks
        return found


class Rooms(NamedTuple):
    """Memory that the layers of a group take in turns."""

    w: Operand  # for a weight that no product reads
    z8: Operand  # for dZ in e4m3
    scale: Operand  # of its rows

    def wanted(self, one: Sibling, group: Siblings, gain: Operand | None = None) -> Wanted:
        """What a launch must know that writes W: with a gain for y again, in a backward."""
        return Wanted(one.n, group.k, group.kind, self.w, gain, weak_gain(group.kind) if gain else 0.0)

    def dz8(self, one: Sibling, group: Siblings) -> Quantised[Operand]:
        return Quantised(self.z8.seen_as((group.m, one.n), FP8), self.scale)


class Made(NamedTuple):
    """What a forward leaves for the backward, beside the outputs."""

    room: torch.Tensor
    bits: MaybeTensor
    z: Sequence[MaybeTensor]


class Given(NamedTuple):
    """A layer's tensors, ``held`` its base's, and its scaling; a and b None without adapters, magnitude without
    DoRA."""

    held: Sequence[torch.Tensor]
    a: MaybeTensor
    b: MaybeTensor
    bias: MaybeTensor
    magnitude: MaybeTensor
    scaling: float | torch.Tensor


class Kept(NamedTuple):
    """What the backward reads of one layer, each None where it does not; then come its base's tensors."""

    b: MaybeTensor = None
    y: MaybeTensor = None
    z: MaybeTensor = None


class Deferred(NamedTuple):
    """Launches that wait until what the backward reads is saved."""

    program: Program
    bound: Bound
    first: int

    def run(self) -> None:
        self.program.run(self.bound, self.first)
