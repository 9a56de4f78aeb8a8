"""LoRAConfig, and the layers of a model that it stands for."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lora_fast.gather import is_sharded
from lora_fast.layers import _check_hyperparameters, check_base_dtype, why_not_lora
from lora_fast.projections import patterns as name_patterns
from lora_fast.projections import projections
from lora_fast.wrappers import is_compiled, unwrapped

_SUFFIX = r"(.*\.)?({})$"  # how PEFT reads a key of rank_pattern: it stands for a full name or its last parts


@dataclass
class LoRAConfig:
    """What :func:`add_lora` converts and how: the names and meanings of PEFT's ``LoraConfig``.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in :class:`lora_fast.LoRALinear`.
        base_dtype: None, or "float8_e4m3": the frozen weights of the converted layers become fp8
            (:class:`lora_fast.fp8.Fp8Weight`), one after the other, the original freed; one that is tied to another
            parameter stays as it is. remove_lora leaves them so.
        base_dtype_exclude: a list or a regex, as exclude_modules: converted layers that keep their weight as it is.
            None: all are quantised ("all-linear" leaves the output head out by itself).
        use_dora: convert to :class:`lora_fast.DoRALinear`, which also trains the lengths of the weight's rows.
        target_modules: a list of full module names or their last parts ("q_proj", "attn.q_proj"), a regex that must
            match the full name, or "all-linear": every ``nn.Linear`` but the model's ``get_output_embeddings()``. What
            projects and is no ``nn.Linear`` (fused experts) gets no adapter, and add_lora a warning that names it.
            A layer among them that no adapter can stand in for (of an ``nn.MultiheadAttention``, say) is an error.
        exclude_modules: a list or a regex, likewise: targets to leave alone.
        rank_pattern, alpha_pattern: {regex of a full name or its last parts: r or lora_alpha}; the first match wins.
        bias: the existing biases that train: "none", "lora_only" (those of the converted layers) or "all".
        modules_to_save: names or last parts of modules that train in full: in place, never converted, and saved with
            the adapter; so does what is tied to them. (PEFT trains a copy, untied without its
            ensure_weight_tying; here disabling or removing LoRA does not bring the original back.)

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | Literal["gaussian"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    base_dtype: str | None = None
    base_dtype_exclude: str | list[str] | None = None

    def __post_init__(self) -> None:
        _check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.init_lora_weights)
        if not isinstance(self.use_dora, bool):
            raise TypeError(f"use_dora: got {self.use_dora!r}, expected True or False")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias: got {self.bias!r}, expected "none", "all" or "lora_only"')
        _check_names("target_modules", self.target_modules)
        _check_names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: got {self.modules_to_save!r}, expected a list of module names")
        _check_names("modules_to_save", self.modules_to_save)
        check_base_dtype(self.base_dtype)
        _check_names("base_dtype_exclude", self.base_dtype_exclude)
        if self.base_dtype_exclude is not None and self.base_dtype is None:
            raise ValueError(f"base_dtype_exclude: got {self.base_dtype_exclude!r}, expected None without a base_dtype")
        for argument in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, argument)
            if not isinstance(pattern, dict):
                raise TypeError(f"{argument}: got {pattern!r}, expected a dict of regex to number")
            for key, value in pattern.items():
                _check_regex(argument, key, _SUFFIX)
                r, alpha = (value, 1) if argument == "rank_pattern" else (1, value)
                try:
                    _check_hyperparameters(r, alpha, 0.0, False, True)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{argument}[{key!r}]: {error}") from None


def find_targets(
    model: nn.Module, config: LoRAConfig, names: dict[nn.Module, list[str]], saved: set[nn.Module]
) -> dict[nn.Linear, None]:
    """The layers to convert, in the model's order; ValueError if there is none or one that cannot be."""
    patterns = config.target_modules
    if patterns is None:
        raise ValueError('target_modules: got None, expected a list of module names, a regex or "all-linear"')
    head: Any = None
    if isinstance(patterns, str) and patterns.lower() == "all-linear":
        found: set[nn.Module] = {module for module in names if isinstance(module, nn.Linear)}
        if callable(get_output_embeddings := getattr(unwrapped(model), "get_output_embeddings", None)):
            head = unwrapped(get_output_embeddings())
    else:
        found = matching("target_modules", patterns, names)
    excluded = matching("exclude_modules", config.exclude_modules, {m: names[m] for m in found})
    targets = [m for m in names if m in found and m not in excluded and m not in saved and m is not head]
    if not targets:
        others = some(name_patterns(projections(model)))
        hint = f" (it has projections that are no nn.Linear, which LoRA does not reach: {others})" if others else ""
        raise ValueError(f"target_modules: {patterns!r} leaves no layer to convert{hint}")
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    if unfit := [f"{names[m][0]} {why}" for m in targets if (why := _why_not(m, parents[m]))]:
        raise ValueError(f"target_modules: cannot convert {'; '.join(unfit)} (exclude_modules leaves layers out)")
    return {m: None for m in targets if isinstance(m, nn.Linear)}


def _why_not(module: nn.Module, parents: list[nn.Module]) -> str | None:
    """Why a LoRALinear could not stand in for the module in this place, in words."""
    if getattr(module, "_is_fsdp_managed_module", False) or is_sharded(getattr(module, "weight", None)):
        return "is sharded (by FSDP or tensor parallelism): add or load the adapter first, then shard the model"
    if "_hf_hook" in vars(module):
        return "is dispatched by accelerate: add or load the adapter first, then dispatch or offload the model"
    if why := why_not_lora(module):
        return why
    if any(map(is_compiled, parents)):
        return "is compiled by itself: torch.compile's wrapper would go on calling the layer without an adapter"
    if torch.backends.mha.get_fastpath_enabled() and any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
        return (
            "is in an nn.TransformerEncoderLayer, whose inference fast path reads the weight and would skip the adapter"
            " (call torch.backends.mha.set_fastpath_enabled(False) first)"
        )
    return None


def matching(
    argument: str, patterns: str | Collection[str] | None, names: dict[nn.Module, list[str]]
) -> set[nn.Module]:
    """The modules that a regex (a string) or full names or suffixes (a list) stand for; each entry must match."""
    found = set()
    for entry in [patterns] if isinstance(patterns, str) else patterns or []:
        hits = {
            module
            for module, own in names.items()
            for name in own
            if (re.fullmatch(entry, name) if isinstance(patterns, str) else f".{name}".endswith(f".{entry}"))
        }
        if not hits:
            known = [own[0] for module, own in names.items() if isinstance(module, nn.Linear)]
            raise ValueError(f"{argument}: {entry!r} matches nothing (nn.Linear layers: {some(known) or 'none'})")
        found |= hits
    return found


def holders(model: nn.Module) -> Counter[int]:
    """{id of a parameter: how many modules hold it}: more than one for a tied weight."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def resolve_pattern(
    argument: str, pattern: dict[str, Any], default: Any, targets: Collection[nn.Module], names: dict
) -> dict[nn.Module, Any]:
    """r or lora_alpha of each target; ValueError if a key stands for none of them."""
    values = dict.fromkeys(targets, default)
    for key, value in reversed(pattern.items()):  # the first key that matches wins
        hits = [m for m in targets if any(re.match(_SUFFIX.format(key), name) for name in names[m])]
        if not hits:
            raise ValueError(f"{argument}: {key!r} matches none of the converted layers")
        values.update(dict.fromkeys(hits, value))
    return values


def _check_names(argument: str, patterns: Any) -> None:
    if isinstance(patterns, str):
        _check_regex(argument, patterns)
    elif patterns is not None:
        if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(entry, str) for entry in patterns):
            raise TypeError(f"{argument}: got {patterns!r}, expected a list of module names")
        if not patterns or "" in patterns:
            raise ValueError(f"{argument}: got {patterns!r}, expected one module name or more, none of them empty")


def _check_regex(argument: str, pattern: Any, within: str = "{}") -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument}: got {pattern!r}, expected a regex as a string")
    try:
        re.compile(within.format(pattern))
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a valid regex: {error}") from None


def some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
