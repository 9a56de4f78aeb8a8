"""What of a model has adapters: its layers, their tensors, the one of several that is meant; switching them off."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fast.layers.embedding import LoRAEmbedding
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.named import InNamedLinear, NamedLinear
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.layers.replacing import lost
from lora_fast.models.targets import some
from lora_fast.wrappers.gather import identities
from lora_fast.wrappers.names import plain_modules

LAYERS = LoRALinear, LoRAEmbedding, ParameterLoRA  # what has an adapter
DEFAULT = "default"  # the name of one that was given none

# What add_lora notes on the modules it met, in each one's __dict__: so it follows deepcopy, pickle and wrappers.
BEFORE = "_before_lora"  # {parameter name: requires_grad before add_lora}, for remove_lora
TRAINED = "_trained_with_lora"  # names of own tensors that train and are saved beside lora_A and lora_B
SAVED = "_saved_with_lora"  # present where modules_to_save trains a module that has tensors of its own

Layer = LoRALinear | LoRAEmbedding | ParameterLoRA


def lora_parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """Iterate over lora_A [r, in], lora_B [out, r] (of embeddings lora_embedding_A [r, num_embeddings],
    lora_embedding_B [embedding_dim, r]) and, of DoRA layers, lora_magnitude_vector [out], layer by layer: of all
    adapters, or of the one of this name.

    Raises:
        ValueError: no LoRA layers, no adapter of this name.
    """
    if name is None:
        check_adapted(model)
        layers = [one for layer in standing(model).values() for one in _adapters_of(layer).values()]
    else:
        layers = list(lora_layers(model, name=name).values())
    return iter([getattr(layer, own) for layer in layers for own in layer.adapter_names])


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Within ``with disable_lora(model):`` every layer gives its base's output; then each is as it was before.

    Biases and modules_to_save that were trained stay as trained. ValueError without LoRA layers.
    """
    check_adapted(model)
    enabled = [layer for layer in standing(model).values() if layer.enabled]
    try:
        for layer in enabled:
            layer.disable()
        yield
    finally:
        for layer in enabled:
            layer.enable()


def standing(model: nn.Module) -> dict[str, Any]:
    """{name: what stands in the model for a module that was adapted}: a layer with one adapter, a NamedLinear with any
    number, or a parameter's adapter."""
    kinds = (*LAYERS, NamedLinear)
    return {
        name: module
        for name, module in plain_modules(model)
        if isinstance(module, kinds) and not isinstance(module, InNamedLinear)
    }


def named_linears(model: nn.Module) -> dict[str, NamedLinear]:
    """{name: layer with adapters under names}"""
    return {name: layer for name, layer in standing(model).items() if isinstance(layer, NamedLinear)}


def names_in(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which its layers have them."""
    return list(dict.fromkeys(name for layer in standing(model).values() for name in _adapters_of(layer)))


def _adapters_of(layer: Any) -> dict[str, Any]:
    return layer.adapters if isinstance(layer, NamedLinear) else {DEFAULT: layer}


def check_adapted(model: nn.Module, complete: bool = True) -> None:
    """Raise TypeError, ValueError: no module, no LoRA layers, or (``complete``) some were replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if complete and (gone := lost(model)):
        raise ValueError(
            f"model: has lost adapters: other layers took the places of LoRA layers ({some(gone)}); "
            "convert or quantise the model before add_lora"
        )
    if not standing(model):
        raise ValueError("model: has no LoRA layers; call add_lora first")


def lora_layers(model: nn.Module, complete: bool = True, name: str | None = None) -> dict[str, Layer]:
    """{name of the layer: the layer, or a parameter's adapter} of the adapter of this name, or of the active one.

    Raises:
        TypeError, ValueError: as :func:`check_adapted`; no adapter of this name, or no layer of the active one.
    """
    check_adapted(model, complete)
    found = {}
    for place, layer in standing(model).items():
        adapters = _adapters_of(layer)
        active = layer.choice.active if isinstance(layer, NamedLinear) else DEFAULT
        wanted = active if name is None else name
        if wanted in adapters:
            found[place] = adapters[wanted]
    if not found:
        names = " or ".join(map(repr, names_in(model)))
        if name is None:
            raise ValueError(f"model: has no layer of the active adapter, {active!r}; give a name: {names}")
        raise ValueError(f"name: got {name!r}, expected {names}")
    return found


def adapter_tensors(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """Each tensor of the adapter of this name, or of the active one, once, under its first name."""
    layers = lora_layers(model, name=name)
    tensors: dict[str, torch.Tensor] = {}
    for owner, module in plain_modules(model):
        layer: Any = layers.get(owner)
        trained = [(own, module) for own in vars(module).get(TRAINED, ())]
        for own, holder in [*((own, layer) for own in (layer.adapter_names if layer else ())), *trained]:
            tensors[f"{owner}.{own}" if owner else own] = getattr(holder, own)
    first: dict[Hashable, str] = {}
    for full, key in identities(model, tensors).items():
        first.setdefault(key, full)
    return {full: tensors[full] for full in first.values()}
