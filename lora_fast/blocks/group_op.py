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
    lead: Sequence[int], weights: Tensors, small: Small, flags: Sequence[bool], needs: Sequence[bool] = NONE
) -> Siblings:
    return Siblings(tuple(lead), weights[0].shape[1], tuple(each_of(weights, small, flags, needs)), needs[0])


def _forward(
    x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, seed: MaybeTensor, p: float, flags: Any
) -> list[torch.Tensor]:
    """Each y, the room, and what there is of the mask's bits and each z, in this order."""
    lead = x.shape[:-1]
    key = "group", *key_of(lead, weights, small, *flags, x.stride())
    problem = problems.get(key) or problems.keep(key, _problem(lead, weights, small, flags))
    with on(x.device):
        each = [given((weight,), small[4 * i : 4 * i + 4], scalings[i]) for i, weight in enumerate(weights)]
        ys, made, late = kernels.forward(problem, addressable(x), each, seed, p)
        if late is not None:
            late.run()
    return [*ys, *(t for t in (made.room, made.bits, *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, seed: MaybeTensor, p: float, flags: Any
) -> list[torch.Tensor]:
    problem = _problem(x.shape[:-1], weights, small, flags)
    found = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    z = [torch.empty_like(y) for i, y in enumerate(found) if flags[2 * i + 1]]
    found.append(x.new_empty(problem.bytes, dtype=torch.uint8))
    if seed is not None:
        found.append(x.new_empty(problem.m, -(-problem.k // 32), dtype=torch.int32))
    return found + z


def _gradients(
    dys: Small,
    x: MaybeTensor,
    weights: Tensors,
    small: Small,
    scalings: Tensors,
    room: torch.Tensor,
    bits: MaybeTensor,
    *rest: Any,
) -> list[torch.Tensor]:
    """The gradients that are needed and there, of x and of each layer's tensors. ``rest``: what each layer's magnitude
    reads, p, flags, and what is needed."""
    kept, p, flags, needs = rest
    (first, *_) = (dy for dy in dys if dy is not None)
    lead = first.shape[:-1]
    key = "group_bwd", *key_of(lead, weights, small, *flags, *needs)
    problem = problems.get(key) or problems.keep(key, _problem(lead, weights, small, flags, needs))
    with on(first.device):
        dx, grads = kernels.backward(
            problem,
            [None if dy is None else as_rows(dy) for dy in dys],
            None if x is None else addressable(x),
            Made(room, bits, ()),
            list(chain.from_iterable(kept_of(weights, small, kept, each_of(weights, small, flags, needs)))),
            scalings,
            p,
        )
    return [t for t in (dx, *apart(grads)) if t is not None]


def _wanted(dys: Small, needs: Sequence[bool]) -> list[bool]:
    """Which gradients ``lora_group_bwd`` gives: none of layers without dY."""
    return [needs[0], *(need and dys[i // 4] is not None for i, need in enumerate(needs[1:]))]


def _gradients_fake(dys: Small, x: Any, weights: Tensors, small: Small, *rest: Any) -> list[torch.Tensor]:
    (first, *_) = (dy for dy in dys if dy is not None)
    shape = *first.shape[:-1], weights[0].shape[1]
    return fake_gradients(shape, weights[0].dtype, first, small, _wanted(dys, rest[-1]))


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weights: Any, scalings: Any, seed: Any, p: Any, flags: Any, *small: Any) -> Any:
        ctx.set_materialize_grads(False)
        n = len(weights)
        outs = torch.ops.lora_fast.lora_group_fwd(x, weights, small, scalings, seed, p, flags)
        ys, (room, *rest) = outs[:n], outs[n:]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        bits, kept = rest.pop(0) if seed is not None else None, []
        for i, one in enumerate(each_of(weights, small, flags, needs)):
            z = rest.pop(0) if one.keep_z else None
            kept.append(z if z is not None else ys[i] if one.z_again else None)
        reads_x = any(needs[4 * i + j] for i in range(n) for j in (1, 4))
        ctx.save_for_backward(x if reads_x else None, room, bits, *weights, *scalings, *small, *kept)
        ctx.rest = p, flags, needs
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        (x, room, bits, *rest), (p, flags, needs), n = ctx.saved_tensors, ctx.rest, len(dys)
        weights, scalings, small, kept = rest[:n], rest[n : 2 * n], rest[2 * n : 6 * n], rest[6 * n :]
        grads = torch.ops.lora_fast.lora_group_bwd(dys, x, weights, small, scalings, room, bits, kept, p, flags, needs)
        dx, *found = (grads.pop(0) if want else None for want in _wanted(dys, needs))
        return dx, *(None,) * 5, *found


def _group(
    x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, seed: Any, p: float, flags: Any
) -> Sequence[torch.Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return list(_Group.apply(x, weights, scalings, seed, p, flags, *small))
    return torch.ops.lora_fast.lora_group_fwd(x, weights, small, scalings, seed, p, flags)[: len(weights)]


def _alone(x: torch.Tensor, weights: Tensors, *rest: Any) -> list[torch.Tensor]:
    return torch.ops.lora_fast.lora_group_fwd(x, weights, *rest)[: len(weights)]


register("lora_group", _alone, lambda x, weights, *rest: _forward_fake(x, weights, *rest)[: len(weights)], _group)
register("lora_group_fwd", _forward, _forward_fake)
register("lora_group_bwd", _gradients, _gradients_fake)
