"""Layers with one input, y_i = g_i * (x W_i^T + S_i B_i^T) + bias_i: what their forward and their backward launch, in
their order.

Forward: the adapters are stacked; one pass over x makes S of all, side by side; a product for each y. Backward: a pass
over each dY makes its dS, dB and what else needs it; one pass over x makes all dA; one product makes dX (products.py).
One dropout mask serves all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import precision, wide
from lora_fast.kernels.gradients import Gradients, OneBackward, Wanted, few_rows
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.memory import allocator
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.outputs import OneForward, outputs
from lora_fast.kernels.passes import Pass, a_pass, launches_of
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Made, Siblings
from lora_fast.kernels.tiles import FEW

Maybe = Any  # an operand, None where the problem has none


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    room: Operand
    bits: Maybe
    seed: Maybe
    keep_count: Number
    n_words: Number
    keep: Number
    each: tuple[Any, ...]  # the fields of ``OneForward`` for each layer, then those of each base's tensors that y reads


def forward_launches(at: Forward, group: Siblings) -> list[Launch]:
    first = [] if at.seed is None else [mask(at.seed, at.bits, at.keep_count, at.n_words)]
    each, held, _ = group.parted(at.each, len(OneForward._fields), group.for_y)
    small, both = group.small(at.room), [OneForward(*one) for one in each]
    return [*first, *outputs(at.x.rows(), both, held, group, small, at.bits, at.keep)]


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    room: Operand
    x: Maybe
    dx: Maybe
    grad_a: Maybe
    bits: Maybe
    ds: Maybe
    keep: Number
    each: tuple[Any, ...]  # dY of each layer; four ``specs`` of each; its scaling; and as in ``Kept``


def backward_launches(at: Backward, group: Siblings) -> list[Launch]:
    n, each, held = len(group.each), [], []
    dys, grads, scalings, rest = at.each[:n], at.each[n : 5 * n], at.each[5 * n : 6 * n], at.each[6 * n :]
    for i, sibling in enumerate(group.each):
        each.append(OneBackward._make((dys[i], *grads[4 * i : 4 * i + 4], scalings[i], *rest[:3])))
        held.append(rest[3 : 3 + sibling.held])
        rest = rest[3 + sibling.held :]
    small, scratch, x = group.small(at.room), Scratch(at.room.device), None if at.x is None else at.x.rows()
    ds = at.ds
    parts: Sequence[Maybe] = [None] * len(each)
    if group.needs_ds:
        ds = ds or scratch.part((group.m, group.ranks), group.kind)
        parts = group.columns(ds)
    layers = zip(each, small.each, group.each, parts, held, strict=True)
    made = [Gradients(*layer) for layer in layers if layer[0].dy is not None]
    last: list[Pass] = []
    if at.grad_a is not None:
        assert x is not None
        last = [a_pass(x, ds, at.grad_a, bits=at.bits)]
    kind = wide(made[0].one.dy)
    if group.packed:
        rooms, passes = group.rooms(scratch), []
        for i, one in enumerate(made):
            passes += one.passes(x, at.keep, group, rooms)
            if at.dx is not None:
                passes += one.into(at.dx.rows(), at.bits, group, rooms, adds=i > 0)
        return launches_of([*passes, *last], kind, scratch)
    wanted = Wanted(at.dx, at.grad_a, ds, at.bits, at.keep)
    if x is not None and (few := few_rows(wanted, x, made, group, small, scratch)):
        return few
    rooms = group.rooms(scratch)
    passes = [one for layer in made for one in layer.passes(x, at.keep, group, rooms)]
    launches = launches_of([*passes, *last], kind, scratch, at.dx)
    if at.dx is not None:
        stacked = small.stacked if group.ranks else None
        launches.append(products([one.source for one in made], ds, stacked, at.dx.rows(), bits=at.bits))
    return launches


def forward(
    group: Siblings, x: torch.Tensor, each: Sequence[Given], seed: torch.Tensor | int | None, p: float
) -> tuple[list[torch.Tensor], Made, Deferred | None]:
    """Each y [*lead, N], what it leaves for the backward, and the launches of those that this does not read, which are
    to be run once that is saved.

    x [..., K], contiguous or the matrix of its rows; the adapters, bias and magnitude contiguous, in any dtype; with a
    seed elements of x are dropped with p, the same for all.
    """
    m, words, new = group.m, -(-group.k // 32), allocator(x)
    room, bits = new(group.bytes, dtype=torch.uint8), None
    count, keep = 0, 1.0
    if seed is not None:
        bits, count, keep = new(m, words, dtype=torch.int32), keep_count(p), keep_scale(p)
    ys: list[torch.Tensor] = []
    z: list[MaybeTensor] = []
    flat: list[Any] = []
    kinds: list[Any] = []  # of scalings in tensors
    for sibling, one in zip(group.each, each, strict=True):
        y, scaling = new(*group.lead, sibling.n), as_scaling(one.scaling)
        kept = torch.empty_like(y) if sibling.keep_z else None
        if isinstance(scaling, torch.Tensor):
            kinds.append((len(ys), kind_of(scaling)))
        ys.append(y)
        z.append(kept)
        flat += (*one[1:5], scaling, y, kept)
    for one, there in zip(each, group.for_y, strict=True):
        flat += one[0][there]
    made = Made(room, bits, z)
    if m == 0:
        return ys, made, None
    given = x, room, bits, seed, count, m * words, keep, *flat
    key = (
        forward_launches,
        None if seed is None else kind_of(seed),
        *kinds,
        group.is_float32 and precision(group.kind, 256),
    )
    program = group.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(group, key, Forward, given)
    first = len(program.launches) - program.late
    program.run(bound, 0, first)
    return ys, made, Deferred(program, bound, first) if program.late else None


class Grads(NamedTuple):
    """What a backward makes: dX [*lead, K]; all dA, one below the other, [sum of padded R, K]; and dB, dbias and dm of
    each layer. None where it is not needed, and for layers whose dY is not there."""

    dx: MaybeTensor
    stacked: MaybeTensor
    small: list[MaybeTensor]  # three of each layer

    def of_layers(self, group: Siblings, there: Sequence[bool]) -> list[tuple[MaybeTensor, ...]]:
        """(dA, dB, dbias, dm) of each layer; ``there``: whose dY is. The A's gradients are parts of one matrix."""
        found: list[tuple[MaybeTensor, ...]] = []
        own: Sequence[MaybeTensor] = [None] * len(group.each)
        if self.stacked is not None:
            own = self.stacked.split_with_sizes(group.ranks_of)
        for i, (one, part) in enumerate(zip(group.each, own, strict=True)):
            if part is not None:
                part = (part if one.ranks == one.r else part[: one.r]) if one.needs.a and there[i] else None
                if part is not None and one.kinds.a != group.a_kind:
                    part = part.to(one.kinds.a)
            found.append((part, *self.small[3 * i : 3 * i + 3]))
        return found


def backward(
    group: Siblings,
    dys: Sequence[MaybeTensor],
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Any],
    scalings: Sequence[float | torch.Tensor],
    p: float,
    in_place: bool = False,
) -> Grads:
    """The gradients. Weights and adapters have the strides that the group's calls agree in.

    dys [*lead, N] contiguous, or matrices of their rows, each row contiguous; x and ``kept``, as in ``Kept``, one layer
    after the other: what the backward reads. With many rows dX comes last, and till then its memory holds what the
    passes leave for their sums.
    ``in_place``: DoRA's dZ takes dY's memory, but where launches for few rows may read dY after it is written.
    """
    m, room, bits, kind = group.m, made.room, made.bits, group.kind
    in_place = in_place and m > FEW
    new, ds = allocator(room), None
    there = [dy is not None for dy in dys]
    dx, stacked, *small = [spec and new(*spec[0], dtype=spec[1]) for spec in group.wanted_of(there)]
    strides = [None if dy is None or dy.is_contiguous() else dy.stride() for dy in dys]
    missing = [i for i, has in enumerate(there) if not has]
    flat: list[Any] = []
    for i, (dy, (*_, dz)) in enumerate(zip(dys, group.specs, strict=True)):
        flat += small[3 * i : 3 * i + 3]
        if dy is None or dz is None:
            flat.append(None)
        else:
            flat.append(dy if in_place else new(*dz[0], dtype=dz[1]))
    if missing and group.needs_ds:  # whose columns nobody writes
        ds = new(m, group.ranks, dtype=kind).zero_()
    found = Grads(dx, stacked, small)
    if m == 0:
        for grad in (dx, stacked, *small):
            if grad is not None:
                grad.zero_()
    elif dx is not None or stacked is not None or any([grad is not None for grad in flat]):
        kinds = None
        if not all([type(scaling) is float for scaling in scalings]):
            scalings = list(map(as_scaling, scalings))
            kinds = tuple(map(kind_of, scalings))
        given = room, x, dx, stacked, bits, ds, 1.0 if bits is None else keep_scale(p), *dys, *flat, *scalings, *kept
        key = (
            backward_launches,
            None if x is None or x.is_contiguous() else x.stride(),
            bits is None,
            in_place,
            kinds,
            *strides,
            *missing,
            group.is_float32 and precision(kind, 256),
        )
        program = group.programs.get(key)
        if program is None or (bound := program.bind(*given)) is None:
            program, bound = bound_program(group, key, Backward, given)
        program.run(bound)
    return found
