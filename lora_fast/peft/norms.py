"""DoRA's row norms kept from one evaluation to the next, where ``peft.helpers.DoraCaching`` asks for it.

They lie where PEFT keeps its own, so what clears PEFT's clears these, and stock calls find them. Beyond PEFT's rules,
whatever is kept is dropped once the tensors that it was made of have changed.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import dora
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_fast.bases.packed import PackedWeight, rounds_norm
from lora_fast.functional import dora_norm

_steps = 0  # of all optimizers: those that are fused change a tensor without counting its version up


class Sources(NamedTuple):
    """What a norm was made of: marks of the tensors, and on the CPU, where a look takes no waiting, the adapter."""

    marks: tuple[Any, ...]
    adapter: tuple[torch.Tensor, ...]

    def are(self, marks: tuple[Any, ...], adapter: tuple[torch.Tensor, ...]) -> bool:
        return self.marks == marks and all(map(torch.equal, self.adapter, adapter))


_sources: WeakKeyDictionary[nn.Module, Sources] = WeakKeyDictionary()  # beside the modules: copies start without


def wanted(magnitude: Any) -> bool:
    """Whether PEFT would keep the norm in this call. If not, what it kept is dropped, as PEFT drops it."""
    if getattr(dora, "ENABLE_DORA_CACHING", False) and not magnitude.training and not torch.compiler.is_compiling():
        return True
    if kept := vars(magnitude).get("_dora_cache"):
        kept.clear()
    return False


def norm_of(magnitude: Any, name: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: Any) -> Any:
    """The norms [N] of ``weight + scaling * b a``, rounded as PEFT's: the kept ones, or new ones, which are kept."""
    drop_stale(magnitude, weight, a, b, scaling)
    kept, key = magnitude._dora_cache, f"weight-norm-{name}"
    if key not in kept:
        norm = dora_norm(weight, a, b, scaling)
        kept[key] = norm.to(weight.dtype) if rounds_norm(weight) else norm
    return kept[key].to(torch.promote_types(kept[key].dtype, torch.float32))


def drop_stale_of(layer: Any, names: list[str]) -> None:
    """The same before a call that is stock PEFT's."""
    for name in names:
        magnitude = layer.lora_magnitude_vector[name] if name in layer.lora_magnitude_vector else None
        if magnitude is not None and wanted(magnitude) and magnitude._dora_cache:
            weight, a, b = (
                getattr(module, "weight", None)
                for module in (layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name])
            )
            drop_stale(magnitude, weight, a, b, layer.scaling[name])


def drop_stale(magnitude: Any, weight: Any, a: Any, b: Any, scaling: Any) -> None:
    """Drop what is kept, unless it was made of these tensors as they are now."""
    marks = _steps, *map(_mark, (scaling, weight, a, b))
    counted, known = None not in marks, _sources.get(magnitude)
    adapter = (a.detach(), b.detach()) if counted and a.device.type == b.device.type == "cpu" else ()
    if known is None or not counted or not known.are(marks, adapter):
        magnitude._dora_cache.clear()
        _sources[magnitude] = Sources(marks, tuple(t.clone() for t in adapter))


def _mark(t: Any) -> tuple[Any, ...] | None:
    """Another one for another number, or once the tensor has other elements, as far as torch counts; None where it
    does not count."""
    if isinstance(t, float | int):
        return "number", t
    if isinstance(t, PackedWeight):
        t = getattr(t, t.INNER[0])
    if type(t) not in (torch.Tensor, nn.Parameter) or t.is_inference():
        return None
    where = StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.stride()
    return "tensor", t._version, t.dtype, t.shape, *where


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)
