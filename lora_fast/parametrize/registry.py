"""What :mod:`lora_fast.parametrize` stands on: which layers have which adapters on their weight, putting one there and
taking it out."""

import re
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from lora_fast.bases.packed import is_opaque
from lora_fast.checks import FLOATS
from lora_fast.layers.lora import LoRALinear
from lora_fast.models.config import LoRAConfig
from lora_fast.models.targets import matching, some
from lora_fast.parametrize.adapters import LAYERS, SPARSE, LoRAParametrization, has_sparse_gradient

KEY = re.compile(r"(?:(.*)\.)?parametrizations\.weight\.\d+\.(lora_A|lora_B|lora_magnitude_vector)")
_REQUIRED_GRAD = "_required_grad"  # noted on a layer's ParametrizationList: whether the weight below did before


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")


def check_layer(argument: str, layer: Any) -> None:
    if not isinstance(layer, LAYERS) or isinstance(layer, LoRALinear):
        raise TypeError(f"{argument}: got {type(layer).__name__}, expected an nn.Linear, nn.Conv2d or nn.Embedding")


def parametrizations(layer: Any) -> Sequence[nn.Module]:
    """All parametrizations of the layer's weight, in order."""
    return layer.parametrizations.weight if is_parametrized(layer, "weight") else ()


def own(layer: nn.Module, name: str | None = None) -> list[LoRAParametrization]:
    """The adapters among them, or the one of this name."""
    return [p for p in parametrizations(layer) if isinstance(p, LoRAParametrization) and name in (None, p.name)]


def below(layer: Any) -> list[nn.Parameter]:
    """The parameters that the weight is made from, without the adapters': one, but for others' parametrizations."""
    if is_parametrized(layer, "weight"):
        return list(layer.parametrizations.weight.parameters(recurse=False))
    return [layer.weight]


def tie(layer: nn.Module) -> tuple[int, ...]:
    """The same for layers whose weights are the same for good."""
    return tuple(map(id, (*below(layer), *parametrizations(layer))))


def adapted(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The layers that have adapters (or one of this name), by their first name; ValueError if none has."""
    check_model(model)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected a string")
    layers = {at: module for at, module in model.named_modules() if own(module)}
    found = {at: layer for at, layer in layers.items() if own(layer, name)}
    if not layers:
        raise ValueError("model: has no parametrized layers; call lora_fast.parametrize.add_lora first")
    if not found:
        known = dict.fromkeys(adapter.name for layer in layers.values() for adapter in own(layer))
        raise ValueError(f"name: got {name!r}, expected one that the model has: {', '.join(map(repr, known))}")
    return found


def tensors(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The adapters' parameters under the keys that they have in the model's state dict."""
    return {
        ".".join([*filter(None, [at]), "parametrizations.weight", str(i), tensor]): getattr(adapter, tensor)
        for at, layer in adapted(model, name).items()
        for i, adapter in enumerate(parametrizations(layer))
        if adapter in own(layer, name)
        for tensor in adapter.adapter_names
    }


def targets(model: nn.Module, config: LoRAConfig, name: str) -> dict[nn.Module, list[str]]:
    """The layers that ``add_lora`` is to adapt, with their names; ValueError if there is none or one that cannot be."""
    names: dict[nn.Module, list[str]] = {}
    for at, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LAYERS):
            names.setdefault(module, []).append(at)
    patterns, head = config.target_modules, None
    if patterns is None or isinstance(patterns, str) and patterns.lower() == "all-linear":
        found: set[nn.Module] = {module for module in names if isinstance(module, nn.Linear)}
        if patterns is not None and callable(get_head := getattr(model, "get_output_embeddings", None)):
            head = get_head()
    else:
        found = matching("target_modules", patterns, names)
    excluded = matching("exclude_modules", config.exclude_modules, {m: names[m] for m in found})
    chosen = {m: ats for m, ats in names.items() if m in found and m not in excluded and m is not head}
    if not chosen:
        raise ValueError(f"target_modules: {patterns!r} leaves no layer of the model to adapt")
    if twice := [ats[0] or "the model itself" for m, ats in chosen.items() if own(m, name)]:
        raise ValueError(f"name: got {name!r}, which {some(twice)} has already, expected another or remove_lora first")
    if unfit := [f"{ats[0] or 'the model'} {why}" for m, ats in chosen.items() if (why := _why_not(m))]:
        raise ValueError(f"target_modules: cannot adapt {'; '.join(unfit)} (exclude_modules leaves layers out)")
    return chosen


def _why_not(layer: Any) -> str | None:
    if isinstance(layer, LoRALinear):
        return "is a LoRALinear"
    if not is_parametrized(layer, "weight") and not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "has no parameter as its weight"
    if has_sparse_gradient(layer):
        return SPARSE
    if isinstance(below(layer)[0], nn.parameter.UninitializedParameter):
        return "has no weight yet (run the model once)"
    if below(layer)[0].dtype not in FLOATS:
        return f"has a quantised weight ({below(layer)[0].dtype})"
    if is_opaque(below(layer)[0]):
        return f"has a quantised weight (a {type(below(layer)[0]).__name__})"
    return None


def register(layer: Any, adapter: LoRAParametrization, required_grad: bool) -> None:
    """Put the adapter after what the layer has, and note whether its weight required grad, for :func:`restore`."""
    training = adapter.training
    register_parametrization(layer, "weight", adapter, unsafe=True)  # its checks would compute the weight
    adapter.train(training or layer.training)
    vars(layer.parametrizations.weight).setdefault(_REQUIRED_GRAD, required_grad)


def required_grad(layer: nn.Module) -> bool:
    """Whether the weight did before the first adapter came."""
    return getattr(parametrizations(layer), _REQUIRED_GRAD, any(p.requires_grad for p in below(layer)))


def restore(
    layers: Iterable[Any], name: str | None = None, weights: Iterable[nn.Parameter | None] = repeat(None)
) -> None:
    """Take adapters (or those of this name) out of layers that have them; where none is left, the weight is what it was
    before, or the one given, and requires grad as before."""
    flags: dict[nn.Parameter, bool] = {}
    for layer, weight in zip(layers, weights, strict=False):
        left = [p for p in parametrizations(layer) if p not in own(layer, name)]
        flag, parameters = required_grad(layer), below(layer)
        if not left:
            # torch takes the property off the layer's class, which it shares with its deepcopies
            kind, inner = type(layer), ("__dict__", "__weakref__")
            layer.__class__ = type(
                kind.__name__, kind.__bases__, {k: v for k, v in vars(kind).items() if k not in inner}
            )
            remove_parametrizations(layer, "weight", leave_parametrized=False)
            if weight is not None:
                layer.weight, parameters = weight, [weight]
            if "bias" in layer._parameters:  # comes after the weight, as in a new layer
                layer._parameters["bias"] = layer._parameters.pop("bias")
        else:
            for i in reversed(range(len(parametrizations(layer)))):
                if parametrizations(layer)[i] not in left:
                    del layer.parametrizations.weight[i]
        if not own(layer):
            flags |= {p: flags.get(p, False) or flag for p in parameters}
            if left:
                vars(parametrizations(layer)).pop(_REQUIRED_GRAD)
    for parameter, flag in flags.items():  # tied ones require grad if one of the layers' did
        parameter.requires_grad_(flag)
