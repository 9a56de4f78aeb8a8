"""Adapters whose initialisation changes the base weight (PiSSA, OLoRA, CorDA, LoftQ), in layers that are patched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fast.bases import LABELS
from lora_fast.bases.packed import PackedWeight
from lora_fast.layers.rules import LEAVE_THE_BASE


def asked_for(*args: Any, **kwargs: Any) -> Any:
    """The ``init_lora_weights`` that an ``update_layer`` of PEFT's is given, in a config or by name."""
    for given in (*args, *kwargs.values()):
        if hasattr(given, "init_lora_weights"):
            return given.init_lora_weights
    return kwargs.get("init_lora_weights")


@contextmanager
def base_watched(layer: Any, init: Any) -> Iterator[None]:
    """PEFT may initialise an adapter of the layer within. In a merged layer that changes the merged weight, not what
    was kept of the base: this is then forgotten, and the unmerge is stock PEFT's, by subtraction.

    Raises:
        ValueError: the base weight changed, and is packed, or would be after an unmerge. It is then as it was.
    """
    base, weight = layer.base_layer, layer.base_layer.weight
    packed = isinstance(weight, PackedWeight)
    if weight.is_meta or init in LEAVE_THE_BASE or not (packed or layer.merged):
        yield
        return
    before = weight.dequantise() if packed else weight.detach().clone()
    if packed:  # assigned to its ``data`` the new one would be lost without a word
        base.weight = nn.Parameter(before.clone(), requires_grad=False)
    try:
        yield
        changed = not torch.equal(before, base.weight)
    finally:
        if packed:
            base.weight = weight
    if not changed:
        return
    if packed or _is_packed_below(layer):
        if not packed:
            weight.data = before
        raise ValueError(
            f"init_lora_weights: got one that changes the base weight, expected another over a base in {LABELS}, which "
            "stays as it is (True, 'gaussian', 'orthogonal')"
        )
    layer.forget_base()


def _is_packed_below(layer: Any) -> bool:
    """Whether an unmerge brings a packed weight, or bitsandbytes' layer, back."""
    kept = layer._buffers.get("unmerged_weight")
    return isinstance(kept, PackedWeight) or vars(layer).get("_quantised_base") is not None
