"""What stock PEFT's calls keep of DoRA under ``peft.helpers.DoraCaching``, and when that is dropped.

Fused calls keep their norm by themselves (:mod:`lora_fast.layers.keeping`). Some calls of a patched layer are stock
PEFT's: what these keep is dropped beyond PEFT's rules, once the tensors that it was made of have changed.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import dora
from torch import nn

from lora_fast.bases.packed import tensors_of
from lora_fast.kept import Sources

# (what the norm was made of, the scaling), beside the modules: copies start without.
_sources: WeakKeyDictionary[nn.Module, tuple[Sources | None, Any]] = WeakKeyDictionary()


def wanted(magnitude: Any) -> bool:
    """Whether PEFT would keep the norm in this call. If not, what it kept is dropped, as PEFT drops it."""
    if getattr(dora, "ENABLE_DORA_CACHING", False) and not magnitude.training and not torch.compiler.is_compiling():
        return True
    if kept := vars(magnitude).get("_dora_cache"):
        kept.clear()
    return False


def drop_stale_of(layer: Any, names: list[str]) -> None:
    """Before a call of stock PEFT's with these adapters: drop what was not made of their tensors as they are now."""
    for name in names:
        magnitude = layer.lora_magnitude_vector[name] if name in layer.lora_magnitude_vector else None
        if magnitude is not None and wanted(magnitude):
            _drop_stale(magnitude, layer.scaling[name], layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name])


def _drop_stale(magnitude: Any, scaling: Any, *modules: Any) -> None:
    weight, a, b = parts = [getattr(module, "weight", None) for module in modules]
    held = None if weight is None else tensors_of(weight)
    tensors = parts if held is None else [*held(weight), a, b]
    if isinstance(scaling, torch.Tensor):
        tensors, scaling = [scaling, *tensors], None
    known, by = _sources.get(magnitude, (None, None))
    if known is None or by != scaling or not known.are(tensors):
        magnitude._dora_cache.clear()
        _sources[magnitude] = Sources.of(tensors, len(tensors) - 2), scaling
