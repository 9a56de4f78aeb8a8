"""Which path a call of the functional API takes: decided once for all calls that agree in what the choice rests on."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch, reference
from lora_fast.bases.packed import PackedWeight, first_of, tensors_of
from lora_fast.kept import Kept

Facts = tuple[Any, ...]  # what the choice for a call rests on
calls: dict[Facts, Callable[..., torch.Tensor]] = {}  # what takes them, by their facts


def facts_of(t: torch.Tensor) -> Facts:
    """What of a tensor the checks and the choice of a path rest on."""
    return type(t), t.dtype, t.shape, t.stride(), t.device, t.requires_grad


def recall(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, bias: Any, magnitude: Any, dropout_p: Any, *asked: Any
) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts): all that the checks of a call and the choice of its path rest on, but
    for numbers, which are right here. The host waits for this in every step. No facts where numbers are wrong or
    something is no tensor, which the checks will say, and under compilation."""
    number, base, acts_as = type(scaling) is float, weight, None
    if (
        is_compiling()
        or type(dropout_p) is not float
        or not 0 <= dropout_p < 1
        or (number and not -math.inf < scaling < math.inf)
    ):
        return None, None
    try:
        if isinstance(weight, PackedWeight):
            base, acts_as = first_of(weight), (weight.traits, weight.requires_grad)
        facts = (
            facts_of(x),
            facts_of(base),
            facts_of(lora_A),
            facts_of(lora_B),
            None if bias is None else facts_of(bias),
            None if magnitude is None else facts_of(magnitude),
            acts_as,
            None if number else (scaling.dtype, scaling.shape, scaling.device),
            torch.is_grad_enabled(),
            dispatch.autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None,
            dispatch.get_backend(),
            *asked,
        )
        return facts, calls.get(facts)
    except (AttributeError, RuntimeError, TypeError):
        return None, None


def settle(
    facts: Facts | None,
    dtype: torch.dtype,
    backend: str,
    tensors: tuple[Any, ...],
    detach_norm: bool = True,
    *,
    save_x: str,
    **options: Any,
) -> Callable[..., torch.Tensor]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    x, weight, *_ = tensors
    e4m3 = save_x == "fp8" or (isinstance(weight, PackedWeight) and weight.E4M3_PRODUCTS)
    path = dispatch.choose(backend, x.device, dtype, e4m3)
    call: Callable[..., torch.Tensor]
    if path == "triton" and detach_norm:
        from lora_fast.ops.linear import FusedLinear  # needs Triton

        call = FusedLinear(*tensors, save_x=save_x, **options)
    else:
        call = partial(_plain, detach_norm=detach_norm, round_norm=options.get("round_norm", False))
    remember(calls, facts, call)
    return call


def remember(known: dict[Facts, Callable[..., Any]], facts: Facts | None, call: Callable[..., Any]) -> None:
    """What takes calls with these facts, from now on; all else is forgotten when 4096 are known (batch sizes that never
    repeat)."""
    if facts is not None:
        if len(known) >= 4096:
            known.clear()
        known[facts] = call


def _plain(
    x: Any,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    scaling: Any,
    bias: Any,
    p: float,
    magnitude: Any = None,
    kept: Kept | None = None,
    *,
    detach_norm: bool,
    round_norm: bool,
) -> torch.Tensor:
    """The reference, called as the fused form is."""
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.detach()
    if magnitude is None:
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, p)
    gain = None
    if kept is not None and not (torch.is_grad_enabled() or is_compiling() or torch._C._len_torch_dispatch_stack()):
        held = tensors_of(weight)
        gain = kept.get(
            (weight,) if held is None else held(weight),
            (lora_A, lora_B, magnitude),
            scaling,
            ("reference", detach_norm, round_norm),
            lambda: reference.gain_of(weight, lora_A, lora_B, magnitude, scaling, detach_norm, round_norm),
        )
    return reference.dora_linear(
        x,
        weight,
        lora_A,
        lora_B,
        magnitude,
        scaling,
        bias,
        p,
        detach_norm=detach_norm,
        round_norm=round_norm,
        gain=gain,
    )
