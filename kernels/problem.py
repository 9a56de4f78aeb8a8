"""What a layer's programs are decided by, and what passes from its forward to its backward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import BASES, PLAIN, TURNED, Base, Wanted
from lora_fast.kernels.cast import cast_wanted
from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.operands import Operand, Scratch, Size, rounded
from lora_fast.kernels.program import Bound, Program

MaybeTensor = torch.Tensor | None


class Made(NamedTuple):
    """What a forward leaves for the backward."""

    room: MaybeTensor  # bytes, see ``Small``
    bits: MaybeTensor = None  # of the dropout mask
    z: MaybeTensor = None  # [..., N], the output before gain and bias, if wanted
    x8: MaybeTensor = None  # x in e4m3 [M, K], which the product reads over an e4m3 base, or dA


class Saved(NamedTuple):
    """What a backward reads, each None where it does not. The base's tensors follow, but only those that it reads."""

    x: MaybeTensor  # [..., K]
    a: MaybeTensor
    b: MaybeTensor
    y: MaybeTensor
    room: MaybeTensor  # from here on as in ``Made``
    bits: MaybeTensor
    z: MaybeTensor
    x8: MaybeTensor


class Needs(NamedTuple):
    """Whose gradients a backward makes."""

    x: bool = False
    a: bool = False
    b: bool = False
    bias: bool = False
    m: bool = False


class Kinds(NamedTuple):
    """The dtypes of the products, of the adapters, and of the gradients of bias and magnitude, if there are any."""

    x: torch.dtype
    a: torch.dtype
    b: torch.dtype
    bias: torch.dtype | None = None
    m: torch.dtype | None = None


class Small(NamedTuple):
    """The small things that a forward makes: operands, each None where the problem has none, that lie in one piece of
    memory, the room, which it leaves for the backward."""

    a: Any = None  # [R, K] and b [N, padded R] in x's dtype, where the products cannot read the adapters
    b: Any = None
    norm: Any = None  # [N], DoRA's norm n and gain g
    gain: Any = None
    x_scale: Any = None  # [M], scales of the rows of an e4m3 x
    s: Any = None  # [M, padded R]


class Shapes(dict[str, tuple[Size, torch.dtype]]):
    """Of small things that lie one behind the other in one piece of memory."""

    @property
    def bytes(self) -> int:
        return sum(rounded(math.prod(shape) * kind.itemsize) for shape, kind in self.values())

    def parts(self, memory: Operand) -> dict[str, Operand]:
        start, found = 0, {}
        for name, (shape, kind) in self.items():
            found[name] = memory.part(shape, kind, start)
            start += rounded(found[name].nbytes)
        return found

    def of(self, memory: Operand) -> Small:
        return Small(**self.parts(memory))


@dataclass(eq=False)
class Problem:
    """What the programs of a layer are decided by, but for what may vary from call to call: dropout, and how scaling,
    seed and dY are given. It serves calls whose tensors agree in dtype, shape, strides and device, and keeps the
    programs that were made for them."""

    lead: Size  # x is [*lead, K]
    k: int
    n: int
    r: int
    kinds: Kinds
    needs: Needs
    base_name: str = PLAIN.name  # its row: while torch.compile traces this, rows cannot be given, up to torch 2.11
    dora: bool = False
    keep_x8: bool = False  # the backward reads x in e4m3
    keep_z: bool = False  # and z, which the forward keeps for it
    round_norm: bool = False
    alone: bool = False  # no backward will come, so nothing need be left for it
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.m, self.kind = math.prod(self.lead), self.kinds.x
        self.x_shape, self.y_shape = (*self.lead, self.k), (*self.lead, self.n)
        self.is_float32 = self.kind == torch.float32
        # In float16 B carries a part of the scaling: in a copy. Beside a W that is turned, A and B are read turned.
        self.lifted, self.turned = self.kind == torch.float16, self.base_name == TURNED.name
        self.casts = self.lifted or self.turned or cast_wanted(self.kinds[:3], self.r)
        # dm from y, which may have to make z again
        self.z_again = self.needs.m and not self.keep_z

    # What rests on the base, and is read in each call but not while torch.compile traces.

    @cached_property
    def base(self) -> Base:
        return BASES[self.base_name]

    @cached_property
    def for_y(self) -> slice:
        return self.base.for_y

    @cached_property
    def saved(self) -> slice:
        """Those of the base's tensors that the backward reads."""
        return self.base.read_by(y=self.z_again, dx=self.needs.x)

    @cached_property
    def save(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """What the backward will read, as in ``Saved`` and the base's tensors behind, of (None, x, A, B, y, *made,
        *held); nothing else, but in the room, where all is small."""
        need_x, need_a, need_b, _, need_m = self.needs
        again, need_ds, copied = self.z_again, need_x or need_a, self.casts
        kept = (
            (need_a and not self.keep_x8) or again,
            need_x and not copied,
            (need_ds or again) and not copied,
            again,
            need_b or need_m or (need_ds and (copied or self.dora)) or (need_a and self.keep_x8),
            need_ds,
            need_m,
            need_a and self.keep_x8,
        )
        held = range(len(kept) + 1, len(kept) + 1 + len(self.base.tensors))
        return itemgetter(*(place if keeps else 0 for place, keeps in enumerate(kept, 1)), *held[self.saved])

    @cached_property
    def quantises(self) -> bool:
        """Whether the forward writes x in e4m3, for the product or to be kept."""
        return self.base.e4m3 or self.keep_x8

    def wanted(self, scratch: Scratch) -> Wanted:
        """What a launch that writes W must know, and where it may."""
        return Wanted(self.n, self.k, self.kind, self.base.room(self.n, self.k, self.kind, scratch))

    @cached_property
    def shapes(self) -> Shapes:
        """Of the small things."""
        gains, s_shape = torch.float64 if self.kind == torch.float64 else torch.float32, (self.m, padded_rank(self.r))
        shapes = Shapes()
        if self.casts:
            shapes |= {"a": ((self.r, self.k), self.kind), "b": ((self.n, s_shape[1]), self.kind)}
            if self.turned:
                shapes |= {"a": ((self.k, s_shape[1]), self.kind), "b": ((s_shape[1], self.n), self.kind)}
        if self.dora:
            shapes |= {"norm": ((self.n,), gains), "gain": ((self.n,), gains)}
        if self.quantises:
            shapes["x_scale"] = (self.m,), torch.float32
        shapes["s"] = s_shape, self.kind
        return shapes

    @cached_property
    def lasting(self) -> Shapes:
        """Of those small things that a layer may keep: they do not follow from x. Copies that are worth it alone."""
        plain = self.kind.itemsize == 2 and not self.quantises and not self.turned
        names = ("a", "b", "norm", "gain") if plain else ("norm", "gain")
        return Shapes({name: self.shapes[name] for name in names if name in self.shapes})

    @cached_property
    def bytes(self) -> int:
        """Of the small things together."""
        return self.shapes.bytes

    def small(self, room: Operand) -> Small:
        small = self.shapes.of(room)
        if not self.turned:
            return small
        a, b = self.seen(small.a, small.b)
        return small._replace(a=a, b=b)

    def seen(self, a: Operand, b: Operand) -> tuple[Operand, Operand]:
        """Copies of A and B, in the memory of their ``shapes``, as [R, K] and [N, padded R]."""
        return (a.block(0, 0, self.k, self.r).t(), b.t()) if self.turned else (a, b)

    def kept(self, kept: Operand) -> Small:
        """What of the small things a layer has kept."""
        return self.lasting.of(kept)


class Call:
    """What one call has beside x, its adapter and its bias; ``held`` are the base's tensors. If it ``defers`` its last
    product is not launched but left here, to be run as ``program.run(bound, first)`` once what the backward reads is
    saved."""

    defers = False
    deferred: tuple[Program, Bound, int] | None = None

    def __init__(
        self, scaling: float | torch.Tensor, seed: torch.Tensor | int | None, p: float, held: Sequence[torch.Tensor]
    ) -> None:
        self.scaling, self.seed, self.p, self.held = scaling, seed, p, held
