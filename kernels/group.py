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
from lora_fast.kernels.downs import downs, takes_downs
from lora_fast.kernels.fan import Result, fan, fans, is_fan
from lora_fast.kernels.gemm import product
from lora_fast.kernels.magnitudes import dz_and_dm
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import Norm, norms, norms_of
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling
from lora_fast.kernels.pair import OverDy, pair, takes_pair
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of, needs_dz
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Deferred, Given, Made, Shared, Siblings
from lora_fast.kernels.stack import Adapter, stack
from lora_fast.kernels.sums import Dora

MOST_RANKS = 64  # of all layers together, whose dA one program of few rows makes
Maybe = Any  # an operand, None where the problem has none


class OneForward(NamedTuple):
    """Of one layer's forward: as in ``Given``, then y and z."""

    weight: Operand
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
    adapters, results, needed = [], [], []
    for one, has, sibling in zip(each, small.each, group.each, strict=True):
        b = one.b if has.b is None else has.b
        results.append(Result(one.weight, has.s, b, one.y.rows(), has.gain, one.bias))
        if sibling.r:
            adapters.append(Adapter(one.a, one.b, has.b, one.scaling))
        if sibling.dora:
            needed.append((Norm(one.weight, has.a, b, one.scaling, has.norm, one.magnitude, has.gain), sibling, one.y))
    launches = []
    if adapters:
        launches = [
            stack(x, adapters, small.stacked, small.scales, group.lifted),
            down(x, small.stacked, small.s, None, keep, bits=bits, scales=small.scales),
        ]
    if len({sibling.round_norm for _, sibling, _ in needed}) == 1 and not any(norm.has_parts for norm, *_ in needed):
        round_norm = needed[0][1].round_norm
        launches.append(norms_of([norm for norm, *_ in needed], round_norm=round_norm, lifted=group.lifted))
        needed = []
    for norm, sibling, y in needed:  # parts of the norm take y's memory, until y is there
        launches += norms(
            *norm[:5],
            m=norm.m,
            gain=norm.gain,
            round_norm=sibling.round_norm,
            scratch=scratch,
            room=y,
            lifted=group.lifted,
        )
    together = [result for result, sibling in zip(results, group.each, strict=True) if sibling.r]
    if any(one.z is not None for one in each) or not fans(x, together):
        together = []
    for one, result in zip(each, results, strict=True):
        if result not in together:
            z = None if one.z is None else one.z.rows()
            w, s, b, y, gain, bias = result
            launches.append(product(x, w, s, b, y, transposed=True, bias=bias, gain=gain, z=z))
    return [*launches, fan(x, together)] if together else launches


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
    each: tuple[Any, ...]  # the fields of ``OneBackward`` for each layer


def backward_launches(at: Backward, group: Siblings) -> list[Launch]:
    each = [OneBackward(*at.each[i : i + 10]) for i in range(0, len(at.each), 10)]
    small, scratch, x = group.small(at.room), Scratch(at.room.device), None if at.x is None else at.x.rows()
    ds = at.ds
    parts: Sequence[Maybe] = [None] * len(each)
    if group.needs_ds:
        ds = ds or scratch.part((group.m, group.ranks), group.kind)
        parts = group.columns(ds)
    if x is not None and (few := few_rows(at, x, each, group)):
        return few
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
    launches = launches_of(passes, wide(sources[0][0]), scratch, at.dx) if sources else []
    if at.dx is not None:
        stacked = small.stacked if group.ranks else None
        launches.append(products(sources, ds, stacked, at.dx.rows(), bits=at.bits))
    return launches


def few_rows(at: Backward, x: Operand, each: Sequence[OneBackward], group: Siblings) -> list[Launch]:
    """The same for few rows, each launch for all layers; none where it does not serve."""
    small, scratch = group.small(at.room), Scratch(at.room.device)
    both = list(zip(each, group.each, strict=True))
    adapted = [one for one, sibling in both if sibling.r]
    wanted = at.dx, at.grad_a, *(one.dy for one in each), *(one.grad_b for one in adapted)
    forms = {tuple(t and t.dtype for t in (one.grad_b, one.grad_bias, one.grad_m, one.z, one.dz)) for one in adapted}
    if any(one.grad_bias is not None for one, sibling in both if not sibling.r):
        return []
    r = max(one.r for one in group.each)
    if any(t is None for t in wanted) or len(forms) > 1 or group.ranks > MOST_RANKS:
        return []
    dys = [one.dy.rows() for one in each]
    if not takes_downs(group.m, r, x) or not takes_pair(x, dys, r, False):
        return []
    ds = at.ds or scratch.part((group.m, group.ranks), group.kind)
    gained, ranks, over, sources = [], [], [], []
    for one, dy, has, sibling in zip(each, dys, small.each, group.each, strict=True):
        if not sibling.r:
            sources.append((dy, one.weight))
            continue
        b, dz, gain = one.b if has.b is None else has.b, dy, None
        if one.dz is not None:
            dora = Dora(has.gain, has.norm, one.y if one.z is None else one.z, one.dz, one.grad_m)
            if sibling.z_again:
                dora = dora._replace(x=x, weight=one.weight, s=has.s, b=b)
            gained.append((dy, dora))
            dz, gain = one.dz, has.gain
        ranks.append((dz, b, sibling.r))
        scaling = one.scaling if group.lifted else None
        over.append(OverDy(dy, has.s, one.grad_b, one.grad_bias, gain, scaling))
        sources.append((dz, one.weight))
    return [
        *(dz_and_dm(gained, scratch) if gained else ()),
        downs(ranks, ds, small.scales, at.keep),
        pair(x, ds, at.grad_a, over, bits=at.bits),
        products(sources, ds, small.stacked, at.dx.rows(), bits=at.bits),
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
        flat += (*one[:5], scaling, y, kept)
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
    late = group.late
    if is_fan(program.launches[-1]):  # which makes all with adapters, late if the backward reads none of them
        late = 1 + len(ys) - len(group.adapted) if late == len(ys) else 0
    first = len(program.launches) - late
    program.run(bound, 0, first)
    return ys, made, Deferred(program, bound, first, (x,)) if late else None


def backward(
    group: Siblings,
    dys: Sequence[MaybeTensor],
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[MaybeTensor]],
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
            if one.dora and not one.scaled and (group.needs_x or needs_dz(one.r, group.needs_ds, need_b)):
                dz = dy if in_place else new(m, one.n, dtype=kind)
        scaling = as_scaling(scaling)
        if isinstance(scaling, torch.Tensor):
            key.append((len(grads), kind_of(scaling)))
        grads.append((grad_b, grad_bias, grad_m))
        flat += (dy, grad_b, grad_bias, grad_m, dz, scaling, *keeps)
    wanted = [grad for grad in (dx, stacked, *(grad for three in grads for grad in three)) if grad is not None]
    if m == 0:
        for grad in wanted:
            grad.zero_()
    elif wanted:
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
