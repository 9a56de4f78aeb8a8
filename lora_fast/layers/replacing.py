"""Adapted layers are not replaced without a word.

Tools that put another layer in the place of every ``nn.Linear`` (to resize a vocabulary, to quantise, to train in 8
bits) would drop the adapter, and the model would train nothing there.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized

from lora_fast.blocks.siblings import CHILDREN
from lora_fast.wrappers.gather import is_sharded

_EMPTY = nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict  # without children they are nothing at all
_CLEARED = "_in_place_of_lora"  # in the __dict__ of a module that may take an adapted layer's place


class Noted(NamedTuple):
    """What a module's ``CHILDREN`` in its __dict__ are."""

    children: int  # how many there were when the adapters came
    adapted: list[str]  # which of them got some
    whole: bool  # it is what the adapters were given to


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
    """Of ours, in whatever depth: layers, parametrizations and bottlenecks, whose classes have ``keeps_adapter``."""
    return any(getattr(type(m), "keeps_adapter", False) for m in module.modules())


def _is_innocent(new: nn.Module) -> bool:
    """Nothing at all, what an adapted layer gave itself, or something that has adapters."""
    nothing = isinstance(new, _EMPTY) and not new._modules
    return nothing or any(_CLEARED in vars(m) for m in new.modules()) or _has_adapter(new)


def _drops(old: nn.Module, new: nn.Module) -> bool:
    """Whether the adapters of ``old`` are gone with ``new`` in its place: not where that is a wrapper of it, or what it
    wraps (as PEFT's unload puts there), or has all its parameters (as what torch.fx or torch.jit trace)."""
    if _is_innocent(new) or any(m is old for m in new.modules()) or any(m is new for m in old.modules()):
        return False
    return not set(map(id, old.parameters())) <= set(map(id, new.parameters()))


def _is_whole(module: nn.Module) -> bool:
    """Whether it is what the adapters were given to, a model of PEFT's or one that was converted: whoever exchanges a
    whole model means it."""
    noted = vars(module).get(CHILDREN)
    return (noted is not None and noted.whole) or isinstance(getattr(module, "peft_config", None), dict)


def _check(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Called for every module that is assigned to an attribute, or added; raises where that would drop an adapter."""
    old = parent._modules[name] if name in parent._modules else None  # noqa: SIM401 - a ScriptModule's has no get
    if new is old:
        _check_size(name, new)
    if old is None or new is None or new is old or not _has_adapter(old) or _is_whole(old) or not _drops(old, new):
        return
    raise RuntimeError(
        f"{name}: a {type(new).__name__} would take the place of a {type(old).__name__} and drop its adapter; resize, "
        "quantise or convert the model before it gets adapters, or leave the adapted layers out, or take the adapters "
        "out first (remove_lora; of PEFT's layers unload). A layer's own to_linear() or to_embedding() may take its "
        "place, and anything after None was put there"
    )


def _check_size(name: str, layer: Any) -> None:
    """Called for a module that is assigned to its own place, as transformers' resize_token_embeddings does at its end:
    of a computed weight it has resized a copy, and let what that is computed from train."""
    if isinstance(layer, nn.Embedding) and "lora_embedding_A" in layer._parameters:
        _check_rows(name, layer)
    if not (isinstance(layer, (nn.Embedding, nn.Linear)) and is_parametrized(layer, "weight") and _has_adapter(layer)):
        return
    base: Any = layer.get_submodule("parametrizations.weight")
    parts = list(base.parameters(recurse=False))  # one, but for others' parametrizations
    there = next(len(m.lora_B) for m in base if _has_adapter(m))
    if (asked := getattr(layer, "num_embeddings", there)) != there:
        layer.num_embeddings = there
        for p in parts:
            p.requires_grad_(False)
        raise RuntimeError(
            f"{name}: num_embeddings is {asked}, but the weight that its adapter is on has {there} rows and cannot be "
            "resized; resize before the adapters come, or take them out first (lora_fast.parametrize.remove_lora)"
        )
    if any(p.requires_grad for p in parts):
        warnings.warn(
            f"{name}: the base weight of a parametrized {type(layer).__name__} trains, beside its adapter "
            "(transformers' resize_token_embeddings makes it so: resize before the adapters come, or freeze "
            f"{name}.parametrizations.weight.original again)",
            stacklevel=4,
        )


def _check_rows(name: str, layer: Any) -> None:
    """Of an adapted embedding transformers exchanges the weight's data: rows that it added are taken away again."""
    weight, rows = layer.weight, layer.lora_embedding_A.shape[-1]
    if is_sharded(weight) or weight.shape[0] == rows:
        return
    asked, lost_rows = weight.shape[0], weight.shape[0] < rows
    if not lost_rows:
        weight.data = weight.data[:rows].clone()
        layer.num_embeddings = rows
    raise RuntimeError(
        f"{name}: the weight has {asked} rows now, but its adapter has {rows} and cannot be resized; resize before the "
        "adapters come, or take them out first (remove_lora)"
        + ("; rows of the base are lost, load it anew" if lost_rows else "")
    )


register_module_module_registration_hook(_check)


def note_adapted(model: nn.Module) -> None:
    """Note on each module which of its children have adapters, in whatever depth, for :func:`lost`: not every
    replacement is seen."""
    for module in model.modules():
        forget_adapted(module)
        if names := [name for name, child in module.named_children() if _has_adapter(child)]:
            vars(module)[CHILDREN] = Noted(len(module._modules), names, module is model)


def lost(model: nn.Module) -> list[str]:
    """Names of what took the places of adapted layers, or of modules around them, where no module came or went since
    :func:`note_adapted`."""
    found = []
    for at, module in model.named_modules():
        noted = vars(module).get(CHILDREN)
        if noted is not None and len(module._modules) == noted.children:
            children = [(name, module._modules.get(name)) for name in noted.adapted]
            found += [f"{at}.{name}".lstrip(".") for name, m in children if m is not None and _is_strange(m)]
    return found


def _is_strange(module: nn.Module) -> bool:
    """Whether nothing in it has an adapter, or had one when the adapters came."""
    return not _is_innocent(module) and not any(CHILDREN in vars(m) for m in module.modules())


def forget_adapted(module: nn.Module) -> None:
    vars(module).pop(CHILDREN, None)
