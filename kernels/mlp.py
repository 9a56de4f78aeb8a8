"""An MLP, each of its layers with adapters or without: what its forward and its backward launch, in their order. It is
y = down(act(gate(x)) * up(x)); or one layer's output is both, in halves; or y = down(act(first(x))).

Forward: ``gate`` and ``up``, or the one layer, as a group (group.py) make e and g; one read of these makes h and S of
``down``; a product makes y. What is kept is x, e, g and what is small. Backward: as a layer's over dY and h, whose dX
is dh; then de and dg from dh, e and g, and h again (glu.py); and a group's backward over de and dg.
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
from lora_fast.kernels.outputs import OneForward, outputs, stacked
from lora_fast.kernels.passes import a_pass, launches_of
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Siblings, Spec
from lora_fast.kernels.sums import Dora, Parts, add_parts
from lora_fast.kernels.tiles import FEW

Maybe = Any  # an operand, None where the problem has none


@dataclass(eq=False)
class Mlp:
    """What the programs of such an MLP are decided by. ``inner``: gate and up, or one layer; ``outer``: down, a group
    of one. ``gate``: which half of the one layer's output is e, the other being g, "first" or "second"; None without g,
    and with two layers. Of the magnitudes of ``inner`` those that ``dots`` names have their gradients made from e and
    g, not from a z that was kept: to the group they seem to need none, and where they are ``scaled`` it gets dZ for de
    and dg."""

    inner: Siblings
    outer: Siblings
    act: str
    gate: str | None
    dots: Sequence[bool]
    dot_kinds: Sequence[torch.dtype | None]

    def __post_init__(self) -> None:
        self.programs = self.inner.programs
        (self.down,) = self.outer.each
        # What of the bases of the inner layers makes z again.
        both = zip(self.inner.each, self.dots, strict=True)
        self.again = [one.base.tensors[one.for_y] if dots else () for one, dots in both]

    @cached_property
    def saved(self) -> list[slice]:
        """Those of each base's tensors that the backward reads, down's last."""
        both = zip(self.inner.each, self.dots, strict=True)
        found = [one.base.read_by(y=dots, dx=self.inner.needs_x) for one, dots in both]
        return [*found, *self.outer.saved]

    @cached_property
    def of_dots(self) -> list[Spec]:
        """Of dm of the inner layers that the backward's first half makes."""
        dots = zip(self.inner.each, self.dots, self.dot_kinds, strict=True)
        return [((one.n,), kind) if has and kind else None for one, has, kind in dots]

    @cached_property
    def of_down(self) -> list[Spec]:
        """Of dA, with the rows of its padding, dB, dbias and dm of down."""
        of_a: Spec = ((self.down.ranks, self.outer.k), self.down.kinds.a) if self.down.needs.a else None
        return [of_a, *self.outer.specs[0][:3]]

    @cached_property
    def wanted(self) -> list[Spec]:
        """Of all that a backward makes: what the group of the inner layers does, with all dm, then ``of_down``."""
        found = list(self.inner.wanted)
        for i, dm in enumerate(self.of_dots):
            found[4 + 3 * i] = dm or found[4 + 3 * i]
        return [*found, *self.of_down]

    def halves(self, found: Sequence[Maybe]) -> tuple[Maybe, Maybe]:
        """What belongs to e and what to g, of matrices whose columns are those of the inner layers' outputs."""
        first, *others = found
        if others or self.gate is None or first is None:
            return first, others[0] if others else None
        e, g = (first.block(0, at, len(first), self.outer.k) for at in (0, self.outer.k))
        return (e, g) if self.gate == "first" else (g, e)


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    h: Operand
    room: Operand  # of the inner layers
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
    each: tuple[Any, ...]  # the fields of ``OneForward`` for each layer


def forward_launches(at: Forward, mlp: Mlp) -> list[Launch]:
    fields, (inner, outer) = len(OneForward._fields), (mlp.inner, mlp.outer)
    each, held, rest = inner.parted(at.each, fields, inner.for_y)
    (own,), of_down, _ = outer.parted(rest, fields, outer.for_y)
    ones, down = [OneForward(*one) for one in each], OneForward(*own)
    (e, g), small = mlp.halves([one.y.rows() for one in ones]), outer.small(at.down_room)
    launches = []
    for seed, bits, count, words in (
        (at.seed, at.bits, at.keep_count, at.n_words),
        (at.h_seed, at.h_bits, at.h_keep_count, at.h_words),
    ):
        if seed is not None:
            launches.append(mask(seed, bits, count, words))
    launches += outputs(at.x.rows(), ones, held, inner, inner.small(at.room), at.bits, at.keep)
    a = s = scales = None
    # Else whoever quantises h makes S, or of few rows a launch after this, by more programs.
    ready = mlp.down.r > 0 and not mlp.down.base.e4m3 and outer.m > FEW
    if ready:
        a, s, scales = small.stacked, small.s, small.scales
        launches += stacked(at.h, [down], outer, small)
    launches.append(glu_down(e, g, at.h, a, s, scales, at.h_keep, act=mlp.act, bits=at.h_bits if ready else None))
    return launches + outputs(at.h, [down], of_down, outer, small, at.h_bits, at.h_keep, ready=ready)


class Backward(NamedTuple):
    """The arguments of the program of a backward's first half, in this order: to de and dg."""

    dy: Operand
    out: Operand  # of gate, or of the one inner layer; of up; their gradients
    up: Maybe
    d_out: Operand
    d_up: Maybe
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
    x: Maybe  # what z of the inner layers is made of again, where their gains are tiny
    rest: tuple[Any, ...]  # (dm, b) of each inner layer, what is read of their bases, and of down's


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
    _, (held,), _ = outer.parted(at.rest[2 * len(mlp.again) + sum(map(len, mlp.again)) :], 0, outer.saved)
    e, g = mlp.halves((at.out, at.up)[: len(mlp.again)])
    again = {"gate": g, "act": mlp.act} if sibling.z_again else {}
    layer, rooms = Gradients(one, small.each[0], sibling, ds, held, again), outer.rooms(scratch)
    kind = wide(dy)
    launches = [
        *launches_of(layer.passes(e, at.h_keep, outer, rooms), kind, scratch, at.dh),
        *layer.into(at.dh, at.h_bits, outer, rooms),
        *_middle(at, mlp, scratch),
    ]
    if at.grad_a is not None:
        assert ds is not None
        launches += launches_of([a_pass(at.dh, ds, at.grad_a, bits=at.h_bits)], kind, scratch)
    return launches


def _middle(at: Backward, mlp: Mlp, scratch: Scratch) -> list[Launch]:
    """de, dg and h, and dm of the inner layers, where these come from e and g."""
    inner, count = mlp.inner, len(mlp.again)
    outs, d_outs = (at.out, at.up)[:count], (at.d_out, at.d_up)[:count]
    kind, splits, small = inner.kind, glu_splits(inner.m), inner.small(at.room)
    parts = [
        scratch.part((splits, one.n), wide(at.dy)) if dots else None
        for one, dots in zip(inner.each, mlp.dots, strict=True)
    ]
    gains = [has.gain.rows() if one.scaled else None for one, has in zip(inner.each, small.each, strict=True)]
    (e, g), (de, dg) = mlp.halves(outs), mlp.halves(d_outs)
    of_both = {"gains": mlp.halves(gains), "parts": mlp.halves(parts)}
    launches = [glu_grad(at.dh, e, g, de, dg, act=mlp.act, with_h=at.grad_a is not None, **of_both)]
    rooms, rest = inner.rooms(scratch), at.rest[2 * count :]
    for i, (part, d_out, has, one) in enumerate(zip(parts, d_outs, small.each, inner.each, strict=True)):
        if part is None:
            continue
        (dm, b), held = at.rest[2 * i : 2 * i + 2], [None] * one.held
        held[one.for_y], rest = rest[: len(mlp.again[i])], rest[len(mlp.again[i]) :]
        w = one.base.y(held, rooms.wanted(one, inner, has.gain))
        b = b if has.b is None else has.b
        dora = Dora(has.gain, has.norm, dm=dm, x=at.x.rows(), weight=w.matrix, s=has.s, b=b, w_scale=w.scale)
        sums = Parts(col_blocks=0, splits=splits, ds=0, sums=0, dm=one.n, g=0)
        launches += [*w.launches, add_parts(sums, part, d_out, kind, dora=dora, rescales=True)]
    return launches


class Made(NamedTuple):
    """What a forward leaves for the backward, beside y: the outputs of gate and of up, or of the one inner layer; and
    ``z`` of each layer, if they are kept."""

    out: torch.Tensor
    up: MaybeTensor
    room: torch.Tensor
    down_room: torch.Tensor
    bits: MaybeTensor
    h_bits: MaybeTensor
    z: tuple[MaybeTensor, ...] = ()

    @property
    def outs(self) -> tuple[torch.Tensor, ...]:
        return (self.out,) if self.up is None else (self.out, self.up)


Seed = torch.Tensor | int | None


def forward(
    mlp: Mlp, x: torch.Tensor, each: Sequence[Given], seeds: tuple[Seed, Seed], rates: tuple[float, float]
) -> tuple[torch.Tensor, Made, Deferred | None]:
    """y [*lead, N], what it leaves for the backward, and the product of y if this does not read it, to be run once that
    is saved. x [..., K], contiguous or the matrix of its rows; ``each``: the inner layers and down; seeds and rates of
    the dropout of x, which the inner layers share, and of h."""
    inner, outer, new = mlp.inner, mlp.outer, allocator(x)
    m, width = inner.m, outer.k
    y, h, outs = new(*inner.lead, mlp.down.n), new(m, width), [new(m, one.n) for one in inner.each]
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
    for sibling, one, out in zip((*inner.each, mlp.down), each, (*outs, y), strict=True):
        kept, scaling = torch.empty_like(out) if sibling.keep_z else None, as_scaling(one.scaling)
        if isinstance(scaling, torch.Tensor):
            key.append((len(z), kind_of(scaling)))
        z.append(kept)
        fields.append((*one[1:5], scaling, out, kept))
        held.append(one.held[sibling.for_y])
    chained = itertools.chain.from_iterable
    flat = *chained(fields[:-1]), *chained(held[:-1]), *fields[-1], *held[-1]
    of_x, of_h = masks
    made = Made(outs[0], outs[1] if len(outs) > 1 else None, room, down_room, of_x[0], of_h[0], tuple(z))
    if m == 0:
        return y, made, None
    given = x, h, room, down_room, *chained(zip(of_x, of_h, strict=True)), *flat
    key.append(inner.is_float32 and precision(inner.kind, 256))
    program = mlp.programs.get(tuple(key))
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(mlp, tuple(key), Forward, given)
    first = len(program.launches) - program.late
    program.run(bound, 0, first)
    return y, made, Deferred(program, bound, first) if program.late else None


def backward(
    mlp: Mlp,
    dy: torch.Tensor,
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[Any]],
    scaling: float | torch.Tensor,
    p: float,
    in_place: bool,
) -> tuple[Sequence[torch.Tensor], list[MaybeTensor], list[MaybeTensor]]:
    """The gradients of the inner layers' outputs (where ``scaled`` with DoRA's gain), [dA, dB, dbias, dm] of down, dA
    with the rows of its padding, and dm of each inner layer where ``Mlp.dots`` says so. ``kept``, each as in ``Kept``,
    is of the inner layers and down; scaling and p are down's. ``in_place``: the gradients take the memory of the
    outputs."""
    inner, outer, down, outs, new = mlp.inner, mlp.outer, mlp.down, made.outs, allocator(dy)
    m, width = inner.m, mlp.outer.k
    d_outs = outs if in_place else tuple(map(torch.empty_like, outs))
    dms, grads = ([spec and new(*spec[0], dtype=spec[1]) for spec in specs] for specs in (mlp.of_dots, mlp.of_down))
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
        rest += kept[-1][3:][outer.saved[0]]
        rooms = made.room, made.down_room
        own = x if any(mlp.dots) else None
        both = (None,) if len(outs) == 1 else ()
        given = (
            *(dy, *outs, *both, *d_outs, *both, dh),
            *(*rooms, made.h_bits, keep, *grads, dz, scaling),
            *(*kept[-1][:3], own, *rest),
        )
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
    return d_outs, grads, dms
