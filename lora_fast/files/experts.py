"""Adapters of experts in PEFT's files: which tensors are whose.

PEFT wraps a module once for each of its parameters that has an adapter, in the module's order, and names the tensors by
the nesting: the last parameter's are the module's own, ``X.lora_A.weight``, those of the one before
``X.base_layer.lora_A.weight``. So of one parameter alone the name does not say which it is, but the config's
``target_parameters`` does.
"""

from collections.abc import Collection

from torch import nn

from lora_fast.experts.known import form_of, frozen_of, is_experts
from lora_fast.layers.experts import CHILD
from lora_fast.wrappers.names import plain_modules

BASE = ".base_layer"


def layer_of(parameter: str) -> str:
    """The name of the adapter (:class:`lora_fast.layers.experts.ExpertsLoRA`) of a parameter."""
    owner, _, key = parameter.rpartition(".")
    return f"{owner}.{CHILD}{key}"


def parameter_of(layer: str) -> str:
    """The reverse of :func:`layer_of`."""
    owner, _, child = layer.rpartition(".")
    return f"{owner}.{child.removeprefix(CHILD)}"


def wrappers_of(model: nn.Module, parameters: Collection[str]) -> dict[str, str]:
    """{parameter of experts: the name of PEFT's wrapper for it}, where these are the ones with adapters."""
    found = {}
    for name, module in plain_modules(model):
        own = [full for key in module._parameters if (full := f"{name}.{key}") in parameters]
        found.update({full: name + BASE * (len(own) - 1 - i) for i, full in enumerate(own)})
    return found


def targeted(model: nn.Module, target_parameters: Collection[str]) -> list[str]:
    """The parameters of experts that target_parameters means, as PEFT reads it.

    Raises:
        ValueError: an entry that means none.
    """
    names = [
        f"{name}.{key}"
        for name, module in plain_modules(model)
        if is_experts(module)
        for key, p in module._parameters.items()
        if p is not None
    ]
    for entry in target_parameters:
        if not any(_ends(name, entry) for name in names):
            raise ValueError(
                f"target_parameters: {entry!r:.200} names no parameter of experts in this model (lora-fast merge does "
                "not reach experts: load_adapter into the model and merge_lora do; PEFT adapts other parameters, too)"
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
    form = form_of(module)
    if isinstance(form, str):
        return form
    weight = {"gate_up_proj": frozen_of(module).gate_up, "down_proj": frozen_of(module).down}.get(key)
    if weight is None:
        return f"{key} is no projection"
    experts, n, k = weight.shape
    n, k = (k, n) if form.transposed else (n, k)
    return [experts * r, k], [n, r * experts]


def _ends(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")
