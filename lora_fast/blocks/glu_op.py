"""A gated MLP as an operator for torch.compile: ``torch.ops.lora_fast.lora_glu``, which under autograd becomes
``lora_glu_fwd``, whose gradients ``lora_glu_bwd`` makes. Unlike in eager nothing is written over e and g."""

from collections.abc import Sequence
from typing import Any

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
    held_of,
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
    lead: Sequence[int], kind: torch.dtype, small: Small, bases: Sequence[str], sizes: Sequence[int], flags: Any,
    act: str, needs: Sequence[bool] = NONE,
) -> Mlp:  # fmt: skip
    return mlp_of(tuple(lead), sizes[0], each_of(kind, small, bases, sizes, flags, needs), needs[0], act)


def _forward(
    x: torch.Tensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, seed: Any, h_seed: Any,
    p: float, h_p: float, flags: Any, act: str,
) -> list[torch.Tensor]:  # fmt: skip
    """y, e, g, both rooms, and what there is of the masks' bits and each z, in this order."""
    lead = x.shape[:-1]
    key = "glu", *key_of(lead, held, small, x.dtype, *bases, *sizes, *flags, act, x.stride())
    problem = problems.get(key) or problems.keep(key, _problem(lead, x.dtype, small, bases, sizes, flags, act))
    with on(x.device):
        tensors = held_of(held, bases)
        each = [given(own, small[4 * i : 4 * i + 4], scalings[i]) for i, own in enumerate(tensors)]
        y, made, late = kernels.forward(problem, addressable(x), each, (seed, h_seed), (p, h_p))
        if late is not None:
            late.run()
    return [y, *(t for t in (*made[:6], *made.z) if t is not None)]


def _forward_fake(
    x: torch.Tensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any, seed: Any, h_seed: Any,
    p: float, h_p: float, flags: Any, act: str,
) -> list[torch.Tensor]:  # fmt: skip
    problem = _problem(x.shape[:-1], x.dtype, small, bases, sizes, flags, act)
    m, k, width = problem.inner.m, problem.inner.k, problem.outer.k
    y, e = x.new_empty(*x.shape[:-1], problem.down.n), x.new_empty(m, width)
    found = [y, e, torch.empty_like(e)]
    found += [x.new_empty(group.bytes, dtype=torch.uint8) for group in (problem.inner, problem.outer)]
    for one, cols in ((seed, k), (h_seed, width)):
        if one is not None:
            found.append(x.new_empty(m, -(-cols // 32), dtype=torch.int32))
    return found + [torch.empty_like(out) for i, out in enumerate((e, e, y)) if flags[2 * i + 1]]


def _gradients(
    dy: torch.Tensor, x: MaybeTensor, held: Tensors, small: Small, scalings: Tensors, bases: Any, sizes: Any,
    e: torch.Tensor, g: torch.Tensor, room: torch.Tensor, down_room: torch.Tensor, bits: MaybeTensor,
    h_bits: MaybeTensor, kept: Small, p: float, h_p: float, flags: Any, act: str, needs: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients that are needed, of x and of each layer's tensors."""
    lead = dy.shape[:-1]
    key = "glu_bwd", *key_of(lead, held, small, dy.dtype, *bases, *sizes, *flags, act, *needs)
    mlp = problems.get(key) or problems.keep(key, _problem(lead, dy.dtype, small, bases, sizes, flags, act, needs))
    with on(dy.device):
        x = None if x is None else addressable(x)
        made = Made(e, g, room, down_room, bits, h_bits)
        keeps = kept_of(held_of(held, bases), mlp.saved, small, kept, (*mlp.inner.each, mlp.down))
        de, dg, of_down, dms = kernels.backward(mlp, as_rows(dy), x, made, keeps, scalings[2], h_p, False)
        shared = MadeOfGroup(room, bits, ())
        dx, both = group_kernels.backward(
            mlp.inner, (de, dg), x, shared, (*keeps[0], *keeps[1]), scalings[:2], p, in_place=True
        )
    grads = [(*three, own if dm is None else dm) for (*three, own), dm in zip(both, dms, strict=True)]
    return [t for t in (dx, *apart([*grads, of_down])) if t is not None]


def _gradients_fake(
    dy: torch.Tensor, x: Any, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *rest: Any
) -> list[torch.Tensor]:
    return fake_gradients((*dy.shape[:-1], sizes[0]), dy.dtype, dy, small, rest[-1])


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, held: Any, scalings: Any, bases: Any, sizes: Any, seed: Any, h_seed: Any, p: Any, h_p: Any,
        flags: Any, act: Any, *small: Any,
    ) -> Any:  # fmt: skip
        y, e, g, room, down_room, *rest = torch.ops.lora_fast.lora_glu_fwd(
            x, held, small, scalings, bases, sizes, seed, h_seed, p, h_p, flags, act
        )
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[11:]]
        bits, h_bits = (rest.pop(0) if one is not None else None for one in (seed, h_seed))
        z = [rest.pop(0) if flags[2 * i + 1] else None for i in range(3)]
        *_, down = each_of(x.dtype, small, bases, sizes, flags, needs)
        if down.z_again:
            z[2] = y
        reads_x = any(needs[4 * i + j] for i in range(2) for j in (1, 4))
        saved = x if reads_x else None, e, g, room, down_room, bits, h_bits
        ctx.save_for_backward(*saved, *scalings, *small, *z, *held)
        ctx.rest, ctx.of_layers = (p, h_p, flags, act, needs), (bases, sizes)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        x, made, scalings, small, z, held = (
            saved[i:j] for i, j in ((0, 1), (1, 7), (7, 10), (10, 22), (22, 25), (25, None))
        )
        grads = torch.ops.lora_fast.lora_glu_bwd(dy, *x, held, small, scalings, *ctx.of_layers, *made, z, *ctx.rest)
        dx, *found = (grads.pop(0) if need else None for need in ctx.rest[-1])
        return dx, *(None,) * 10, *found


def _glu(x: torch.Tensor, held: Any, small: Small, *rest: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return _Glu.apply(x, held, *rest, *small)
    return _alone(x, held, small, *rest)


def _alone(*args: Any) -> torch.Tensor:
    return torch.ops.lora_fast.lora_glu_fwd(*args)[0]


register("lora_glu", _alone, lambda *args: _forward_fake(*args)[0], _glu)
register("lora_glu_fwd", _forward, _forward_fake)
register("lora_glu_bwd", _gradients, _gradients_fake)
