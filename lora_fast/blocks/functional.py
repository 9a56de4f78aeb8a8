"""Blocks as functions: checked inputs, then what takes such calls (paths.py)."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_fast.blocks import reference
from lora_fast.blocks.form import Layer
from lora_fast.blocks.paths import recall, settle
from lora_fast.checks import check_dora, check_linear


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
            scalings, dropout, biases, magnitudes and the adapters' dtypes may differ; some may have no adapters. More
            than four, and different dropout, run layer by layer, with a :class:`lora_fast.SlowPathWarning`.
        training: False switches dropout off.
        backend: "auto" (what :func:`lora_fast.set_backend` says), "triton" or "reference".

    Returns:
        [..., N] of each layer, in the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``; the message begins with the layer's place, as in
            ``layers[1].lora_A``.
    """
    facts, call = recall(x, layers, training, backend, "group")
    if call is None:
        dtype = _check(x, [(f"layers[{i}]", layer) for i, layer in enumerate(_listed(layers))])
        call = settle(facts, backend, x, dtype, layers, training, "group")
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
    facts, call = recall(x, layers, training, backend, _checked(activation))
    if call is None:
        dtype = _check(x, [("gate", gate), ("up", up)])
        if gate.weight.shape != up.weight.shape:
            got, wanted = tuple(up.weight.shape), tuple(gate.weight.shape)
            raise ValueError(f"up.weight: got shape {got}, expected {wanted}, as gate.weight")
        _check(x.detach().new_empty(0, len(gate.weight)), [("down", down)])
        call = settle(facts, backend, x, dtype, layers, training, activation)
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
    facts, call = recall(x, layers, training, backend, _checked(activation), gate)
    if call is None:
        dtype, parts = _check(x, [("fc1", fc1)]), 1 if gate is None else 2
        if len(fc1.weight) % parts:
            raise ValueError(f"fc1.weight: got {len(fc1.weight)} rows, expected two halves of them, gate={gate!r}")
        _check(x.detach().new_empty(0, len(fc1.weight) // parts), [("fc2", fc2)])
        call = settle(facts, backend, x, dtype, layers, training, activation, gate)
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
