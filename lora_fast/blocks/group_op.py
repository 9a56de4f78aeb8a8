"""A group as an operator for torch.compile: ``torch.ops.lora_fast.lora_group``, which becomes ``lora_group_fwd``, and
whose gradients ``lora_group_bwd`` makes."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import as_rows, saved_of
from lora_fast.blocks.operators import (
    LAYERS,
    Small,
    Tensors,
    key_of,
    layers_of,
    library,
    new_of,
    placed,
    prepared,
    problems,
    register,
    text_of,
)
from lora_fast.kernels import group as kernels
from lora_fast.kernels.group import Grads
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.siblings import Made, Siblings
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, on

library.define(f"lora_group(Tensor x, {LAYERS}, Tensor? seed, float p, bool[] flags) -> Tensor[]")
library.define("""lora_group_fwd(Tensor x, Tensor[] held, Tensor?[] small, Tensor[] scalings, Tensor? seed, float p,
    SymInt[] sizes, str layers) -> Tensor[]""")
library.define("""lora_group_bwd(Tensor?[] dys, Tensor? x, Tensor room, Tensor? bits, Tensor?[] kept, Tensor[] scalings,
    float p, SymInt[] sizes, str layers) -> Tensor[]""")


def lora_group(x: torch.Tensor, layers: Sequence[Layer], training: bool) -> tuple[torch.Tensor, ...]:
    """The outputs, by way of the operator."""
    p = max(layer.dropout_p for layer in layers if layer.adapted) if training else 0.0
    x, *rest, flags = prepared(x, layers)
    return tuple(torch.ops.lora_fast.lora_group(x, *rest, draw_seed(x.device) if p > 0 else None, p, flags))


def _group_of(lead: Sequence[int], sizes: Sequence[int], layers: str) -> Siblings:
    of = layers_of(layers)
    return Siblings(tuple(lead), sizes[0], of.sized(sizes), of.needs_x)


def _forward(
    x: torch.Tensor,
    held: Tensors,
    small: Small,
    scalings: Tensors,
    seed: MaybeTensor,
    p: float,
    sizes: Sequence[int],
    layers: str,
) -> list[torch.Tensor]:
    """Each y, the room, and what there is of the mask's bits and each z, in this order."""
    key = key_of(x, held, "group", layers, *sizes)
    group = problems.get(key) or problems.keep(key, _group_of(x.shape[:-1], sizes, layers))
    with on(x.device):
        each = layers_of(layers).givens(held, small, scalings)
        ys, made, late = kernels.forward(group, addressable(x), each, seed, p)
        if late is not None:
            late.run()
    return [*ys, *(t for t in (made.room, made.bits, *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor, held: Any, small: Any, scalings: Any, seed: MaybeTensor, p: float, *what: Any
) -> list[torch.Tensor]:
    group = _group_of(x.shape[:-1], *what)
    found = [x.new_empty(*x.shape[:-1], one.n) for one in group.each]
    z = [torch.empty_like(y) for y, one in zip(found, group.each, strict=True) if one.keep_z]
    found.append(x.new_empty(group.bytes, dtype=torch.uint8))
    if seed is not None:
        found.append(x.new_empty(group.m, -(-group.k // 32), dtype=torch.int32))
    return found + z


def _gradients(
    dys: Small,
    x: MaybeTensor,
    room: torch.Tensor,
    bits: MaybeTensor,
    kept: Small,
    scalings: Tensors,
    p: float,
    sizes: Sequence[int],
    layers: str,
) -> list[torch.Tensor]:
    """What there is of ``Grads``, in its order."""
    (first, *_) = (dy for dy in dys if dy is not None)
    key = key_of(first, kept, "group_bwd", layers, *sizes)
    group = problems.get(key) or problems.keep(key, _group_of(first.shape[:-1], sizes, layers))
    rows = [None if dy is None else as_rows(dy) for dy in dys]
    with on(first.device):
        x = None if x is None else addressable(x)
        dx, stacked, small = kernels.backward(group, rows, x, Made(room, bits, ()), kept, scalings, p)
    return [t for t in (dx, stacked, *small) if t is not None]


def _gradients_fake(dys: Small, *rest: Any) -> list[torch.Tensor]:
    (first, *_) = (dy for dy in dys if dy is not None)
    return new_of(first, _group_of(first.shape[:-1], *rest[-2:]).wanted_of([dy is not None for dy in dys]))


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, held: Any, scalings: Any, bases: Any, sizes: Any, seed: Any, p: Any, flags: Any, *small: Any
    ) -> Any:
        ctx.set_materialize_grads(False)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[8:]]
        layers, n = text_of(x.dtype, small, bases, flags, needs), len(bases)
        outs = torch.ops.lora_fast.lora_group_fwd(x, held, small, scalings, seed, p, sizes, layers)
        ys, (room, *rest) = outs[:n], outs[n:]
        bits, group = rest.pop(0) if seed is not None else None, _group_of(x.shape[:-1], sizes, layers)
        made = Made(room, bits, [rest.pop(0) if one.keep_z else None for one in group.each])
        ctx.save_for_backward(*saved_of(group, x, small, ys, made, layers_of(layers).bases(held)), *scalings)
        ctx.rest = p, sizes, layers
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        (x, room, bits, *rest), (p, *what), n = ctx.saved_tensors, ctx.rest, len(dys)
        (first, *_), there = (dy for dy in dys if dy is not None), [dy is not None for dy in dys]
        found = torch.ops.lora_fast.lora_group_bwd(dys, x, room, bits, rest[:-n], rest[-n:], p, *what)
        group = _group_of(first.shape[:-1], *what)
        dx, stacked, *small = placed(found, group.wanted_of(there))
        grads = Grads(dx, stacked, small).of_layers(group, there)
        return dx, *(None,) * 7, *(grad for four in grads for grad in four)


def _group(x: torch.Tensor, held: Tensors, small: Small, scalings: Any, *rest: Any) -> Sequence[Any]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return list(_Group.apply(x, held, scalings, *rest, *small))
    return _alone(x, held, small, scalings, *rest)


def _alone(x: torch.Tensor, held: Any, small: Small, scalings: Any, *rest: Any) -> list[torch.Tensor]:
    bases, sizes, *masked, flags = rest
    layers = text_of(x.dtype, small, bases, flags)
    return torch.ops.lora_fast.lora_group_fwd(x, held, small, scalings, *masked, sizes, layers)[: len(bases)]


def _alone_fake(x: torch.Tensor, held: Any, small: Any, scalings: Any, bases: Any, sizes: Any, *rest: Any) -> list[Any]:
    return [x.new_empty(*x.shape[:-1], n) for n in sizes[1:]]


register("lora_group", _alone, _alone_fake, _group)
register("lora_group_fwd", _forward, _forward_fake)
register("lora_group_bwd", _gradients, _gradients_fake)
