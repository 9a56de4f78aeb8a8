"""Which path a block takes: the fused kernels, its layers one by one, or the plain torch reference; decided once for
calls that are alike."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, first_of
from lora_fast.blocks import apart, reference
from lora_fast.blocks.form import Layer
from lora_fast.paths import Facts, facts_of, remember

calls: dict[Facts, Callable[..., Any]] = {}  # what takes them, by their facts


def recall(x: Any, layers: Sequence[Any], training: Any, *asked: Any) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts), as for a single layer; no facts where numbers are wrong or something
    is no tensor, which the checks will say, and under compilation and transforms of torch.func."""
    if is_compiling() or type(training) is not bool or torch._C._are_functorch_transforms_active():
        return None, None
    facts: list[Any] = []
    try:
        for weight, a, b, scaling, bias, p, magnitude, round_norm, save in layers:
            number = type(scaling) in (float, int)
            wrong = number and not -math.inf < scaling < math.inf
            if wrong or type(p) not in (float, int) or not 0 <= p < 1:
                return None, None
            acts_as = None
            if isinstance(weight, PackedWeight):
                acts_as = weight.traits, weight.requires_grad
                weight = first_of(weight)
            facts += (
                facts_of(weight),
                acts_as,
                a if a is None else facts_of(a),
                b if b is None else facts_of(b),
                bias if bias is None else facts_of(bias),
                magnitude if magnitude is None else facts_of(magnitude),
                None if number else (scaling.dtype, scaling.shape, scaling.device),
                p if training else 0.0,
                round_norm,
                save,
            )
        found = (
            facts_of(x),
            *facts,
            torch.is_grad_enabled(),
            dispatch.autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None,
            dispatch.get_backend(),
            *asked,
        )
        return found, calls.get(found)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None


def settle(
    facts: Facts | None,
    backend: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    layers: Sequence[Layer],
    training: bool,
    asked: str,
    gate: str | None = None,
) -> Callable[..., Any]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    e4m3 = any(isinstance(layer.weight, PackedWeight) and layer.weight.E4M3_PRODUCTS for layer in layers)
    call: Callable[..., Any]
    if dispatch.choose(backend, x.device, dtype, e4m3) == "reference":
        call = reference.lora_group if asked == "group" else partial(_plain_mlp, asked, gate)
    elif asked == "group":
        call = _fused_group(x, layers, training, backend)
    else:
        call = _fused_mlp(x, layers, training, backend, asked, gate)
    remember(calls, facts, call)
    return call


def _plain_mlp(activation: str, gate: str | None, x: Any, layers: Any, training: bool) -> torch.Tensor:
    """The reference, called as the fused form is."""
    *inner, down = layers
    if len(inner) == 1:
        return reference.lora_mlp(x, inner[0], down, activation, training, gate)
    return reference.lora_glu(x, inner[0], inner[1], down, activation, training)


def _fused_group(
    x: torch.Tensor, layers: Sequence[Layer], training: bool, backend: str
) -> Callable[..., tuple[torch.Tensor, ...]]:
    from lora_fast.blocks import group_op  # needs Triton, as the next
    from lora_fast.blocks.group import FEW, FusedGroup, why_apart

    alone = partial(apart.lora_group, backend=backend)
    if not any(layer.adapted for layer in layers):
        return alone
    if why := why_apart(x, layers, training):
        dispatch.tell("runs a group layer by layer", why)
        return alone
    if is_compiling():
        return group_op.lora_group
    fused, dropping = FusedGroup(x, layers), training and any(layer.dropout_p > 0 for layer in layers)
    return alone if not fused.records and fused.group.m <= FEW and not dropping else fused


def _fused_mlp(
    x: torch.Tensor, layers: Sequence[Layer], training: bool, backend: str, activation: str, gate: str | None
) -> Callable[..., torch.Tensor]:
    from lora_fast.blocks import mlp_op  # needs Triton, as the next
    from lora_fast.blocks.group import FEW
    from lora_fast.blocks.mlp import FusedMlp, why_apart

    alone = partial(apart.lora_mlp, activation=activation, gate=gate, backend=backend)
    if not any(layer.adapted for layer in layers):
        return alone
    if why := why_apart(x, layers, training):
        dispatch.tell(f"runs {'a gated MLP' if len(layers) > 2 or gate else 'an MLP'} layer by layer", why)
        return alone
    if is_compiling():
        return partial(mlp_op.lora_mlp, activation=activation, gate=gate)
    fused = FusedMlp(x, layers, activation, gate)
    dropping = training and any(layer.dropout_p > 0 for layer in layers)
    return alone if not fused.records and fused.mlp.inner.m <= FEW and not dropping else fused
