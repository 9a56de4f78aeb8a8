"""The experts with LoRA as one function: checked inputs, one choice of path, the fused kernels or plain torch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, first_of, is_opaque
from lora_fast.bases.stack import PackedStack
from lora_fast.checks import check_tensors
from lora_fast.experts import reference
from lora_fast.experts.form import Adapter, ExpertsForm
from lora_fast.paths import Facts, facts_of, remember

INTEGERS = (torch.int32, torch.int64)


def lora_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_lora: Adapter | None = None,
    down_lora: Adapter | None = None,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    form: ExpertsForm,
    backend: str = "auto",
) -> torch.Tensor:
    """The experts of a Mixture-of-Experts layer, frozen, each with a low-rank update on one of its two projections, or
    on both: :func:`lora_fast.experts.reference.lora_experts` has the formulas.

    Gradients reach x, the routing weights and the adapters, each if it asks for one; what the experts themselves hold
    is frozen. Without adapters these are frozen experts.

    Args:
        x: [T, H], any strides, floating.
        top_k_index: [T, k], int32 or int64: the experts of each token. An id that is no expert's, negative or >= E, as
            expert parallelism marks a slot of another process, adds nothing to the output, and no gradient.
        top_k_weights: [T, k], any floating dtype; used in float32 or better.
        gate_up: [E, 2I, H], down: [E, H, I], or as ``form`` says; x's dtype (outside autocast). Either may be packed
            in 8 or 4 bits (:class:`lora_fast.bases.PackedStack`): it is then written out ahead of each product.
        gate_up_lora, down_lora: an :class:`lora_fast.experts.form.Adapter`, or None. Any floating dtypes; computed in
            x's dtype, their gradients come in their own.
        gate_up_bias: [E, 2I], down_bias: [E, H], or None; x's dtype (outside autocast).
        form: how the weights lie, and the gate.
        backend: as in :func:`lora_fast.functional.lora_linear`.

    Returns:
        [T, H], x's dtype. Under autocast the products are made in its dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices, a scaling that is not finite, experts that require grad.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    given = x, top_k_index, top_k_weights, gate_up, down, gate_up_lora, down_lora, gate_up_bias, down_bias
    facts, call = _recall(given, form, backend)
    if call is None:
        dtype = _check(given, form)
        call = _settle(given, form, dtype, backend)
        remember(_calls, facts, call)
    return call(*given)


_calls: dict[Facts, Callable[..., torch.Tensor]] = {}  # what takes calls, by their facts


def _settle(given: tuple[Any, ...], form: ExpertsForm, dtype: torch.dtype, backend: str) -> Callable[..., torch.Tensor]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    if dispatch.choose(backend, given[0].device, dtype) == "reference":
        return partial(reference.lora_experts, form=form)
    if dtype == torch.float64:  # which the interpreter has, for other operators
        raise RuntimeError(f"backend='triton': {dtype} has no fused kernel (bfloat16, float16 and float32 have)")
    from lora_fast.experts.fused import FusedExperts  # imports Triton

    return FusedExperts(*given, form=form)


def _recall(given: tuple[Any, ...], form: Any, backend: Any) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts): all that the checks of a call and the choice of its path rest on; the
    host waits for this in every step. No facts where something is not as it should be, which the checks will say, and
    under compilation."""
    if is_compiling():
        return None, None
    x, index, weights, gate_up, down, *others = given
    loras, biases = others[:2], others[2:]
    try:
        facts = [facts_of(x), facts_of(index), facts_of(weights), _facts_of_weight(gate_up), _facts_of_weight(down)]
        for lora in loras:
            if lora is None:
                facts.append(())
            elif type(lora) is Adapter and type(lora.scaling) is float and -math.inf < lora.scaling < math.inf:
                facts += (facts_of(lora.lora_A), facts_of(lora.lora_B))
            else:
                return None, None
        for bias in biases:
            facts.append(() if bias is None else facts_of(bias))
        autocast = dispatch.autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None
        key = *facts, form, backend, torch.is_grad_enabled(), autocast, dispatch.get_backend()
        return key, _calls.get(key)
    except (AttributeError, RuntimeError, TypeError):
        return None, None


def _facts_of_weight(weight: torch.Tensor) -> Facts:
    if isinstance(weight, PackedStack):  # which itself takes the host longer to ask
        return facts_of(first_of(weight)), weight.traits, weight.requires_grad
    return facts_of(weight)


def _check(given: tuple[Any, ...], form: Any) -> torch.dtype:
    """Raise on arguments that do not fit together; return the dtype that the products are made in."""
    x, top_k_index, top_k_weights, gate_up, down, gate_up_lora, down_lora, gate_up_bias, down_bias = given
    if not isinstance(form, ExpertsForm):
        raise TypeError(f"form: got {type(form).__name__}, expected an ExpertsForm")
    tensors = {"x": x, "top_k_weights": top_k_weights, "gate_up": gate_up, "down": down}
    frozen = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    frozen = {name: t for name, t in frozen.items() if t is not None}
    loras = {"gate_up_lora": gate_up_lora, "down_lora": down_lora}
    loras = {name: lora for name, lora in loras.items() if lora is not None}
    for name, lora in loras.items():
        if not isinstance(lora, Adapter):
            raise TypeError(f"{name}: got {type(lora).__name__}, expected an Adapter or None")
        tensors |= {f"{name}.lora_A": lora.lora_A, f"{name}.lora_B": lora.lora_B}
    check_tensors({**tensors, **frozen})
    _check_routing(x, top_k_index, top_k_weights)
    wide = _check_weights(x, frozen, form)
    shapes = {"gate_up_lora": (x.shape[1], wide), "down_lora": (wide // 2, x.shape[1])}
    for name, lora in loras.items():
        _check_adapter(name, lora, len(gate_up), *shapes[name])
    for name, t in frozen.items():
        if isinstance(t, PackedStack):
            if t.turned != form.transposed:
                raise ValueError(
                    f"{name}: got packed experts, turned={t.turned}, expected {form.transposed} to fit form"
                )
        elif is_opaque(t) or isinstance(t, PackedWeight):
            raise TypeError(f"{name}: got a {type(t).__name__}, expected a plain tensor")
        if t.requires_grad:
            raise ValueError(f"{name}: requires grad, expected frozen experts ({name}.requires_grad_(False))")
    autocast = dispatch.autocast_dtype(x.device)
    if autocast is not None and x.dtype != torch.float64:
        for name, t in frozen.items():
            if t.dtype == torch.float64:
                raise TypeError(f"{name}: got dtype {t.dtype}, which autocast leaves alone, expected x's {x.dtype}")
        return autocast
    for name, t in frozen.items():
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected x's {x.dtype} (or autocast)")
    return x.dtype


def _check_routing(x: torch.Tensor, top_k_index: Any, top_k_weights: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [T, H]")
    if not isinstance(top_k_index, torch.Tensor):
        raise TypeError(f"top_k_index: got {type(top_k_index).__name__}, expected a tensor")
    if top_k_index.dtype not in INTEGERS:
        raise TypeError(f"top_k_index: got dtype {top_k_index.dtype}, expected int32 or int64")
    if top_k_index.device != x.device:
        raise ValueError(f"top_k_index: got a tensor on {top_k_index.device}, expected {x.device}, where x is")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0] or top_k_index.shape[1] < 1:
        got = tuple(top_k_index.shape)
        raise ValueError(f"top_k_index: got shape {got}, expected [{x.shape[0]}, k] with k >= 1 to fit x")
    if top_k_weights.shape != top_k_index.shape:
        got, expected = tuple(top_k_weights.shape), tuple(top_k_index.shape)
        raise ValueError(f"top_k_weights: got shape {got}, expected {expected}, as top_k_index has")


def _check_weights(x: torch.Tensor, frozen: dict[str, torch.Tensor], form: ExpertsForm) -> int:
    """2I."""
    gate_up, down, h = frozen["gate_up"], frozen["down"], x.shape[1]
    last = 2 if form.transposed else 1
    if gate_up.dim() != 3 or gate_up.shape[3 - last] != h or gate_up.shape[last] % 2 or not gate_up.numel():
        expected = f"[E, {h}, 2I]" if form.transposed else f"[E, 2I, {h}]"
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}, expected {expected} to fit x and form")
    experts, wide = gate_up.shape[0], gate_up.shape[last]
    expected_down = (experts, wide // 2, h) if form.transposed else (experts, h, wide // 2)
    if down.shape != expected_down:
        raise ValueError(f"down: got shape {tuple(down.shape)}, expected {expected_down} to fit gate_up and form")
    for name, n in (("gate_up_bias", wide), ("down_bias", h)):
        if name in frozen and frozen[name].shape != (experts, n):
            raise ValueError(f"{name}: got shape {tuple(frozen[name].shape)}, expected {(experts, n)}")
    return wide


def _check_adapter(name: str, lora: Adapter, experts: int, k: int, n: int) -> None:
    a, b, scaling = lora
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] % experts or not a.shape[0]:
        raise ValueError(f"{name}.lora_A: got shape {tuple(a.shape)}, expected [{experts} * r, {k}] with r >= 1")
    if b.shape != (n, a.shape[0]):
        raise ValueError(f"{name}.lora_B: got shape {tuple(b.shape)}, expected {(n, a.shape[0])}")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        if not is_compiling():  # there a float may be symbolic
            raise TypeError(f"{name}.scaling: got {type(scaling).__name__}, expected a number")
    elif not is_compiling() and not math.isfinite(scaling):
        raise ValueError(f"{name}.scaling: got {scaling}, expected a finite number")
