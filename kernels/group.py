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
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.outputs import OneForward, outputs
from lora_fast.kernels.passes import Pass, a_pass, launches_of, needs_dz
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Made, Siblings

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
    each: tuple[Any, ...]  # the fields of ``OneBackward`` for each layer, then each base's tensors that are saved


def backward_launches(at: Backward, group: Siblings) -> list[Launch]:
    flat, held, _ = group.parted(at.each, len(OneBackward._fields), group.saved)
    each = [OneBackward(*one) for one in flat]
    small, scratch, x = group.small(at.room), Scratch(at.room.device), None if at.x is None else at.x.rows()
    ds = at.ds
    parts: Sequence[Maybe] = [None] * len(each)
    if group.needs_ds:
        ds = ds or scratch.part((group.m, group.ranks), group.kind)
        parts = group.columns(ds)
    made = [
        Gradients(one, has, sibling, part, tensors)
        for one, has, sibling, part, tensors in zip(each, small.each, group.each, parts, held, strict=True)
    ]
    made = [one for one in made if one.one.dy is not None]
    if not made:
        return []
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
    m, words, new = group.m, -(-group.k // 32), x.new_empty
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
    return ys, made, Deferred(program, bound, first, (x,)) if program.late else None


def backward(
    group: Siblings,
    dys: Sequence[MaybeTensor],
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[Any]],
    scalings: Sequence[float | torch.Tensor],
    p: float,
    in_place: bool = False,
) -> tuple[MaybeTensor, list[tuple[MaybeTensor, ...]]]:
    """dX [*lead, K], and (dA, dB, dbias, dm) of each layer; None where it is not needed, and for layers whose dY is
    None. Weights and adapters have the strides that the group's calls agree in.

    dys [*lead, N] contiguous, or matrices of their rows, each row contiguous; x and ``kept`` (each a ``Kept``): what
    the backward reads. The A's gradients are parts of one matrix. With many rows dX comes last, and till then its
    memory holds what the passes leave for their sums.
    ``in_place``: DoRA's dZ takes dY's memory.
    """
    m, room, bits, kind = group.m, made.room, made.bits, group.kind
    new, dx, stacked, ds = room.new_empty, None, None, None
    if group.needs_x:
        dx = new(*group.x_shape, dtype=kind)
    if group.needs_a and any([one.needs.a and dy is not None for one, dy in zip(group.each, dys, strict=True)]):
        stacked = new(group.ranks, group.k, dtype=group.a_kind)
    grads: list[tuple[MaybeTensor, ...]] = []
    flat: list[Any] = []
    key: list[Any] = [backward_launches]
    for one, dy, scaling, keeps in zip(group.each, dys, scalings, kept, strict=True):
        grad_b = grad_bias = grad_m = dz = None
        if dy is None:
            key.append(None)
            if group.needs_ds and ds is None:  # whose columns nobody writes
                ds = new(m, group.ranks, dtype=kind).zero_()
        else:
            key.append(dy.stride())
            _, _, need_b, need_bias, need_m = one.needs
            if need_b:
                grad_b = new(one.n, one.r, dtype=one.kinds.b)
            if need_bias:
                grad_bias = new(one.n, dtype=one.kinds.bias)
            if need_m:
                grad_m = new(one.n, dtype=one.kinds.m)
            by_itself = group.needs_x and not one.base.e4m3  # else that is quantised, and read so
            if one.dora and not one.scaled and (by_itself or needs_dz(one.r, group.needs_ds, need_b)):
                dz = dy if in_place else new(m, one.n, dtype=kind)
        scaling = as_scaling(scaling)
        if isinstance(scaling, torch.Tensor):
            key.append((len(grads), kind_of(scaling)))
        grads.append((grad_b, grad_bias, grad_m))
        flat += (dy, grad_b, grad_bias, grad_m, dz, scaling, *keeps[1:])
    wanted = [grad for grad in (dx, stacked, *(grad for three in grads for grad in three)) if grad is not None]
    if m == 0:
        for grad in wanted:
            grad.zero_()
    elif wanted:
        for keeps, there in zip(kept, group.saved, strict=True):
            flat += keeps[0][there]
        given = room, x, dx, stacked, bits, ds, 1.0 if bits is None else keep_scale(p), *flat
        key += (None if x is None else x.stride(), bits is None, in_place)
        key.append(group.is_float32 and precision(kind, 256))
        program = group.programs.get(tuple(key))
        if program is None or (bound := program.bind(*given)) is None:
            program, bound = bound_program(group, tuple(key), Backward, given)
        program.run(bound)
    if stacked is None:
        return dx, [(None, *three) for three in grads]
    found: list[tuple[MaybeTensor, ...]] = []
    parts = stacked.split_with_sizes(group.ranks_of)
    for one, ranks, dy, part, three in zip(group.each, group.ranks_of, dys, parts, grads, strict=True):
        own: MaybeTensor = None
        if one.needs.a and dy is not None:
            own = part if ranks == one.r else part[: one.r]
            if one.kinds.a != group.a_kind:
                own = own.to(one.kinds.a)
        found.append((own, *three))
    return dx, found
