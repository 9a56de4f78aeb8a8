"""A gated MLP, y = down(act(gate(x)) * up(x)), each of the three with adapters or without: what its forward and its
backward launch, in their order.

Forward: ``gate`` and ``up`` as a group (group.py) make e and g; one read of these makes h and S of ``down``; a product
makes y. What is kept is x, e, g and what is small. Backward: as a layer's over dY and h, whose dX is dh; then de and dg
from dh, e and g, and h again (glu.py); and a group's backward over de and dg.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import precision, wide
from lora_fast.kernels.glu import glu_down, glu_grad, glu_splits
from lora_fast.kernels.gradients import Gradients, OneBackward
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.memory import allocator
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.outputs import OneForward, outputs
from lora_fast.kernels.passes import a_pass, launches_of
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Siblings
from lora_fast.kernels.stack import Adapter, stack
from lora_fast.kernels.sums import Dora, Parts, add_parts

Maybe = Any  # an operand, None where the problem has none


@dataclass(eq=False)
class Mlp:
    """What the programs of such an MLP are decided by. ``inner``: gate and up; ``outer``: down, a group of one. Of the
    two magnitudes of ``inner`` those that ``dots`` names have their gradients made from e and g, not from a z that was
    kept: to the group they seem to need none, and where they are ``scaled`` it gets dZ for de and dg."""

    inner: Siblings
    outer: Siblings
    act: str
    dots: Sequence[bool]
    dot_kinds: Sequence[torch.dtype | None]

    def __post_init__(self) -> None:
        self.programs = self.inner.programs
        (self.down,) = self.outer.each
        # What of the bases of gate and up makes z again.
        both = zip(self.inner.each, self.dots, strict=True)
        self.again = [one.base.tensors[one.for_y] if dots else () for one, dots in both]

    @cached_property
    def saved(self) -> list[slice]:
        """Those of each base's tensors that the backward reads: of gate, up, down."""
        both = zip(self.inner.each, self.dots, strict=True)
        found = [one.base.read_by(y=dots, dx=self.inner.needs_x) for one, dots in both]
        return [*found, *self.outer.saved]


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    h: Operand
    room: Operand  # of gate and up
    down_room: Operand
    bits: Maybe  # of the masks on x and on h
    h_bits: Maybe
    seed: Maybe
    h_seed: Maybe
    keep_count: Number
    h_keep_count: Number
    n_words: Number
    h_words: Number
    keep: Number
    h_keep: Number
    each: tuple[Any, ...]  # the fields of ``OneForward`` for gate, up and down


def forward_launches(at: Forward, mlp: Mlp) -> list[Launch]:
    fields, (inner, outer) = len(OneForward._fields), (mlp.inner, mlp.outer)
    both, held, rest = inner.parted(at.each, fields, inner.for_y)
    (own,), of_down, _ = outer.parted(rest, fields, outer.for_y)
    (gate, up), down = (OneForward(*one) for one in both), OneForward(*own)
    e, g, small = gate.y.rows(), up.y.rows(), outer.small(at.down_room)
    launches = []
    for seed, bits, count, words in (
        (at.seed, at.bits, at.keep_count, at.n_words),
        (at.h_seed, at.h_bits, at.h_keep_count, at.h_words),
    ):
        if seed is not None:
            launches.append(mask(seed, bits, count, words))
    launches += outputs(at.x.rows(), (gate, up), held, inner, inner.small(at.room), at.bits, at.keep)
    a = s = scales = None
    ready = mlp.down.r > 0 and not mlp.down.base.e4m3  # else whoever quantises h makes S
    if ready:
        a, s, scales, has = small.stacked, small.s, small.scales, small.each[0]
        launches.append(stack(at.h, [Adapter(down.a, down.b, has.b, down.scaling)], a, scales, outer.lifted))
    launches.append(glu_down(e, g, at.h, a, s, scales, at.h_keep, act=mlp.act, bits=at.h_bits if ready else None))
    return launches + outputs(at.h, [down], of_down, outer, small, at.h_bits, at.h_keep, ready=ready)


class Backward(NamedTuple):
    """The arguments of the program of a backward's first half, in this order: to de and dg."""

    dy: Operand
    e: Operand
    g: Operand
    de: Operand
    dg: Operand
    dh: Operand  # and then h
    room: Operand
    down_room: Operand
    h_bits: Maybe
    h_keep: Number
    grad_a: Maybe  # of down, with the rows of its padding
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe
    scaling: Operand | Number
    b: Maybe  # from here on as in ``Kept``, of down
    y: Maybe
    z: Maybe
    x: Maybe  # what z of gate and up is made of again, where their gains are tiny
    rest: tuple[Any, ...]  # (dm, b) of gate and of up, what is read of their bases, and of down's


def backward_launches(at: Backward, mlp: Mlp) -> list[Launch]:
    dy, outer, scratch, small, sibling = (
        at.dy,
        mlp.outer,
        Scratch(at.dy.device),
        mlp.outer.small(at.down_room),
        mlp.down,
    )
    ds = scratch.part((outer.m, sibling.ranks), outer.kind) if sibling.r else None
    one = OneBackward(dy, at.grad_b, at.grad_bias, at.grad_m, at.dz, at.scaling, at.b, at.y, at.z)
    _, (held,), _ = outer.parted(at.rest[4 + sum(map(len, mlp.again)) :], 0, outer.saved)
    again = {"gate": at.g, "act": mlp.act} if sibling.z_again else {}
    layer, rooms = Gradients(one, small.each[0], sibling, ds, held, again), outer.rooms(scratch)
    kind = wide(dy)
    launches = [
        *launches_of(layer.passes(at.e, at.h_keep, outer, rooms), kind, scratch, at.dh),
        *layer.into(at.dh, at.h_bits, outer, rooms),
        *_middle(at, mlp, scratch),
    ]
    if at.grad_a is not None:
        assert ds is not None
        launches += launches_of([a_pass(at.dh, ds, at.grad_a, bits=at.h_bits)], kind, scratch)
    return launches


def _middle(at: Backward, mlp: Mlp, scratch: Scratch) -> list[Launch]:
    """de, dg and h, and dm of gate and up, where these come from e and g."""
    (m, n), kind = at.e.shape, mlp.inner.kind
    splits, small = glu_splits(m), mlp.inner.small(at.room)
    parts: Any = tuple(scratch.part((splits, n), wide(at.e)) if dots else None for dots in mlp.dots)
    gains: Any = tuple(has.gain if one.scaled else None for one, has in zip(mlp.inner.each, small.each, strict=True))
    with_h = at.grad_a is not None
    launches = [glu_grad(at.dh, at.e, at.g, at.de, at.dg, act=mlp.act, gains=gains, parts=parts, with_h=with_h)]
    rooms, rest = mlp.inner.rooms(scratch), at.rest[4:]
    for i, (part, d, has, one) in enumerate(zip(parts, (at.de, at.dg), small.each, mlp.inner.each, strict=True)):
        if part is None:
            continue
        (dm, b), held = at.rest[2 * i : 2 * i + 2], [None] * one.held
        held[one.for_y], rest = rest[: len(mlp.again[i])], rest[len(mlp.again[i]) :]
        w = one.base.y(held, rooms.wanted(one, mlp.inner, has.gain))
        b = b if has.b is None else has.b
        dora = Dora(has.gain, has.norm, dm=dm, x=at.x.rows(), weight=w.matrix, s=has.s, b=b, w_scale=w.scale)
        sums = Parts(col_blocks=0, splits=splits, ds=0, sums=0, dm=n, g=0)
        launches += [*w.launches, add_parts(sums, part, d, kind, dora=dora, rescales=True)]
    return launches


class Made(NamedTuple):
    """What a forward leaves for the backward, beside y; ``z`` of gate, up and down, if they are kept."""

    e: torch.Tensor
    g: torch.Tensor
    room: torch.Tensor
    down_room: torch.Tensor
    bits: MaybeTensor
    h_bits: MaybeTensor
    z: tuple[MaybeTensor, ...] = (None,) * 3


Seed = torch.Tensor | int | None


def forward(
    mlp: Mlp, x: torch.Tensor, each: Sequence[Given], seeds: tuple[Seed, Seed], rates: tuple[float, float]
) -> tuple[torch.Tensor, Made, Deferred | None]:
    """y [*lead, N], what it leaves for the backward, and the product of y if this does not read it, to be run once that
    is saved. x [..., K], contiguous or the matrix of its rows; ``each``: gate, up and down; seeds and rates of the
    dropout of x, which gate and up share, and of h."""
    inner, outer, new = mlp.inner, mlp.outer, allocator(x)
    m, width = inner.m, outer.k
    y, e, g, h = new(*inner.lead, mlp.down.n), new(m, width), new(m, width), new(m, width)
    room, down_room = new(inner.bytes, dtype=torch.uint8), new(outer.bytes, dtype=torch.uint8)
    masks: list[tuple[MaybeTensor, Seed, int, int, float]] = []  # bits, seed, count, words, scale: of x and of h
    key: list[Any] = [forward_launches]
    for seed, p, cols in zip(seeds, rates, (inner.k, width), strict=True):
        words, kind = -(-cols // 32), None
        if seed is None:
            masks.append((None, None, 0, m * words, 1.0))
        else:
            bits, kind = new(m, words, dtype=torch.int32), kind_of(seed)
            masks.append((bits, seed, keep_count(p), m * words, keep_scale(p)))
        key.append(kind)
    z: list[MaybeTensor] = []
    fields: list[Any] = []
    held: list[Any] = []
    for sibling, one, out in zip((*inner.each, mlp.down), each, (e, g, y), strict=True):
        kept, scaling = torch.empty_like(out) if sibling.keep_z else None, as_scaling(one.scaling)
        if isinstance(scaling, torch.Tensor):
            key.append((len(z), kind_of(scaling)))
        z.append(kept)
        fields.append((*one[1:5], scaling, out, kept))
        held.append(one.held[sibling.for_y])
    flat = *fields[0], *fields[1], *held[0], *held[1], *fields[2], *held[2]
    of_x, of_h = masks
    made = Made(e, g, room, down_room, of_x[0], of_h[0], tuple(z))
    if m == 0:
        return y, made, None
    each_mask = itertools.chain.from_iterable(zip(of_x, of_h, strict=True))
    given = x, h, room, down_room, *each_mask, *flat
    key.append(inner.is_float32 and precision(inner.kind, 256))
    program = mlp.programs.get(tuple(key))
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(mlp, tuple(key), Forward, given)
    first = len(program.launches) - program.late
    program.run(bound, 0, first)
    return y, made, Deferred(program, bound, first, (h,)) if program.late else None


def backward(
    mlp: Mlp,
    dy: torch.Tensor,
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[Any]],
    scaling: float | torch.Tensor,
    p: float,
    in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, tuple[MaybeTensor, ...], list[MaybeTensor]]:
    """de and dg [M, I] (where ``scaled`` with DoRA's gain), (dA, dB, dbias, dm) of down, and dm of gate and of up where
    ``Mlp.dots`` says so. ``kept``, each as in ``Kept``, is of gate, up and down; scaling and p are down's.
    ``in_place``: de and dg take the memory of e and g."""
    inner, outer, down, e, g, new = mlp.inner, mlp.outer, mlp.down, made.e, made.g, allocator(dy)
    m, width = inner.m, mlp.outer.k
    de, dg = (e, g) if in_place else (torch.empty_like(e), torch.empty_like(g))
    needs, kinds = down.needs, down.kinds
    grad_a = new(down.ranks, width, dtype=kinds.a) if needs.a else None
    grad_b = new(down.n, down.r, dtype=kinds.b) if needs.b else None
    grad_bias = new(down.n, dtype=kinds.bias) if needs.bias else None
    grad_m = new(down.n, dtype=kinds.m) if needs.m else None
    dms = [new(width, dtype=kind) if dots else None for dots, kind in zip(mlp.dots, mlp.dot_kinds, strict=True)]
    grads = grad_a, grad_b, grad_bias, grad_m
    if m == 0:
        for grad in (*grads, *dms):
            if grad is not None:
                grad.zero_()
    else:
        dh, dz = new(m, width), None
        if down.dora and not down.base.e4m3:  # else that is quantised, and read so
            dz = new(m, down.n)
        scaling, keep = as_scaling(scaling), 1.0 if made.h_bits is None else keep_scale(p)
        rest: list[Any] = []
        for dm, one in zip(dms, kept, strict=False):
            rest += (None, None) if dm is None else (dm, one[0])
        for i, sibling in enumerate(inner.each):
            if mlp.dots[i]:
                rest += kept[i][3:][sibling.for_y]
        rest += kept[2][3:][outer.saved[0]]
        rooms = made.room, made.down_room
        own = x if any(mlp.dots) else None
        given = dy, e, g, de, dg, dh, *rooms, made.h_bits, keep, *grads, dz, scaling, *kept[2][:3], own, *rest
        key = (
            backward_launches,
            dy.stride(),
            None if own is None else own.stride(),
            kind_of(scaling),
            made.h_bits is None,
            in_place,
            inner.is_float32 and precision(inner.kind, 256),
        )
        program = mlp.programs.get(key)
        if program is None or (bound := program.bind(*given)) is None:
            program, bound = bound_program(mlp, key, Backward, given)
        program.run(bound)
    if grad_a is not None:
        grad_a = grad_a[: down.r]
    return de, dg, (grad_a, grad_b, grad_bias, grad_m), dms
