"""A gated MLP as an operator for torch.compile: ``torch.ops.lora_fast.lora_glu``, which under autograd becomes
``lora_glu_fwd``, whose gradients ``lora_glu_bwd`` makes. Unlike in eager nothing is written over e and g."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.glu import mlp_of, rates
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
from lora_fast.kernels import group as group_kernels
from lora_fast.kernels import mlp as kernels
from lora_fast.kernels.mlp import Made, Mlp
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.siblings import Made as MadeOfGroup
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, on

_MASKED = "Tensor? seed, Tensor? h_seed, float p, float h_p, bool[] flags, str act"
library.define(f"lora_glu(Tensor x, {LAYERS}, {_MASKED}) -> Tensor")
library.define(f"lora_glu_fwd(Tensor x, {LAYERS}, {_MASKED}) -> Tensor[]")
library.define(f"""lora_glu_bwd(Tensor dy, Tensor? x, {LAYERS}, Tensor e, Tensor g, Tensor room, Tensor down_room,
    Tensor? bits, Tensor? h_bits, Tensor?[] kept, float p, float h_p, bool[] flags, str act,
    bool[] needs) -> Tensor[]""")


def lora_glu(x: torch.Tensor, gate: Layer, up: Layer, down: Layer, training: bool, *, activation: str) -> torch.Tensor:
    """y, by way of the operator."""
    p, h_p = rates((gate, up, down), training)
    x, *rest, flags = prepared(x, (gate, up, down))
    seeds = [draw_seed(x.device) if rate > 0 else None for rate in (p, h_p)]
    return torch.ops.lora_fast.lora_glu(x, *rest, *seeds, p, h_p, flags, activation)


def _problem(
    lead: Sequence[int],
    weights: Tensors,
    small: Small,
    flags: Sequence[bool],
    act: str,
    needs: Sequence[bool] = NONE,
) -> Mlp:
    return mlp_of(tuple(lead), weights[0].shape[1], each_of(weights, small, flags, needs), needs[0], act)


class _Masked(NamedTuple):
    """What the operators take beside tensors, in their order (``_MASKED``)."""

    seed: MaybeTensor
    h_seed: MaybeTensor
    p: float
    h_p: float
    flags: Sequence[bool]
    act: str


def _forward(x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, *masked: Any) -> list[torch.Tensor]:
    """y, e, g, both rooms, and what there is of the masks' bits and each z, in this order."""
    of, lead = _Masked(*masked), x.shape[:-1]
    key = "glu", *key_of(lead, weights, small, *of.flags, of.act, x.stride())
    problem = problems.get(key) or problems.keep(key, _problem(lead, weights, small, of.flags, of.act))
    with on(x.device):
        each = [given((weights[i],), small[4 * i : 4 * i + 4], scalings[i]) for i in range(3)]
        y, made, late = kernels.forward(problem, addressable(x), each, (of.seed, of.h_seed), (of.p, of.h_p))
        if late is not None:
            late.run()
    return [y, *(t for t in (*made[:6], *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, *masked: Any
) -> list[torch.Tensor]:
    of = _Masked(*masked)
    problem = _problem(x.shape[:-1], weights, small, of.flags, of.act)
    m, k, width = problem.inner.m, problem.inner.k, problem.outer.k
    y, e = x.new_empty(*x.shape[:-1], problem.down.n), x.new_empty(m, width)
    found = [y, e, torch.empty_like(e)]
    found += [x.new_empty(group.bytes, dtype=torch.uint8) for group in (problem.inner, problem.outer)]
    for one, cols in ((of.seed, k), (of.h_seed, width)):
        if one is not None:
            found.append(x.new_empty(m, -(-cols // 32), dtype=torch.int32))
    return found + [torch.empty_like(out) for i, out in enumerate((e, e, y)) if of.flags[2 * i + 1]]


def _gradients(
    dy: torch.Tensor, x: MaybeTensor, weights: Tensors, small: Small, scalings: Tensors, *rest: Any
) -> list[torch.Tensor]:
    """The gradients that are needed, of x and of each layer's tensors. ``rest``: what was made (``Made``), and from
    ``kept`` on what the operator takes."""
    lead, made = dy.shape[:-1], Made(*rest[:6])
    kept, p, h_p, flags, act, needs = rest[6:]
    key = "glu_bwd", *key_of(lead, weights, small, *flags, act, *needs)
    mlp = problems.get(key) or problems.keep(key, _problem(lead, weights, small, flags, act, needs))
    with on(dy.device):
        x = None if x is None else addressable(x)
        keeps = kept_of(weights, small, kept, (*mlp.inner.each, mlp.down))
        de, dg, of_down, dms = kernels.backward(mlp, as_rows(dy), x, made, keeps, scalings[2], h_p, False)
        shared = MadeOfGroup(made.room, made.bits, ())
        dx, both = group_kernels.backward(
            mlp.inner, (de, dg), x, shared, (*keeps[0], *keeps[1]), scalings[:2], p, in_place=True
        )
    grads = [(*three, own if dm is None else dm) for (*three, own), dm in zip(both, dms, strict=True)]
    return [t for t in (dx, *apart([*grads, of_down])) if t is not None]


def _gradients_fake(dy: torch.Tensor, x: Any, weights: Tensors, small: Small, *rest: Any) -> list[torch.Tensor]:
    shape = *dy.shape[:-1], weights[0].shape[1]
    return fake_gradients(shape, weights[0].dtype, dy, small, rest[-1])


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weights: Any, scalings: Any, masked: Any, *small: Any) -> Any:
        seed, h_seed, *rates, flags, act = masked
        y, e, g, room, down_room, *rest = torch.ops.lora_fast.lora_glu_fwd(x, weights, small, scalings, *masked)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        bits, h_bits = (rest.pop(0) if one is not None else None for one in (seed, h_seed))
        z = [rest.pop(0) if flags[2 * i + 1] else None for i in range(3)]
        *_, down = each_of(weights, small, flags, needs)
        if down.z_again:
            z[2] = y
        reads_x = any(needs[4 * i + j] for i in range(2) for j in (1, 4))
        saved = x if reads_x else None, e, g, room, down_room, bits, h_bits
        ctx.save_for_backward(*saved, *weights, *scalings, *small, *z)
        ctx.rest = *rates, flags, act, needs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        x, made, weights, scalings, small, z = (
            saved[i:j] for i, j in ((0, 1), (1, 7), (7, 10), (10, 13), (13, 25), (25, 28))
        )
        grads = torch.ops.lora_fast.lora_glu_bwd(dy, *x, weights, small, scalings, *made, z, *ctx.rest)
        dx, *found = (grads.pop(0) if need else None for need in ctx.rest[-1])
        return dx, *(None,) * 3, *found


def _glu(x: torch.Tensor, weights: Tensors, small: Small, scalings: Tensors, *masked: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return _Glu.apply(x, weights, scalings, masked, *small)
    return torch.ops.lora_fast.lora_glu_fwd(x, weights, small, scalings, *masked)[0]


def _alone(*args: Any) -> torch.Tensor:
    return torch.ops.lora_fast.lora_glu_fwd(*args)[0]


register("lora_glu", _alone, lambda *args: _forward_fake(*args)[0], _glu)
register("lora_glu_fwd", _forward, _forward_fake)
register("lora_glu_bwd", _gradients, _gradients_fake)
