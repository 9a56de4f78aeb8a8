"""Layers that run as one in a model that was not written so: the memo of siblings that are given one input, and the
gated MLPs whose forward is one step.

What will probably run together is found once (recognise.py). What does is decided in each call, from the layers' state
then; whatever comes apart runs layer by layer, each still fused by itself, and tells so once for each reason.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from lora_fast import dispatch
from lora_fast.blocks.form import Layer
from lora_fast.blocks.functional import lora_glu, lora_group
from lora_fast.blocks.recognise import Glu, activation_of, glu_of, siblings_of
from lora_fast.blocks.reference import ACTIVATIONS

# In the __dict__ of modules: so it follows deepcopy and pickle.
SIBLINGS = "_siblings"  # a layer's group; a parent's groups
GLU = "_glu"  # what a gated MLP is, or why a module that looks like one is none
# The hooks' key, the same in all parents: torch.compile guards it, and would compile each layer of a model anew.
HOOK = -0x10FA


class Joins:
    """A layer that can be computed beside others: the mixin of our LoRA layers."""

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        """What this layer computes in a call with x; why it can be in no block now, in words; or None where there is
        nothing to join (adapters that are disabled, merged or not there)."""
        raise NotImplementedError

    @property
    def joinable(self) -> bool:
        """Whether blocks of such layers are one step: not over a packed base, as things are."""
        raise NotImplementedError

    def joined(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output for x if it was, or is to be, made with that of its siblings."""
        siblings: Siblings | None = vars(self).get(SIBLINGS)
        return None if siblings is None else siblings.take(self, x)


@dataclass(eq=False)
class _Entry:
    """The outputs that are left of a group's run on x. It lives no longer than the call of the parent."""

    x: torch.Tensor
    mode: tuple[Any, ...]
    outputs: dict[str, torch.Tensor]  # by the layers' names
    asked: set[str]


@dataclass(eq=False)
class _Call:
    """A call of the parent that is going on."""

    parent: nn.Module
    entries: list[_Entry] = field(default_factory=list)


class Siblings:
    """What layers of one parent share that are predicted to get one input: a memo of outputs, by the input's identity.

    It is open while the parent runs (two hooks of the parent's), in that thread, and empty afterwards: an output holds
    its input through autograd's graph, so an entry that only knew its input weakly would never end.
    """

    def __init__(self, names: tuple[str, ...], hook: int = HOOK) -> None:
        self.names, self.hook = names, hook  # the key of the parent's two hooks
        self.calls, self.wasted = 0, dict.fromkeys(names, 0)  # runs, and of these outputs that nobody asked for
        self._open: dict[int, list[_Call]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, self.hook)  # nothing of calls that are going on

    def attach(self, parent: nn.Module) -> None:
        """Open with the parent's calls from now on."""
        before, after = parent.register_forward_pre_hook(self.enter), parent.register_forward_hook(self.leave)
        parent._forward_pre_hooks[self.hook] = parent._forward_pre_hooks.pop(before.id)
        parent._forward_hooks[self.hook] = parent._forward_hooks.pop(after.id)
        parent._forward_hooks_always_called[self.hook] = True

    def detach(self, parent: nn.Module) -> None:
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks, parent._forward_hooks_always_called):
            hooks.pop(self.hook, None)

    def enter(self, parent: nn.Module, args: Any) -> None:
        self._open.setdefault(_thread(), []).append(_Call(parent))

    def leave(self, parent: nn.Module, args: Any, output: Any) -> None:
        calls = self._open.get(_thread())
        if not calls or calls[-1].parent is not parent:
            return  # another hook raised before the first of these two
        call = calls.pop()
        if not is_compiling():
            for entry in call.entries:
                for name in entry.outputs:
                    self.wasted[name] += 1
        if not calls:
            del self._open[_thread()]

    def take(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output for x; None where it must make it by itself."""
        calls = self._open.get(_thread())
        if not calls:
            return None  # called from elsewhere than its parent's forward
        call = calls[-1]
        modules = call.parent._modules
        name = next((name for name in self.names if modules[name] is layer), None)
        if name is None or not (layer.training or torch.is_grad_enabled()):
            return None  # evaluation keeps more of a layer than a group does
        mode = _mode(x)
        for entry in call.entries:
            if entry.x is x and entry.mode == mode and name not in entry.asked:
                entry.asked.add(name)
                return entry.outputs.pop(name, None)
        if any(name in entry.outputs for entry in call.entries):
            return None  # it was predicted to get another input
        outputs = self._made(modules, x)
        call.entries.append(_Entry(x, mode, outputs, {name}))
        return outputs.pop(name, None)

    def _made(self, modules: dict[str, Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        layers: list[Layer] = []
        for name in self.names:
            sibling: Any = modules[name]
            made = sibling.as_layer(x) if isinstance(sibling, Joins) else f"is a {type(sibling).__name__}"
            if not isinstance(made, Layer):
                if made is not None:
                    dispatch.tell("runs a group layer by layer", f"{name}: {made}")
                return {}
            layers.append(made)
        if not is_compiling():
            self.calls += 1
        return dict(zip(self.names, lora_group(x, layers), strict=True))


def _thread() -> int:
    return 0 if is_compiling() else threading.get_ident()


def _mode(x: torch.Tensor) -> tuple[Any, ...]:
    """What the outputs depend on beside the layers and x itself."""
    version = 0 if is_compiling() or x.is_inference() else x._version
    return torch.is_grad_enabled(), dispatch.autocast_dtype(x.device), version


class FastGlu:
    """The first base of a gated MLP's class while its forward is one step. Not constructed: see :func:`join`."""

    PLAIN: type[Any]  # the class that the module had

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class that it had, and what that gives where the layers cannot be joined."""
        layers = why_apart_now(self, args, kwargs)
        if isinstance(layers, tuple):
            gate, up, down = layers
            return lora_glu(args[0], gate, up, down, vars(self)[GLU].activation)
        if layers is not None:
            dispatch.tell("runs a block layer by layer", layers)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.PLAIN,), self.__getstate__()


def why_apart_now(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Layer, ...] | str | None:
    """gate, up and down as ``lora_glu`` takes them in this call; or why they are not joined in it, in words, or None
    where that is nobody's loss."""
    glu: Glu = vars(module)[GLU]
    if not (module.training or torch.is_grad_enabled()):
        return None  # evaluation keeps more of a layer than a block does
    if len(args) != 1 or kwargs:
        return "it was called with more than x"
    x, modules = args[0], module._modules
    if glu.dropout is not None and (dropout := modules[glu.dropout]).training and dropout.p > 0:
        return "it drops elements itself, ahead of its last linear layer"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    for name in (glu.gate, glu.up, glu.down, glu.act, glu.dropout):
        if name is not None and _hooked(modules[name]):
            return f"{name} has hooks or a replaced forward"
    found = []
    for name in (glu.gate, glu.up, glu.down):
        layer = _layer_of(modules[name], x)
        if layer is None:
            return None
        if isinstance(layer, str):
            return f"{name}: {layer}"
        found.append(layer)
    if not any(layer.adapted for layer in found):
        return None
    return tuple(found) if is_compiling() or _proved(module, x) else "its forward gives other numbers than its layers"


def _layer_of(module: Any, x: torch.Tensor) -> Layer | str | None:
    if isinstance(module, Joins):
        return module.as_layer(x)
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    weight, bias = module.weight, module.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.numel() == 0:
        return "it has no adapter, and its weight is trained, sharded or of a type of its own"
    if x.dtype != weight.dtype and dispatch.autocast_dtype(x.device) is None:
        return f"the input is {x.dtype} and the weight {weight.dtype}, without autocast"
    return Layer(weight, bias=bias)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


_probed: dict[tuple[type, Glu], bool] = {}


def _proved(module: Any, x: torch.Tensor) -> bool:
    """Whether two rows of x give the same bits through the module's own forward as through its layers: looked at once
    for each class, with the same random numbers for both. Tracing cannot see what a forward asks of its input's type.
    """
    key = module.PLAIN, vars(module)[GLU]
    if key not in _probed:
        if x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True  # no numbers to look at; by the trace alone
        _probed[key] = _same_numbers(module, x)
    return _probed[key]


def _same_numbers(module: Any, x: torch.Tensor) -> bool:
    glu: Glu = vars(module)[GLU]
    rows = x.detach().reshape(-1, x.shape[-1])[:2]
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        seed = torch.random.initial_seed()
        torch.manual_seed(seed)
        whole = super(FastGlu, module).forward(rows)
        torch.manual_seed(seed)
        e, g = getattr(module, glu.gate)(rows), getattr(module, glu.up)(rows)
        act = ACTIVATIONS[glu.activation] if glu.act is None else getattr(module, glu.act)
        return torch.equal(whole, getattr(module, glu.down)(act(e) * g))


@cache
def _fast(plain: Any) -> Any:
    """The class of gated MLPs of a class."""
    name = plain.__name__  # which tools compare
    return type(name, (FastGlu, plain), {"PLAIN": plain, "__module__": plain.__module__, "__qualname__": name})


def _rebuilt(plain: type) -> Any:
    kind = _fast(plain)
    return kind.__new__(kind)


@dataclass(frozen=True)
class Joined:
    """What of a model is predicted to run together, by the modules' names; and why others that look alike do not."""

    blocks: dict[str, Glu]  # gated MLPs
    groups: dict[str, tuple[tuple[str, ...], ...]]  # parents, and of each the names of its children that share an input
    refused: dict[str, str]  # modules that are no gated MLP, and why
    wasted: dict[str, tuple[int, int]]  # layers: outputs that nobody asked for, of how many


def join(model: nn.Module) -> None:
    """Let a model's gated MLPs be one step each, and layers with one input a group. May be called again when layers
    were added."""
    verdicts: dict[tuple[Any, ...], Glu | str] = {}
    for module in model.modules():
        if isinstance(module, (FastGlu, Joins)):
            continue
        own = {name: child for name, child in module.named_children() if isinstance(child, Joins) and child.joinable}
        if own and not _made_a_block(module, verdicts):
            _group(module, own)


def _made_a_block(module: nn.Module, verdicts: dict[tuple[Any, ...], Glu | str]) -> bool:
    if sum(map(_is_linear, module.children())) < 3:
        return False
    if "forward" in vars(module):
        glu: Glu | str = "its forward was replaced on the instance"
    else:
        key = type(module), _settings(module)
        glu = verdicts.get(key) or verdicts.setdefault(key, glu_of(module, _is_linear))
    if isinstance(glu, Glu):
        vars(module)[GLU] = glu
        _ungroup(module)
        plain: Any = type(module)
        module.__class__ = _fast(plain)
    elif any(type(child).__module__ in OF_ACTIVATIONS for child in module.children()):
        vars(module)[GLU] = glu
    return isinstance(glu, Glu)


OF_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")  # what looks like an MLP has one of theirs


def _is_linear(module: nn.Module) -> bool:
    return module.joinable if isinstance(module, Joins) else type(module) is nn.Linear


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What a trace may depend on beside the class: the instance's numbers, words, configuration and children."""
    own = [
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    ]
    children = [(name, type(child), activation_of(child)) for name, child in module.named_children()]
    return *own, *children


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
        vars(module).pop(GLU, None)
        if isinstance(module, FastGlu):
            module.__class__ = module.PLAIN


def joined_in(model: nn.Module) -> Joined:
    """What of the model is joined, as things stand."""
    found = Joined({}, {}, {}, {})
    for name, module in model.named_modules():
        glu = vars(module).get(GLU)
        if isinstance(glu, Glu):
            found.blocks[name] = glu
        elif isinstance(glu, str):
            found.refused[name] = glu
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
