"""Fused LoRA and DoRA in models that PEFT made: :func:`patch_peft`, and back, and what runs how."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fast import dispatch
from lora_fast.config import holders, matching
from lora_fast.fp8 import Fp8Weight, is_fp8
from lora_fast.layers import check_base_dtype, check_quantisable


@dataclass(frozen=True)
class PeftLayer:
    """One of PEFT's LoRA layers: its name, whether the fused kernels run it, and the reason or a remark."""

    name: str
    fused: bool
    reason: str


@dataclass(frozen=True)
class PeftReport:
    """Which of a model's LoRA layers the fused kernels run, as things stood when it was made; prints as a table."""

    layers: tuple[PeftLayer, ...]

    @property
    def fused(self) -> int:
        return sum(layer.fused for layer in self.layers)

    @property
    def not_fused(self) -> int:
        return len(self.layers) - self.fused

    def __str__(self) -> str:
        """A line for all layers whose names differ in numbers alone and that share the rest."""
        groups: dict[tuple[str, str, str], int] = {}
        for layer in self.layers:
            name = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            key = name, "fused" if layer.fused else "not fused", layer.reason
            groups[key] = groups.get(key, 0) + 1
        rows = [(name, str(count), *rest) for (name, *rest), count in groups.items()]
        table = [("layer", "count", "", "reason"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in table
        ]
        return "\n".join([*lines, f"{self.fused} fused, {self.not_fused} not fused"])


def patch_peft(
    model: nn.Module,
    save: str = "auto",
    base_dtype: str | None = None,
    base_dtype_exclude: str | list[str] | None = None,
) -> PeftReport:
    """Let the LoRA and DoRA linear layers of a PEFT model run through lora_fast's fused kernels, in place.

    Each ``peft.tuners.lora.Linear`` on a plain ``nn.Linear`` becomes an instance of a subclass of it; parameters, state
    dict keys and all else that PEFT does with the model stay. Layers of adapters that are added later follow by
    themselves in a ``PeftModel``; in a model with PEFT's layers alone, patch it again then.

    What changes after the patch (device, dtype, hooks, active adapters, merging) is looked at in every call: a layer is
    patched on the CPU too, runs in plain torch there and fused once the model is on a GPU. Calls that only stock PEFT
    can serve are stock PEFT's, with a :class:`lora_fast.SlowPathWarning` for each reason.

    Two things differ from stock on purpose: DoRA's dropout acts on the low-rank branch alone (same expectation, less
    noise), and several active adapters, fused as one of their joint rank, share a dropout mask.

    Args:
        model: a ``PeftModel``, or any model that contains PEFT's LoRA layers.
        save: what DoRA layers keep for the backward, as in :func:`lora_fast.functional.dora_linear`: "z" takes more
            memory, and lets a model change the outputs of these layers in place. Also an attribute of each layer.
        base_dtype: None, or "float8_e4m3": the base weights of the layers that can be fused become fp8
            (:class:`lora_fast.fp8.Fp8Weight`), one after the other, the original freed; unpatch_peft makes plain ones
            of them again. A merge puts a 16-bit weight in the fp8 one's place until the unmerge. Layers that are
            merged, whose base trains, or whose base weight is tied to another parameter stay as they are; the report
            says "fp8 base" of the others. A DoRA magnitude stays PEFT's, the norm is the fp8 weight's.
        base_dtype_exclude: a list of names or last parts, or a regex: more layers whose base stays as it is.

    Returns:
        What is fused as things stand now; :func:`peft_report` tells it anew.

    Raises:
        TypeError: not a module; a weight to quantise of another dtype than float16, bfloat16 or float32.
        ValueError: no LoRA layer of PEFT's in it, ``save`` neither "auto" nor "z", an unknown base_dtype, a weight to
            quantise that is not finite. The model is then as it was, as after any other error.
        RuntimeError: an fp8 base on a GPU that has no units for it.
        ImportError: without PEFT.
    """
    if save not in ("auto", "z"):
        raise ValueError(f'save: got {save!r}, expected "auto" or "z"')
    check_base_dtype(base_dtype)
    if base_dtype_exclude is not None and base_dtype is None:
        raise ValueError(f"base_dtype_exclude: got {base_dtype_exclude!r}, expected None without a base_dtype")
    layers = _lora_layers(model)
    from lora_fast.peft_layers import FastLinear, FastLoraModel, LoraModel
    from lora_fast.peft_rules import why_never_fused

    kept = matching("base_dtype_exclude", base_dtype_exclude, {layer: [name] for name, layer in layers.items()})
    done: list[Any] = []
    eight: list[Any] = []
    try:
        for layer in layers.values():
            if why_never_fused(layer) is None:
                FastLinear.adopt(layer)
                done.append(layer)
        if base_dtype is not None:
            eight = _quantisable(model, {name: layer for name, layer in layers.items() if layer not in kept})
    except BaseException:
        for layer in done:
            layer.release()
        raise
    for layer in eight:
        layer.base_layer.weight = nn.Parameter(Fp8Weight.quantise(layer.base_layer.weight), requires_grad=False)
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.save = save
        elif type(module) is LoraModel:
            module.__class__ = FastLoraModel
    return peft_report(model)


def _quantisable(model: nn.Module, layers: dict[str, Any]) -> list[Any]:
    """Those of the layers whose base weight becomes an fp8 one; raises where one of them cannot."""
    from lora_fast.peft_layers import FastLinear
    from lora_fast.peft_rules import PLAIN

    found, held = [], holders(model)
    for name, layer in layers.items():
        weight: Any = getattr(layer.base_layer, "weight", None)
        if not isinstance(layer, FastLinear) or type(weight) not in PLAIN or weight.requires_grad:
            continue
        if not layer.merged and held[id(weight)] == 1:
            try:
                check_quantisable(weight)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
            found.append(layer)
    return found


def unpatch_peft(model: nn.Module) -> None:
    """Undo :func:`patch_peft`. Layers that are merged stay merged, and unmerge as stock PEFT does: by subtraction.

    Raises:
        TypeError, ValueError, ImportError: as :func:`patch_peft`.
    """
    layers = _lora_layers(model)
    from lora_fast.peft_layers import FastLinear, FastLoraModel, LoraModel

    for layer in layers.values():
        if isinstance(layer, FastLinear):
            layer.release()
    for module in model.modules():
        if type(module) is FastLoraModel:
            module.__class__ = LoraModel  # type: ignore[assignment]


def peft_report(model: nn.Module) -> PeftReport:
    """Which of the model's LoRA layers the fused kernels would run if it were called now, and why not the others.

    Raises:
        TypeError, ValueError, ImportError: as :func:`patch_peft`.
    """
    layers = _lora_layers(model)
    gathered = set(_under_fsdp(model))
    return PeftReport(tuple(PeftLayer(name, *_judge(layer, layer in gathered)) for name, layer in layers.items()))


def _judge(layer: Any, gathered: bool) -> tuple[bool, str]:
    from lora_fast.peft_layers import FastLinear
    from lora_fast.peft_rules import active, examine, is_dora, why_never_fused

    if not isinstance(layer, FastLinear):
        return False, why_never_fused(layer) or "not patched"
    old_forward = vars(layer).get("_old_forward")  # what an accelerate hook calls
    if "forward" in vars(layer) and getattr(old_forward, "__func__", None) is not FastLinear.forward:
        return False, "its forward was replaced on the instance (if by an accelerate hook: patch before it)"
    if layer.disable_adapters or layer.merged:
        return False, "nothing to fuse: " + ("adapters are disabled" if layer.disable_adapters else "merged")
    if not (names := active(layer)):
        return False, "nothing to fuse: none of its adapters is active"
    parts = examine(layer, names, gathered)
    if isinstance(parts, str):
        return False, parts
    weight = layer.base_layer.weight
    mesh = getattr(weight, "device_mesh", None)  # FSDP2 may keep on the CPU what it gathers on the mesh's devices
    device = weight.device if mesh is None else torch.device(mesh.device_type)
    slow = dispatch.why_slow(device, dispatch.autocast_dtype(device) or weight.dtype)
    if slow is None and is_fp8(weight):
        slow = dispatch.why_not_fp8(device)
    remarks = [] if slow is None else [slow]
    if is_fp8(weight):
        remarks.append("fp8 base")
    if is_dora(layer, names[0]):
        drops = isinstance(layer.lora_dropout[names[0]], nn.Dropout)
        remarks.append("DoRA, dropout in the low-rank branch alone" if drops else "DoRA")
    if len(names) > 1:
        remarks.append(f"{len(names)} adapters as one")
    return slow is None, "; ".join(remarks)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of all of PEFT's LoRA layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a PEFT model (a torch.nn.Module)")
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("patch_peft needs PEFT: pip install 'lora_fast[peft]'") from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"model: got a {type(model).__name__} without LoRA layers of PEFT's, expected some")
    return layers


def _under_fsdp(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters FSDP2 gathers before they run."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody uses it
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            yield from module.modules()
