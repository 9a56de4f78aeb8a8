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
from lora_fast.kernels.down import down
from lora_fast.kernels.gemm import product
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import norms
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of, needs_dz
from lora_fast.kernels.problem import MaybeTensor, Needs
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Kept, Made, Shared, Siblings
from lora_fast.kernels.stack import Adapter, stack
from lora_fast.kernels.sums import Dora

Maybe = Any  # an operand, None where the problem has none


class OneForward(NamedTuple):
    """Of one layer's forward: as in ``Given``, then y and z."""

    weight: Operand
    a: Operand
    b: Operand
    bias: Maybe
    magnitude: Maybe
    scaling: Operand | Number
    y: Operand
    z: Maybe


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    room: Operand
    bits: Maybe
    seed: Maybe
    keep_count: Number
    n_words: Number
    keep: Number
    each: tuple[Any, ...]  # the fields of ``OneForward`` for each layer


def forward_launches(at: Forward, group: Siblings) -> list[Launch]:
    each = [OneForward(*at.each[i : i + 8]) for i in range(0, len(at.each), 8)]
    first = [] if at.seed is None else [mask(at.seed, at.bits, at.keep_count, at.n_words)]
    return [*first, *outputs(at.x.rows(), each, group, group.small(at.room), at.bits, at.keep)]


def outputs(
    x: Operand, each: Sequence[OneForward], group: Siblings, small: Shared, bits: Maybe, keep: Number
) -> list[Launch]:
    """The small things and each y, whose products come last."""
    scratch = Scratch(x.device)
    adapters = [Adapter(one.a, one.b, has.b, one.scaling) for one, has in zip(each, small.each, strict=True)]
    launches = [
        stack(x, adapters, small.stacked, small.scales, group.lifted),
        down(x, small.stacked, small.s, None, keep, bits=bits, scales=small.scales),
    ]
    last = []
    for one, has, sibling in zip(each, small.each, group.each, strict=True):
        b = one.b if has.b is None else has.b
        if sibling.dora:  # parts of the norm take y's memory, until y is there
            launches += norms(
                one.weight,
                has.a,
                b,
                one.scaling,
                has.norm,
                m=one.magnitude,
                gain=has.gain,
                round_norm=sibling.round_norm,
                scratch=scratch,
                room=one.y,
                lifted=group.lifted,
            )
        z = None if one.z is None else one.z.rows()
        last.append(product(x, one.weight, has.s, b, one.y.rows(), transposed=True, bias=one.bias, gain=has.gain, z=z))
    return [*launches, *last]


class OneBackward(NamedTuple):
    """Of one layer's backward: dY, None where no gradient came; the gradients and dZ, each None where it is not
    wanted; the scaling; then as in ``Kept``."""

    dy: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe
    scaling: Operand | Number
    weight: Maybe
    b: Maybe
    y: Maybe
    z: Maybe


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    room: Operand
    x: Maybe
    dx: Maybe
    grad_a: Maybe
    bits: Maybe
    ds: Maybe
    keep: Number
    each: tuple[Any, ...]  # the fields of ``OneBackward`` for each layer, then dY and W of each frozen one


def backward_launches(at: Backward, group: Siblings) -> list[Launch]:
    end = 10 * len(group.each)
    each = [OneBackward(*at.each[i : i + 10]) for i in range(0, end, 10)]
    frozen = [(at.each[i].rows(), at.each[i + 1]) for i in range(end, len(at.each), 2)]
    return gradients(at, each, frozen, group)


def gradients(
    at: Backward, each: Sequence[OneBackward], frozen: Sequence[tuple[Operand, Operand]], group: Siblings
) -> list[Launch]:
    small, scratch, x = group.small(at.room), Scratch(at.room.device), None if at.x is None else at.x.rows()
    ds = at.ds
    parts: Sequence[Maybe] = [None] * len(each)
    if group.needs_ds:
        ds = ds or scratch.part((group.m, group.ranks), group.kind)
        parts = group.columns(ds)
    passes: list[Pass] = []
    sources = []
    for one, has, sibling, part in zip(each, small.each, group.each, parts, strict=True):
        if one.dy is None:
            continue
        dy, dora = one.dy.rows(), None
        b = one.b if has.b is None else has.b
        if sibling.dora and not sibling.scaled:
            dora = Dora(has.gain, has.norm, one.y if one.z is None else one.z, one.dz, one.grad_m)
            if sibling.z_again:
                dora = dora._replace(x=x, weight=one.weight, s=has.s, b=b)
        passes += dy_passes(
            dy,
            sibling.r,
            one.scaling,
            at.keep,
            s=has.s,
            b=b,
            grad_b=one.grad_b,
            ds=part,
            grad_bias=one.grad_bias,
            dora=dora,
            lifted=group.lifted,
        )
        sources.append((dy if one.dz is None else one.dz, one.weight))
    if at.grad_a is not None:
        assert x is not None
        passes.append(a_pass(x, ds, at.grad_a, bits=at.bits))
    launches = launches_of(passes, wide(at.room if ds is None else ds), scratch, at.dx)
    if at.dx is not None:
        launches.append(products([*sources, *frozen], ds, small.stacked, at.dx.rows(), bits=at.bits))
    return launches


def forward(
    group: Siblings, x: torch.Tensor, each: Sequence[Given], seed: torch.Tensor | int | None, p: float
) -> tuple[list[torch.Tensor], Made, Deferred | None]:
    """Each y [*lead, N], what it leaves for the backward, and the launches of those that this does not read, which are
    to be run once that is saved.

    x [..., K], contiguous or the matrix of its rows; the adapters, bias and magnitude contiguous, in any dtype; with a
    seed elements of x are dropped with p, the same for all.
    """
    m, words = group.m, -(-group.k // 32)
    ys = [x.new_empty(*group.lead, one.n) for one in group.each]
    z = [torch.empty_like(y) if one.keep_z else None for y, one in zip(ys, group.each, strict=True)]
    room = x.new_empty(group.bytes, dtype=torch.uint8)
    made = Made(room, None if seed is None else x.new_empty(m, words, dtype=torch.int32), z)
    if m == 0:
        return ys, made, None
    count, keep = (0, 1.0) if seed is None else (keep_count(p), keep_scale(p))
    scalings = [as_scaling(one.scaling) for one in each]
    flat: list[Any] = []
    for one, by, y, kept in zip(each, scalings, ys, z, strict=True):
        flat += (*one[:5], by, y, kept)
    given = x, room, made.bits, seed, count, m * words, keep, *flat
    key = (
        forward_launches,
        None if seed is None else kind_of(seed),
        *(() if all([type(by) is float for by in scalings]) else map(kind_of, scalings)),
        group.is_float32 and precision(group.kind, 256),
    )
    program = group.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(group, key, Forward, given)
    first = len(program.launches) - group.late
    program.run(bound, 0, first)
    return ys, made, Deferred(program, bound, first, (x,)) if group.late else None


def backward(
    group: Siblings,
    dys: Sequence[MaybeTensor],
    frozen: Sequence[tuple[torch.Tensor, torch.Tensor]],
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Kept],
    scalings: Sequence[float | torch.Tensor],
    p: float,
    in_place: bool = False,
) -> tuple[MaybeTensor, list[tuple[MaybeTensor, ...]]]:
    """dX [*lead, K], and (dA, dB, dbias, dm) of each layer; None where it is not needed, and for layers whose dY is
    None. Weights and adapters have the strides that the group's calls agree in.

    dys [*lead, N] contiguous, or matrices of their rows, each row contiguous; ``frozen``: dY and W of layers without
    adapters that share x; x and ``kept``: what the backward reads. The A's gradients are parts of one matrix. With
    many rows dX comes last, and till then its memory holds what the passes leave for their sums. ``in_place``: DoRA's
    dZ takes dY's memory.
    """
    m, room, bits = group.m, made.room, made.bits
    new, scalings = room.new_empty, [as_scaling(by) for by in scalings]
    floats = all([type(by) is float for by in scalings])
    dx = new(group.x_shape, dtype=group.kind) if group.needs_x else None
    live = [one.needs if dy is not None else Needs() for one, dy in zip(group.each, dys, strict=True)]
    stacked = new(group.ranks, group.k, dtype=group.a_kind) if any(needs.a for needs in live) else None
    grads = [
        (
            new(one.n, one.r, dtype=one.kinds.b) if needs.b else None,
            new(one.n, dtype=one.kinds.bias) if needs.bias else None,
            new(one.n, dtype=one.kinds.m) if needs.m else None,
        )
        for one, needs in zip(group.each, live, strict=True)
    ]
    if m == 0:
        for grad in (dx, stacked, *(grad for three in grads for grad in three)):
            if grad is not None:
                grad.zero_()
    elif any(t is not None for t in (dx, stacked, *(grad for three in grads for grad in three))):
        ds = None
        if group.needs_ds and any(dy is None for dy in dys):  # whose columns of dS nobody writes
            ds = new(m, group.ranks, dtype=group.kind).zero_()
        flat: list[Any] = []
        for one, dy, three, by, keeps in zip(group.each, dys, grads, scalings, kept, strict=True):
            dz = None
            dora = dy is not None and one.dora and not one.scaled
            if dora and (group.needs_x or needs_dz(one.r, group.needs_ds, one.needs.b)):
                dz = dy if in_place else new(m, one.n, dtype=group.kind)
            flat += (dy, *three, dz, by, *keeps)
        flat += (t for pair in frozen for t in pair)
        given = room, x, dx, stacked, bits, ds, 1.0 if bits is None else keep_scale(p), *flat
        key = (
            backward_launches,
            *[None if dy is None else dy.stride() for dy in dys],
            *[t.stride() for pair in frozen for t in pair],
            *[dy.shape for dy, _ in frozen],
            None if x is None else x.stride(),
            bits is None,
            in_place,
            *(() if floats else map(kind_of, scalings)),
            group.is_float32 and precision(group.kind, 256),
        )
        program = group.programs.get(key)
        if program is None or (bound := program.bind(*given)) is None:
            program, bound = bound_program(group, key, Backward, given)
        program.run(bound)
    found: list[tuple[MaybeTensor, ...]] = []
    first = 0
    for one, ranks, needs, three in zip(group.each, group.ranks_of, live, grads, strict=True):
        grad_a = None
        if needs.a and stacked is not None:
            grad_a = stacked[first : first + one.r]
            if one.kinds.a != group.a_kind:
                grad_a = grad_a.to(one.kinds.a)
        found.append((grad_a, *three))
        first += ranks
    return dx, found
