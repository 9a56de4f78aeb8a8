"""An MLP as one differentiable operator: inner layers, one or two, and down (see kernels/mlp.py)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_fast.blocks import group
from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import Bases, as_rows, given, kept_held, sibling
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels import group as group_kernels
from lora_fast.kernels import mlp as mlp_kernels
from lora_fast.kernels.mlp import Made, Mlp
from lora_fast.kernels.operands import Size
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.siblings import Deferred, Sibling, Siblings
from lora_fast.kernels.siblings import Made as MadeOfGroup
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, contiguous, on, one_gpu

# Whether another backward may come through the graph (torch 2.5 and later); without it we take it that one may.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def why_apart(x: torch.Tensor, layers: Sequence[Layer], training: bool) -> str | None:
    """Why such layers do not run as one step, in words; None where they do."""
    return group.why_apart(x, layers[:-1], training) or group.why_apart(x, layers[-1:], training)


def rates(layers: Sequence[Layer], training: bool) -> tuple[float, float]:
    """Of the dropout of x, which the inner layers share, and of h."""
    if not training:
        return 0.0, 0.0
    *inner, down = layers
    of_x = [layer.dropout_p for layer in inner if layer.adapted]
    return (of_x[0] if of_x else 0.0), (down.dropout_p if down.adapted else 0.0)


def mlp_of(lead: Size, k: int, each: Sequence[Sibling], needs_x: bool, activation: str, gate: str | None) -> Mlp:
    """What decides the launches for an x [*lead, k], from what does for the inner layers and down."""
    *inner, down = each
    # dm of inner layers comes from e and g, which are kept anyway, where no bias is in these.
    dots = [one.z_again for one in inner]
    group = Siblings(lead, k, tuple(map(_over_dz, inner)), needs_x)
    outer = Siblings((group.m,), inner[0].n // (1 if gate is None else 2), (down,), True)
    return Mlp(group, outer, activation, gate, dots, [one.kinds.m for one in inner])


def _over_dz(one: Sibling) -> Sibling:
    """An inner layer as its group's backward sees it: over dZ, where it wants nothing else of dY."""
    needs = one.needs._replace(m=one.needs.m and one.keep_z)
    return replace(one, needs=needs, scaled=one.dora and not needs.bias and not needs.m)


class Call(NamedTuple):
    """What one call has beside tensors that autograd looks at."""

    held: Sequence[Sequence[torch.Tensor]]  # what holds each weight
    scalings: Sequence[float | torch.Tensor]
    seeds: tuple[Any, Any]  # of the dropout of x and of h
    rates: tuple[float, float]
    late: list[Deferred]  # filled: a launch for once what the backward reads is saved


class FusedMlp:
    """The fused form of ``reference.lora_glu`` and ``lora_mlp`` for calls, checked before, that are alike (see
    ``FusedLinear``)."""

    def __init__(self, x: torch.Tensor, layers: Sequence[Layer], activation: str, gate: str | None) -> None:
        dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
        self.kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        needs_x = train and x.requires_grad
        each = [sibling(layer, self.kind, train) for layer in layers]
        self.mlp = mlp_of(tuple(x.shape[:-1]), x.shape[-1], each, needs_x, activation, gate)
        self.bases, self.casts = Bases(layers, self.kind), x.dtype != self.kind
        self.contiguous = all(t is None or t.is_contiguous() for layer in layers for t in layer.tensors[1:])
        self.elsewhere = x.device.type == "cuda" and not one_gpu()
        self.records = needs_x or any(
            train and t is not None and t.requires_grad for layer in layers for t in layer.tensors[1:]
        )

    def __call__(self, x: torch.Tensor, layers: Sequence[Layer], training: bool) -> torch.Tensor:
        if self.elsewhere:
            with on(x.device):
                return self.run(x, layers, training)
        return self.run(x, layers, training)

    def run(self, x: torch.Tensor, layers: Sequence[Layer], training: bool) -> torch.Tensor:
        """y, on the current device."""
        scalings: list[float | torch.Tensor] = []
        small: list[Any] = []
        held = self.bases.held(layers)
        for _, a, b, scaling, bias, _, magnitude, _, _ in layers:
            scalings.append(scaling)
            small += (a, b, bias, magnitude)
        if self.casts:
            x = x.to(self.kind)
        if not self.contiguous:
            small = [contiguous(t) for t in small]
        p, h_p = rates(layers, training)
        seeds = draw_seed(x.device) if p > 0 else None, draw_seed(x.device) if h_p > 0 else None
        call = Call(held, scalings, seeds, (p, h_p), [])
        y = _apply(x, self, call, *small) if self.records else self.forward(x, call, *small)[0]
        for late in call.late:
            late.run()
        return y

    def forward(self, x: torch.Tensor, call: Call, *small: Any) -> tuple[torch.Tensor, Made]:
        each = [given(held, small[4 * i : 4 * i + 4], call.scalings[i]) for i, held in enumerate(call.held)]
        y, made, late = mlp_kernels.forward(self.mlp, addressable(x), each, call.seeds, call.rates)
        if late is not None:
            call.late.append(late)
        return y, made

    def backward(
        self, dy: torch.Tensor, saved: Sequence[Any], scalings: Sequence[Any], rates: tuple[float, float]
    ) -> tuple[MaybeTensor, ...]:
        """dX, then dA, dB, dbias and dm of the inner layers and down."""
        grads = gradients(self.mlp, dy, *parted(self.mlp, saved), scalings, rates, in_place=not _keeps_graph())
        return grads.dx, *chain.from_iterable(grads.of_layers(self.mlp))


class Grads(NamedTuple):
    """What a backward makes, as it lies in memory."""

    inner: group_kernels.Grads
    down: list[MaybeTensor]  # dA with the rows of its padding, dB, dbias, dm

    @classmethod
    def of(cls, flat: Sequence[MaybeTensor]) -> "Grads":
        """From what ``Mlp.wanted`` names."""
        dx, stacked, *small = flat
        return cls(group_kernels.Grads(dx, stacked, small[:-4]), small[-4:])

    @property
    def dx(self) -> MaybeTensor:
        return self.inner.dx

    @property
    def flat(self) -> list[MaybeTensor]:
        return [self.inner.dx, self.inner.stacked, *self.inner.small, *self.down]

    def of_layers(self, mlp: Mlp) -> list[tuple[MaybeTensor, ...]]:
        """(dA, dB, dbias, dm) of each layer."""
        a, *rest = self.down
        inner = self.inner.of_layers(mlp.inner, [True] * len(mlp.inner.each))
        return [*inner, (None if a is None else a[: mlp.down.r], *rest)]


def gradients(
    mlp: Mlp,
    dy: torch.Tensor,
    x: MaybeTensor,
    made: Made,
    kept: Sequence[Sequence[Any]],
    scalings: Sequence[Any],
    rates: tuple[float, float],
    in_place: bool,
) -> Grads:
    """The gradients; arguments as of the two kernels' ``backward``."""
    *inner, _ = kept
    d_outs, of_down, dms = mlp_kernels.backward(mlp, as_rows(dy), x, made, kept, scalings[-1], rates[1], in_place)
    shared = MadeOfGroup(made.room, made.bits, ())
    flat = list(chain.from_iterable(inner))
    grads = group_kernels.backward(mlp.inner, d_outs, x, shared, flat, scalings[:-1], rates[0], in_place=True)
    for i, dm in enumerate(dms):
        if dm is not None:
            grads.small[3 * i + 2] = dm
    return Grads(grads, of_down)


def saved_of(
    mlp: Mlp, x: torch.Tensor, small: Sequence[Any], y: torch.Tensor, made: Made, held: Sequence[Sequence[torch.Tensor]]
) -> list[MaybeTensor]:
    """What the backward will read: x, the inner outputs, the rooms, the masks' bits, and ``Kept`` of each layer."""
    saved: list[MaybeTensor] = [x if mlp.inner.needs_a or any(mlp.dots) else None, *made[:6]]
    for i, one in enumerate((*mlp.inner.each, mlp.down)):
        saved += (  # as in ``Kept``
            None if one.casts else small[4 * i + 1],
            y if one.z_again else None,
            made.z[i] if one.needs.m else None,
            *kept_held(held[i], mlp.saved[i]),
        )
    return saved


def parted(mlp: Mlp, saved: Sequence[Any]) -> tuple[MaybeTensor, Made, list[Sequence[Any]]]:
    """Of what ``saved_of`` gave x, as kernels read it, what the forward made, and ``Kept`` of each layer."""
    (x, *rest), kept = saved, list[Sequence[Any]]()
    made, rest = Made(*rest[:6]), rest[6:]
    for one in (*mlp.inner.each, mlp.down):
        kept.append(rest[: 3 + one.held])
        rest = rest[3 + one.held :]
    return None if x is None else addressable(x), made, kept


class _Mlp(torch.autograd.Function):
    """The last product waits until what the backward reads is saved: a checkpoint's second forward ends there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fused: FusedMlp, call: Call, *small: Any) -> torch.Tensor:
        y, made = fused.forward(x, call, *small)
        scalings = list(call.scalings)
        tensors = [i for i, scaling in enumerate(scalings) if isinstance(scaling, torch.Tensor)]
        saved = saved_of(fused.mlp, x, small, y, made, call.held)
        ctx.save_for_backward(*saved, *(scalings[i] for i in tensors))
        for i in tensors:
            scalings[i] = 1.0
        ctx.rest = fused, scalings, tensors, call.rates
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of torch.func is at work, and in less time.
_apply = super(torch.autograd.Function, _Mlp).apply


def _backward_of(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    fused, scalings, tensors, rates = ctx.rest
    saved, scalings = list(ctx.saved_tensors), list(scalings)
    for i in reversed(tensors):
        scalings[i] = saved.pop()
    dx, *grads = fused.backward(dy, saved, scalings, rates)
    return dx, None, None, *grads


_backward_once = once_differentiable(_backward_of)
