"""The state dict of a merged layer: the live weight under its own name, and the base that was kept beside it.

Whoever reads ``weight`` so gets what the layer computes. The keys of what was kept have ``lora_`` in them, by which
readers of base models tell what to drop, and no "bias", by which PEFT tells what belongs into its adapters' files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fast.placement import alike, known_to_all, settle

KEPT = {"weight": "lora_unmerged_weight", "bias": "lora_unmerged_offset"}
TO_COME = "_live_to_come"  # in a layer's __dict__: names whose live value a later part of the dict will bring


def add_kept(kept: Mapping[str, torch.Tensor | None], destination: dict, prefix: str, keep_vars: bool) -> None:
    """Put what a merged layer kept of its base, by name, into the state dict."""
    for name, t in kept.items():
        if t is not None:
            destination[prefix + KEPT[name]] = t if keep_vars else t.detach()


def read_base(
    layer: nn.Module, base: nn.Module, live: Mapping[str, Any], state_dict: dict, prefix: str, base_prefix: str
) -> None:
    """Let ``state_dict``, about to be loaded into ``layer``, hold the base under weight and bias, as one that was taken
    unmerged does: what was kept where it is there, else what is there already.

    A dict may come in parts, in any order: if one has what was kept without the live weight, then this is no base when
    it comes. Nor is ``live``, what the layer computed with before it was unmerged for this.
    """
    to_come = vars(layer).pop(TO_COME, frozenset())
    settle(layer)
    for name, key in KEPT.items():
        own, at = base._parameters.get(name), base_prefix + name
        if own is None:
            continue
        if (kept := known_to_all(state_dict.pop(prefix + key, None), own)) is not None:
            to_come = to_come - {name} if at in state_dict else to_come | {name}
            state_dict[at] = alike(kept, own)
        elif at in state_dict and (name in to_come or state_dict[at] is live.get(name)):
            to_come -= {name}
            state_dict[at] = own.detach()
    if to_come:
        vars(layer)[TO_COME] = to_come
