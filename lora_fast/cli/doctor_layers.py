"""What of a model is fused, layer by layer, and why not the rest: what ``lora-fast doctor`` lists."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from lora_fast import dispatch
from lora_fast.bases.packed import packed_in
from lora_fast.bases.stack import PackedStack
from lora_fast.experts.known import form_of, is_experts
from lora_fast.experts.registry import NAME
from lora_fast.files.parameters import parameter_of
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.embedding import LoRAEmbedding
from lora_fast.layers.experts import AdaptedExperts, ExpertsLoRA
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.named import NamedLinear
from lora_fast.layers.parameters import ParameterLoRA, why_no_matrix
from lora_fast.layers.rules import features, is_linear, why_not_lora
from lora_fast.models.adapters import LAYERS
from lora_fast.models.projections import projections
from lora_fast.peft.report import is_wrapper, peft_report, remark_of_base


class Layer(NamedTuple):
    name: str
    what: str
    fused: bool | None  # None: not an adapter's layer
    why: str  # not fused; of a layer without an adapter, what there is for it
    remark: str = ""


def examine(model: nn.Module) -> Iterator[Layer]:
    """Every layer that has an adapter of ours or of PEFT's, or is linear and could have one, under its first name;
    every module of experts; and the parameters that project as well and cannot have one."""
    tuner = _peft_layers()
    of_peft = any(isinstance(module, tuner) for module in model.modules())
    verdicts = _peft_verdicts(model) if of_peft else {}
    adapted = of_peft or any(isinstance(module, LAYERS) for module in model.modules())
    inside: set[nn.Module] = set()  # of PEFT's layers: told with them
    others = set(projections(model).values())
    for name, module in model.named_modules():
        start, name = f"{name}." if name else "", name or "(itself)"
        if isinstance(module, ExpertsLoRA):
            why = _why_not_fused(module)
            base = module.base_weight
            kept = f" in {base.base_dtype}" if isinstance(base, PackedStack) else ""
            what = f"ExpertsLoRA {module.experts} x {_shape(module)}{kept}, r={module.r}"
            yield Layer(parameter_of(name), what, why is None, why or "")
        elif isinstance(module, ParameterLoRA):
            what = f"ParameterLoRA {_shape(module)}, r={module.r}"
            yield Layer(parameter_of(name), what, False, "a small matrix: written out with its adapter in each forward")
        elif isinstance(module, LoRAEmbedding):
            why = _why_not_fused(module)
            yield Layer(name, f"LoRAEmbedding {module.extra_repr()}", why is None, why or "")
        elif isinstance(module, LoRALinear):
            kind = "DoRALinear" if isinstance(module, DoRALinear) else "LoRALinear"
            why, packed = _why_not_fused(module), packed_in(module.base_weight)
            remark = "" if packed is None else remark_of_base(packed.LABEL, packed)
            yield Layer(name, f"{kind} {_shape(module)}, r={module.r}", why is None, why or "", remark)
        elif isinstance(module, NamedLinear):
            continue  # its adapters are told, each by itself
        elif isinstance(module, tuner) and is_wrapper(module):
            if module not in inside:
                inside.update(module.modules())
                yield from (
                    Layer(full, "PEFT's LoRA on a parameter", *verdict)
                    for full, verdict in verdicts.items()
                    if full.rpartition(".")[0] == name
                )
        elif isinstance(module, tuner):
            inside.update(module.modules())
            verdict = verdicts.get(name, (False, "stock PEFT", ""))
            yield Layer(name, _of_peft(module), *verdict)
        elif is_linear(module) and module not in inside:
            why, can = why_not_lora(module), "" if adapted else "add_lora can convert it"
            what = f"{type(module).__name__} {_shape(module)}"
            yield Layer(name, what, None, f"cannot be converted: it {why}" if why else can)
        elif is_experts(module) and not _has_adapters(module) and module not in inside:
            yield from _experts(name, module)
        elif module not in inside:
            for key, parameter in module._parameters.items():
                if parameter in others:
                    kind = "router" if _is_router(name, module, parameter) else "parameter"
                    what = f"{kind} {list(parameter.shape)}, {str(parameter.dtype).removeprefix('torch.')}"
                    reachable = why_no_matrix(module, key) is None
                    why = "target_parameters can adapt it" if reachable else "not adapted: it is no nn.Linear's"
                    yield Layer(start + key, what, None, why)


def _is_router(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """As transformers' models have them: [experts, hidden], in a module called gate or router."""
    last = name.rpartition(".")[2].lower()
    return parameter.dim() == 2 and (last in ("gate", "router") or "router" in type(module).__name__.lower())


def _has_adapters(module: nn.Module) -> bool:
    return isinstance(module, AdaptedExperts) and bool(module.adapters())


def _experts(name: str, module: nn.Module) -> Iterator[Layer]:
    """A module of transformers' experts without an adapter: what there is for it."""
    form, stacks = form_of(module), [(key, p) for key, p in module.named_parameters() if p.dim() == 3]
    packed = [p.base_dtype for _, p in stacks if isinstance(p, PackedStack)]
    shapes = [f"{key} {list(p.shape)}" for key, p in stacks]
    what = f"{type(module).__name__}: {', '.join(shapes)}"
    if isinstance(form, str):
        yield Layer(name, what, None, f"LoRA cannot reach these experts: {form}")
        return
    if packed:
        why = "target_parameters can adapt them; frozen, run through lora_fast"
        yield Layer(name, f"{what} in {packed[0]}", None, why)
        return
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    frozen = "run through lora_fast" if chosen == NAME else 'register_experts and "lora_fast" make them faster'
    yield Layer(name, what, None, f"target_parameters can adapt them; frozen, {frozen}")


def _shape(linear: Any) -> str:
    k, n = features(linear)
    return f"{k} -> {n}, {str(linear.weight.dtype).removeprefix('torch.')}"


def _of_peft(layer: Any) -> str:
    """What of PEFT's LoRA is there, by its shape; another tuner's layer by its class."""
    kind = type(layer)
    if kind.__module__.partition(".")[0] != "lora_fast" and not kind.__module__.startswith("peft.tuners.lora."):
        return f"{kind.__module__}.{kind.__qualname__}"
    base, ranks = layer.get_base_layer(), sorted({layer.r[name] for name in layer.active_adapters if name in layer.r})
    what = f"PEFT's {layer._get_name()}"
    if is_linear(base):
        what += f" {_shape(base)}"
    elif isinstance(base, nn.Embedding):
        what += f" {base.num_embeddings}, {base.embedding_dim}"
    return what + "".join(f", r={r}" for r in ranks)


def _why_not_fused(layer: LoRALinear | LoRAEmbedding | ExpertsLoRA) -> str | None:
    if layer.merged or not layer.enabled:
        plain = "look-up" if isinstance(layer, LoRAEmbedding) else "product"
        return f"merged: one plain {plain}" if layer.merged else f"disabled: the base's plain {plain}"
    device, packed = layer.weight.device, packed_in(layer.weight)
    why = dispatch.why_slow(device, layer.weight.dtype)
    return packed.why_not(device) if why is None and packed is not None else why


def _peft_layers() -> tuple[type[nn.Module], ...]:
    """The class of PEFT's adapter layers, if the model can have any: PEFT is then imported already."""
    found = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return () if found is None else (found,)


def _peft_verdicts(model: nn.Module) -> dict[str, tuple[bool, str, str]]:
    """{layer: (fused, why not, remark)} of PEFT's LoRA layers, as lora_fast.peft_report has it."""
    try:
        report = peft_report(model)
    except ValueError:  # all are of PEFT's other methods
        return {}
    return {layer.name: (layer.fused, layer.reason, layer.remark) for layer in report.layers}
