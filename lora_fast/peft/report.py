"""What of a PEFT model the fused kernels run, layer by layer, and why not the rest: :func:`peft_report`."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, is_packed, packed_in
from lora_fast.blocks.joining import joined_in
from lora_fast.tables import aligned, grouped, shared, told_once
from lora_fast.wrappers import fsdp1, zero3
from lora_fast.wrappers.gather import TENSOR_PARALLEL

NOT_PATCHED = "not patched"


@dataclass(frozen=True)
class PeftLayer:
    """One of PEFT's LoRA layers.

    Attributes:
        name: its name in the model.
        fused: whether the fused kernels run it.
        reason: why they do not; "" where they do.
        remark: what else is to know of it ("DoRA", "nf4 base"), or "".
    """

    name: str
    fused: bool
    reason: str
    remark: str = ""


@dataclass(frozen=True)
class PeftReport:
    """Which of a model's LoRA layers the fused kernels run, as things stood when it was made; prints as a table.

    Attributes:
        layers: all of them, each with name, fused, reason (why it is not) and remark.
        fused, not_fused: how many of them are, and are not.
        blocks: names of MLPs whose layers run as one step, where nothing in a call speaks against it.
        groups: of layers that run together where they are given one input, their names.
    """

    layers: tuple[PeftLayer, ...]
    blocks: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    joined: tuple[tuple[str, str, str], ...] = ()  # (module, "block", "group" or "no ...", remark)
    in_blocks: int = 0  # of the layers

    @property
    def fused(self) -> int:
        return sum(layer.fused for layer in self.layers)

    @property
    def not_fused(self) -> int:
        return len(self.layers) - self.fused

    def __str__(self) -> str:
        """A line for all layers whose names differ in numbers alone and that share the rest; the reason that most of
        them share stands below, once."""
        marks = {True: "fused", False: "not fused"}
        rows = grouped((layer.name, marks[layer.fused], layer.reason, layer.remark) for layer in self.layers)
        reasons = [reason for *_, reason, _ in rows]
        often = shared(reasons)
        layers = [(*row, _beside("" if why == often else why, remark)) for *row, why, remark in rows]
        text = aligned([("layer", "count", "", "reason"), *layers, *grouped(self.joined)])
        if often:
            text.append(told_once(often, reasons))
        joined = []
        if self.blocks:
            joined.append(f"{self.in_blocks} in {len(self.blocks)} blocks")
        if self.groups:
            joined.append(f"{sum(map(len, self.groups))} in {len(self.groups)} groups")
        together = f" ({', '.join(joined)})" if joined else ""
        return "\n".join([*text, f"{self.fused} fused, {self.not_fused} not fused{together}"])


def _beside(reason: str, remark: str) -> str:
    """A reason and a remark in one cell: a remark is no reason, so it is in brackets."""
    return f"{reason} ({remark})".lstrip() if remark else reason


def peft_report(model: nn.Module) -> PeftReport:
    """Which of the model's LoRA layers the fused kernels would run if it were called now, and why not the others.

    Raises:
        TypeError, ValueError, ImportError: as :func:`patch_peft`.
    """
    layers = lora_layers(model)
    gathered, flat = set(_gathered(model)), set(fsdp1.wrapped(model))
    wrappers, found = experts_layers(layers), []
    for name, layer in layers.items():
        if name in wrappers:
            found += [PeftLayer(*verdict) for verdict in _judge_experts(name, layer, layer in gathered)]
        elif not is_wrapper(layer):
            found.append(PeftLayer(name, *_judge(layer, layer in gathered, layer in flat)))
    return joined_report(model, tuple(found))


def joined_report(model: nn.Module, layers: tuple[PeftLayer, ...]) -> PeftReport:
    """With what of the model runs together."""
    joined, names = joined_in(model), {layer.name for layer in layers}
    lines, in_blocks, blocks, groups = [], 0, [], []
    reasons, split = {layer.name: layer.reason for layer in layers}, zero3.splits(model)

    def why_apart(name: str, own: Iterable[str]) -> str:
        """Why these children never run together, however they are called."""
        found = {reasons.get(_under(name, child)) for child in own}
        return zero3.APART if split else TENSOR_PARALLEL if TENSOR_PARALLEL in found else ""

    for name, mlp in joined.blocks.items():
        own = mlp.layers
        if why := why_apart(name, own):
            lines.append((name, "no block", why))
            continue
        blocks.append(name)
        in_blocks += sum(_under(name, child) in names for child in own)
        again = "product" if len(own) > 2 or mlp.gate else "activation"
        what = f"{', '.join(own)} in one step ({mlp.activation}); the {again} is made again in the backward"
        lines.append((name, "block", what))
    for name, of_module in joined.groups.items():
        for own_names in of_module:
            if why := why_apart(name, own_names):
                lines.append((name, "no group", why))
                continue
            full = tuple(_under(name, child) for child in own_names)
            groups.append(full)
            wasted = [
                f"{child} was given another input in {joined.wasted[_under(name, child)][0]} of "
                f"{joined.wasted[_under(name, child)][1]} calls"
                for child in own_names
                if _under(name, child) in joined.wasted
            ]
            lines.append(
                (name, "group", "; ".join([f"{', '.join(own_names)} share one pass over their input", *wasted]))
            )
    lines += [(name, "no block", why) for name, why in joined.refused.items()]
    return PeftReport(layers, tuple(blocks), tuple(groups), tuple(lines), in_blocks)


def _under(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _judge_experts(name: str, wrapper: Any, gathered: bool) -> Iterator[tuple[str, bool, str]]:
    """(name, fused, reason) of each parameter with an adapter, of those that one module has."""
    from lora_fast.peft.experts import FastExperts, chain_of, why_never_fused
    from lora_fast.peft.rules import HOOKS_ON_ALL, active

    loras: Any = NOT_PATCHED
    if not isinstance(wrapper, FastExperts):
        loras = why_never_fused(wrapper) or loras
    elif "forward" in vars(wrapper):
        loras = "its forward was replaced on the instance (if by an accelerate hook: patch before it)"
    else:
        loras = wrapper.examine(gathered)
    for one in reversed(chain_of(wrapper)):
        if one.disable_adapters or one.merged:
            why = "nothing to fuse: " + ("adapters are disabled" if one.disable_adapters else "merged")
        elif not active(one):
            why = "nothing to fuse: none of its adapters is active"
        elif isinstance(loras, str):
            why = loras
        elif torch_module._has_any_global_hook():
            why = HOOKS_ON_ALL
        else:
            parameter = one.get_param()
            mesh = getattr(parameter, "device_mesh", None)
            device = parameter.device if mesh is None else torch.device(mesh.device_type)
            why = dispatch.why_slow(device, dispatch.autocast_dtype(device) or parameter.dtype) or ""
        yield f"{name}.{one.parameter_name}", not why, why


def _judge(layer: Any, gathered: bool, flat: bool) -> tuple[Any, ...]:
    """(fused, reason), and a remark where the layer could be fused elsewhere."""
    from lora_fast.peft import embedding
    from lora_fast.peft.layers import FastLinear
    from lora_fast.peft.rules import HOOKS_ON_ALL, active, examine, is_dora, why_never_fused

    if isinstance(layer, embedding.FastEmbedding):
        active, examine, is_dora = embedding.active, embedding.examine, embedding.is_dora
    elif not isinstance(layer, FastLinear):
        return False, why_never_fused(layer) or NOT_PATCHED
    old_forward = vars(layer).get("_old_forward")  # what an accelerate hook calls
    if "forward" in vars(layer) and getattr(old_forward, "__func__", None) is not type(layer).forward:
        return False, "its forward was replaced on the instance (if by an accelerate hook: patch before it)"
    if layer.disable_adapters or layer.merged:
        return False, "nothing to fuse: " + ("adapters are disabled" if layer.disable_adapters else "merged")
    if not (names := active(layer)):
        return False, "nothing to fuse: none of its adapters is active"
    if torch_module._has_any_global_hook():
        return False, HOOKS_ON_ALL
    if flat and is_packed(layer.base_layer.weight):
        return False, fsdp1.NO_FP8
    parts = examine(layer, names, gathered)
    if isinstance(parts, str):
        return False, parts
    weight = layer.frozen()[0] if isinstance(layer, FastLinear) else embedding.base_weight(layer.base_layer)
    mesh = getattr(weight, "device_mesh", None)  # FSDP2 may keep on the CPU what it gathers on the mesh's devices
    device = weight.device if mesh is None else torch.device(mesh.device_type)
    slow = dispatch.why_slow(device, dispatch.autocast_dtype(device) or weight.dtype)
    packed = packed_in(weight)
    if slow is None and packed is not None:
        slow = packed.why_not(device)
    remarks = []
    if zero3.is_split(weight):
        remarks.append(zero3.GATHERED)
    if packed is not None:
        remarks.append(remark_of_base(layer.label_of_base(packed), packed))
    if is_dora(layer, names[0]):
        drops = isinstance(layer, FastLinear) and isinstance(layer.lora_dropout[names[0]], nn.Dropout)
        remarks.append("DoRA, dropout in the low-rank branch alone" if drops else "DoRA")
    if len(names) > 1:
        remarks.append(f"{len(names)} adapters as one")
    return slow is None, slow or "", "; ".join(remarks)


def remark_of_base(label: str, packed: PackedWeight) -> str:
    return f"{label} base{', 8-bit products' if packed.BASE_COMPUTE else ''}"


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of all of PEFT's LoRA layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a PEFT model (a torch.nn.Module)")
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("patch_peft needs PEFT: pip install peft") from error
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(
            f"model: got a {type(model).__name__} without LoRA layers of PEFT's, expected some (patch what "
            "get_peft_model gives, or trainer.model where a trainer makes it of a peft_config; add_lora makes own "
            "layers)"
        )
    return layers


def is_wrapper(layer: Any) -> bool:
    """Whether it is PEFT's for a parameter (``target_parameters``), stock or fused; not every PEFT has it."""
    return type(layer).__name__ == "ParamWrapper"


def experts_layers(layers: dict[str, Any]) -> dict[str, Any]:
    """{name: wrapper} of the wrappers of parameters among these layers that are in no other one."""
    if not any(map(is_wrapper, layers.values())):
        return {}
    from lora_fast.peft.experts import outermost

    return outermost(layers)


def _gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters FSDP2 or ZeRO-3 gathers before they run."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody uses it
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            yield from module.modules()
    if zero3.splits(model):
        yield from model.modules()
