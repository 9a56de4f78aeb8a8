"""An MLP as an operator for torch.compile: ``torch.ops.lora_fast.lora_mlp``, which under autograd becomes
``lora_mlp_fwd``, whose gradients ``lora_mlp_bwd`` makes. Unlike in eager nothing is written over e and g."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import given
from lora_fast.blocks.mlp import gradients, mlp_of, rates
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
from lora_fast.kernels import mlp as kernels
from lora_fast.kernels.mlp import Made, Mlp
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, on

_MASKED = "Tensor? seed, Tensor? h_seed, float p, float h_p, bool[] flags, str act, str? gate"
library.define(f"lora_mlp(Tensor x, {LAYERS}, {_MASKED}) -> Tensor")
library.define(f"lora_mlp_fwd(Tensor x, {LAYERS}, {_MASKED}) -> Tensor[]")
library.define(f"""lora_mlp_bwd(Tensor dy, Tensor? x, {LAYERS}, Tensor out, Tensor? up, Tensor room, Tensor down_room,
    Tensor? bits, Tensor? h_bits, Tensor?[] kept, float p, float h_p, bool[] flags, str act, str? gate,
    bool[] needs) -> Tensor[]""")


def lora_mlp(
    x: torch.Tensor, layers: Sequence[Layer], training: bool, *, activation: str, gate: str | None
) -> torch.Tensor:
    """y, by way of the operator; down is the last of the layers."""
    p, h_p = rates(layers, training)
    x, *rest, flags = prepared(x, layers)
    seeds = [draw_seed(x.device) if rate > 0 else None for rate in (p, h_p)]
    return torch.ops.lora_fast.lora_mlp(x, *rest, *seeds, p, h_p, flags, activation, gate)


def _problem(
    lead: Sequence[int],
    kind: torch.dtype,
    small: Small,
    bases: Sequence[str],
    sizes: Sequence[int],
    flags: Any,
    act: str,
    gate: str | None,
    needs: Sequence[bool] = NONE,
) -> Mlp:
    return mlp_of(tuple(lead), sizes[0], each_of(kind, small, bases, sizes, flags, needs), needs[0], act, gate)


class _Masked(NamedTuple):
    """What the operators take beside tensors and layers, in their order (``_MASKED``)."""

    seed: MaybeTensor
    h_seed: MaybeTensor
    p: float
    h_p: float
    flags: Sequence[bool]
    act: str
    gate: str | None


def _forward(
    x: torch.Tensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, *masked: Any
) -> list[torch.Tensor]:
    """y, the inner layers' outputs, both rooms, and what there is of the masks' bits and each z, in this order."""
    of, lead = _Masked(*masked), x.shape[:-1]
    key = "mlp", *key_of(lead, held, small, x.dtype, *bases, *sizes, *of.flags, of.act, of.gate, x.stride())
    problem = problems.get(key)
    if problem is None:
        problem = problems.keep(key, _problem(lead, x.dtype, small, bases, sizes, of.flags, of.act, of.gate))
    with on(x.device):
        tensors = held_of(held, bases)
        each = [given(own, small[4 * i : 4 * i + 4], scalings[i]) for i, own in enumerate(tensors)]
        y, made, late = kernels.forward(problem, addressable(x), each, (of.seed, of.h_seed), (of.p, of.h_p))
        if late is not None:
            late.run()
    return [y, *(t for t in (*made[:6], *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, *masked: Any
) -> list[torch.Tensor]:
    of = _Masked(*masked)
    problem = _problem(x.shape[:-1], x.dtype, small, bases, sizes, of.flags, of.act, of.gate)
    m, k, width = problem.inner.m, problem.inner.k, problem.outer.k
    y, outs = x.new_empty(*x.shape[:-1], problem.down.n), [x.new_empty(m, one.n) for one in problem.inner.each]
    found = [y, *outs]
    found += [x.new_empty(group.bytes, dtype=torch.uint8) for group in (problem.inner, problem.outer)]
    for one, cols in ((of.seed, k), (of.h_seed, width)):
        if one is not None:
            found.append(x.new_empty(m, -(-cols // 32), dtype=torch.int32))
    return found + [torch.empty_like(out) for i, out in enumerate((*outs, y)) if of.flags[2 * i + 1]]


def _gradients(
    dy: torch.Tensor, x: MaybeTensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, *rest: Any
) -> list[torch.Tensor]:
    """The gradients that are needed, of x and of each layer's tensors. ``rest``: what was made (``Made``), and from
    ``kept`` on what the operator takes."""
    lead, made = dy.shape[:-1], Made(*rest[:6])
    kept, p, h_p, flags, act, gate, needs = rest[6:]
    key = "mlp_bwd", *key_of(lead, held, small, dy.dtype, *bases, *sizes, *flags, act, gate, *needs)
    mlp = problems.get(key)
    if mlp is None:
        mlp = problems.keep(key, _problem(lead, dy.dtype, small, bases, sizes, flags, act, gate, needs))
    with on(dy.device):
        x = None if x is None else addressable(x)
        keeps = kept_of(held_of(held, bases), mlp.saved, small, kept, (*mlp.inner.each, mlp.down))
        dx, grads = gradients(mlp, dy, x, made, keeps, scalings, (p, h_p), in_place=False)
    return [t for t in (dx, *apart(grads)) if t is not None]


def _gradients_fake(
    dy: torch.Tensor, x: Any, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *rest: Any
) -> list[torch.Tensor]:
    return fake_gradients((*dy.shape[:-1], sizes[0]), dy.dtype, dy, small, rest[-1])


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, held: Any, scalings: Any, bases: Any, sizes: Any, masked: Any, *small: Any) -> Any:
        found = torch.ops.lora_fast.lora_mlp_fwd(x, held, small, scalings, bases, sizes, *masked)
        seed, h_seed, *rates_of, flags, act, gate = masked
        n, needs = len(bases), [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        y, outs, (room, down_room, *rest) = found[0], found[1:n], found[n:]
        bits, h_bits = (rest.pop(0) if one is not None else None for one in (seed, h_seed))
        z = [rest.pop(0) if flags[2 * i + 1] else None for i in range(n)]
        *_, down = each_of(x.dtype, small, bases, sizes, flags, needs)
        if down.z_again:
            z[-1] = y
        reads_x = any(needs[4 * i + j] for i in range(n - 1) for j in (1, 4))
        up = outs[1] if len(outs) > 1 else None
        saved = x if reads_x else None, outs[0], up, room, down_room, bits, h_bits
        ctx.save_for_backward(*saved, *scalings, *small, *z, *held)
        ctx.rest, ctx.of_layers = (*rates_of, flags, act, gate, needs), (bases, sizes)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        (x, *made), rest, n = ctx.saved_tensors[:7], ctx.saved_tensors[7:], len(ctx.of_layers[0])
        scalings, small, z, held = rest[:n], rest[n : 5 * n], rest[5 * n : 6 * n], rest[6 * n :]
        grads = torch.ops.lora_fast.lora_mlp_bwd(dy, x, held, small, scalings, *ctx.of_layers, *made, z, *ctx.rest)
        dx, *found = (grads.pop(0) if need else None for need in ctx.rest[-1])
        return dx, *(None,) * 5, *found


def _mlp(x: torch.Tensor, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *masked: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return _Mlp.apply(x, held, scalings, bases, sizes, masked, *small)
    return _alone(x, held, small, scalings, bases, sizes, *masked)


def _alone(*args: Any) -> torch.Tensor:
    return torch.ops.lora_fast.lora_mlp_fwd(*args)[0]


register("lora_mlp", _alone, lambda *args: _forward_fake(*args)[0], _mlp)
register("lora_mlp_fwd", _forward, _forward_fake)
register("lora_mlp_bwd", _gradients, _gradients_fake)
