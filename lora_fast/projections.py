"""Parameters that project as an ``nn.Linear``'s weight does and belong to none: what no adapter of ours can reach."""

import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import nn

OTHERS = ("embed", "norm", "bias", "token", "position")  # in the name of a class or parameter that does not project


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of fused experts [E, N, K], routers, transformers' ``Conv1D``, the q, k and v of an
    ``nn.MultiheadAttention``, as far as names and shapes tell."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and _projects(module, name, parameter)
    }


def _projects(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    kind, shape = type(module), parameter.shape
    words = f"{kind.__name__} {name}".lower()
    if (
        isinstance(module, (nn.Linear, nn.Embedding))
        or any(word in words for word in OTHERS)
        or min(shape, default=0) < 2
    ):
        return False
    if kind.__module__.startswith("torch.nn."):  # convolutions, recurrent layers...
        return len(shape) == 2 and "proj" in name
    return len(shape) == 3 or (len(shape) == 2 and (name == "weight" or "proj" in name))


def missed_by(model: nn.Module, target_modules: str | Collection[str] | None) -> list[str]:
    """The names of those that stay frozen though ``target_modules`` speaks of them: "all-linear" does of all."""
    found = [name for name, parameter in projections(model).items() if not parameter.requires_grad]
    if isinstance(target_modules, str):
        everything = target_modules.lower() == "all-linear"
        return [name for name in found if everything or re.fullmatch(target_modules, name)]
    return [name for name in found if any(f".{name}".endswith(f".{entry}") for entry in target_modules or ())]


def patterns(names: Iterable[str]) -> list[str]:
    """The names, those that differ in numbers alone as one, with their count."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
