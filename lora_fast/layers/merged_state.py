"""The state dict of a merged layer: the live weight under its own name, and the base that was kept beside it.

Whoever reads ``weight`` so gets what the layer computes. The keys of what was kept have ``lora_`` in them, by which
readers of base models tell what to drop, and no "bias", by which PEFT tells what belongs into its adapters' files.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fast.bases.packed import as_plain, packed_in
from lora_fast.wrappers.gather import whole
from lora_fast.wrappers.placement import alike, known_to_all, settle

KEPT = {"weight": "lora_unmerged_weight", "bias": "lora_unmerged_offset"}
TO_COME = "_live_to_come"  # in a layer's __dict__: names whose live value a later part of the dict will bring, and
# those of the adapter's tensors that had not come with what was kept, or after it


def add_kept(
    kept: Mapping[str, torch.Tensor | None], destination: dict[str, Any], prefix: str, keep_vars: bool
) -> None:
    """Put what a merged layer kept of its base, by name, into the state dict."""
    for name, t in kept.items():
        if t is not None:
            destination[prefix + KEPT[name]] = t if keep_vars else t.detach()


def read_base(
    layer: Any, base: nn.Module, live: Mapping[str, Any], state_dict: dict[str, Any], prefix: str, base_prefix: str
) -> None:
    """Let ``state_dict``, about to be loaded into ``layer``, hold the base under weight and bias, as one that was taken
    unmerged does: what was kept where it is there, else what is there already.

    A dict may come in parts, in any order: if one has what was kept without the live weight, then this is no base when
    it comes. It is known by what the layer would compute with if merged (``layer.live_values``); while its adapter has
    not come either, any weight is taken for it, with a warning. Nor is ``live`` a base, what the layer computed with
    before it was unmerged for this.
    """
    to_come = vars(layer).pop(TO_COME, frozenset())
    settle(layer)
    stay = []
    missing = frozenset(part for part in layer.parts_of_adapter() if prefix + part not in state_dict)
    for name, key in KEPT.items():
        own, at = base._parameters.get(name), base_prefix + name
        if own is None:
            continue
        if (kept := known_to_all(state_dict.pop(prefix + key, None), own)) is not None:
            to_come = to_come - {name} if at in state_dict else to_come | {name} | missing
            state_dict[at] = alike(kept, own)
        elif at in state_dict and state_dict[at] is not own:  # with which torch fills what a dict lacks
            if state_dict[at] is live.get(name) or (
                name in to_come and _was_announced(layer, own, to_come, name, state_dict[at], at)
            ):
                stay.append(name)
            to_come -= {name}
    state_dict.update({base_prefix + name: base._parameters[name].detach() for name in stay})  # type: ignore[union-attr]
    to_come &= missing | KEPT.keys()
    if to_come & KEPT.keys():
        vars(layer)[TO_COME] = to_come


@torch.no_grad()
def _was_announced(layer: Any, own: torch.Tensor, to_come: frozenset[str], name: str, given: Any, key: str) -> bool:
    """Whether ``given``, to be loaded as ``own``, is the live value that belongs to what a merge kept."""
    if not isinstance(given, torch.Tensor) or given.shape != own.shape:
        return False  # an error of torch's
    if not (given.is_meta or own.is_meta):
        for values in layer.live_values():
            if _is_merged(whole(given), values[name], whole(own)):
                return True
        if not to_come - KEPT.keys():
            return False
    warnings.warn(
        f"{key}: is taken for the merged weight that belongs to the {KEPT[name]} loaded before, and ignored; if it is "
        "a new base, load it once more",
        stacklevel=2,
    )
    return True


def _is_merged(given: torch.Tensor, live: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether ``given`` is ``live``, but for roundings and another order of sums."""
    packed = packed_in(base)
    error = max(torch.finfo(t.dtype).eps for t in (given, base)) if packed is None else packed.ROUNDING
    dtype = torch.promote_types(live.dtype, torch.float32)
    given, live, base = (as_plain(t).to(live.device, dtype) for t in (given, live, base))
    return bool((given - live).norm() <= error * live.norm() + 0.01 * (live - base).norm())
