"""A group of layers with one input as one differentiable operator."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_fast.bases.packed import PackedWeight, rounds_norm, tensors_of
from lora_fast.blocks.form import Layer
from lora_fast.dispatch import autocast_dtype, refuse_transforms
from lora_fast.kernels.bases import TURNED
from lora_fast.kernels.group import backward, forward
from lora_fast.kernels.problem import MaybeTensor, Needs
from lora_fast.kernels.siblings import Deferred, Given, Made, Sibling, Siblings
from lora_fast.kernels.stack import MOST
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, base_of, contiguous, kinds_of, on, one_gpu

FEW = 128  # rows whose forwards without gradients have kernels of their own, a layer at a time


def why_apart(x: torch.Tensor, layers: Sequence[Layer], training: bool) -> str | None:
    """Why such layers do not share launches, in words; None where they do. RuntimeError in transforms of torch.func."""
    refuse_transforms()
    if len(layers) > MOST:
        return f"it has {len(layers)} layers, and at most {MOST} share their launches"
    for layer in layers:
        if isinstance(layer.weight, PackedWeight):
            if layer.weight.E4M3_PRODUCTS and not layer.adapted:
                return "it has a layer without adapters over a base whose products are of 8 bits"
        elif base_of(layer.weight) != TURNED.name and layer.weight.stride(1) != 1:
            return "rows of a base weight are not contiguous"
    if len(rates := {layer.dropout_p for layer in layers if layer.adapted and training}) > 1:
        return f"its layers differ in their dropout ({', '.join(map(str, sorted(rates)))})"
    return None


def sibling(layer: Layer, kind: torch.dtype, train: bool) -> Sibling:
    """What decides the launches of a layer."""
    _, a, b, bias, magnitude = layer.tensors
    needs = Needs(False, *(t is not None and train and t.requires_grad for t in (a, b, bias, magnitude)))
    # z is kept where y cannot stand for it, as in a layer by itself.
    keeps_y = layer.save == "auto" and bias is None and needs.a and needs.b
    return Sibling(
        layer.weight.shape[0],
        0 if a is None else len(a),
        kinds_of(kind, a, b, bias, magnitude),
        needs,
        dora=magnitude is not None,
        keep_z=needs.m and not keeps_y,
        round_norm=layer.round_norm and rounds_norm(layer.weight),
        base_name=base_of(layer.weight),
    )


def given(held: Sequence[torch.Tensor], small: Sequence[Any], scaling: float | torch.Tensor) -> Given:
    """A layer's tensors, first those that hold its weight; ``small``: A, B, bias and magnitude."""
    a, b, bias, magnitude = small
    return Given(held, a, b, bias, magnitude, scaling)


class Bases:
    """What holds the weights of layers: they themselves, cast where they must be, or a packed one's inner tensors."""

    def __init__(self, layers: Sequence[Layer], kind: torch.dtype) -> None:
        self.kind, self.of = kind, [tensors_of(layer.weight) for layer in layers]
        self.plain = all(of is None for of in self.of)
        self.casts = any(of is None and one.weight.dtype != kind for of, one in zip(self.of, layers, strict=True))

    def held(self, layers: Sequence[Layer]) -> list[tuple[torch.Tensor, ...]]:
        if self.plain and not self.casts:
            return [(layer[0],) for layer in layers]
        return [
            (layer.weight.to(self.kind),) if of is None else of(layer.weight)
            for of, layer in zip(self.of, layers, strict=True)
        ]


def kept_held(held: Sequence[torch.Tensor], saved: slice) -> Sequence[MaybeTensor]:
    """The tensors in their places, of which these are saved."""
    if len(held) == 1:
        return held if held[saved] else (None,)
    found: list[MaybeTensor] = [None] * len(held)
    found[saved] = held[saved]
    return found


class Call(NamedTuple):
    """What one call has beside tensors that autograd looks at."""

    held: Sequence[Sequence[torch.Tensor]]  # what holds each weight
    scalings: Sequence[float | torch.Tensor]
    seed: torch.Tensor | int | None
    p: float
    late: list[Deferred]  # filled: launches for once what the backward reads is saved


class FusedGroup:
    """The fused form of ``reference.lora_group`` for calls, checked before, that are alike (see ``FusedLinear``)."""

    def __init__(self, x: torch.Tensor, layers: Sequence[Layer]) -> None:
        dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
        self.kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        each = tuple(sibling(layer, self.kind, train) for layer in layers)
        self.group = Siblings(tuple(x.shape[:-1]), x.shape[-1], each, train and x.requires_grad)
        self.records = train and any(
            t is not None and t.requires_grad for t in (x, *(t for layer in layers for t in layer.tensors))
        )
        self.first = next(i for i, layer in enumerate(layers) if layer.adapted)  # whose dropout is that of all
        self.bases, self.casts = Bases(layers, self.kind), x.dtype != self.kind
        self.contiguous = all(t is None or t.is_contiguous() for layer in layers for t in layer.tensors[1:])
        self.elsewhere = x.device.type == "cuda" and not one_gpu()

    def __call__(self, x: torch.Tensor, layers: Sequence[Layer], training: bool) -> tuple[torch.Tensor, ...]:
        if self.elsewhere:
            with on(x.device):
                return self.run(x, layers, training)
        return self.run(x, layers, training)

    def run(self, x: torch.Tensor, layers: Sequence[Layer], training: bool) -> tuple[torch.Tensor, ...]:
        """The outputs, on the current device."""
        held = self.bases.held(layers)
        if self.casts:
            x = x.to(self.kind)
        scalings: list[Any] = []
        small: list[Any] = []
        for _, a, b, scaling, bias, _, magnitude, _, _ in layers:
            scalings.append(scaling)
            small += (a, b, bias, magnitude)
        if not self.contiguous:
            small = [contiguous(t) for t in small]
        p = layers[self.first][5] if training else 0.0
        call = Call(held, scalings, draw_seed(x.device) if p > 0 else None, p, [])
        ys = _apply(x, self, call, *small) if self.records else self.forward(x, call, *small)[0]
        for late in call.late:
            late.run()
        return tuple(ys)

    def forward(self, x: torch.Tensor, call: Call, *small: Any) -> tuple[list[torch.Tensor], Made]:
        """The outputs in the order of the layers, but for launches that come late."""
        each = [given(held, small[4 * i : 4 * i + 4], call.scalings[i]) for i, held in enumerate(call.held)]
        ys, made, late = forward(self.group, addressable(x), each, call.seed, call.p)
        if late is not None:
            call.late.append(late)
        return ys, made

    def backward(
        self, dys: Sequence[MaybeTensor], saved: Sequence[Any], scalings: Sequence[Any], p: float
    ) -> tuple[MaybeTensor, ...]:
        """dX, then dA, dB, dbias and dm of each layer."""
        x, room, bits, *kept = saved
        rows = [None if dy is None else as_rows(dy) for dy in dys]
        made = Made(room, bits, ())
        x = None if x is None else addressable(x)
        grads = backward(self.group, rows, x, made, kept, scalings, p)
        return grads.dx, *chain.from_iterable(grads.of_layers(self.group, [dy is not None for dy in dys]))


def saved_of(
    group: Siblings,
    x: torch.Tensor,
    small: Sequence[Any],
    ys: Sequence[torch.Tensor],
    made: Made,
    held: Sequence[Sequence[torch.Tensor]],
) -> list[MaybeTensor]:
    """What a group's backward will read: x, room and bits, and each layer's ``Kept``, its base's tensors last."""
    saved: list[MaybeTensor] = [
        x if group.needs_a or group.z_again else None,
        made.room,
        made.bits if group.needs_ds else None,
    ]
    for i, one in enumerate(group.each):
        saved += (  # as in ``Kept``
            small[4 * i + 1] if not one.casts and (group.needs_ds or one.z_again) else None,
            ys[i] if one.z_again else None,
            made.z[i] if one.needs.m else None,
            *kept_held(held[i], group.saved[i]),
        )
    return saved


def as_rows(dy: Any) -> torch.Tensor:
    """A gradient [..., N] as kernels read it: contiguous, or the matrix of its rows, each contiguous."""
    if not dy.is_contiguous():
        dy = addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    return dy


class _Group(torch.autograd.Function):
    """The products of outputs that the backward does not read wait until what it does read is saved: a checkpoint's
    second forward ends there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fused: FusedGroup, call: Call, *small: Any) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ys, made = fused.forward(x, call, *small)
        scalings: list[Any] = list(call.scalings)
        tensors = [i for i, scaling in enumerate(scalings) if isinstance(scaling, torch.Tensor)]
        saved = saved_of(fused.group, x, small, ys, made, call.held)
        ctx.save_for_backward(*saved, *(scalings[i] for i in tensors))
        for i in tensors:
            scalings[i] = None
        ctx.rest = fused, scalings, tensors, call.p
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, *dys) if torch.is_grad_enabled() else _backward_of(ctx, *dys)


# What Function.apply comes to where no transform of torch.func is at work, and in less time.
_apply = super(torch.autograd.Function, _Group).apply


def _backward_of(ctx: Any, *dys: Any) -> tuple[Any, ...]:
    fused, scalings, tensors, p = ctx.rest
    saved = list(ctx.saved_tensors)
    if tensors:
        scalings = list(scalings)
        for i in reversed(tensors):
            scalings[i] = saved.pop()
    dx, *rest = fused.backward(dys, saved, scalings, p)
    return dx, None, None, *rest


_backward_once = once_differentiable(_backward_of)
