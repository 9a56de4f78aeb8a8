"""Layers of one parent that run as a group where they are given one input: a memo of outputs, by the input's identity.

Which will probably be given one is found once (predict.py); in each call the tensors themselves decide.
"""

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from lora_fast import dispatch
from lora_fast.blocks.form import Layer
from lora_fast.blocks.functional import lora_group

# In the __dict__ of modules: so it follows deepcopy and pickle.
SIBLINGS = "_siblings"  # a layer's group; a parent's groups
CHILDREN = "_adapted_children"  # how many a module had when the adapters came, and which of them got one
# The hooks' key, the same in all parents: torch.compile guards it, and would compile each layer of a model anew.
HOOK = -0x10FA


class Joins:
    """A layer that can be computed beside others: the mixin of our LoRA layers."""

    casts_back = False  # its output has its input's dtype, whatever it computes in

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        """What this layer computes in a call with x; why it can be in no block now, in words; or None where there is
        nothing to join (adapters that are disabled, merged or not there)."""
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
    saved: Any  # what happens to tensors that are saved, as it was when the call began
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
        calls = self._open.setdefault(_thread(), [])
        if calls and not is_compiling():
            del calls[max(_depth(parent, sys._getframe(1)) - 1, 0) :]
        if self.hook in parent._forward_hooks:
            calls.append(_Call(parent, _saved()))
        elif not calls:
            del self._open[_thread()]

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
        if not is_compiling() and x.is_inference():
            return None  # it counts no writes: whether it is unchanged cannot be known
        mode = _mode(x)
        if _saved() != call.saved:  # in a checkpoint of its own, which makes this layer again and not its siblings
            call.entries.append(_Entry(x, mode, {}, {name}))  # theirs would make this one, too
            return None
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
        ys = lora_group(x, layers)
        return {name: y.to(x.dtype) if modules[name].casts_back else y for name, y in zip(self.names, ys, strict=True)}


def _thread() -> int:
    return 0 if is_compiling() else threading.get_ident()


def _depth(parent: nn.Module, frame: FrameType | None) -> int:
    """How many calls of the parent are going on in this thread, by the frame that called a hook of the last of them:
    an interrupt ends a call without its hook behind."""
    assert frame is not None
    code, depth = frame.f_code, 0
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is parent:
            depth += 1
        frame = frame.f_back
    return depth


def _saved() -> Any:
    """The hooks for what autograd saves, as of the innermost checkpoint. In a graph a checkpoint is a step."""
    return None if is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


def _mode(x: torch.Tensor) -> tuple[Any, ...]:
    """What the outputs depend on beside the layers and x itself."""
    version = 0 if is_compiling() else x._version
    return torch.is_grad_enabled(), dispatch.autocast_dtype(x.device), version
