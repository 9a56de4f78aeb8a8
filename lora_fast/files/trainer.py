"""Checkpoints of transformers' Trainer that hold the adapter alone: :func:`checkpoint_adapters_only`."""

import os
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from lora_fast.files.adapter import save_adapter
from lora_fast.files.writing import safetensors_or_raise
from lora_fast.models.adapters import lora_layers
from lora_fast.models.state import lora_state_dict

WEIGHTS = "model.safetensors"  # what Trainer reads when it resumes, and the best model from


def checkpoint_adapters_only(model: nn.Module) -> None:
    """Let ``model.save_pretrained(directory)`` write the adapter alone, as that of a ``PeftModel`` does, so that
    Trainer's checkpoints do not hold the base. Call it after :func:`lora_fast.add_lora`; ``model`` is transformers'.

    A checkpoint then has the adapter in PEFT's format (:func:`lora_fast.save_adapter`'s two files), and once more, by
    the model's own names, as the ``model.safetensors`` that Trainer looks for: ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read that into the model, whose base is there already. (Trainer then logs the names of
    the base as missing; they are meant to be.) It has no ``config.json``: it is no model by itself.

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
    tensors = {name: tensor.contiguous().clone() for name, tensor in lora_state_dict(model).items()}
    safetensors_or_raise("torch").save_file(tensors, Path(save_directory) / WEIGHTS, metadata={"format": "pt"})
