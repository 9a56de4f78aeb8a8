"""Adapters of parameters, of experts above all, in PEFT's files: which tensors are whose.

PEFT wraps a module once for each of its parameters that has an adapter, in the module's order, and names the tensors by
the nesting: the last parameter's are the module's own, ``X.lora_A.weight``, those of the one before
``X.base_layer.lora_A.weight``. So of one parameter alone the name does not say which it is, but the config's
``target_parameters`` does.
"""

from collections.abc import Collection

from torch import nn

from lora_fast.experts.known import DOWN, GATE_UP, form_of, is_experts
from lora_fast.layers.experts import why_not_adapted
from lora_fast.layers.parameters import CHILD
from lora_fast.wrappers.names import plain_modules

BASE = ".base_layer"


def layer_of(parameter: str) -> str:
    """The name of the adapter (:class:`lora_fast.layers.parameters.ParameterLoRA`) of a parameter."""
    owner, _, key = parameter.rpartition(".")
    return f"{owner}.{CHILD}{key}"


def parameter_of(layer: str) -> str:
    """The reverse of :func:`layer_of`."""
    owner, _, child = layer.rpartition(".")
    return f"{owner}.{child.removeprefix(CHILD)}"


def wrappers_of(model: nn.Module, parameters: Collection[str]) -> dict[str, str]:
    """{parameter: the name of PEFT's wrapper for it}, where these are the ones with adapters."""
    found = {}
    for name, module in plain_modules(model):
        own = [full for key in module._parameters if (full := f"{name}.{key}") in parameters]
        found.update({full: name + BASE * (len(own) - 1 - i) for i, full in enumerate(own)})
    return found


def targeted(model: nn.Module, target_parameters: Collection[str]) -> list[str]:
    """The parameters of modules that are no ``nn.Linear`` that target_parameters means, as PEFT reads it.

    Raises:
        ValueError: an entry that means none.
    """
    names = [
        f"{name}.{key}"
        for name, module in plain_modules(model)
        for key, p in module._parameters.items()
        if p is not None and (is_experts(module) or why_not_adapted(module, key) is None)
    ]
    for entry in target_parameters:
        if not any(_ends(name, entry) for name in names):
            raise ValueError(
                f"target_parameters: {entry!r:.200} names no parameter of experts or routers in this model (lora-fast "
                "merge does not reach them: load_adapter into the model and merge_lora do)"
            )
    return [name for name in names if any(_ends(name, entry) for entry in target_parameters)]


def target_parameters(model: nn.Module, converted: Collection[str]) -> list[str]:
    """target_parameters that to PEFT mean these parameters and no others: last parts of names, or full names."""
    names = [f"{name}.{key}" for name, module in plain_modules(model) for key in module._parameters]
    ends = {".".join(name.split(".")[-3:]) for name in converted}
    if {name for name in names if any(_ends(name, end) for end in ends)} == set(converted):
        return sorted(ends)
    return sorted(converted)


def shapes_of(module: nn.Module, key: str, r: int) -> tuple[list[int], list[int]] | str:
    """The shapes of lora_A and lora_B of rank r, or why there can be none."""
    weight = module._parameters.get(key)
    if weight is not None and weight.dim() == 2 and not is_experts(module):
        n, k = weight.shape
        return [r, k], [n, r]
    form = form_of(module)
    if isinstance(form, str):
        return form
    if key not in (GATE_UP, DOWN) or weight is None:
        return f"{key} is no projection"
    experts, n, k = weight.shape
    n, k = (k, n) if form.transposed else (n, k)
    return [experts * r, k], [n, r * experts]


def _ends(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")
