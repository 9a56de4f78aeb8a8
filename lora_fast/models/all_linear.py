"""What "all-linear" also means to PEFT: parameters that were ``nn.Linear`` layers in transformers 4."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_fast.layers.experts import why_not_adapted
from lora_fast.models.config import LoRAConfig
from lora_fast.models.projections import patterns
from lora_fast.wrappers.names import unwrapped

Target = tuple[nn.Module, str]  # a module and a parameter of its own

FAMILIES = ("mixtral", "qwen2_moe")  # whose experts and routers these are to PEFT 0.21
# {last parts of the parameter's name: how many layers it was}: of so many times the rank and lora_alpha.
LAYERS = {"gate_up_proj": 2, "down_proj": 1, "gate.weight": 1}


def is_all_linear(target_modules: Any) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def layers_before(model: nn.Module, config: LoRAConfig, names: Mapping[nn.Module, list[str]]) -> dict[Target, int]:
    """{(module, parameter): how many layers it was}, of what the config so means and what can have an adapter."""
    if not is_all_linear(config.target_modules) or not _is_of_families(unwrapped(model)):
        return {}
    return {
        (module, key): count
        for module, own in names.items()
        for key, p in module._parameters.items()
        for end, count in LAYERS.items()
        if p is not None and f".{own[0]}.{key}".endswith(f".{end}") and why_not_adapted(module, key) is None
    }


def check_adapters(config: LoRAConfig, parameters: Iterable[str]) -> None:
    """Raise ValueError where parameters that "all-linear" means are to have what adapters of parameters cannot."""
    means = ", ".join(patterns(parameters))
    for name, given in (("lora_dropout", config.lora_dropout), ("use_dora", config.use_dora)):
        if given and means:
            raise ValueError(
                f'{name}: got {given!r}, expected none with target_modules="all-linear", which also means {means} '
                "(exclude_modules leaves modules out)"
            )


def _is_of_families(model: nn.Module) -> bool:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return kind in FAMILIES or known.get(kind) in FAMILIES
