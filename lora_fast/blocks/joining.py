"""Blocks in a model that was not written so: MLPs whose forward is one step (gated.py), and layers with one input
that run as a group (siblings.py).

What will probably run together is found here, once. What does is decided in each call, from the layers' state then;
whatever comes apart runs layer by layer, each still fused by itself, and tells so once for each reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fast.blocks.gated import MLP, TRACED, FastMlp, Traced, fast, settings
from lora_fast.blocks.predict import siblings_of
from lora_fast.blocks.recognise import Mlp, activation_of, is_conv1d, mlp_of
from lora_fast.blocks.siblings import HOOK, SIBLINGS, Joins, Siblings


@dataclass(frozen=True)
class Joined:
    """What of a model is predicted to run together, by the modules' names; and why others that look alike do not."""

    blocks: dict[str, Mlp]
    groups: dict[str, tuple[tuple[str, ...], ...]]  # parents, and of each the names of its children that share an input
    refused: dict[str, str]  # modules that are no such MLP, and why
    wasted: dict[str, tuple[int, int]]  # layers: outputs that nobody asked for, of how many


def join(model: nn.Module) -> None:
    """Let a model's MLPs be one step each, and layers with one input a group. May be called again when layers
    were added."""
    verdicts: dict[tuple[Any, ...], Mlp | str] = {}
    for module in model.modules():
        if isinstance(module, (FastMlp, Joins)):
            continue
        own = {name: child for name, child in module.named_children() if isinstance(child, Joins)}
        if own and not _made_a_block(module, verdicts):
            _group(module, own)


def _made_a_block(module: nn.Module, verdicts: dict[tuple[Any, ...], Mlp | str]) -> bool:
    if sum(map(_is_linear, module.children())) < 2:
        return False
    if "forward" in vars(module):
        mlp: Mlp | str = "its forward was replaced on the instance"
    else:
        key = type(module), _kind(module)
        mlp = verdicts.get(key) or verdicts.setdefault(key, mlp_of(module, _is_linear))
    if isinstance(mlp, Mlp):
        vars(module).update({MLP: mlp, TRACED: Traced.of(module, mlp)})
        _ungroup(module)
        plain: Any = type(module)
        module.__class__ = fast(plain)
    elif any(type(child).__module__ in OF_ACTIVATIONS for child in module.children()):
        vars(module)[MLP] = mlp
    return isinstance(mlp, Mlp)


OF_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")  # what looks like an MLP has one of theirs


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Joins) or type(module) is nn.Linear or is_conv1d(module)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What a trace may depend on beside the class: the instance's numbers, words, configuration and children."""
    own: list[tuple[str, Any]] = [
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, value in settings(module).items()
    ]
    for name, child in module.named_children():
        own.append((name, (type(child), activation_of(child), getattr(child, "out_features", None))))
    return tuple(own)


def _group(module: nn.Module, own: dict[str, Any]) -> None:
    predicted = siblings_of(module, own)
    if [siblings.names for siblings in _groups(module)] == predicted:
        return
    _ungroup(module)
    groups = vars(module)[SIBLINGS] = [Siblings(names, HOOK - i) for i, names in enumerate(predicted)]
    for siblings in groups:
        for name in siblings.names:
            vars(own[name])[SIBLINGS] = siblings
        siblings.attach(module)


def _ungroup(module: nn.Module) -> None:
    for siblings in _groups(module):
        siblings.detach(module)
        for name in siblings.names:
            vars(module._modules[name]).pop(SIBLINGS, None)
    vars(module).pop(SIBLINGS, None)


def part(model: nn.Module) -> None:
    """Undo :func:`join`."""
    for module in model.modules():
        _ungroup(module)
        for name in (MLP, TRACED):
            vars(module).pop(name, None)
        if isinstance(module, FastMlp):
            module.__class__ = module.PLAIN


def joined_in(model: nn.Module) -> Joined:
    """What of the model is joined, as things stand."""
    found = Joined({}, {}, {}, {})
    for name, module in model.named_modules():
        mlp = vars(module).get(MLP)
        if isinstance(mlp, Mlp):
            found.blocks[name] = mlp
        elif isinstance(mlp, str):
            found.refused[name] = mlp
        if groups := _groups(module):
            found.groups[name] = tuple(siblings.names for siblings in groups)
        for siblings in groups:
            for own, count in siblings.wasted.items():
                if count:
                    found.wasted[f"{name}.{own}" if name else own] = count, siblings.calls
    return found


def _groups(module: nn.Module) -> Sequence[Siblings]:
    found = vars(module).get(SIBLINGS)
    return found if isinstance(found, list) else ()
