"""A group as an operator for torch.compile: ``torch.ops.lora_fast.lora_group``, which under autograd becomes
``lora_group_fwd``, whose gradients ``lora_group_bwd`` makes."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import as_rows, given
from lora_fast.blocks.operators import (
    LAYERS,
    NONE,
    Small,
    Tensors,
    apart,
    each_of,
    fake_gradients,
    held_of,
    kept_of,
    key_of,
    library,
    prepared,
    problems,
    register,
)
from lora_fast.kernels import group as kernels
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.siblings import Made, Siblings
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, on

for _name in ("lora_group", "lora_group_fwd"):
    library.define(f"{_name}(Tensor x, {LAYERS}, Tensor? seed, float p, bool[] flags) -> Tensor[]")
library.define(f"""lora_group_bwd(Tensor?[] dys, Tensor? x, {LAYERS}, Tensor room, Tensor? bits, Tensor?[] kept,
    float p, bool[] flags, bool[] needs) -> Tensor[]""")


def lora_group(x: torch.Tensor, layers: Sequence[Layer], training: bool) -> tuple[torch.Tensor, ...]:
    """The outputs, by way of the operator."""
    p = max(layer.dropout_p for layer in layers if layer.adapted) if training else 0.0
    x, *rest, flags = prepared(x, layers)
    return tuple(torch.ops.lora_fast.lora_group(x, *rest, draw_seed(x.device) if p > 0 else None, p, flags))


def _problem(
    lead: Sequence[int],
    kind: torch.dtype,
    small: Small,
    bases: Sequence[str],
    sizes: Sequence[int],
    flags: Any,
    needs: Sequence[bool] = NONE,
) -> Siblings:
    each = each_of(kind, small, bases, sizes, flags, needs)
    return Siblings(tuple(lead), sizes[0], tuple(each), needs[0])


def _forward(
    x: torch.Tensor,
    held: Tensors,
    small: Small,
    scalings: Tensors,
    bases: Any,
    sizes: Any,
    seed: MaybeTensor,
    p: float,
    flags: Any,
) -> list[torch.Tensor]:
    """Each y, the room, and what there is of the mask's bits and each z, in this order."""
    lead = x.shape[:-1]
    key = "group", *key_of(lead, held, small, x.dtype, *bases, *sizes, *flags, x.stride())
    problem = problems.get(key) or problems.keep(key, _problem(lead, x.dtype, small, bases, sizes, flags))
    with on(x.device):
        tensors = held_of(held, bases)
        each = [given(own, small[4 * i : 4 * i + 4], scalings[i]) for i, own in enumerate(tensors)]
        ys, made, late = kernels.forward(problem, addressable(x), each, seed, p)
        if late is not None:
            late.run()
    return [*ys, *(t for t in (made.room, made.bits, *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor,
    held: Tensors,
    small: Small,
    scalings: Tensors,
    bases: Any,
    sizes: Any,
    seed: MaybeTensor,
    p: float,
    flags: Any,
) -> list[torch.Tensor]:
    problem = _problem(x.shape[:-1], x.dtype, small, bases, sizes, flags)
    found = [x.new_empty(*x.shape[:-1], n) for n in sizes[1:]]
    z = [torch.empty_like(y) for i, y in enumerate(found) if flags[2 * i + 1]]
    found.append(x.new_empty(problem.bytes, dtype=torch.uint8))
    if seed is not None:
        found.append(x.new_empty(problem.m, -(-problem.k // 32), dtype=torch.int32))
    return found + z


def _gradients(
    dys: Small, x: MaybeTensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, *rest: Any
) -> list[torch.Tensor]:
    """The gradients that are needed and there, of x and of each layer's tensors. ``rest``: the room, the mask's bits,
    what each layer's magnitude reads, p, flags, and what is needed."""
    room, bits, kept, p, flags, needs = rest
    (first, *_) = (dy for dy in dys if dy is not None)
    lead = first.shape[:-1]
    key = "group_bwd", *key_of(lead, held, small, first.dtype, *bases, *sizes, *flags, *needs)
    problem = problems.get(key)
    if problem is None:
        problem = problems.keep(key, _problem(lead, first.dtype, small, bases, sizes, flags, needs))
    with on(first.device):
        dx, grads = kernels.backward(
            problem,
            [None if dy is None else as_rows(dy) for dy in dys],
            None if x is None else addressable(x),
            Made(room, bits, ()),
            list(chain.from_iterable(kept_of(held_of(held, bases), problem.saved, small, kept, problem.each))),
            scalings,
            p,
        )
    return [t for t in (dx, *apart(grads)) if t is not None]


def _wanted(dys: Small, needs: Sequence[bool]) -> list[bool]:
    """Which gradients ``lora_group_bwd`` gives: none of layers without dY."""
    return [needs[0], *(need and dys[i // 4] is not None for i, need in enumerate(needs[1:]))]


def _gradients_fake(
    dys: Small, x: Any, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *rest: Any
) -> list[torch.Tensor]:
    (first, *_) = (dy for dy in dys if dy is not None)
    return fake_gradients((*first.shape[:-1], sizes[0]), first.dtype, first, small, _wanted(dys, rest[-1]))


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, held: Any, scalings: Any, bases: Any, sizes: Any, seed: Any, p: Any, flags: Any, *small: Any
    ) -> Any:
        ctx.set_materialize_grads(False)
        n = len(bases)
        outs = torch.ops.lora_fast.lora_group_fwd(x, held, small, scalings, bases, sizes, seed, p, flags)
        ys, (room, *rest) = outs[:n], outs[n:]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[8:]]
        bits, kept = rest.pop(0) if seed is not None else None, []
        for i, one in enumerate(each_of(x.dtype, small, bases, sizes, flags, needs)):
            z = rest.pop(0) if one.keep_z else None
            kept.append(z if z is not None else ys[i] if one.z_again else None)
        reads_x = any(needs[4 * i + j] for i in range(n) for j in (1, 4))
        ctx.save_for_backward(x if reads_x else None, room, bits, *scalings, *small, *kept, *held)
        ctx.rest, ctx.of_layers = (p, flags, needs), (bases, sizes)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        (x, room, bits, *rest), (p, flags, needs), n = ctx.saved_tensors, ctx.rest, len(dys)
        scalings, small, kept, held = rest[:n], rest[n : 5 * n], rest[5 * n : 6 * n], rest[6 * n :]
        grads = torch.ops.lora_fast.lora_group_bwd(
            dys, x, held, small, scalings, *ctx.of_layers, room, bits, kept, p, flags, needs
        )
        dx, *found = (grads.pop(0) if want else None for want in _wanted(dys, needs))
        return dx, *(None,) * 7, *found


def _group(x: torch.Tensor, held: Tensors, small: Small, scalings: Any, bases: Any, *rest: Any) -> Sequence[Any]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return list(_Group.apply(x, held, scalings, bases, *rest, *small))
    return _alone(x, held, small, scalings, bases, *rest)


def _alone(x: torch.Tensor, held: Any, small: Any, scalings: Any, bases: Any, *rest: Any) -> list[torch.Tensor]:
    return torch.ops.lora_fast.lora_group_fwd(x, held, small, scalings, bases, *rest)[: len(bases)]


def _alone_fake(x: torch.Tensor, held: Any, small: Any, scalings: Any, bases: Any, *rest: Any) -> list[torch.Tensor]:
    return _forward_fake(x, held, small, scalings, bases, *rest)[: len(bases)]


register("lora_group", _alone, _alone_fake, _group)
register("lora_group_fwd", _forward, _forward_fake)
register("lora_group_bwd", _gradients, _gradients_fake)
