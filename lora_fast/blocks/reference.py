"""Blocks in plain torch: their layers one by one, through :mod:`lora_fast.reference`. The CPU's path, and the tests'
oracle (in float64)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lora_fast import reference
from lora_fast.blocks.form import Layer

MaybeTensor = torch.Tensor | None


def _tanh_gelu(e: torch.Tensor) -> torch.Tensor:
    return F.gelu(e, approximate="tanh")


def _quick_gelu(e: torch.Tensor) -> torch.Tensor:
    return e * torch.sigmoid(1.702 * e)


def _squared_relu(e: torch.Tensor) -> torch.Tensor:
    return F.relu(e).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
}


def layer(x: torch.Tensor, one: Layer, training: bool = True, keep: MaybeTensor = None) -> torch.Tensor:
    """y [..., N] of one layer. ``keep``: a boolean mask like x, in the place of a drawn one."""
    scaling = one.scaling.detach() if isinstance(one.scaling, torch.Tensor) else one.scaling
    if one.lora_A is None or one.lora_B is None:
        return F.linear(x, one.weight, one.bias)
    given = one.weight, one.lora_A, one.lora_B
    if one.lora_magnitude_vector is None:
        return reference.lora_linear(x, *given, scaling, one.bias, one.dropout_p, training, keep=keep)
    return reference.dora_linear(
        x,
        *given,
        one.lora_magnitude_vector,
        scaling,
        one.bias,
        one.dropout_p,
        training,
        keep=keep,
        round_norm=one.round_norm,
    )


def lora_group(
    x: torch.Tensor, layers: Sequence[Layer], training: bool = True, keep: MaybeTensor = None
) -> tuple[torch.Tensor, ...]:
    """The output of each layer for one x [..., K]. ``keep``: one mask for all whose dropout is on."""
    return tuple(layer(x, one, training, keep if one.dropout_p > 0 else None) for one in layers)


def lora_glu(
    x: torch.Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: str = "silu",
    training: bool = True,
    keep_x: MaybeTensor = None,
    keep_h: MaybeTensor = None,
) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202), [..., N] from x [..., K]; a mask for x, and one
    for what ``down`` is given."""
    e, g = lora_group(x, (gate, up), training, keep_x)
    h = ACTIVATIONS[activation](e) * g
    return layer(h, down, training, keep_h if down.dropout_p > 0 else None)


def halved(e: torch.Tensor, gate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an output's two halves that which is the gate, and the other."""
    first, second = e.chunk(2, -1)
    return (first, second) if gate == "first" else (second, first)


def hidden(e: torch.Tensor, activation: str, gate: str | None = None) -> torch.Tensor:
    """h of an output e: act(e); with a ``gate`` that half of e is activated, times the other half."""
    if gate is None:
        return ACTIVATIONS[activation](e)
    e, g = halved(e, gate)
    return ACTIVATIONS[activation](e) * g


def lora_mlp(
    x: torch.Tensor,
    fc1: Layer,
    fc2: Layer,
    activation: str = "gelu",
    training: bool = True,
    gate: str | None = None,
    keep_x: MaybeTensor = None,
    keep_h: MaybeTensor = None,
) -> torch.Tensor:
    """``fc2(act(fc1(x)))`` [..., N] from x [..., K], perhaps with a ``gate``; a mask for x, and one for h."""
    e = layer(x, fc1, training, keep_x if fc1.dropout_p > 0 else None)
    return layer(hidden(e, activation, gate), fc2, training, keep_h if fc2.dropout_p > 0 else None)
