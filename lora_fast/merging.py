"""Adapters folded into the weights of a model in memory, over packed bases also into those of its checkpoint."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lora_fast.bases import LABELS
from lora_fast.bases.packed import PackedWeight
from lora_fast.layers.named import InNamedLinear
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.models.adapt import noting
from lora_fast.models.adapters import lora_layers, named_linears
from lora_fast.models.named import activating
from lora_fast.models.targets import holders, some
from lora_fast.peft.report import lora_layers as peft_layers
from lora_fast.wrappers.gather import at_hand
from lora_fast.wrappers.names import plain_modules
from lora_fast.wrappers.placement import AWAY, offloading, place_of_weight

TIED = "weight: is sharded and tied to another layer's, which would change; merge before that"


def merge_lora(
    model: nn.Module,
    safe_merge: bool = False,
    original: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> nn.Module:
    """Merge the adapter into the weights of its layers; return ``model``. Layers merged already stay as they are.

    Of several adapters it is the one of this ``name``, which becomes the active one, or the active one. While it is
    merged no other can be active.

    ``original`` names the checkpoint that the model's bases in 8 or 4 bits were made from, a safetensors file or a
    directory with one or with shards. Layers with such a base are then merged into the weights there,
    ``<module>.weight`` without the base's rounding, as ``lora-fast merge`` does; DoRA's gain becomes
    ``m / |W + scaling * B A|`` with that W. Sums in float32, rounded once to the checkpoint's dtype, which is the
    base's. Unmerging gives the packed bases back.

    Weights that FSDP shards or accelerate keeps on the CPU are changed where they are; under FSDP every process must
    merge, and ``model`` be the outermost wrapper.

    Raises:
        ValueError: no LoRA layer, no adapter of this name; another one merged already; with ``safe_merge``, a merged
            weight that is not finite; one that cannot be changed where it is (a packed base in shards or offloaded; on
            disk; tied to another layer's, which would change too).
        FileNotFoundError, TypeError, ValueError: ``original`` is no checkpoint, or its weight of a layer is missing,
            has another dtype or shape, or is not what the base was made from; the model has no packed base, or one that
            is merged already. All weights are read and compared before the first layer changes.
        ImportError: an ``original``, without safetensors.
        After any error the layers that this call merged are unmerged again, and the active adapter is the one before.
    """
    layers = lora_layers(model, name=name)
    homes = {place: layer.home if isinstance(layer, InNamedLinear) else layer for place, layer in layers.items()}
    with at_hand(model, write=True):
        held, offloaded = holders(model), any(map(offloading, model.modules()))
        for place, layer in homes.items():
            with noting(f"while merging {place!r}"):
                if isinstance(layer, ParameterLoRA):
                    layer.check_place()
                    continue
                if offloaded and layer.weight.is_meta and offloading(layer) is None:
                    raise ValueError(AWAY)
                if not layer.merged and place_of_weight(layer) is not None and held[id(layer.weight)] > 1:
                    raise ValueError(TIED)
        bases = {place: layer.base_weight for place, layer in layers.items()}
        read = _originals(original, bases, layers)
        with nullcontext() if name is None or not named_linears(model) else activating(model, name):
            _merge_all(layers, lambda place, layer: layer.merge(safe_merge, read(place)))
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put every base weight back, bit for bit; return ``model``. ValueError without LoRA layers.

    Modules that were tied to a merged weight meanwhile (transformers' ``tie_weights`` does that to a head) have the
    base after it, too, and are tied to that.
    """
    layers = lora_layers(model)
    with at_hand(model, write=True):
        merged = {layer.weight: layer for layer in layers.values() if layer.merged}
        for layer in layers.values():
            layer.unmerge()
        for module in model.modules():
            for name, held in list(module._parameters.items()):
                if held in merged and merged[held].weight is not held:
                    setattr(module, name, merged[held].weight)
    return model


def merge_peft(
    model: nn.Module, original: str | os.PathLike[str], safe_merge: bool = False, adapter_names: list[str] | None = None
) -> nn.Module:
    """Merge the adapters of a model under :func:`lora_fast.patch_peft` as PEFT's ``merge_adapter`` does, but where the
    base is in 8 or 4 bits into the weights of the checkpoint that it was made from; return ``model``.

    ``original`` as in :func:`merge_lora`, its names without PEFT's prefix. Sums are float32, but for the ``B A`` of an
    adapter in 16 bits, which PEFT rounds to them. PEFT's ``unmerge_adapter`` gives the packed bases back, its
    ``merge_and_unload`` a model of the merged weights.

    Raises:
        ValueError: no LoRA layer of PEFT's; with ``safe_merge``, a merged weight that is not finite.
        FileNotFoundError, TypeError, ValueError, ImportError: about ``original``, as :func:`merge_lora`.
        After any error the layers that this call merged are unmerged again.
    """
    wanted = set(peft_layers(model).values())
    layers: dict[str, Any] = {name: module for name, module in plain_modules(model) if module in wanted}
    bases = {
        name: layer._buffers.get("unmerged_weight", getattr(layer.get_base_layer(), "weight", None))
        for name, layer in layers.items()
    }
    read = _originals(original, bases, layers)

    def merge(name: str, layer: Any) -> None:
        if (weight := read(name)) is None:
            layer.merge(safe_merge, adapter_names)
            return
        layer.merge(safe_merge, adapter_names, weight)
        if safe_merge and not torch.isfinite(layer.base_layer.weight).all():
            raise ValueError(f"safe_merge: the merged weight has NaN or infinite elements in {weight.dtype}")

    from lora_fast.peft.merging import mark_ties

    mark_ties(model)  # as they are by now
    _merge_all(layers, merge)
    return model


def _merge_all(layers: Mapping[str, Any], merge: Callable[[str, Any], None]) -> None:
    """``merge(name, layer)`` for the layers that are not merged; after an error none of these is."""
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    try:
        for name, layer in unmerged.items():
            with noting(f"while merging {name!r}"):
                merge(name, layer)
    except BaseException:
        for layer in unmerged.values():
            if layer.merged:
                layer.unmerge()
        raise


def _originals(
    original: str | os.PathLike[str] | None, bases: Mapping[str, Any], layers: Mapping[str, Any]
) -> Callable[[str], torch.Tensor | None]:
    """A reader of the original weights of layers, by name; None of a layer whose base is not packed."""
    if original is None:
        return lambda name: None
    packed = {name: weight for name, weight in bases.items() if isinstance(weight, PackedWeight)}
    if not packed:
        raise ValueError(f"original: got {str(original)!r}, expected None for a model without {LABELS} bases")
    if before := [name for name in packed if layers[name].merged]:
        raise ValueError(f"original: {some(before)}: merged already, expected unmerged layers")
    from lora_fast.files.checkpoint import open_originals  # needs safetensors

    read = open_originals(original, packed)
    return lambda name: read(name) if name in packed else None
