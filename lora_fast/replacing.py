"""Adapted layers are not replaced without a word.

Tools that put another layer in the place of every ``nn.Linear`` (to resize a vocabulary, to quantise, to train in 8
bits) would drop the adapter, and the model would train nothing there.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_CHILDREN = (
    "_adapted_children"  # in the __dict__ of a module: how many there were when the adapters came, which got one
)
_NOBODY = nn.Module()
_CLEARED = "_in_place_of_lora"  # in the __dict__ of a module that may take an adapted layer's place


def cleared(module: Any) -> Any:
    """The module, which from now on may be put in the place of an adapted layer."""
    vars(module)[_CLEARED] = True
    return module


def tell_of_freezing(layer: nn.Module, adapter: Iterable[torch.Tensor | None]) -> None:
    """Warn if a part of the adapter trains that ``layer.requires_grad_(False)`` is about to freeze."""
    if any(p is not None and p.requires_grad for p in adapter):
        warnings.warn(
            f"requires_grad_(False) for a {type(layer).__name__} freezes its adapter, too (transformers' "
            "resize_token_embeddings does so to a head that keeps its size: resize before the adapters come, or let "
            "the adapter's parameters require grad again)",
            stacklevel=3,
        )


def _has_adapter(module: nn.Module) -> bool:
    """Of ours, as a layer of its own, a parametrization or a bottleneck; their classes have ``keeps_adapter``."""
    inside = [module._modules.get(name) for name in ("parametrizations", "bottleneck")]
    found = [module, *(m for child in inside if child is not None for m in child.modules())]
    return any(getattr(type(m), "keeps_adapter", False) for m in found)


def _drops(old: nn.Module, new: nn.Module) -> bool:
    """Whether the adapter of ``old`` is gone with ``new`` in its place: not where that is a wrapper of it, what it gave
    itself, has another adapter, or is nothing at all."""
    if isinstance(new, nn.Identity) or any(m is old or _CLEARED in vars(m) or _has_adapter(m) for m in new.modules()):
        return False
    return all(m is not new for m in old.modules())  # what it wraps, as PEFT's unload puts there


def _check(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Called for every module that is assigned to an attribute, or added; raises where that would drop an adapter."""
    old = parent._modules.get(name)
    if old is None or new is None or new is old or not _has_adapter(old) or not _drops(old, new):
        return
    raise RuntimeError(
        f"{name}: a {type(new).__name__} would take the place of a {type(old).__name__} and drop its adapter; resize, "
        "quantise or convert the model before it gets adapters, or leave the adapted layers out, or take the adapters "
        "out first (remove_lora; of PEFT's layers unload). A layer's own to_linear() may take its place"
    )


register_module_module_registration_hook(_check)


def note_adapted(model: nn.Module) -> None:
    """Note on each module which of its children have adapters, for :func:`lost`: not every replacement is seen."""
    for module in model.modules():
        if names := [name for name, child in module.named_children() if _has_adapter(child)]:
            vars(module)[_CHILDREN] = len(module._modules), names


def lost(model: nn.Module) -> list[str]:
    """Names of the layers in the places of adapted ones, where no module came or went since :func:`note_adapted`."""
    found = []
    for at, module in model.named_modules():
        count, names = vars(module).get(_CHILDREN, (0, ()))
        if len(module._modules) == count:
            children = [(name, module._modules.get(name)) for name in names]
            found += [f"{at}.{name}".lstrip(".") for name, m in children if m is not None and _drops(_NOBODY, m)]
    return found


def forget_adapted(module: nn.Module) -> None:
    vars(module).pop(_CHILDREN, None)
