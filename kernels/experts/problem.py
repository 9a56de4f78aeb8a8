"""What the programs of an experts layer are decided by, and what passes from its forward to its backward. Nothing here
depends on the routing: programs, and CUDA graphs of them, serve any."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import BASES, PLAIN, Base, Read, Wanted
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.experts.gate import Gate
from lora_fast.kernels.experts.pack import padded_ranks
from lora_fast.kernels.experts.route import Route, Table
from lora_fast.kernels.experts.tiles import CHUNK, experts_product
from lora_fast.kernels.operands import Operand, Scratch, Size, rounded
from lora_fast.kernels.program import Program


class Needs(NamedTuple):
    """Whose gradients a backward makes: x, routing weights, adapters of gate and up (1) and of down (2)."""

    x: bool = False
    weights: bool = False
    a1: bool = False
    b1: bool = False
    a2: bool = False
    b2: bool = False


class Kinds(NamedTuple):
    """The dtypes of the products, of the routing weights, and of the adapters that there are."""

    x: torch.dtype
    weights: torch.dtype
    a1: torch.dtype | None = None
    b1: torch.dtype | None = None
    a2: torch.dtype | None = None
    b2: torch.dtype | None = None


class Room(NamedTuple):
    """The small things that a forward makes, in one piece of memory, which it leaves for the backward; each None where
    the problem has none."""

    route: Route
    p1: Any  # [S, padded ranks] each
    p2: Any
    a1: Any  # adapters as the products read them, [E, ranks, C] or [E, C, ranks]; of an A that lies so, nothing
    b1: Any
    a2: Any
    b2: Any


@dataclass(eq=False)
class Problem:
    """It serves calls whose tensors agree in dtype, shape, strides and device, and keeps the programs that were made
    for them."""

    tokens: int
    k: int
    experts: int
    h: int
    i: int
    r1: int  # 0: no adapter
    r2: int
    kinds: Kinds
    needs: Needs
    transposed: tuple[bool, bool]  # gate_up is [E, H, 2I], down [E, I, H]; packed ones are not
    gate: Gate
    device: torch.device
    base_names: tuple[str, str] = (PLAIN.name, PLAIN.name)  # rows of ``BASES`` that gate_up and down are
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots, self.kind = self.tokens * self.k, self.kinds.x
        needs = self.needs
        self.needs_dh = needs.x or needs.a1 or needs.b1
        self.needs_da = self.needs_dh or needs.weights
        self.needs_dp1 = self.r1 > 0 and (needs.x or needs.a1)
        self.needs_dp2 = self.r2 > 0 and (self.needs_da or needs.a2)

    # What rests on the bases, which torch.compile need not trace.

    @cached_property
    def bases(self) -> tuple[Base, Base]:
        first, second = self.base_names
        return BASES[first], BASES[second]

    @cached_property
    def last(self) -> int:
        """How many launches make y once all is there that the backward reads: the last product, what writes its weight,
        and the sum over a token's rows."""
        return 2 if self.bases[1].unpack_y is None else 3

    def parts(self, held: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Any, Any]:
        """What the experts hold, in a row, apart: the tensors of gate_up and of down, their biases."""
        first, second = (len(base.tensors) for base in self.bases)
        return held[:first], held[first : first + second], *held[first + second :]

    def memory(self, scratch: Scratch, *projections: int) -> Operand | None:
        """Where the weights of these that no product reads are written to, one at a time."""
        size = 0
        for projection in projections:
            experts, n, k = self.stored_shape(projection)
            size = max(size, self.bases[projection].size(experts * n, k, self.kind))
        return scratch.part((size,), torch.uint8) if size else None

    def weight(self, projection: int, tensors: Sequence[Any], memory: Any) -> Read:
        """What a product over it reads, [E, ., .]: as it is given, or where it is written to."""
        base = self.bases[projection]
        if base.unpack_y is None:
            return Read(*tensors)
        experts, n, k = self.stored_shape(projection)
        read = base.y(tensors, Wanted(experts * n, k, self.kind, memory))
        return read._replace(matrix=read.matrix.seen_as((experts, n, k), self.kind))

    def stored_shape(self, projection: int) -> tuple[int, int, int]:
        """[E, N, K], as a packed weight lies."""
        return (self.experts, 2 * self.i, self.h) if projection == 0 else (self.experts, self.h, self.i)

    def a_packed(self, projection: int) -> bool:
        """Whether lora_A of this projection (0 or 1) needs a copy: it already lies as [E, ranks, in] where its ranks
        need no padding."""
        r, kind = (self.r1, self.kinds.a1) if projection == 0 else (self.r2, self.kinds.a2)
        return self.transposed[projection] or kind != self.kind or r != padded_ranks(r)

    def shape_of_a(self, projection: int) -> Size:
        """As dX's product, and the one before, reads it."""
        c, r = (self.h, self.r1) if projection == 0 else (self.i, self.r2)
        ranks = padded_ranks(r)
        return (self.experts, c, ranks) if self.transposed[projection] else (self.experts, ranks, c)

    def shape_of_b(self, projection: int) -> Size:
        """As y's product reads it."""
        c, r = (2 * self.i, self.r1) if projection == 0 else (self.h, self.r2)
        ranks = padded_ranks(r)
        return (self.experts, ranks, c) if self.transposed[projection] else (self.experts, c, ranks)

    @cached_property
    def shapes(self) -> dict[str, tuple[Size, torch.dtype]]:
        """Of the small things."""
        s, ints = self.slots, torch.int32
        shapes: dict[str, tuple[Size, torch.dtype]] = {
            "slot": ((s,), ints),
            "row": ((s,), ints),
            "weight": ((s,), torch.float32),
            "rows": ((1,), ints),
            "tiles": ((Table.size(s, self.experts, self.tile_rows),), ints),
            "chunks": ((Table.size(s, self.experts, CHUNK),), ints),
        }
        for projection, r in enumerate((self.r1, self.r2)):
            if r:
                shapes[f"p{projection + 1}"] = (s, padded_ranks(r)), self.kind
                shapes[f"b{projection + 1}"] = self.shape_of_b(projection), self.kind
                if self.a_packed(projection):
                    shapes[f"a{projection + 1}"] = self.shape_of_a(projection), self.kind
        return shapes

    @cached_property
    def tile_rows(self) -> int:
        """Rows of a tile of the products, which do not depend on their columns."""
        return experts_product(2 * self.i, self.h, dtype=self.kind, chip=Chip.of(self.device), tma=True).m

    @cached_property
    def bytes(self) -> int:
        """Of the small things together."""
        return sum(rounded(math.prod(shape) * kind.itemsize) for shape, kind in self.shapes.values())

    def room(self, memory: Operand) -> Room:
        start, found = 0, dict[str, Operand]()
        for name, (shape, kind) in self.shapes.items():
            found[name] = memory.part(shape, kind, start)
            start += rounded(found[name].nbytes)

        def table(name: str, rows: int) -> Table:
            return Table(found[name], Table.most(self.slots, self.experts, rows), rows)

        route = Route(
            found["slot"],
            found["row"],
            found["weight"],
            found["rows"],
            table("tiles", self.tile_rows),
            table("chunks", CHUNK),
        )
        return Room(route, *map(found.get, Room._fields[1:]))
