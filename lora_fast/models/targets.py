"""The layers of a model that a :class:`LoRAConfig` stands for, found by names and patterns."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lora_fast.layers.embedding import why_no_embedding
from lora_fast.layers.experts import why_not_adapted
from lora_fast.layers.rules import is_linear, why_not_lora
from lora_fast.models.all_linear import check_adapters, is_all_linear
from lora_fast.models.config import SUFFIX, LoRAConfig
from lora_fast.models.projections import patterns as name_patterns
from lora_fast.models.projections import projections
from lora_fast.wrappers import zero3
from lora_fast.wrappers.gather import is_sharded
from lora_fast.wrappers.names import is_compiled, unwrapped

Target = TypeVar("Target")


def find_targets(
    model: nn.Module,
    config: LoRAConfig,
    names: dict[nn.Module, list[str]],
    saved: set[nn.Module],
    beside: Collection[nn.Module] = (),
) -> dict[Any, None]:
    """The layers to convert, linear ones and embeddings, in the model's order; ValueError if there is none or one that
    cannot be. exclude_modules may also speak of modules ``beside`` these."""
    patterns = config.target_modules
    if not patterns:
        if config.target_parameters is not None:
            return {}
        raise ValueError('target_modules: got None, expected a list of module names, a regex or "all-linear"')
    head: Any = None
    if is_all_linear(patterns):
        found: set[nn.Module] = {module for module in names if is_linear(module)}
        if callable(get_output_embeddings := getattr(unwrapped(model), "get_output_embeddings", None)):
            head = unwrapped(get_output_embeddings())
    else:
        found = matching("target_modules", patterns, names)
    excluded = matching("exclude_modules", config.exclude_modules, {m: names[m] for m in found.union(beside)})
    targets = [m for m in names if m in found and m not in excluded and m not in saved and m is not head]
    if not targets:
        others = some(name_patterns(projections(model)))
        hint = f" (target_parameters may reach projections that are no nn.Linear: {others})" if others else ""
        raise ValueError(f"target_modules: {patterns!r} leaves no layer to convert{hint}")
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    if unfit := [f"{names[m][0]}, which {why}" for m in targets if (why := _why_not(m, parents[m]))]:
        raise ValueError(f"target_modules: cannot convert {'; '.join(unfit)} (exclude_modules leaves layers out)")
    return {m: None for m in targets if is_linear(m) or isinstance(m, nn.Embedding)}


class ParameterTarget(NamedTuple):
    """A parameter of a module that is no nn.Linear, which is to get an adapter."""

    module: nn.Module
    parameter: str


class Parameters(NamedTuple):
    """Those to adapt, in the model's order."""

    names: dict[ParameterTarget, list[str]]
    times: dict[ParameterTarget, int]  # how many times the config's rank and lora_alpha each has by default


def find_parameters(
    config: LoRAConfig,
    names: dict[nn.Module, list[str]],
    saved: set[nn.Module],
    meant: Mapping[Any, int],
) -> Parameters:
    """The parameters that ``target_parameters`` names, and those that "all-linear" has ``meant``, if they can have
    adapters.

    Raises:
        ValueError: an entry that matches nothing, a parameter that cannot have an adapter; dropout or DoRA.
    """
    own = {
        ParameterTarget(module, key): [f"{name}.{key}" for name in module_names]
        for module, module_names in names.items()
        for key, p in module._parameters.items()
        if p is not None
    }
    left = matching("exclude_modules", config.exclude_modules, names) | saved if meant else saved
    times = {t: meant[t] for t, full in own.items() if t in meant and t.module not in left and len(full) == 1}
    check_adapters(config, (own[t][0] for t in times))
    found: dict[ParameterTarget, list[str]] = {}
    for entry in config.target_parameters or ():
        hits = {t: full for t, full in own.items() if any(f".{name}".endswith(f".{entry}") for name in full)}
        if not hits:
            raise ValueError(f"target_parameters: {entry!r} matches no parameter")
        found |= hits
    unfit = []
    for (module, key), full in found.items():
        if why := why_not_adapted(module, key):
            unfit.append(f"{full[0]}: {why}")
        elif len(full) > 1 or module in saved:
            unfit.append(f"{full[0]}: its module {'is in several places' if len(full) > 1 else 'is to be saved'}")
    if unfit:
        raise ValueError(f"target_parameters: cannot adapt {some(unfit)}")
    chosen = {target: full for target, full in own.items() if target in found or target in times}
    return Parameters(chosen, {target: times.get(target, 1) for target in chosen})


def _why_not(module: nn.Module, parents: list[nn.Module]) -> str | None:
    """Why a LoRALinear, or a LoRAEmbedding, could not stand in for the module in this place, in words."""
    if getattr(module, "_is_fsdp_managed_module", False) or is_sharded(getattr(module, "weight", None)):
        return "is sharded (by FSDP or tensor parallelism): add or load the adapter first, then shard the model"
    if zero3.splits(module):
        way = "add or load the adapter first, then make the engine, or let PEFT add it (patch_peft)"
        return f"{zero3.PARTITIONED}: {way}"
    if "_hf_hook" in vars(module):
        return "is dispatched by accelerate: add or load the adapter first, then dispatch or offload the model"
    if why := why_no_embedding(module) if isinstance(module, nn.Embedding) else why_not_lora(module):
        return why
    if any(map(is_compiled, parents)):
        return "is compiled by itself: torch.compile's wrapper would go on calling the layer without an adapter"
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
        return (
            "is in an nn.TransformerEncoderLayer, whose inference fast path reads the weight and would skip the adapter"
            " (call torch.backends.mha.set_fastpath_enabled(False) first)"
        )
    return None


def matching(argument: str, patterns: str | Collection[str] | None, names: Mapping[Target, list[str]]) -> set[Target]:
    """The targets that a regex (a string) or full names or suffixes (a list) stand for; each entry must match."""
    found: set[Target] = set()
    for entry in [patterns] if isinstance(patterns, str) else patterns or []:
        hits = {
            target
            for target, own in names.items()
            for name in own
            if (re.fullmatch(entry, name) if isinstance(patterns, str) else f".{name}".endswith(f".{entry}"))
        }
        if not hits:
            known = [own[0] for target, own in names.items() if is_linear(getattr(target, "base_layer", target))]
            raise ValueError(f"{argument}: {entry!r} matches nothing (linear layers: {some(known) or 'none'})")
        found |= hits
    return found


def holders(model: nn.Module) -> Counter[int]:
    """{id of a parameter: how many modules hold it}: more than one for a tied weight."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def resolve_pattern(
    argument: str,
    pattern: dict[str, Any],
    default: Any,
    targets: Collection[Target],
    names: Mapping[Target, list[str]],
    times: Mapping[Any, int] = MappingProxyType({}),
) -> dict[Target, Any]:
    """r or lora_alpha of each target, by default so many ``times`` the default; ValueError if a key stands for none of
    them."""
    values = {target: default * times.get(target, 1) for target in targets}
    for key, value in reversed(pattern.items()):  # the first key that matches wins
        hits = [m for m in targets if any(re.match(SUFFIX.format(key), name) for name in names[m])]
        if not hits:
            raise ValueError(f"{argument}: {key!r} matches none of the converted layers")
        values.update(dict.fromkeys(hits, value))
    return values


def some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
