"""Adapters of experts as one pair of matrices for each expert and projection: what servers read."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast.experts.known import GATE_UP
from lora_fast.files.adapter import in_peft_format, plain_number
from lora_fast.files.format import PREFIX
from lora_fast.files.parameters import parameter_of, wrappers_of
from lora_fast.files.writing import write_adapter
from lora_fast.layers.experts import ExpertsLoRA
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.wrappers.names import plain_modules, unwrapped


def export_experts(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` into ``directory`` with those of experts apart, as they were before transformers
    fused experts and as vLLM and SGLang read them: ``...experts.{i}.gate_proj.lora_A.weight`` and so on.

    gate_proj and up_proj have the same lora_A, and each its rows of lora_B. Projections are called as in the model's
    checkpoint, as far as transformers says how (Mixtral's ``w1``, ``w2`` and ``w3``), else gate_proj, up_proj and
    down_proj. Servers read one rank and one ``lora_alpha`` of the whole adapter and no patterns: so all layers have the
    largest rank, smaller ones with zeros, and a scaling that is another one is in its lora_B. The rest is as
    :func:`lora_fast.save_adapter` has it.

    ``load_adapter`` does not read these files: save_adapter's are the ones to go on with.

    Raises:
        ValueError: no adapter of experts; what :func:`lora_fast.save_adapter` refuses.
        ImportError: without safetensors.
    """
    layers, tensors, config = in_peft_format(model)
    parameters = {name: parameter_of(name) for name, layer in layers.items() if isinstance(layer, ParameterLoRA)}
    experts = {parameters[name]: layer for name, layer in layers.items() if isinstance(layer, ExpertsLoRA)}
    if not experts:
        raise ValueError("model: has no adapters of experts; save_adapter writes the others")
    r0, rslora = config["r"], config["use_rslora"]
    scaling = config["lora_alpha"] / (math.sqrt(r0) if rslora else r0)
    scaling = scaling or next((layer.scaling for layer in layers.values() if layer.scaling), 0.0)
    wrappers, names = wrappers_of(model, parameters.values()), _names(unwrapped(model), experts)
    others = {name: layer for name, layer in layers.items() if not isinstance(layer, ExpertsLoRA)}
    others = {wrappers.get(parameters.get(name, ""), name): layer for name, layer in others.items()}
    r = max(layer.r for layer in layers.values())

    def put(name: str, keys: tuple[str, ...], pair: tuple[torch.Tensor, torch.Tensor], layer: Any) -> None:
        down, up = pair
        if layer.scaling != scaling:  # which is 0 only if all are
            up = (up.float() * (layer.scaling / scaling)).to(up.dtype)
        padded = F.pad(down, (0, 0, 0, r - layer.r)), F.pad(up, (0, r - layer.r))
        tensors.update({f"{PREFIX}{name}.{key}": t.contiguous() for key, t in zip(keys, padded, strict=True)})

    for name, layer in others.items():
        keys = tuple(key if "embedding" in key else f"{key}.weight" for key in layer.adapter_names[:2])
        down, up = (tensors.pop(f"{PREFIX}{name}.{key}") for key in keys)
        put(name, keys, (down, up), layer)
    apart = [name for own in names.values() for name in own]
    routers = [name for name in others if name in wrappers.values()]  # linear layers of transformers 4, as experts
    for parameter, layer in experts.items():
        a, b = (tensors.pop(f"{PREFIX}{wrappers[parameter]}.{part}.weight") for part in layer.adapter_names)
        for name, pair in zip(names[parameter], _apart(layer, a, b), strict=True):
            put(name, ("lora_A.weight", "lora_B.weight"), pair, layer)
    config.pop("target_parameters", None)
    config |= {
        "target_modules": _targets(model, config["target_modules"], routers + apart),
        "r": r,
        "lora_alpha": plain_number(scaling * (math.sqrt(r) if rslora else r)),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_adapter(directory, tensors, config)


def _apart(layer: ExpertsLoRA, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(lora_A [r, in], lora_B [out, r]) of each expert; of gate_up_proj the gate's and then up's."""
    downs = a.reshape(layer.experts, layer.r, -1)
    ups = b.reshape(len(b), layer.r, layer.experts)
    for expert, down in enumerate(downs):
        up = ups[..., expert]
        if layer.parameter != GATE_UP:
            parts = [up]
        else:
            parts = [up[::2], up[1::2]] if layer.form.interleaved else list(up.chunk(2))
        for part in parts:
            yield down.clone(), part


def _names(model: nn.Module, experts: dict[str, ExpertsLoRA]) -> dict[str, list[str]]:
    """{parameter: what its parts are called apart}, in the order of :func:`_apart`."""
    markers, parts, first = {}, {}, 0
    for parameter, layer in experts.items():
        halves = 2 if layer.parameter == GATE_UP else 1
        marks = torch.arange(first, first + layer.experts * halves).reshape(layer.experts, halves, 1).float()
        markers[parameter] = marks.mT if layer.form.transposed else marks
        parts[parameter] = range(first, first + marks.numel())
        first += marks.numel()
    found = _on_disk(model, markers)
    names = {}
    for parameter, own in parts.items():
        owner = parameter.rpartition(".")[0]
        projections = ["gate_proj", "up_proj"] if len(own) > experts[parameter].experts else ["down_proj"]
        plain = [f"{owner}.{i}.{name}" for i in range(experts[parameter].experts) for name in projections]
        names[parameter] = [found[mark] for mark in own] if found.keys() >= set(own) else plain
    return names


def _on_disk(model: nn.Module, markers: dict[str, torch.Tensor]) -> dict[int, str]:
    """{number: the module whose weight it becomes} when transformers saves the model with these weights; nothing of
    weights that stay fused."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    saved = revert_weight_conversion(model, dict(markers))
    return {int(t.item()): key.removesuffix(".weight") for key, t in saved.items() if t.numel() == 1}


def _targets(model: nn.Module, others: str | list[str], names: list[str]) -> list[str] | str:
    """target_modules that mean the others and these, and none of the model's other modules."""
    ends = {name.rpartition(".")[2] for name in names}
    taken = any(name.rpartition(".")[2] in ends for name, _ in plain_modules(model) if name not in names)
    own = sorted(names if taken else ends)
    if isinstance(others, str):
        return "|".join([others, *(rf"(?:.*\.)?{re.escape(name)}" for name in own)])
    return sorted({*others, *own})
