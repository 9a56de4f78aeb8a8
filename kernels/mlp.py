"""A gated MLP, y = down(act(gate(x)) * up(x)), each of the three with adapters or without: what its forward and its
backward launch, in their order.

Forward: ``gate`` and ``up`` as a group (group.py) make e and g; one read of these makes h and S of ``down``; a product
makes y. What is kept is x, e, g and what is small. Backward: as a layer's over dY and h, whose dX is dh; then de and dg
from dh, e and g, and h again (glu.py); and a group's backward over de and dg.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import precision, wide
from lora_fast.kernels.gemm import product
from lora_fast.kernels.glu import glu_down, glu_grad, glu_splits
from lora_fast.kernels.group import OneForward, outputs
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import norms
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of
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
        self.late = not self.down.needs.m


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
    gate, up, down = (OneForward(*at.each[i : i + 8]) for i in (0, 8, 16))
    e, g, y, scratch = gate.y.rows(), up.y.rows(), down.y.rows(), Scratch(at.x.device)
    small = mlp.outer.small(at.down_room)
    has, lifted = small.each[0], mlp.outer.lifted
    b = down.b if has.b is None else has.b
    launches = []
    for seed, bits, count, words in (
        (at.seed, at.bits, at.keep_count, at.n_words),
        (at.h_seed, at.h_bits, at.h_keep_count, at.h_words),
    ):
        if seed is not None:
            launches.append(mask(seed, bits, count, words))
    launches += outputs(at.x.rows(), (gate, up), mlp.inner, mlp.inner.small(at.room), at.bits, at.keep)
    a = s = scales = None
    if mlp.down.r:
        a, s, scales = small.stacked, small.s, small.scales
        launches.append(stack(at.h, [Adapter(down.a, down.b, has.b, down.scaling)], a, scales, lifted))
    launches.append(glu_down(e, g, at.h, a, s, scales, at.h_keep, act=mlp.act, bits=at.h_bits))
    if mlp.down.dora:
        launches += norms(
            down.weight,
            has.a,
            b,
            down.scaling,
            has.norm,
            m=down.magnitude,
            gain=has.gain,
            round_norm=mlp.down.round_norm,
            scratch=scratch,
            room=y,
            lifted=lifted,
        )
    z = None if down.z is None else down.z.rows()
    last = product(at.h, down.weight, s, b, y, transposed=True, bias=down.bias, gain=has.gain, z=z)
    return [*launches, last]


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
    weight: Operand  # from here on as in ``Kept``, of down
    b: Maybe
    y: Maybe
    z: Maybe
    x: Maybe  # what z of gate and up is made of again, where their gains are tiny
    inner: tuple[Any, ...]  # (dm, weight, b) of gate and of up


def backward_launches(at: Backward, mlp: Mlp) -> list[Launch]:
    dy, scratch, small, sibling = at.dy.rows(), Scratch(at.dy.device), mlp.outer.small(at.down_room), mlp.down
    has, kind, lifted = small.each[0], mlp.outer.kind, mlp.outer.lifted
    b, dora = at.b if has.b is None else has.b, None
    ds = scratch.part((mlp.outer.m, sibling.ranks), kind) if sibling.r else None
    if sibling.dora:
        dora = Dora(has.gain, has.norm, at.y if at.z is None else at.z, at.dz, at.grad_m)
        if sibling.z_again:
            dora = dora._replace(x=at.e, weight=at.weight, s=has.s, b=b, gate=at.g, act=mlp.act)
    passes: list[Pass] = list(
        dy_passes(
            dy,
            sibling.r,
            at.scaling,
            at.h_keep,
            s=has.s,
            b=b,
            grad_b=at.grad_b,
            ds=ds,
            grad_bias=at.grad_bias,
            dora=dora,
            lifted=lifted,
        )
    )
    source = dy if at.dz is None else at.dz
    launches = [
        *launches_of(passes, wide(dy), scratch, at.dh),
        product(source, at.weight, ds, small.stacked if sibling.r else None, at.dh, transposed=False, bits=at.h_bits),
        *_middle(at, mlp, scratch),
    ]
    if at.grad_a is not None:
        assert ds is not None
        launches += launches_of([a_pass(at.dh, ds, at.grad_a, bits=at.h_bits)], wide(dy), scratch)
    return launches


def _middle(at: Backward, mlp: Mlp, scratch: Scratch) -> list[Launch]:
    """de, dg and h, and dm of gate and up, where these come from e and g."""
    (m, n), kind = at.e.shape, mlp.inner.kind
    splits, small = glu_splits(m), mlp.inner.small(at.room)
    parts: Any = tuple(scratch.part((splits, n), wide(at.e)) if dots else None for dots in mlp.dots)
    gains: Any = tuple(has.gain if one.scaled else None for one, has in zip(mlp.inner.each, small.each, strict=True))
    with_h = at.grad_a is not None
    launches = [glu_grad(at.dh, at.e, at.g, at.de, at.dg, act=mlp.act, gains=gains, parts=parts, with_h=with_h)]
    for i, (part, d, has) in enumerate(zip(parts, (at.de, at.dg), small.each, strict=True)):
        if part is None:
            continue
        dm, weight, b = at.inner[3 * i : 3 * i + 3]
        b = b if has.b is None else has.b
        dora = Dora(has.gain, has.norm, dm=dm, x=at.x.rows(), weight=weight, s=has.s, b=b)
        sums = Parts(col_blocks=0, splits=splits, ds=0, sums=0, dm=n, g=0)
        launches.append(add_parts(sums, part, d, kind, dora=dora, rescales=True))
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
    inner, outer, new = mlp.inner, mlp.outer, x.new_empty
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
    flat: list[Any] = []
    for sibling, one, out in zip((*inner.each, mlp.down), each, (e, g, y), strict=True):
        kept, scaling = torch.empty_like(out) if sibling.keep_z else None, as_scaling(one.scaling)
        if isinstance(scaling, torch.Tensor):
            key.append((len(z), kind_of(scaling)))
        z.append(kept)
        flat += (*one[:5], scaling, out, kept)
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
    if not mlp.late:
        program.run(bound)
        return y, made, None
    program.run(bound, 0, -1)
    return y, made, Deferred(program, bound, len(program.launches) - 1, (h,))


def backward(
    mlp: Mlp,
    dy: torch.Tensor,
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[MaybeTensor]],
    scaling: float | torch.Tensor,
    p: float,
    in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, tuple[MaybeTensor, ...], list[MaybeTensor]]:
    """de and dg [M, I] (where ``scaled`` with DoRA's gain), (dA, dB, dbias, dm) of down, and dm of gate and of up where
    ``Mlp.dots`` says so. ``kept``, each a ``Kept``, is of gate, up and down; scaling and p are down's. ``in_place``: de
    and dg take the memory of e and g."""
    inner, down, e, g, new = mlp.inner, mlp.down, made.e, made.g, dy.new_empty
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
        dh, dz = new(m, width), new(m, down.n) if down.dora else None
        scaling, keep = as_scaling(scaling), 1.0 if made.h_bits is None else keep_scale(p)
        again: list[MaybeTensor] = []
        for dm, one in zip(dms, kept, strict=False):
            again += (None, None, None) if dm is None else (dm, one[0], one[1])
        rooms = made.room, made.down_room
        own = x if any(mlp.dots) else None
        given = dy, e, g, de, dg, dh, *rooms, made.h_bits, keep, *grads, dz, scaling, *kept[2], own, *again
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
