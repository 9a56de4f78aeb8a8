"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in one directory."""

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fast.files.fitting import Adapter, fit_adapter
from lora_fast.files.format import (
    CONFIG,
    PREFIX,
    TENSORS,
    Settings,
    inside,
    parse,
    read_config,
    settings_of,
)
from lora_fast.files.header import check_header
from lora_fast.files.parameters import parameter_of, target_parameters, wrappers_of
from lora_fast.files.pattern_keys import pattern_of
from lora_fast.files.writing import safetensors_or_raise, write_adapter
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.models.adapters import SAVED, TRAINED, lora_layers
from lora_fast.models.state import state_at_hand
from lora_fast.models.targets import some
from lora_fast.models.ties import refuse_shared, saved_places, under_every_name
from lora_fast.wrappers.gather import at_hand, whole
from lora_fast.wrappers.names import plain_modules, unwrapped


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write the adapter of ``model`` into ``directory`` in PEFT's format, which PEFT, transformers and vLLM read: of
    several the one of this ``name``, or the active one. The file does not hold the name.

    Saved is what :func:`lora_state_dict` gives: adapters, and the biases and modules_to_save that train; where these
    are tied to other modules, these modules too, so that PEFT, which trains copies, computes the same. Both files are
    written in full beside the old ones before they take their places, so that a save that is cut short leaves an
    adapter that was there as it was.

    Wrappers in the model or around it (torch.compile, DistributedDataParallel, checkpoint_wrapper, ...) leave no trace
    in the names. Of a sharded model (FSDP, tensor parallelism) all processes call this together, since the tensors are
    gathered for it; each of them writes the whole adapter, into the same directory or one of its own. What accelerate
    has offloaded, to the CPU or to disk, is read from there.

    Raises:
        ValueError: no LoRA layer, no adapter of this name; layers that differ in use_rslora or in being DoRA, or
            modules_to_save tied to the model itself or to a module with adapters inside, or a layer in several places,
            which the format cannot say; a model that is itself a LoRA layer; tensors without data (on the meta device).
        ImportError: without safetensors.
    """
    safetensors_or_raise("torch")
    _, tensors, config = in_peft_format(model, name)
    write_adapter(directory, tensors, config)


def in_peft_format(
    model: nn.Module, name: str | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """(layers with adapters, tensors by their names in PEFT's file, its config) of a model; raises as
    :func:`save_adapter`."""
    layers = lora_layers(model, name=name)
    if len({(layer.use_dora, layer.use_rslora) for layer in layers.values()}) > 1:
        raise ValueError("model: has layers that differ in use_dora or use_rslora, expected one adapter of one kind")
    if "" in layers:
        raise ValueError("model: is itself a LoRA layer, for which the format has no name; put it into a module first")
    refuse_shared(model, layers)
    with at_hand(model) as lent:
        saved = saved_places(model)
        state = under_every_name(model, saved, state_at_hand(model, name))
        if missing := [key for key, tensor in state.items() if tensor.is_meta]:
            raise ValueError(f"model: {some(missing)}: on the meta device, without data to save")
        state = {key: whole(tensor).clone() if lent else whole(tensor) for key, tensor in state.items()}
    parameters = {place: parameter_of(place) for place, layer in layers.items() if isinstance(layer, ParameterLoRA)}
    wrappers = wrappers_of(model, parameters.values())
    tensors = {}
    for key, tensor in state.items():
        owner, _, last = key.rpartition(".")
        if owner in parameters:
            owner, last = wrappers[parameters[owner]], f"{last}.weight"
        elif owner in layers:
            last = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}.get(last, last)
            last = f"base_layer.{last}" if last == "bias" else last
        tensors[f"{PREFIX}{owner}.{last}" if owner else PREFIX + last] = tensor.contiguous()
    if misread := _taken_for_experts(unwrapped(model), [place for place in layers if place not in parameters]):
        warnings.warn(
            f"save_adapter: {some(misread)}: beside transformers 5, PEFT takes adapters of layers so named for ones of "
            "the model's fused experts, and gives these layers none. load_adapter and lora-fast merge read the file "
            "rightly; for PEFT leave these layers out (exclude_modules)",
            stacklevel=3,
        )
    return layers, tensors, _config_of(unwrapped(model), layers, saved)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Put the adapter in ``directory`` (ours or PEFT's: LoRA, DoRA, rank-stabilised, with patterns) into ``model``.

    A model without LoRA layers is converted first, exactly where the adapter has tensors; one that has them must have
    them there, of the same rank, and takes lora_alpha and use_rslora over. Returns ``model``.

    With a ``name`` it is the adapter of this name that is loaded into, or that comes beside others, as with
    :func:`lora_fast.add_lora`, which only nn.Linear layers take; without one, of several the active adapter.

    Wrappers in the model or around it (torch.compile, DistributedDataParallel, checkpoint_wrapper, ...) stand in no
    name. A sharded or offloaded model must have LoRA layers already, and takes the adapter as
    :func:`lora_fast.load_lora_state_dict` does: load first, then shard or offload, where there is a choice.

    A module of modules_to_save that is tied to something for which the adapter holds other values or none (PEFT trains
    an untied copy) is no longer tied afterwards, which a warning says; in a model that has LoRA layers already that is
    an error.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: they are not what they should be or do not fit the model, or this has no data to load into (it is
            on the meta device, or offloaded to disk); the message says what. The model is then as it was.
        ImportError: without safetensors.
    """
    with at_hand(model, write=True):
        fit_adapter(model, read_adapter(model, directory), with_data=True, name=name)
    return model


@contextmanager
def open_adapter(directory: str | os.PathLike[str]) -> Iterator[tuple[Settings, Any]]:
    """(settings, safetensors' handle of the tensors) of an adapter in PEFT's format.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load_adapter`, about the files by themselves.
    """
    safe_open = safetensors_or_raise("").safe_open
    folder = Path(directory)
    settings = read_config(inside(folder, CONFIG))
    path = inside(folder, TENSORS)
    try:
        opened = safe_open(path, "pt")
    except Exception as error:  # safetensors has an error class of its own for each version
        raise ValueError(f"{TENSORS}: is no safetensors file: {error}") from None
    with opened as file:
        written = (file.metadata() or {}).get("adapter_config")
        if written is not None and settings_of(parse(written, TENSORS)) != settings:
            raise ValueError(f"{CONFIG}: does not fit {TENSORS}, which was saved with another one")
        yield settings, file


def read_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Adapter:
    """The adapter in ``directory``, compared with ``model``, which is not changed and may be on the meta device.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`load_adapter`, about the files and their fit.
    """
    with open_adapter(directory) as (settings, file):
        ranks, alphas, sources = check_header(model, settings, file)
        state = {own: file.get_tensor(key) for own, key in sources.items()}
    if bad := [sources[own] for own, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise ValueError(f"{TENSORS}: {some(bad)}: elements that are not finite")
    return Adapter(settings, ranks, alphas, state)


def _config_of(model: nn.Module, layers: dict[str, Any], saved: list[str]) -> dict[str, Any]:
    first = next(iter(layers.values()))
    linears = {name for name, layer in layers.items() if not isinstance(layer, ParameterLoRA)}
    parameters = {parameter_of(name) for name in layers.keys() - linears}
    names = {name: name if name in linears else parameter_of(name) for name in layers}
    ranks = {names[name]: layer.r for name, layer in layers.items()}
    alphas = {names[name]: plain_number(layer.lora_alpha) for name, layer in layers.items()}
    r, alpha = _commonest(ranks), _commonest(alphas)
    linear = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]
    with_biases = [module for module in model.modules() if vars(module).get(TRAINED) and SAVED not in vars(module)]
    biases = "lora_only" if all(isinstance(module, LoRALinear) for module in with_biases) else "all"
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "bias": biases if with_biases else "none",
        "target_modules": target_modules(model, linears) if linears else [],
        # An older PEFT does not know the name.
        **({"target_parameters": target_parameters(model, parameters)} if parameters else {}),
        "rank_pattern": pattern_of(ranks, r),
        "alpha_pattern": pattern_of(alphas, alpha),
        "modules_to_save": saved or None,
        "fan_in_fan_out": linear[-1].fan_in_fan_out if linear else False,  # PEFT's, which the last layer decides
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    }


def target_modules(model: nn.Module, converted: set[str]) -> list[str] | str:
    """target_modules that to PEFT mean these modules and no other, of whatever class: last parts of names, or full
    names, or a regex."""
    names = {name for name, _ in plain_modules(model) if name}
    for entries in ({name.rpartition(".")[2] for name in converted}, converted):
        if {name for name in names if not entries.isdisjoint(_ends(name))} == converted:
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(converted))


def _taken_for_experts(model: nn.Module, layers: list[str]) -> list[str]:
    """Those of the layers that PEFT takes for transformers 4's experts in a model whose experts transformers 5 fuses,
    by the ends of their names and whatever target_modules says."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if "transformers" not in sys.modules or kind is None or not any(p.dim() == 3 for p in model.parameters()):
        return []
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # no PEFT, or one before this, or transformers 4
        return []
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    old = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family) or ()
    return [layer for layer in layers if not set(old).isdisjoint(_ends(layer))]


def _ends(name: str) -> list[str]:
    """A name and its last parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _commonest(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def plain_number(number: float) -> float:
    return int(number) if float(number).is_integer() else number
