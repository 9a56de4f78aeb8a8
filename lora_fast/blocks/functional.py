"""Blocks as functions: checked inputs, one choice of path, then the fused kernels or the plain torch reference."""

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
from lora_fast.checks import check_dora, check_linear
from lora_fast.paths import Facts, facts_of

_calls: dict[Facts, Callable[..., Any]] = {}  # what takes them, by their facts


def lora_group(
    x: torch.Tensor, layers: Sequence[Layer], *, training: bool = True, backend: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """The outputs of several layers that share their input, such as the q, k and v projections of an attention.

    Each is what :func:`lora_fast.functional.lora_linear`, or ``dora_linear``, gives. The fused kernels read x once for
    all of them, forward and backward, and make its gradient in one product, rounded once. Layers whose dropout is on
    share one mask; an output that no loss depends on gives its adapters no gradient (None).

    Args:
        x: [..., K], any strides, floating point.
        layers: two :class:`lora_fast.blocks.form.Layer` or more over weights [N, K], each with its own N. Ranks,
            scalings, dropout, biases, magnitudes and the adapters' dtypes may differ; some may have no adapters.
        training: False switches dropout off.
        backend: "auto" (what :func:`lora_fast.set_backend` says), "triton" or "reference".

    Returns:
        [..., N] of each layer, in the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``; the message begins with the layer's place, as in
            ``layers[1].lora_A``.
    """
    facts, call = _recall(x, layers, training, backend, "group")
    if call is None:
        dtype = _check(x, [(f"layers[{i}]", layer) for i, layer in enumerate(_listed(layers))])
        call = _settle(facts, backend, x, dtype, layers, training, "group")
    return call(x, layers, training)


def lora_glu(
    x: torch.Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: str = "silu",
    *,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """A gated MLP: ``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202), such as that of Llama.

    The fused kernels keep x and the outputs of ``gate`` and ``up`` for the backward, and make what ``down`` reads
    again. The gradients of those two outputs take their memory, unless the graph is kept for another backward.

    Args:
        x: [..., K], any strides, floating point.
        gate, up: :class:`lora_fast.blocks.form.Layer` over weights [I, K].
        down: one over a weight [N, I]. Each of the three may have no adapters.
        activation: "silu", "gelu" (by the error function), "gelu_tanh", "quick_gelu", "relu" or "relu2" (squared).
        training: False switches dropout off.
        backend: as in :func:`lora_group`.

    Returns:
        [..., N], in the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``; the message begins with the layer's name, as in
            ``gate.lora_A``. ValueError: another activation.
    """
    layers = gate, up, down
    facts, call = _recall(x, layers, training, backend, _checked(activation))
    if call is None:
        dtype = _check(x, [("gate", gate), ("up", up)])
        if gate.weight.shape != up.weight.shape:
            got, wanted = tuple(up.weight.shape), tuple(gate.weight.shape)
            raise ValueError(f"up.weight: got shape {got}, expected {wanted}, as gate.weight")
        _check(x.detach().new_empty(0, len(gate.weight)), [("down", down)])
        call = _settle(facts, backend, x, dtype, layers, training, activation)
    return call(x, layers, training)


def lora_mlp(
    x: torch.Tensor,
    fc1: Layer,
    fc2: Layer,
    activation: str = "gelu",
    *,
    gate: str | None = None,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """An MLP of two layers: ``fc2(act(fc1(x)))``, such as that of GPT-2 (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    With a ``gate`` fc1 is the two layers of a gated MLP in one, such as Phi-3's ``gate_up_proj``: that half of its
    output is the gate, and ``h = act(e) * g`` of the two halves is what fc2 reads. The fused kernels keep x and fc1's
    output for the backward, and make h again; the gradient of that output takes its memory, unless the graph is kept
    for another backward. DoRA with a bias on fc1 keeps one matrix more.

    Args:
        x: [..., K], any strides, floating point.
        fc1: a :class:`lora_fast.blocks.form.Layer` over a weight [I, K]; [2 I, K] with a gate.
        fc2: one over a weight [N, I]. One of the two may have no adapters.
        activation: as in :func:`lora_glu`.
        gate: "first" or "second", the half of fc1's output that is the gate; None without one.
        training: False switches dropout off.
        backend: as in :func:`lora_group`.

    Returns:
        [..., N], in the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``; the message begins with the layer's name, as in
            ``fc1.lora_A``. ValueError: another activation or gate; a gate, and an odd number of rows in fc1.weight.
    """
    if gate not in (None, "first", "second"):
        raise ValueError(f'gate: got {gate!r}, expected "first", "second" or None')
    layers = fc1, fc2
    facts, call = _recall(x, layers, training, backend, _checked(activation), gate)
    if call is None:
        dtype, parts = _check(x, [("fc1", fc1)]), 1 if gate is None else 2
        if len(fc1.weight) % parts:
            raise ValueError(f"fc1.weight: got {len(fc1.weight)} rows, expected two halves of them, gate={gate!r}")
        _check(x.detach().new_empty(0, len(fc1.weight) // parts), [("fc2", fc2)])
        call = _settle(facts, backend, x, dtype, layers, training, activation, gate)
    return call(x, layers, training)


def _checked(activation: Any) -> str:
    if not isinstance(activation, str) or activation not in reference.ACTIVATIONS:
        expected = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"activation: got {activation!r}, expected one of {expected}")
    return activation


def _listed(layers: Any) -> Sequence[Layer]:
    if not isinstance(layers, (list, tuple)) or isinstance(layers, Layer):
        raise TypeError(f"layers: got {type(layers).__name__}, expected a list of Layer")
    if len(layers) < 2:
        raise ValueError(f"layers: got {len(layers)}, expected two or more")
    return layers


def _check(x: Any, named: Sequence[tuple[str, Any]]) -> torch.dtype:
    """Raise where a layer does not fit x, with its name; return the dtype that the products are made in."""
    dtype = None
    for name, layer in named:
        if not isinstance(layer, Layer):
            raise TypeError(f"{name}: got {type(layer).__name__}, expected a Layer")
        a, b, adapted = layer.lora_A, layer.lora_B, layer.adapted
        if adapted != (b is not None):
            missing, given = ("lora_B", "lora_A") if adapted else ("lora_A", "lora_B")
            raise TypeError(f"{name}.{missing}: got None, expected a tensor beside {given}")
        try:
            dtype = check_linear(
                x, layer.weight, a, b, layer.scaling, layer.bias, layer.dropout_p, adapted=layer.adapted
            )
            if layer.lora_magnitude_vector is not None:
                if not adapted:
                    raise ValueError("lora_magnitude_vector: got a tensor without adapters, expected None")
                check_dora(layer.lora_magnitude_vector, layer.weight, True, layer.round_norm, layer.save)
        except (TypeError, ValueError) as error:
            message = str(error).replace("magnitude: ", "lora_magnitude_vector: ")
            raise type(error)(message if message.startswith("x: ") else f"{name}.{message}") from None
    assert dtype is not None
    return dtype


def _recall(x: Any, layers: Sequence[Any], training: Any, *asked: Any) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts), as for a single layer; no facts where numbers are wrong or something
    is no tensor, which the checks will say, and under compilation."""
    if is_compiling() or type(training) is not bool:
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
        return found, _calls.get(found)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None


def _settle(
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
    if facts is not None:
        if len(_calls) >= 4096:  # batch sizes that never repeat
            _calls.clear()
        _calls[facts] = call
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
