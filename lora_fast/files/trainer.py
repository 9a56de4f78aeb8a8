"""Checkpoints of transformers' Trainer that hold the adapter alone: :func:`checkpoint_adapters_only`."""

import os
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from lora_fast.files.adapter import save_adapter
from lora_fast.files.writing import safetensors_or_raise
from lora_fast.layers.named import CHILD
from lora_fast.models.adapters import lora_layers, named_linears, names_in
from lora_fast.models.state import lora_state_dict

WEIGHTS = "model.safetensors"  # what Trainer reads when it resumes, and the best model from


def checkpoint_adapters_only(model: nn.Module) -> None:
    """Let ``model.save_pretrained(directory)`` write the adapter alone, as that of a ``PeftModel`` does, so that
    Trainer's checkpoints do not hold the base. Call it after :func:`lora_fast.add_lora`; ``model`` is transformers'.

    A checkpoint then has the adapter in PEFT's format (:func:`lora_fast.save_adapter`'s two files), and once more, by
    the model's own names, as the ``model.safetensors`` that Trainer looks for: ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read that into the model, whose base is there already. (Trainer then logs the names of
    the base as missing; they are meant to be.) It has no ``config.json``: it is no model by itself. Of adapters with
    names PEFT's two files hold the active one, ``model.safetensors`` all of them; add these before you resume.

    Not for FSDP and DeepSpeed, which Trainer saves in ways of their own.

    Raises:
        TypeError: not a module of transformers' (Trainer calls save_pretrained of these alone).
        ValueError: no LoRA layer.
    """
    lora_layers(model)
    if not callable(getattr(model, "save_pretrained", None)):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers model, with save_pretrained")
    vars(model)["save_pretrained"] = MethodType(_save_adapter_alone, model)


def _save_adapter_alone(model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Trainer's call: only from the process that is to write."""
    save_adapter(model, save_directory)
    tensors = {name: tensor.contiguous().clone() for name, tensor in _own_tensors(model).items()}
    safetensors_or_raise("torch").save_file(tensors, Path(save_directory) / WEIGHTS, metadata={"format": "pt"})


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of all adapters, as the model's own state dict names them."""
    if not named_linears(model):
        return lora_state_dict(model)
    found = {}
    for name in names_in(model):
        for key, tensor in lora_state_dict(model, name).items():
            layer, _, last = key.rpartition(".")
            found[f"{layer}.{CHILD}{name}.{last}"] = tensor
    return found
