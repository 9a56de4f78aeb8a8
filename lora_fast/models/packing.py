"""Frozen experts of a model in 8 or 4 bits, with or without adapters."""

import sys
import weakref
from typing import Any

import torch
from torch import nn

from lora_fast.bases.four_bits import Mxfp4Weight
from lora_fast.bases.stack import PackedStack
from lora_fast.experts.known import DOWN, GATE_UP, form_of, holds_fp8, is_experts
from lora_fast.layers.experts import AdaptedExperts, check_packable, pack, take_fp8, why_no_experts, why_not_taken
from lora_fast.layers.held_linears import dtype_beside
from lora_fast.models.adapters import standing
from lora_fast.models.targets import holders, some
from lora_fast.wrappers.names import plain_modules


def pack_experts(model: nn.Module, base_dtype: str) -> nn.Module:
    """Keep the frozen weights of all of transformers' modules of experts in ``model`` in 8 or 4 bits; return ``model``.

    Each weight is made expert by expert and takes the place of the one before, so that there is never a second copy of
    the model. From then on these experts run through :func:`lora_fast.lora_experts`, which writes a weight out just
    ahead of each product over it, exactly; they stay frozen. ``add_lora`` and PEFT may adapt them afterwards, or other
    layers alone. Packed weights stay as they are. transformers' FP8Experts keep their bytes, and have products in the
    dtype of most of the model's other parameters from then on.

    Args:
        model: on any device.
        base_dtype: "nf4", "mxfp4", or "float8_e4m3" (one byte an element, a scale for each block of 128 x 128).

    Raises:
        TypeError: no module; weights in another dtype, or packed in another way.
        ValueError: another base_dtype; no experts, or some whose form is not known, are tied or cannot be packed: the
            model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    found = {name: module for name, module in plain_modules(model) if is_experts(module)}
    if not found:
        raise ValueError(f"model: got a {type(model).__name__} without modules of transformers' experts")
    owners, unfit = holders(model), list[str]()
    for name, module in found.items():
        unfit += [f"{name}{why}" for why in _why_not(module, name, base_dtype, owners)]
    if unfit:
        raise ValueError(f"model: cannot pack {some(unfit)}")
    dtype = dtype_beside(model) or torch.bfloat16
    for module in found.values():
        if _is_fp8(module):
            take_fp8(module, dtype)
            continue
        for key in (GATE_UP, DOWN):
            pack(module, key, base_dtype)
    guard_saving(model)
    return model


def guard_saving(model: nn.Module) -> None:
    """Have ``save_pretrained`` of the transformers models in ``model`` go through :class:`Saving`, where it is still
    their own."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    for module in model.modules():
        if kind is not None and isinstance(module, kind) and "save_pretrained" not in vars(module):
            vars(module)["save_pretrained"] = Saving(module)


class Saving:
    """``save_pretrained`` of a transformers model with packed experts, which transformers would split up by the names
    of their weights and read again without their scales.

    Whole where the model's own config says that its checkpoint has such experts. With adapters the file is the state
    dict, as Trainer's checkpoints need it; without them only ``save_original_format=False`` asks for that.

    Raises:
        ValueError: packed experts that from_pretrained would not read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)  # which nothing is to keep

    def __reduce__(self) -> tuple[Any, ...]:
        return Saving, (self.model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        packed = {name: p for name, p in model.named_parameters() if isinstance(p, PackedStack)}
        unread = [name for name, p in packed.items() if _written_as(p) != _quantisation_of(model)]
        if unread and not getattr(model, "_hf_peft_config_loaded", False):  # which writes adapters alone
            if standing(model):
                kwargs["save_original_format"] = False
            elif kwargs.get("save_original_format", True):
                raise ValueError(
                    f"save_pretrained: has packed experts ({some(unread)}), which from_pretrained would not read; save "
                    "state_dict(), for a model whose experts are packed alike, or with save_original_format=False"
                )
        return type(model).save_pretrained(model, *args, **kwargs)


def _written_as(weight: PackedStack) -> str:
    """The quant_method of checkpoints in transformers that hold such experts by these names; "" without one."""
    matrix: Any = weight.matrix
    if weight.base_dtype == "float8_e4m3" and not matrix.by_rows:
        return "fp8"
    return "mxfp4" if weight.base_dtype == "mxfp4" and not weight.stored_shape[2] % Mxfp4Weight.BLOCK else ""


def _quantisation_of(model: Any) -> Any:
    """The quant_method of the model's own checkpoint, as its config has it; None without one."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def _is_fp8(module: nn.Module) -> bool:
    """Whether it is transformers' FP8Experts that was not taken yet."""
    return holds_fp8(module) and not isinstance(module, AdaptedExperts)


def _why_not(module: Any, name: str, base_dtype: str, owners: Any) -> list[str]:
    """Why its weights cannot be packed, in words, each after what is to stand before a colon; raises what
    ``check_packable`` does."""
    if _is_fp8(module):
        if base_dtype != "float8_e4m3":
            return [f": holds fp8, expected base_dtype='float8_e4m3', got {base_dtype!r}"]
        return [f": {why}" for why in [why_not_taken(module)] if why]
    unfit = []
    for key in (GATE_UP, DOWN):
        weight, why = module._parameters.get(key), why_no_experts(module, key)
        if isinstance(module, AdaptedExperts) and any(one.merged for one in module.adapters() if one.parameter == key):
            why = "has an adapter merged into it; unmerge_lora first, or remove_lora"
        if weight is not None and owners[id(weight)] > 1:
            why = "is tied to another parameter"
        if why is not None:
            unfit.append(f".{key}: {why}")
        elif weight is not None:
            form: Any = form_of(module)
            try:
                check_packable(weight, base_dtype, form.transposed)
            except (TypeError, ValueError) as error:
                if str(error).startswith("base_dtype"):
                    raise
                raise type(error)(f"{name}.{key}: {error}") from None
    return unfit
