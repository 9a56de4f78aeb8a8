"""Which of PEFT's layers run fused, and why the others do not, in words."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from lora_fast.bases import KINDS
from lora_fast.blocks import gated
from lora_fast.blocks.recognise import is_conv1d
from lora_fast.checks import FLOATS
from lora_fast.kept import PLAIN
from lora_fast.layers.embedding import asked_of
from lora_fast.layers.held_linears import is_held, why_not_held
from lora_fast.wrappers import zero3
from lora_fast.wrappers.gather import TENSOR_PARALLEL, is_sharded

DoraLinearVariant: Any
try:
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:  # before PEFT had variants, DoRA was the only one
    DoraLinearVariant = None
MiCALinearVariant: Any
try:
    from peft.tuners.lora.variants import MiCALinearVariant  # LoRA whose lora_B stays as it starts
except ImportError:
    MiCALinearVariant = None

FUSED_VARIANTS = type(None), DoraLinearVariant, MiCALinearVariant
NO_VARIANT = "only plain LoRA, DoRA and MiCA are fused"
QUANTISED = {"aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao"}  # PEFT's files of such layers
HOOKS_ON_ALL = "there are hooks on all modules"
BASES = (*PLAIN, *KINDS)  # types of the base weights of layers that are fused


def why_never_fused(module: Any) -> str | None:
    """Why a layer of PEFT's stays stock for good, in words; None where a ``FastLinear`` can stand in for it.

    Only facts that do not change count here; the rest is :func:`examine`'s.
    """
    kind = type(module).__name__
    if kind == "Linear4bit" and type(module).__module__ == "peft.tuners.lora.bnb":
        name = type(module.base_layer).__name__
        return None if name == "Linear4bit" else f"the base layer is a {name}, not bitsandbytes' Linear4bit"
    if type(module) is Embedding:
        return why_embedding_never_fused(module)
    if type(module) is not Linear:
        if kind == "ParamWrapper":
            return "expert parameters (target_parameters)"
        if type(module).__module__.rpartition(".")[2] in QUANTISED:
            return f"PEFT's {kind}, on a quantised base"
        hint = " (if FSDP made it: patch before fully_shard)" if isinstance(module, Linear) else ""
        return f"PEFT's {kind if kind != 'Linear' else kind_of(module)}, not its LoRA Linear{hint}"
    base = module.base_layer
    if is_held(base):
        why = why_not_held(base)
        return why and f"the base layer {why}"
    if is_conv1d(base) and module.fan_in_fan_out:
        return None
    if not isinstance(base, nn.Linear) or isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"the base layer is a {kind_of(base)}, not an nn.Linear"
    if module.fan_in_fan_out:
        return f"fan_in_fan_out=True over a {kind_of(base)}, whose weight is not stored transposed"
    return None


def why_embedding_never_fused(layer: Any) -> str | None:
    """As :func:`why_never_fused`, of a layer of PEFT's on an embedding and a ``FastEmbedding``."""
    base = layer.base_layer
    if type(base) is not nn.Embedding and not is_scaled(base):
        return f"the base layer is a {kind_of(base)}, not an nn.Embedding itself"
    if getattr(layer, "tp_layer", None) is not None:
        return "its embedding is split by tensor parallelism"
    return next((f"{name} of its embedding is {value}" for name, value in asked_of(base).items()), None)


def is_scaled(base: nn.Module) -> bool:
    """Whether it is one of transformers' embeddings that multiply their rows by ``embed_scale`` (Gemma's, BART's), and
    this PEFT multiplies the adapter's by it, too."""
    kind = type(base)
    named = kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.models.")
    known = named and hasattr(Embedding, "_get_embed_scale")
    return known and isinstance(base, nn.Embedding) and hasattr(base, "embed_scale")


def kind_of(module: nn.Module) -> str:
    """The name of its class; with that of whoever has it, where torch.nn has another one of that name."""
    kind = type(module)
    whose = "" if getattr(nn, kind.__name__, kind) is kind else f"{kind.__module__}."
    return whose + kind.__name__


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    own = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in own]


def is_dora(layer: Any, name: str) -> bool:
    if DoraLinearVariant is None:
        return layer.use_dora.get(name, False)
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def hooked(module: nn.Module) -> bool:
    """Whether the module has a replaced forward, or hooks: others than those with which DeepSpeed's ZeRO-3 gathers its
    parameters, as it does for whoever reads them, too. (Not in graphs.)"""
    if not gated.hooked(module):
        return False
    return is_compiling() or not zero3.manages(module) or zero3.hooked_by_others(module)


def why_hooked(base: Any) -> str:
    """What is in the way of reading a base layer that has hooks, or a replaced forward, in words."""
    if zero3.manages(base) and not zero3.hooked_by_others(base):
        return zero3.LEFT
    if is_sharded(base._parameters.get("weight")) and not getattr(base, "_is_fsdp_managed_module", False):
        return TENSOR_PARALLEL
    return "the base layer has hooks or a replaced forward"


def examine(layer: Any, names: list[str], gathered: bool = False) -> str | list[tuple[Any, ...]]:
    """Why the layer, in its present state and with these active adapters, runs stock PEFT's forward, in words; or, if
    it need not, (name, lora_A, lora_B, dropout) of each: two tensors and a module. The host waits for this in every
    call.

    ``gathered``: FSDP or ZeRO-3 will have gathered the parameters when forward runs.
    """
    modules = layer._modules  # nn.Module's own attribute look-up takes its time
    weight = layer.base_weight(gathered)
    if isinstance(weight, str):
        return weight
    downs, ups, dropouts = (modules[key]._modules for key in ("lora_A", "lora_B", "lora_dropout"))
    parts: list[tuple[Any, ...]] = []
    for name in names:
        down, up, dropout = downs[name], ups[name], dropouts[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            kind = kind_of(up if type(down) is nn.Linear else down)
            return f"lora_A or lora_B is a {kind}, not an nn.Linear itself"
        if parameter(up, "bias") is not None or parameter(down, "bias") is not None:
            return "lora_bias=True"
        a, b = parameter(down, "weight"), parameter(up, "weight")
        if not gathered and (type(a) not in PLAIN or type(b) not in PLAIN):
            return f"an adapter's weight is a {type(b if type(a) in PLAIN else a).__name__}"
        if hooked(down) or hooked(up) or hooked(dropout):
            return "lora_A, lora_B or lora_dropout has hooks or a replaced forward"
        if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p == 1):
            return f"lora_dropout is {dropout}"
        if DoraLinearVariant is not None:
            variant = type(layer.lora_variant.get(name))
            if variant not in FUSED_VARIANTS:
                return f"{variant.__name__}: {NO_VARIANT}"
        if name not in layer.scaling.mirrors:
            return f"the scaling is {layer.scaling[name]!r}, not a finite number"
        if parts and rate(dropout) != rate(parts[0][3]):
            return "several active adapters that differ in dropout"
        if is_dora(layer, name):
            if len(names) > 1:
                return "several active adapters, one of them DoRA"
            magnitude = layer.lora_magnitude_vector[name]
            if type(magnitude) is not DoraLinearLayer or hooked(magnitude):
                return "the magnitude has hooks or a replaced forward"
        parts.append((name, a, b, dropout))
    if not gathered and zero3.manages(modules["base_layer"]) and zero3.any_empty(_read(layer, names)):
        return zero3.EMPTY
    return parts


def plainly(layer: Any, x: torch.Tensor) -> tuple[Any, ...] | None:
    """(weight, lora_A, lora_B, scaling, bias, probability of dropout) of the plainest call there is: one LoRA adapter
    over a linear layer of x's dtype, with nothing that :func:`examine` or ``why_not_this_call`` could find. None where
    they are to look. The host waits for this in every call, so it looks where things are kept, and at nothing twice."""
    own = layer.__dict__
    modules, name = own["_modules"], own["_active_adapter"]
    if type(name) is list and len(name) == 1:
        (name,) = name
    base, scalings = modules["base_layer"], own["_scalings"]
    if own["_disable_adapters"] or own["merged_adapters"] or type(base) is not nn.Linear or type(name) is not str:
        return None
    if (own["lora_variant"] if DoraLinearVariant is not None else own["use_dora"]).get(name):
        return None
    down, up = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
    if type(down) is not nn.Linear or type(up) is not nn.Linear or name not in scalings.mirrors:
        return None
    dropout, p = modules["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout and dropout.p < 1:
        p = dropout.p if dropout.training else p
    elif type(dropout) is not nn.Identity:
        return None
    hooks = gated.hooked
    if torch_module._has_any_global_hook():
        return None
    if hooks(base) or hooks(down) or hooks(up) or hooks(dropout) or zero3.manages(base):
        return None
    own, of_a, of_b = base._parameters, down._parameters, up._parameters
    weight, a, b = own.get("weight"), of_a.get("weight"), of_b.get("weight")
    if not type(weight) is type(a) is type(b) is nn.Parameter or type(x) not in PLAIN or "bias" not in own:
        return None
    if of_a.get("bias", a) is not None or of_b.get("bias", b) is not None:
        return None
    if weight.requires_grad or (dtype := x.dtype) != weight.dtype or dtype not in FLOATS:
        return None
    return weight, a, b, scalings[name], own["bias"], p


def _read(layer: Any, names: list[str]) -> Iterator[torch.Tensor | None]:
    """All that a fused call reads, which has ZeRO-3 gather it where it can."""
    adapters = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    for module in [layer.base_layer, *(each[name] for each in adapters for name in names if name in each)]:
        yield from (parameter(module, name) for name in module._parameters)


def rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def why_not_this_call(layer: Any, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call, other than the layer's state, needs stock PEFT's forward."""
    if args or kwargs:
        if kwargs.get("adapter_names") is not None:
            return "several adapters in one batch (adapter_names)"
        if args or any(value is not None for value in kwargs.values()):
            return f"forward was given more than x: {', '.join(kwargs) or 'positional arguments'}"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    if torch_module._has_any_global_hook():
        return HOOKS_ON_ALL
    return layer.why_not_dtype(x)


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``; by nn.Module's own attribute look-up, which takes its time, only if it is no parameter."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
