"""Bottleneck adapters behind layers of a frozen model: put them there, and give their part of its state dict."""

from typing import Any

import torch
from torch import nn

from lora_fast.blocks.recognise import is_conv1d
from lora_fast.checks import FLOATS
from lora_fast.layers.bottleneck import BottleneckAdapter
from lora_fast.layers.rules import features
from lora_fast.models.targets import matching, some

_NAME = "bottleneck"  # of the adapter in the module whose output passes through it


def add_bottleneck(
    model: nn.Module,
    target_modules: str | list[str],
    r: int = 64,
    activation: str = "gelu",
    bias: bool = True,
    freeze: bool = True,
) -> nn.Module:
    """Pass the outputs of the targeted modules through a :class:`BottleneckAdapter` each, in place; return ``model``.

    The modules stay what they are, plain, quantised or with LoRA: the adapter becomes their submodule ``bottleneck``,
    which a forward hook calls. Houlsby's two places in each block of a Llama are ``["o_proj", "down_proj"]``.

    Args:
        model: changed in place.
        target_modules: full names or their last parts, or a regex that must match the full name; modules with
            ``out_features``, or transformers' Conv1D, which return one tensor.
        r, activation, bias: as of :class:`BottleneckAdapter`.
        freeze: switch off the gradients of all that is there. False leaves them as they are, so that LoRA that was
            added before trains beside.

    Raises:
        TypeError: not a module; an argument of the wrong type.
        ValueError: the model has such adapters already; a name or pattern matches nothing; a target that cannot have
            one. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise ValueError("model: has bottleneck adapters already")
    if not isinstance(freeze, bool):
        raise TypeError(f"freeze: got {freeze!r}, expected True or False")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            names.setdefault(module, []).append(name)
    found = matching("target_modules", target_modules, names)
    targets: list[Any] = [module for module in names if module in found]
    if unfit := [f"{names[m][0]} {why}" for m in targets if (why := _why_not(m))]:
        raise ValueError(f"target_modules: cannot adapt {some(unfit)}")
    adapters = []
    for module in targets:
        place = next(module.parameters(), torch.empty(0))
        dtype = place.dtype if place.dtype in FLOATS else None
        adapters.append(BottleneckAdapter(_width(module), r, activation, bias, place.device, dtype))
    if freeze:
        model.requires_grad_(False)
    for module, adapter in zip(targets, adapters, strict=True):
        module.add_module(_NAME, adapter.train(module.training))
        module.register_forward_hook(_through)
    return model


def bottleneck_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' part of ``model.state_dict()``, detached but not copied: to be loaded into a model with the same
    adapters by ``load_state_dict(..., strict=False)``. ValueError without bottleneck adapters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckAdapter)}
    if not layers:
        raise ValueError("model: has no bottleneck adapters; call add_bottleneck first")
    return {f"{name}.{key}".lstrip("."): t for name, layer in layers.items() for key, t in layer.state_dict().items()}


def _through(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return module.bottleneck(output)


def _width(module: Any) -> Any:
    """Of the module's output, as far as it says."""
    width = features(module)[1] if is_conv1d(module) else getattr(module, "out_features", None)
    return width if isinstance(width, int) else None


def _why_not(module: nn.Module) -> str | None:
    """Why the module's output cannot pass through an adapter, in words; None where it can."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the output projection of nn.MultiheadAttention, which does not call it"
    if _width(module) is None:
        return f"is a {type(module).__name__} without out_features"
    return f"has something else called {_NAME!r}" if hasattr(module, _NAME) else None
