"""Parameters that project as an ``nn.Linear``'s weight does and belong to none: what no adapter of ours can reach."""

import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import nn

from lora_fast.blocks.recognise import is_conv1d
from lora_fast.layers.parameters import CHILD, is_torchs
from lora_fast.wrappers.names import plain_modules

Patterns = str | Collection[str] | None

# In the name of a class or parameter that does not project.
OTHERS = ("embed", "norm", "bias", "token", "position", "_log", "_scale")


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of fused experts [E, N, K] and routers, as far as names and shapes tell."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in plain_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and _projects(module, name, parameter)
    }


def _projects(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    if is_torchs(module) or is_conv1d(module):
        return False  # linear, which can have an adapter, or one of torch's other layers
    words = f"{type(module).__name__} {name}".lower()
    if f"{CHILD}{name}" in module._modules:
        return False  # has an adapter
    if any(word in words for word in OTHERS) or isinstance(parameter, nn.UninitializedParameter):
        return False
    shape = parameter.shape
    if len(shape) not in (2, 3) or min(shape) < 2:
        return False
    return len(shape) == 3 or name == "weight" or "proj" in name


def missed_by(model: nn.Module, target_modules: Patterns, exclude_modules: Patterns = None) -> list[str]:
    """The names of those that stay frozen though ``target_modules`` speaks of them, "all-linear" of all, and
    ``exclude_modules`` does not speak of their modules."""
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    return [
        name
        for name, parameter in projections(model).items()
        if not parameter.requires_grad
        and (everything or _speak_of(target_modules, name))
        and not _speak_of(exclude_modules, name.rpartition(".")[0])
    ]


def _speak_of(entries: Patterns, name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(f".{name}".endswith(f".{entry}") for entry in entries or ())


def patterns(names: Iterable[str]) -> list[str]:
    """The names, those that differ in numbers alone as one, with their count."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
