"""The kernels of an experts layer in their order: what a forward and a backward launch, from which operands, into
which. Rows are the slots sorted by expert, S = T k of them at most; per row, with the matrices of its expert and its
token's x and dout:

    P1 = s1 x A1^T      h = x W1^T + P1 B1^T (+ b1)    a = gate(h)    P2 = s2 a A2^T    y = a W2^T + P2 B2^T (+ b2)
    dP2 = s2 dout B2    da' = dout W2 + dP2 A2         dw = <da', a> (+ <dout, b2>)     dh = gate'(h, w da')
    dP1 = s1 dh B1      dx = dh W1 + dP1 A1
    dB2 = sum dout^T (w P2)    dA2 = sum dP2^T (w a)    dB1 = sum dh^T P1    dA1 = sum dP1^T x

out is the sum of w y over a token's rows. The routing weight is applied after the products, in float32, and its
gradient comes from da', so neither y nor the gathered x are kept.
"""

import math
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.experts.columns import add_rows, by_columns, low_parts
from lora_fast.kernels.experts.combine import combine
from lora_fast.kernels.experts.gate import dw_parts, gate_backward, gate_forward
from lora_fast.kernels.experts.pack import Stack, collect, pack, padded_ranks
from lora_fast.kernels.experts.problem import Problem, Room
from lora_fast.kernels.experts.product import experts_product
from lora_fast.kernels.experts.route import Route, route_launches
from lora_fast.kernels.experts.rows import by_rows
from lora_fast.kernels.operands import Number, Operand, Scratch, Size, rounded
from lora_fast.kernels.program import Launch

Maybe = Any  # an operand, None where the problem has none


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand  # [T, H]
    ids: Operand  # [T, K]
    weights: Operand
    a1: Maybe  # adapters as PEFT keeps them
    b1: Maybe
    a2: Maybe
    b2: Maybe
    y: Operand  # [T, H]
    h: Operand  # [S, 2I]
    room: Operand
    s1: Number
    s2: Number
    held: tuple[Maybe, ...]  # the tensors of gate_up and of down, and their biases


def forward_launches(at: Forward, problem: Problem) -> list[Launch]:
    *weights, bias1, bias2 = problem.parts(at.held)
    room, scratch = problem.room(at.room), Scratch(at.x.device)
    written = problem.memory(scratch, 0, 1)
    gate_up, down = (problem.weight(i, weight, written) for i, weight in enumerate(weights))
    route, k, experts, kind = room.route, problem.k, problem.experts, problem.kind
    gathered = scratch.part((problem.slots, problem.h), kind)  # x by rows, and later y by rows
    a = scratch.part((problem.slots, problem.i), kind)
    launches = route_launches(at.ids, at.weights, experts, route, scratch)
    for projection, r, given in ((0, problem.r1, (at.a1, at.b1)), (1, problem.r2, (at.a2, at.b2))):
        if r:
            turned = problem.transposed[projection]
            to_a, to_b = ((room.a1, room.b1), (room.a2, room.b2))[projection]
            launches.append(pack(Stack.of_b(given[1], experts), to_b, ranks_first=turned, r=r))
            if to_a is not None:
                launches.append(pack(Stack.of_a(given[0], experts), to_a, ranks_first=not turned, r=r))
    q1, q2 = (_stack_of_a(problem, room, *given) for given in ((0, at.a1), (1, at.a2)))
    return [
        *launches,
        by_rows(at.x, route, experts, k=k, gathers=True, out=gathered, q=q1, p=room.p1, scaling=at.s1),
        *gate_up.launches,
        experts_product(
            gathered,
            gate_up.matrix,
            at.h,
            route.tiles,
            transposed=not problem.transposed[0],
            p=room.p1,
            q=room.b1,
            bias=bias1,
        ),
        gate_forward(at.h, a, route, problem.gate),
        *([by_rows(a, route, experts, k=k, gathers=False, q=q2, p=room.p2, scaling=at.s2)] if problem.r2 else []),
        *down.launches,
        experts_product(
            a,
            down.matrix,
            gathered,
            route.tiles,
            transposed=not problem.transposed[1],
            p=room.p2,
            q=room.b2,
            bias=bias2,
        ),
        combine(gathered, route, at.y, k, at.weights),
    ]


def _matrix_of_a(problem: Problem, room: Room, projection: int, given: Maybe) -> Maybe:
    """lora_A as products read it."""
    packed = (room.a1, room.a2)[projection]
    return packed if packed is not None or given is None else given.seen_as(problem.shape_of_a(projection), given.dtype)


def _stack_of_a(problem: Problem, room: Room, projection: int, given: Maybe) -> Stack | None:
    a = _matrix_of_a(problem, room, projection, given)
    return None if a is None else Stack.packed(a, ranks_first=not problem.transposed[projection])


def _stack_of_b(problem: Problem, b: Maybe, projection: int) -> Stack | None:
    return None if b is None else Stack.packed(b, ranks_first=problem.transposed[projection])


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    dout: Operand  # [T, H]
    dx: Maybe  # the gradients
    dw: Maybe
    da1: Maybe
    db1: Maybe
    da2: Maybe
    db2: Maybe
    s1: Number
    s2: Number
    x: Maybe  # from here on what was saved, None where nothing reads it
    h: Maybe
    room: Operand
    a1: Maybe  # lora_A where the room has no copy
    a2: Maybe
    held: tuple[Maybe, ...]


def backward_launches(at: Backward, problem: Problem) -> list[Launch]:
    of_gate_up, of_down, _, bias2 = problem.parts(at.held)
    room, scratch, needs = problem.room(at.room), Scratch(at.dout.device), problem.needs
    route, k, experts, kind = room.route, problem.k, problem.experts, problem.kind
    s, i = problem.slots, problem.i
    a1, a2 = _matrix_of_a(problem, room, 0, at.a1), _matrix_of_a(problem, room, 1, at.a2)
    q1, q2 = _stack_of_b(problem, room.b1, 0), _stack_of_b(problem, room.b2, 1)
    dp1: Maybe = scratch.part((s, padded_ranks(problem.r1)), kind) if problem.needs_dp1 else None
    dp2: Maybe = scratch.part((s, padded_ranks(problem.r2)), kind) if problem.needs_dp2 else None
    dw = scratch.part((dw_parts(i, problem.gate), s), torch.float32) if needs.weights else None
    dots = scratch.part((s,), torch.float32) if needs.weights and bias2 is not None else None
    at_hand = _Memory(problem, scratch, route)
    written = problem.memory(scratch, *[0] * needs.x, *[1] * problem.needs_da)
    da, dh = at_hand.da, at_hand.dh
    launches: list[Launch] = []

    dout_rows = at_hand.dout_rows
    if not all(t is None for t in (dout_rows, dp2, dots)):
        launches.append(
            by_rows(
                at.dout,
                route,
                experts,
                k=k,
                gathers=True,
                out=dout_rows,
                q=None if dp2 is None else q2,
                p=dp2,
                scaling=at.s2,
                bias=None if dots is None else bias2,
                dots=dots,
            )
        )
    if dout_rows is not None:
        down = problem.weight(1, of_down, written)
        launches += down.launches
        launches.append(
            experts_product(
                dout_rows, down.matrix, da, route.tiles, transposed=problem.transposed[1], p=dp2, q=dp2 and a2
            )
        )
    if da is not None:
        launches.append(
            gate_backward(
                at.h,
                route,
                problem.gate,
                da=da if problem.needs_da else None,
                dh=dh,
                wa=da if needs.a2 else None,
                dw=dw,
            )
        )

    def gradient(src: Operand, p: Operand, grad: Stack, r: int, **how: Any) -> None:
        parts = at_hand.parts(src.shape[1], r)
        launches.append(by_columns(src, p, parts, route, experts, k=k, **how))
        launches.append(collect(parts, route.chunks, grad, experts, r))

    low = at_hand.low
    if at.db1 is not None:
        gradient(dh, room.p1, Stack.of_b(at.db1, experts), problem.r1, gathers=False, q=low and q1, low=low)
    elif dp1 is not None:
        launches.append(by_rows(dh, route, experts, k=k, gathers=False, q=q1, p=dp1, scaling=at.s1))
    if low is not None or dw is not None:
        launches.append(add_rows(route, low=low, p=low and dp1, scaling=at.s1, dw_parts=dw, dots=dots, dw=at.dw))
    if at.da1 is not None:
        gradient(at.x, dp1, Stack.of_a(at.da1, experts), problem.r1, gathers=True)
    if at.da2 is not None:
        gradient(da, dp2, Stack.of_a(at.da2, experts), problem.r2, gathers=False)
    if at.db2 is not None:
        gradient(at.dout, room.p2, Stack.of_b(at.db2, experts), problem.r2, gathers=True, weighted=True)
    if at.dx is not None:
        dx_rows, gate_up = at_hand.dx_rows, problem.weight(0, of_gate_up, written)
        launches += gate_up.launches
        launches.append(
            experts_product(
                dh, gate_up.matrix, dx_rows, route.tiles, transposed=problem.transposed[0], p=dp1, q=dp1 and a1
            )
        )
        launches.append(combine(dx_rows, route, at.dx, k))
    return launches


class _Memory:
    """Two pieces of memory, each for one thing after the other. First: dout by rows, until da is there; dh. Second: da,
    which becomes w a, the parts of each adapter's gradient until they are collected, and those of dP1; dx by rows."""

    def __init__(self, problem: Problem, scratch: Scratch, route: Route) -> None:
        needs, s, h, i, kind = problem.needs, problem.slots, problem.h, problem.i, problem.kind
        self.chunks, self.memory = route.chunks.length, scratch.memory
        rows, hidden, activations = (s, h), (s, 2 * i), (s, i)
        first = [rows] * problem.needs_da + [hidden] * problem.needs_dh
        start = self._reserve(scratch, max((self._bytes(shape, kind) for shape in first), default=0))
        self.dout_rows: Maybe = self.memory.part(rows, kind, start) if problem.needs_da else None
        self.dh: Maybe = self.memory.part(hidden, kind, start) if problem.needs_dh else None

        low: Maybe = None
        ranks = padded_ranks(problem.r1)
        if problem.needs_dp1 and needs.b1 and self.dh is not None:
            low = low_parts(self.dh, ranks), s, ranks
        passes = (needs.a1, h, problem.r1), (needs.b1, 2 * i, problem.r1), (needs.a2, i, problem.r2)
        parts = [self.shape(c, r) for needed, c, r in (*passes, (needs.b2, h, problem.r2)) if needed]
        of_da = self._bytes(activations, kind) if problem.needs_da or needs.a2 else 0
        of_parts = max((self._bytes(shape, torch.float32) for shape in parts), default=0)
        of_low = self._bytes(low, torch.float32) if low else 0
        start = self._reserve(scratch, max(of_da + of_parts + of_low, self._bytes(rows, kind) if needs.x else 0))
        self.da: Maybe = self.memory.part(activations, kind, start) if of_da else None
        self.at_parts = start + of_da
        self.low: Maybe = self.memory.part(low, torch.float32, self.at_parts + of_parts) if low else None
        self.dx_rows: Maybe = self.memory.part(rows, kind, start) if needs.x else None

    @staticmethod
    def _bytes(shape: Size, kind: torch.dtype) -> int:
        return rounded(math.prod(shape) * kind.itemsize)

    @staticmethod
    def _reserve(scratch: Scratch, size: int) -> int:
        """Where so many bytes begin."""
        start = scratch.used
        scratch.part((size,), torch.uint8)
        return start

    def shape(self, c: int, r: int) -> Size:
        return self.chunks, c, padded_ranks(r)

    def parts(self, c: int, r: int) -> Operand:
        return self.memory.part(self.shape(c, r), torch.float32, self.at_parts)
