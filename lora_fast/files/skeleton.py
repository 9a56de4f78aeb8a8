"""A model's names and shapes without its data: what an adapter on disk is compared with when no model is at hand."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lora_fast.files.adapter import open_adapter
from lora_fast.files.format import CONFIG, PREFIX

MAX_DEPTH = 64  # more than any model nests its modules


def like(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A tensor without data, of the kind (floating or not) that safetensors calls ``dtype``.

    Raises:
        ValueError: a shape that no tensor can have.
    """
    floating = dtype.startswith(("F", "BF"))
    try:
        return torch.empty(list(shape), device="meta", dtype=torch.float32 if floating else torch.int64)
    except (RuntimeError, TypeError):  # too large; zeros in it hide that from safetensors
        raise ValueError(f"{list(shape)!r:.200} is no shape of a tensor") from None


def skeleton(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Modules on the meta device whose state dict has these names and shapes: an ``nn.Linear`` for every
    two-dimensional ``weight``, else bare modules with parameters.

    Raises:
        ValueError: a name that no state dict has.
    """
    root = nn.Module()
    for name in sorted(tensors, key=lambda name: (name.count("."), name)):  # owners before what is inside them
        *path, last = name.split(".")
        if len(path) > MAX_DEPTH or not all((*path, last)):
            raise ValueError(f"{name!r:.200} is no name of a tensor in a model")
        owner = root
        for i, part in enumerate(path, 1):
            if part not in owner._modules:  # by hand: add_module refuses names that are also methods
                weight = tensors.get(".".join((*path, "weight"))) if i == len(path) else None
                is_linear = weight is not None and weight.dim() == 2
                owner._modules[part] = _linear(path, tensors) if is_linear else nn.Module()
            owner = owner._modules[part]  # type: ignore[assignment]
        if owner._parameters.get(last) is None:
            owner._parameters[last] = nn.Parameter(tensors[name], requires_grad=False)
    return root


def skeleton_of_adapter(directory: str | os.PathLike[str]) -> nn.Module:
    """The layers that the adapter in ``directory`` was made for, as far as its own file tells.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`lora_fast.load_adapter`, about the files by themselves.
    """
    with open_adapter(directory) as (settings, file):
        if settings.target_parameters:
            raise ValueError(f"{CONFIG}: target_parameters: adapters of experts can only be compared with the model")
        slices = {key.removeprefix(PREFIX): file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        found = {name: like(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    tensors = {}
    for name, tensor in found.items():
        layer = name.removesuffix(".lora_A.weight")
        other = found.get(f"{layer}.lora_B.weight")
        if layer != name and tensor.dim() and other is not None and other.dim():
            tensors[f"{layer}.weight"] = like([other.shape[0], tensor.shape[-1]], "F32")
            continue
        owner, _, last = name.rpartition(".")
        if owner.endswith((".modules_to_save", ".original_module")):
            continue  # copies of a bias that PEFT also writes
        owner = owner.removesuffix(".base_layer") if last == "bias" else owner
        tied = settings.ensure_weight_tying and last == "weight"  # beside what modules_to_save names
        saved = tied or any(f"{entry}." in f"{owner}." for entry in settings.modules_to_save)
        if owner and (saved or (last == "bias" and settings.bias != "none")):
            tensors[f"{owner}.{last}"] = tensor
    return skeleton(tensors)


def _linear(path: list[str], tensors: Mapping[str, torch.Tensor]) -> nn.Linear:
    n, k = tensors[".".join((*path, "weight"))].shape
    bias = tensors.get(".".join((*path, "bias")))
    return nn.Linear(k, n, bias=bias is not None and bias.dim() == 1, device="meta").requires_grad_(False)
