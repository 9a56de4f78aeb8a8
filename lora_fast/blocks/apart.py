"""Blocks layer by layer, each with its own kernels: where the block's cannot take them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lora_fast.blocks.form import Layer
from lora_fast.blocks.reference import ACTIVATIONS, hidden
from lora_fast.functional import dora_linear, lora_linear


def layer(x: torch.Tensor, one: Layer, training: bool, backend: str) -> torch.Tensor:
    """y of one layer."""
    weight, a, b, scaling, bias, p, magnitude, round_norm, save = one
    if a is None or b is None:
        return F.linear(x, weight, bias)
    if magnitude is None:
        return lora_linear(x, weight, a, b, scaling, bias, dropout_p=p, training=training, backend=backend)
    return dora_linear(
        x,
        weight,
        a,
        b,
        magnitude,
        scaling,
        bias,
        dropout_p=p,
        training=training,
        backend=backend,
        round_norm=round_norm,
        save=save,
    )


def lora_group(x: torch.Tensor, layers: Sequence[Layer], training: bool, *, backend: str) -> tuple[torch.Tensor, ...]:
    return tuple(layer(x, one, training, backend) for one in layers)


def lora_mlp(
    x: torch.Tensor, layers: Sequence[Layer], training: bool, *, activation: str, gate: str | None, backend: str
) -> torch.Tensor:
    *inner, down = layers
    e, *others = lora_group(x, inner, training, backend=backend)
    h = ACTIVATIONS[activation](e) * others[0] if others else hidden(e, activation, gate)
    return layer(h, down, training, backend)
