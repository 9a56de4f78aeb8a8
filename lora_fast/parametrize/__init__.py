"""minLoRA's way (https://github.com/cccntu/minLoRA): LoRA and DoRA as ``torch.nn.utils.parametrize`` parametrizations
of the ``weight`` of Linear, Conv2d and Embedding layers, several on one weight, in order, under different names.

A layer keeps its place and its kind; its ``weight`` is computed anew whenever it is read (``parametrize.cached()`` of
torch keeps it for a while). One fused kernel forms it, another gives the gradients. This costs a pass over W and the
rounding of the sum to W's dtype: where only ``nn.Linear`` is adapted, :func:`lora_fast.add_lora` is faster and as exact
as it gets. Every function returns the model, so that calls chain, and leaves it as it was if it raises.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fast.models.config import LoRAConfig
from lora_fast.models.targets import resolve_pattern
from lora_fast.parametrize import registry
from lora_fast.parametrize.adapters import DoRAParametrization, LoRAParametrization, check_name
from lora_fast.parametrize.registry import (
    KEY,
    adapted,
    below,
    check_model,
    own,
    parametrizations,
    register,
    restore,
    tie,
)
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.placement import keeper

__all__ = [
    "DoRAParametrization",
    "LoRAParametrization",
    "add_lora",
    "disable_lora",
    "enable_lora",
    "get_bias_params",
    "get_lora_params",
    "get_lora_state_dict",
    "get_params_by_name",
    "load_lora_state_dict",
    "merge_lora",
    "name_is_bias",
    "name_is_lora",
    "remove_lora",
    "select_lora",
    "tie_weights",
    "untie_weights",
]


ELSEWHERE = "bias", "modules_to_save", "target_parameters", "base_dtype", "base_compute", "base_dtype_exclude"


def add_lora(model: nn.Module, config: LoRAConfig | None = None, name: str = "default") -> nn.Module:
    """Parametrize the weights of the targeted layers, and freeze these weights (biases and other layers: yours).

    Layers whose weights are tied (one Parameter, the same adapters so far) share the adapter and stay tied.

    Args:
        model: a layer itself, or anything with layers in it.
        config: r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights, rank_pattern and alpha_pattern as
            in :class:`lora_fast.LoRAConfig`. target_modules None: every ``nn.Linear``; "all-linear": all but the
            model's ``get_output_embeddings()``; a list or a regex: those Linear, Conv2d and Embedding layers, of which
            each entry must match one; then without exclude_modules. No config: LoRAConfig().
        name: of this adapter. It comes after those that a layer has.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, another field than these in the config, a pattern
            that matches nothing; a model that FSDP1 wraps; a target that has an adapter of this name, is a LoRALinear,
            an Embedding with sparse=True or has no weight of floats.
    """
    check_model(model)
    check_name(name)
    if config is not None and not isinstance(config, LoRAConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a LoRAConfig or None")
    config = replace(config or LoRAConfig())  # its fields may have been assigned since it was checked
    for field in ELSEWHERE:
        if (value := getattr(config, field)) not in (None, "none"):
            raise ValueError(f"config: got {field}={value!r}, which only lora_fast.add_lora knows")
    if fsdp1.holds(model):
        raise ValueError("model: is wrapped by FSDP1 (FullyShardedDataParallel); call add_lora first, then wrap it")
    names = registry.targets(model, config, name)
    ranks = resolve_pattern("rank_pattern", config.rank_pattern, config.r, names, names)
    alphas = resolve_pattern("alpha_pattern", config.alpha_pattern, config.lora_alpha, names, names)
    kind = DoRAParametrization if config.use_dora else LoRAParametrization
    made: dict[tuple[int, ...], LoRAParametrization] = {}
    adapters: dict[nn.Module, LoRAParametrization] = {}
    for layer in names:
        key = tie(layer)
        if key not in made:
            rest = ranks[layer], alphas[layer], config.lora_dropout, config.use_rslora
            made[key] = kind.from_layer(layer, *rest, init_lora_weights=config.init_lora_weights, name=name)
        adapters[layer] = made[key]
    flags = {layer: any(p.requires_grad for p in below(layer)) for layer in names}
    # From here on nothing can fail.
    for layer, adapter in adapters.items():
        register(layer, adapter, flags[layer])
        for p in below(layer):
            p.requires_grad_(False)
    return model


def remove_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take the adapters (or the one of this name) out; weights are the base's again, bit for bit, and require grad if
    they did. ValueError without such adapters."""
    restore(adapted(model, name).values(), name)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Put what the enabled adapters make of each weight in its place, without dropout, and take all adapters out.

    For good: :func:`lora_fast.merge_lora` keeps the base. Tied layers stay tied. A weight that another layer shares
    without the adapters stays as it is there. ValueError without adapters, with parametrizations of another kind, or
    with weights in the keeping of FSDP or accelerate, which would put the old ones back.
    """
    layers, done = adapted(model), dict[tuple[int, ...], nn.Parameter]()
    for at, layer in layers.items():
        if len(own(layer)) < len(parametrizations(layer)):
            raise ValueError(f"model: {at or 'it'} has other parametrizations too, expected LoRA and DoRA alone")
        if who := keeper(layer):
            raise ValueError(f"model: {at or 'it'} has its weight in the keeping of {who}; merge before wrapping it")
        if tie(layer) not in done:
            [original] = below(layer)
            weight: torch.Tensor = original
            for adapter in own(layer):
                weight = adapter.adapted(weight) if adapter.enabled else weight
            done[tie(layer)] = original if weight is original else nn.Parameter(weight, requires_grad=False)
    restore(layers.values(), None, [done[tie(layer)] for layer in layers.values()])
    return model


def enable_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Let the adapters (or the one of this name) act. ValueError without such adapters."""
    return _switch(model, name, True)


def disable_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Let the adapters (or the one of this name) pass their weight through. ValueError without such adapters."""
    return _switch(model, name, False)


def select_lora(model: nn.Module, name: str) -> nn.Module:
    """Enable the adapters of this name and disable all others. ValueError if no layer has one."""
    check_name(name)
    _switch(model, name, True)
    for layer in adapted(model).values():
        for adapter in own(layer):
            adapter.enabled = adapter.name == name
    return model


def _switch(model: nn.Module, name: str | None, enabled: bool) -> nn.Module:
    for layer in adapted(model, name).values():
        for adapter in own(layer, name):
            adapter.enabled = enabled
    return model


def tie_weights(source: nn.Module, target: nn.Module) -> None:
    """Give the layer ``target`` (an embedding, say) the weight and the adapters of ``source`` (the head): the same
    tensors, so that both train as one. What target had is dropped.

    Raises:
        TypeError: not a Linear, Conv2d or Embedding.
        ValueError: weights of different shapes or dtypes; parametrizations of another kind.
    """
    for argument, layer in (("source", source), ("target", target)):
        registry.check_layer(argument, layer)
        if len(own(layer)) < len(parametrizations(layer)):
            raise ValueError(f"{argument}: has other parametrizations too, expected LoRA and DoRA alone")
    [old], [new] = below(target), below(source)
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise ValueError(
            f"target: got a weight {tuple(old.shape)} of {old.dtype}, expected source's "
            f"{tuple(new.shape)} of {new.dtype}"
        )
    if target is source:
        return
    flag = registry.required_grad(source)
    if own(target):
        restore([target])
    target.weight = new
    for adapter in own(source):
        register(target, adapter, flag)
    new.requires_grad_(flag and not own(source))


def untie_weights(layer: nn.Module) -> None:
    """Give the layer its own copies of its weight and adapters, which it shares from now on with none.

    Raises:
        TypeError: not a Linear, Conv2d or Embedding.
    """
    registry.check_layer("layer", layer)
    holder: Any = parametrizations(layer) or layer
    names = ["weight"] if holder is layer else [name for name, _ in holder.named_parameters(recurse=False)]
    for name in names:
        setattr(holder, name, copy.deepcopy(getattr(holder, name)))
    for i, parametrization in enumerate(parametrizations(layer)):
        holder[i] = copy.deepcopy(parametrization)


def name_is_lora(name: str) -> bool:
    """Whether a parameter of this full name belongs to an adapter."""
    return KEY.fullmatch(name) is not None


def name_is_bias(name: str) -> bool:
    """Whether a parameter of this full name is a bias."""
    return name.split(".")[-1] == "bias"


def get_params_by_name(model: nn.Module, name_filter: Callable[[str], bool]) -> Iterator[nn.Parameter]:
    """Iterate over the parameters whose full names the filter takes, each once."""
    check_model(model)
    return (p for name, p in model.named_parameters() if name_filter(name))


def get_bias_params(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the biases."""
    return get_params_by_name(model, name_is_bias)


def get_lora_params(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of the adapters (or of the one of this name), each once. ValueError without any."""
    adapters = dict.fromkeys(adapter for layer in adapted(model, name).values() for adapter in own(layer, name))
    return (getattr(adapter, tensor) for adapter in adapters for tensor in adapter.adapter_names)


def get_lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """The part of ``model.state_dict()`` that belongs to the adapters (or to the one of this name), detached but not
    copied: ``<layer>.parametrizations.weight.<position>.lora_A`` and so on. ValueError without such adapters."""
    return {key: tensor.detach() for key, tensor in registry.tensors(model, name).items()}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], name: str = "default") -> nn.Module:
    """Copy one adapter's tensors, as :func:`get_lora_state_dict` or minLoRA gave them (but for its Embeddings, whose A
    and B are swapped), into the adapter of this name, whatever its position now is.

    Raises:
        TypeError: not a mapping of tensors.
        ValueError: no such adapter; missing or unexpected keys, other shapes; tensors of two adapters.
    """
    check_name(name)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected a mapping of names to tensors")
    mine = {KEY.fullmatch(key).groups(): tensor for key, tensor in registry.tensors(model, name).items()}  # type: ignore[union-attr]
    found: dict[Any, torch.Tensor] = {}
    problems = []
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict[{key!r}]: got {type(tensor).__name__}, expected a tensor")
        match = KEY.fullmatch(key)
        place = match and match.groups()
        if place in found:
            problems.append(f"{key} is of a second adapter (get_lora_state_dict(model, name) gives one)")
        elif place not in mine:
            problems.append(f"unexpected {key}")
        elif tensor.shape != mine[place].shape or not tensor.is_floating_point():
            problems.append(
                f"{key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected "
                f"{tuple(mine[place].shape)} and floats"
            )
        found[place] = tensor
    problems += [f"missing {'.'.join(filter(None, place))}" for place in mine if place not in found]
    if problems:
        raise ValueError(f"state_dict: does not fit the adapter {name!r}: " + "; ".join(problems))
    for place, tensor in mine.items():
        tensor.copy_(found[place])
    return model
