"""Layers with one input, y_i = g_i * (x W_i^T + S_i B_i^T) + bias_i: what their forward and their backward launch, in
their order.

Forward: the adapters are stacked; one pass over x makes S of all, side by side; a product for each y. Backward: a pass
over each dY makes its dS, dB and what else needs it; one pass over x makes all dA; one product makes dX (products.py).
One dropout mask serves all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import Read
from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import FP8, precision, wide
from lora_fast.kernels.down import Quantised, down
from lora_fast.kernels.downs import downs, takes_downs
from lora_fast.kernels.fan import Result, fan, fans
from lora_fast.kernels.gemm import product
from lora_fast.kernels.magnitudes import dz_and_dm
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import Norm, norms, norms_of
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.pair import OverDy, pair, takes_pair
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of, needs_dz
from lora_fast.kernels.problem import MaybeTensor, Small
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Made, Rooms, Shared, Sibling, Siblings
from lora_fast.kernels.stack import Adapter, stack
from lora_fast.kernels.sums import Dora

MOST_RANKS = 64  # of all layers together, whose dA one program of few rows makes
Maybe = Any  # an operand, None where the problem has none


class OneForward(NamedTuple):
    """Of one layer's forward: as in ``Given``, then y and z."""

    a: Maybe
    b: Maybe
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
    each: tuple[Any, ...]  # the fields of ``OneForward`` for each layer, then those of each base's tensors that y reads


def forward_launches(at: Forward, group: Siblings) -> list[Launch]:
    first = [] if at.seed is None else [mask(at.seed, at.bits, at.keep_count, at.n_words)]
    each, held, _ = group.parted(at.each, len(OneForward._fields), group.for_y)
    small, both = group.small(at.room), [OneForward(*one) for one in each]
    return [*first, *outputs(at.x.rows(), both, held, group, small, at.bits, at.keep)]


def outputs(
    x: Operand,
    each: Sequence[OneForward],
    held: Sequence[Sequence[Maybe]],
    group: Siblings,
    small: Shared,
    bits: Maybe,
    keep: Number,
    ready: bool = False,
) -> list[Launch]:
    """The small things, where they are not ``ready``, and each y, whose products come last."""
    scratch, launches = Scratch(x.device), []
    adapters = [Adapter(one.a, one.b, has.b, one.scaling) for one, has in zip(each, small.each, strict=True) if one.a]
    quantised = None
    if adapters and not ready:
        if any(one.base.e4m3 for one in group.each):
            quantised = Quantised(scratch.part(x.shape, FP8), scratch.part((group.m,), torch.float32))
        launches = [
            stack(x, adapters, small.stacked, small.scales, group.lifted),
            down(x, small.stacked, small.s, None, keep, bits=bits, scales=small.scales, quantised=quantised),
        ]
    rooms, made = group.rooms(scratch), []
    for one, has, sibling, tensors in zip(each, small.each, group.each, held, strict=True):
        w, b = sibling.base.y(tensors, rooms.wanted(sibling, group)), one.b if has.b is None else has.b
        made.append(_Output(one, has, sibling, w, b))
    if group.packed:
        return [*launches, *(launch for one in made for launch in one.alone(x, quantised, group, scratch))]
    launches += _gains(made, group, scratch)
    together = [one for one in made if one.sibling.r and one.has.s and one.one.z is None]
    if len(together) < len(adapters) or not fans(x, [one.result for one in together]):
        together = []
    launches += [one.product(x) for one in made if one not in together]
    if together:
        whole = fan(x, [one.result for one in together])
        whole.late = not any(one.sibling.needs.m for one in together)
        launches.append(whole)
    return launches


class _Output(NamedTuple):
    """Of what a layer's output is made."""

    one: OneForward
    has: Small
    sibling: Sibling
    w: Read
    b: Maybe

    @property
    def result(self) -> Result:
        return Result(self.w.matrix, self.has.s, self.b, self.one.y.rows(), self.has.gain, self.one.bias)

    @property
    def norm(self) -> Norm:
        has, one = self.has, self.one
        return Norm(self.w.matrix, has.a, self.b, one.scaling, has.norm, one.magnitude, has.gain, self.w.scale)

    def gain(self, group: Siblings, scratch: Scratch) -> list[Launch]:
        """The norm and the gain, whose parts take y's memory, until y is there."""
        w, a, b, scaling, n, m, gain, w_scale = self.norm
        return norms(
            w,
            a,
            b,
            scaling,
            n,
            m=m,
            gain=gain,
            w_scale=w_scale,
            round_norm=self.sibling.round_norm,
            scratch=scratch,
            room=self.one.y,
            lifted=group.lifted,
        )

    def product(self, x: Operand, x_scale: Operand | None = None) -> Launch:
        w, s, b, y, gain, bias = self.result
        z = self.one.z and self.one.z.rows()
        made = product(x, w, s, b, y, transposed=True, bias=bias, gain=gain, z=z, x_scale=x_scale, w_scale=self.w.scale)
        made.late = not self.sibling.needs.m
        return made

    def alone(
        self, x: Operand, quantised: Quantised[Operand] | None, group: Siblings, scratch: Scratch
    ) -> list[Launch]:
        """All launches, where what writes W for them must come right ahead."""
        gains = self.gain(group, scratch) if self.sibling.dora else []
        last = self.product(*quantised) if self.sibling.base.e4m3 and quantised else self.product(x)
        for launch in self.w.launches:
            launch.late = last.late and not gains
        return [*self.w.launches, *gains, last]


def _gains(made: Sequence[_Output], group: Siblings, scratch: Scratch) -> list[Launch]:
    """Of all layers that have them, by one launch where they are alike."""
    made = [one for one in made if one.sibling.dora]
    if len({one.sibling.round_norm for one in made}) != 1 or any(one.norm.has_parts for one in made):
        return [launch for one in made for launch in one.gain(group, scratch)]
    return [norms_of([one.norm for one in made], round_norm=made[0].sibling.round_norm, lifted=group.lifted)]


class OneBackward(NamedTuple):
    """Of one layer's backward: dY, None where no gradient came; the gradients and dZ, each None where it is not
    wanted; the scaling; then as in ``Kept``, but for the base's tensors."""

    dy: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe
    scaling: Operand | Number
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
    if x is not None and (few := few_rows(at, x, made, group, ds, scratch)):
        return few
    rooms = group.rooms(scratch)
    passes = [one for layer in made for one in layer.passes(x, at.keep, group, rooms)]
    launches = launches_of([*passes, *last], kind, scratch, at.dx)
    if at.dx is not None:
        stacked = small.stacked if group.ranks else None
        launches.append(products([one.source for one in made], ds, stacked, at.dx.rows(), bits=at.bits))
    return launches


class Gradients(NamedTuple):
    """Of what a layer's gradients are made: ``ds`` are its columns of dS, ``held`` the tensors of its base. ``again``:
    what z is made of again beside x, W, S and B."""

    one: OneBackward
    has: Small
    sibling: Sibling
    ds: Maybe
    held: Sequence[Maybe]
    again: dict[str, Any] = {}

    @property
    def b(self) -> Maybe:
        return self.one.b if self.has.b is None else self.has.b

    @property
    def source(self) -> tuple[Operand, Operand]:
        """dZ and W as they are, of which dX is made."""
        return (self.one.dy.rows() if self.one.dz is None else self.one.dz), self.held[0]

    def dora(self, x: Maybe, w: Read | None = None) -> Dora | None:
        """What the pass over dY does for DoRA."""
        one, has, sibling = self.one, self.has, self.sibling
        if not sibling.dora or sibling.scaled:
            return None
        found = Dora(has.gain, has.norm, one.y if one.z is None else one.z, one.dz, one.grad_m)
        if sibling.z_again:
            w = w or Read(self.held[0])
            found = found._replace(x=x, weight=w.matrix, s=has.s, b=self.b, w_scale=w.scale, **self.again)
        return found

    def passes(self, x: Maybe, keep: Number, group: Siblings, rooms: Rooms) -> list[Pass]:
        """What is wanted of dY, ahead of dX."""
        one, has, sibling, dy, base = self.one, self.has, self.sibling, self.one.dy.rows(), self.sibling.base
        w, found, ds = None, list[Pass](), self.ds
        if sibling.z_again:
            w = base.y(self.held, rooms.wanted(sibling, group, has.gain))
            found += w.launches
        dora = self.dora(x, w)
        if group.needs_x and base.e4m3:  # the launch that quantises makes dS, too
            to, gain = rooms.dz8(sibling, group), None if dora is None else dora.gain
            found.append(down(dy, self.b.t(), ds, one.scaling, keep, quantised=to, gain=gain, lifted=group.lifted))
            ds = None
        return found + dy_passes(
            dy,
            sibling.r,
            one.scaling,
            keep,
            s=has.s,
            b=self.b,
            grad_b=one.grad_b,
            ds=ds,
            grad_bias=one.grad_bias,
            dora=dora,
            lifted=group.lifted,
        )

    def into(self, dx: Operand, bits: Maybe, group: Siblings, rooms: Rooms, adds: bool = False) -> list[Launch]:
        """What makes dX, or adds to it."""
        sibling, base = self.sibling, self.sibling.base
        w, x, x_scale = base.dx(self.held, rooms.wanted(sibling, group)), self.source[0], None
        if base.e4m3:
            x, x_scale = rooms.dz8(sibling, group)
        p, q, bits = (self.ds, self.has.a, bits) if sibling.r else (None, None, None)
        made = product(x, w.matrix, p, q, dx, transposed=False, bits=bits, adds=adds, x_scale=x_scale, w_scale=w.scale)
        return [*w.launches, made]


def few_rows(
    at: Backward, x: Operand, made: Sequence[Gradients], group: Siblings, ds: Operand | None, scratch: Scratch
) -> list[Launch]:
    """All launches for few rows, each for all layers; none where they do not serve."""
    adapted = [one for one in made if one.sibling.r]
    if len(made) < len(group.each) or ds is None or at.dx is None or at.grad_a is None:
        return []
    forms = {
        tuple(t and t.dtype for t in (one.grad_b, one.grad_bias, one.grad_m, one.z, one.dz)) for one, *_ in adapted
    }
    if len(forms) > 1 or any(one.one.grad_b is None for one in adapted) or group.ranks > MOST_RANKS:
        return []
    if any(one.one.grad_bias is not None for one in made if not one.sibling.r):
        return []
    dys, r = [one.one.dy.rows() for one in adapted], max(one.r for one in group.each)
    if not takes_downs(group.m, r, x) or not takes_pair(x, [t for one in made for t in one.source[:1]] + dys, r, False):
        return []
    gained, ranks, over = [], [], []
    for dy, layer in zip(dys, adapted, strict=True):
        one, dora = layer.one, layer.dora(x)
        if one.dz is not None and dora is not None:
            gained.append((dy, dora))
        ranks.append((layer.source[0], layer.b, layer.sibling.r))
        scaling = one.scaling if group.lifted else None
        over.append(OverDy(dy, layer.has.s, one.grad_b, one.grad_bias, dora and dora.gain, scaling))
    small = group.small(at.room)
    return [
        *(dz_and_dm(gained, scratch) if gained else ()),
        downs(ranks, ds, small.scales, at.keep),
        pair(x, ds, at.grad_a, over, bits=at.bits),
        products([one.source for one in made], ds, small.stacked, at.dx.rows(), bits=at.bits),
    ]


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
