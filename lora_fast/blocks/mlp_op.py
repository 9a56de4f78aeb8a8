"""An MLP as an operator for torch.compile: ``torch.ops.lora_fast.lora_mlp``, which becomes ``lora_mlp_fwd``, and whose
gradients ``lora_mlp_bwd`` makes. Unlike in eager nothing is written over e and g."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.mlp import Grads, gradients, mlp_of, parted, rates, saved_of
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
from lora_fast.kernels import mlp as kernels
from lora_fast.kernels.mlp import Made, Mlp
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, on

_MASKED = "Tensor? seed, Tensor? h_seed, float p, float h_p"
library.define(f"lora_mlp(Tensor x, {LAYERS}, {_MASKED}, bool[] flags, str act, str? gate) -> Tensor")
library.define(f"""lora_mlp_fwd(Tensor x, Tensor[] held, Tensor?[] small, Tensor[] scalings, {_MASKED}, SymInt[] sizes,
    str layers, str act, str? gate) -> Tensor[]""")
library.define("""lora_mlp_bwd(Tensor dy, Tensor?[] saved, Tensor[] scalings, float p, float h_p, SymInt[] sizes,
    str layers, str act, str? gate) -> Tensor[]""")


def lora_mlp(
    x: torch.Tensor, layers: Sequence[Layer], training: bool, *, activation: str, gate: str | None
) -> torch.Tensor:
    """y, by way of the operator; down is the last of the layers."""
    p, h_p = rates(layers, training)
    x, *rest, flags = prepared(x, layers)
    seeds = [draw_seed(x.device) if rate > 0 else None for rate in (p, h_p)]
    return torch.ops.lora_fast.lora_mlp(x, *rest, *seeds, p, h_p, flags, activation, gate)


def _mlp_of(lead: Sequence[int], sizes: Sequence[int], layers: str, act: str, gate: str | None) -> Mlp:
    of = layers_of(layers)
    return mlp_of(tuple(lead), sizes[0], of.sized(sizes), of.needs_x, act, gate)


class _Masked(NamedTuple):
    """Masks of x and of h, as the operators take them (``_MASKED``)."""

    seed: MaybeTensor
    h_seed: MaybeTensor
    p: float
    h_p: float


def _forward(x: torch.Tensor, held: Tensors, small: Small, scalings: Tensors, *rest: Any) -> list[torch.Tensor]:
    """y, the inner layers' outputs, both rooms, and what there is of the masks' bits and each z, in this order."""
    of, (sizes, layers, *what) = _Masked(*rest[:4]), rest[4:]
    key = key_of(x, held, "mlp", layers, *what, *sizes)
    mlp = problems.get(key) or problems.keep(key, _mlp_of(x.shape[:-1], sizes, layers, *what))
    with on(x.device):
        each = layers_of(layers).givens(held, small, scalings)
        y, made, late = kernels.forward(mlp, addressable(x), each, (of.seed, of.h_seed), (of.p, of.h_p))
        if late is not None:
            late.run()
    return [y, *(t for t in (*made[:6], *made.z) if t is not None)]


def _forward_fake(x: torch.Tensor, held: Any, small: Any, scalings: Any, *rest: Any) -> list[torch.Tensor]:
    of, mlp = _Masked(*rest[:4]), _mlp_of(x.shape[:-1], *rest[4:])
    m, k, width = mlp.inner.m, mlp.inner.k, mlp.outer.k
    y, outs = x.new_empty(*x.shape[:-1], mlp.down.n), [x.new_empty(m, one.n) for one in mlp.inner.each]
    found = [y, *outs]
    found += [x.new_empty(group.bytes, dtype=torch.uint8) for group in (mlp.inner, mlp.outer)]
    for one, cols in ((of.seed, k), (of.h_seed, width)):
        if one is not None:
            found.append(x.new_empty(m, -(-cols // 32), dtype=torch.int32))
    both = zip((*outs, y), (*mlp.inner.each, mlp.down), strict=True)
    return found + [torch.empty_like(out) for out, one in both if one.keep_z]


def _gradients(
    dy: torch.Tensor,
    saved: Small,
    scalings: Tensors,
    p: float,
    h_p: float,
    sizes: Sequence[int],
    layers: str,
    *what: Any,
) -> list[torch.Tensor]:
    """What there is of ``Mlp.wanted``. ``saved``: what ``saved_of`` gave."""
    key = key_of(dy, saved, "mlp_bwd", layers, *what, *sizes)
    mlp = problems.get(key) or problems.keep(key, _mlp_of(dy.shape[:-1], sizes, layers, *what))
    with on(dy.device):
        grads = gradients(mlp, dy, *parted(mlp, saved), scalings, (p, h_p), in_place=False)
    return [t for t in grads.flat if t is not None]


def _gradients_fake(dy: torch.Tensor, saved: Any, scalings: Any, p: float, h_p: float, *what: Any) -> list[Any]:
    return new_of(dy, _mlp_of(dy.shape[:-1], *what).wanted)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, held: Any, scalings: Any, bases: Any, sizes: Any, rest: Any, *small: Any) -> Any:
        *masked, flags, act, gate = rest
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        layers = text_of(x.dtype, small, bases, flags, needs)
        found = torch.ops.lora_fast.lora_mlp_fwd(x, held, small, scalings, *masked, sizes, layers, act, gate)
        n, of, mlp = len(bases), _Masked(*masked), _mlp_of(x.shape[:-1], sizes, layers, act, gate)
        y, outs, (room, down_room, *others) = found[0], found[1:n], found[n:]
        bits, h_bits = (others.pop(0) if one is not None else None for one in (of.seed, of.h_seed))
        z = tuple(others.pop(0) if one.keep_z else None for one in (*mlp.inner.each, mlp.down))
        made = Made(outs[0], outs[1] if len(outs) > 1 else None, room, down_room, bits, h_bits, z)
        ctx.save_for_backward(*saved_of(mlp, x, small, y, made, layers_of(layers).bases(held)), *scalings)
        ctx.rest = of.p, of.h_p, sizes, layers, act, gate
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
        p, h_p, *what = ctx.rest
        mlp = _mlp_of(dy.shape[:-1], *what)
        n = len(mlp.inner.each) + 1
        saved = ctx.saved_tensors
        found = torch.ops.lora_fast.lora_mlp_bwd(dy, saved[:-n], saved[-n:], p, h_p, *what)
        grads = Grads.of(placed(found, mlp.wanted))
        return grads.dx, *(None,) * 5, *(grad for four in grads.of_layers(mlp) for grad in four)


def _mlp(x: torch.Tensor, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *rest: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *small)):
        return _Mlp.apply(x, held, scalings, bases, sizes, rest, *small)
    return _alone(x, held, small, scalings, bases, sizes, *rest)


def _alone(x: torch.Tensor, held: Any, small: Small, scalings: Any, bases: Any, sizes: Any, *rest: Any) -> torch.Tensor:
    *masked, flags, act, gate = rest
    layers = text_of(x.dtype, small, bases, flags)
    return torch.ops.lora_fast.lora_mlp_fwd(x, held, small, scalings, *masked, sizes, layers, act, gate)[0]


def _alone_fake(x: torch.Tensor, held: Any, small: Any, scalings: Any, bases: Any, sizes: Any, *rest: Any) -> Any:
    return x.new_empty(*x.shape[:-1], sizes[-1])


register("lora_mlp", _alone, _alone_fake, _mlp)
register("lora_mlp_fwd", _forward, _forward_fake)
register("lora_mlp_bwd", _gradients, _gradients_fake)
