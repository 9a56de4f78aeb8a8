"""A whole fp8 checkpoint into a model: one byte a weight on disk, one byte a weight in memory, 16 bits at no time."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_fast.bases.scaled import BLOCK, NAMES, REMEDY, ScaledFp8Weight, why_no_scale
from lora_fast.models.targets import some
from lora_fast.wrappers.names import plain_modules

if TYPE_CHECKING:
    from lora_fast.files.checkpoint import Base

E4M3 = "F8_E4M3"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
STATIC = ".activation_scale", ".input_scale"
Holders = list[tuple[nn.Module, str]]  # modules, and the name that each of them has for a tensor


def load_fp8(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device: torch.device | str | None = None,
    strict: bool = True,
) -> nn.Module:
    """Put a checkpoint whose linear layers are in fp8 into ``model``, whose data, if it has any, is replaced; return
    it. The weights of these ``nn.Linear`` layers become :class:`lora_fast.bases.ScaledFp8Weight` over the bytes as they
    are, acting as the dtype that they have in the model; all else is cast to the dtype that it has there.

    The model may be without data: made under ``accelerate.init_empty_weights()``, which keeps the buffers that no file
    has, rotary embeddings' for instance. ``add_lora``, or PEFT and ``patch_peft``, come after this.

    Args:
        model: with the names of the checkpoint.
        checkpoint: a safetensors file, or a directory with one or with shards: e4m3 weights with ``weight_scale_inv``
            for each block of 128 x 128 (DeepSeek's and Qwen's), or ``weight_scale`` for each row (compressed-tensors').
        device: where the tensors go; None: where the model's are, those without data to the CPU.
        strict: whether tensors of the checkpoint that the model has not are an error; else they are left out.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, as for ``merge_lora(original=...)``.
        ValueError: a tensor is missing, left over, or of another shape; fp8 that is no ``nn.Linear``'s weight (experts
            that the model fuses), has other scales (one for the whole weight, other blocks) or goes with a fixed scale
            of the input; a buffer without data that no file has. The model is then as it was.
        ImportError: without safetensors.
    """
    from lora_fast.files.checkpoint import open_base  # which needs safetensors

    files = open_base(Path(checkpoint))
    if callable(tie := getattr(model, "tie_weights", None)):  # transformers'; what is made without data is not tied yet
        tie()
    own = _own_tensors(model)
    scales = _scales(files)
    _check_config(files.config())
    _check_names(files, own, scales, strict)
    for name, holders in own.items():
        if name in files.tensors:
            _check_tensor(name, files, scales.get(name), holders)
    if empty := [name for name, t in model.named_buffers() if t.is_meta and name not in own]:
        raise ValueError(
            f"model: has buffers without data that no checkpoint has: {some(empty)}; make the model under "
            "accelerate.init_empty_weights(), which leaves them their data, or give them theirs before this"
        )
    for name, holders in own.items():
        if name in files.tensors:
            _put(holders, _read(name, files, scales.get(name), holders, device))
    return model


def _own_tensors(model: nn.Module) -> dict[str, Holders]:
    """Of each tensor of the model's state dict, under its first name and under those tied to it."""
    holders: dict[int, Holders] = {}
    names: dict[str, int] = {}
    for prefix, module in plain_modules(model, remove_duplicate=False):
        for kept in (module._parameters, module._buffers):
            for name, t in kept.items():
                if t is not None and name not in module._non_persistent_buffers_set:
                    names[f"{prefix}.{name}" if prefix else name] = id(t)
                    if (module, name) not in (found := holders.setdefault(id(t), [])):
                        found.append((module, name))
    return {name: holders[key] for name, key in names.items()}


def _scales(files: "Base") -> dict[str, str]:
    """{the name of an fp8 weight: what follows it in that of its scale}"""
    weights = [name for name, place in files.tensors.items() if place.dtype == E4M3]
    return {name: key for name in weights for key in NAMES if name + key in files.tensors}


def _check_config(config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    block = settings.get("weight_block_size")
    if block is not None and block != [BLOCK, BLOCK]:
        raise ValueError(f"config.json: got weight_block_size {block}, expected {[BLOCK, BLOCK]}: {REMEDY}")
    if (scheme := settings.get("activation_scheme", "dynamic")) != "dynamic":
        raise ValueError(f"config.json: got activation_scheme {scheme!r}, expected 'dynamic': {REMEDY}")


def _check_names(files: "Base", own: Mapping[str, Holders], scales: Mapping[str, str], strict: bool) -> None:
    there = files.tensors.keys()
    if static := [name for name in there if name.endswith(STATIC)]:
        raise ValueError(f"checkpoint: has fixed scales of inputs (static activations): {some(static)}; {REMEDY}")
    known = own.keys() | {name + key for name, key in scales.items()}
    left = [name for name in there if name not in known]
    if experts := [name for name in left if files.tensors[name].dtype == E4M3 and ".experts." in name]:
        raise ValueError(f"checkpoint: has fp8 experts, which the model fuses or has not: {some(experts)}; {REMEDY}")
    if left and strict:
        raise ValueError(f"checkpoint: has tensors that the model has not: {some(left)} (strict=False leaves them out)")
    loaded = {id(holders) for name, holders in own.items() if name in there}
    if missing := [name for name, holders in own.items() if id(holders) not in loaded]:
        raise ValueError(f"checkpoint: lacks {some(missing)}, which the model has")


def _check_tensor(name: str, files: "Base", key: str | None, holders: Holders) -> None:
    place, (module, last) = files.tensors[name], holders[0]
    own = getattr(module, last)
    if tuple(place.shape) != tuple(own.shape):
        raise ValueError(f"{name}: got shape {tuple(place.shape)}, expected the model's, {tuple(own.shape)}")
    if not place.dtype.startswith("F8_"):
        return
    kinds = [type(one) for one, _ in holders]
    if any(kind is not nn.Linear for kind in kinds) or last != "weight" or place.dtype != E4M3:
        found = f"{place.dtype} for {last!r} of a {kinds[0].__name__}"
        raise ValueError(f"{name}: got {found}, expected {E4M3} for the weight of an nn.Linear: {REMEDY}")
    if key is None:
        raise ValueError(f"{name}: got {E4M3} without {name}{NAMES[0]} or {name}{NAMES[1]}")
    scale = files.tensors[name + key]
    kind = DTYPES.get(scale.dtype, torch.float64)
    if why := why_no_scale(tuple(scale.shape), kind, tuple(own.shape)):
        raise ValueError(f"{name}{key}: {why}")


def _read(
    name: str, files: "Base", key: str | None, holders: Holders, device: torch.device | str | None
) -> torch.Tensor:
    """What is to be there, in memory of its own."""
    module, last = holders[0]
    own = getattr(module, last)
    where = device if device is not None else "cpu" if own.is_meta else own.device
    if key is None:
        return files.read(name).to(where, own.dtype, copy=True)
    tensors = {part: files.read(name + part).to(where, copy=True) for part in ("", key)}
    return ScaledFp8Weight.from_tensors(tensors, own.shape, own.dtype, name)


def _put(holders: Holders, t: torch.Tensor) -> None:
    """In the place of what these modules hold, the same in all."""
    module, last = holders[0]
    if (own := module._parameters.get(last)) is not None:
        t = nn.Parameter(t, requires_grad=own.requires_grad and not isinstance(t, ScaledFp8Weight))
    for one, name in holders:
        kept: dict[str, Any] = one._parameters if name in one._parameters else one._buffers
        kept[name] = t
