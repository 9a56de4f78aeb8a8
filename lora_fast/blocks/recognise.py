"""Whether a module's own forward is an MLP. Nothing is judged by a class's name: it is proved by torch.fx on the
instance itself, which takes the branches of its configuration and sees a forward that somebody else has put there.
"""

import copy
import gc
import operator
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fast.blocks.effects import effect_of
from lora_fast.dispatch import autocast_dtype

PRODUCTS = (operator.mul, operator.imul, torch.mul)


@dataclass(frozen=True)
class Mlp:
    """``down(act(gate(x)) * up(x))``, the same with one layer's output in halves in the place of gate's and up's, or
    ``down(act(first(x)))``: the names of the children, and how ``lora_glu`` and ``lora_mlp`` call what it does."""

    inner: tuple[str, ...]  # gate and up, or the one layer
    down: str
    activation: str
    gate: str | None = None  # which half of the one layer's output is activated, "first" or "second"
    act: str | None = None  # the child that is the activation; None where it is a function
    dropout: str | None = None  # the child ahead of down
    after: str | None = None  # and the one behind it

    @property
    def layers(self) -> tuple[str, ...]:
        return *self.inner, self.down


class _Refused(Exception):
    """Why a forward is no MLP, in words."""


class _Leaves(fx.Tracer):
    """Traces a module's own forward; its children are what it calls, and what it does to a buffer is a step, too.

    Raises :class:`_Refused` where a step is taken in another mode than that of the call.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise _Refused("it does something under no_grad, autocast or a checkpoint of its own")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self.proxies.append(weakref.ref(made))
        return made

    def outlived(self) -> bool:
        """Whether a step's result is kept somewhere after the trace, and not by a cycle alone (as fx's own frames)."""
        for generation in range(3):
            if all(proxy() is None for proxy in self.proxies):
                return False
            gc.collect(generation)
        return any(proxy() is not None for proxy in self.proxies)


class _NoTensors(TorchDispatchMode):
    """Raises :class:`_Refused` where something is done to tensors themselves while a forward is traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Refused(f"it also does {func.overloadpacket.__name__} to a tensor that is neither buffer nor parameter")


def _modes() -> tuple[Any, ...]:
    """What a step depends on beside its arguments, and a graph does not show."""
    autocasts = [autocast_dtype(torch.device(kind)) for kind in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocasts, hooks


def _traced(module: nn.Module, training: bool) -> fx.Graph:
    """The graph of its forward, which runs on a copy of its ``__dict__``: raises :class:`_Refused` where it writes
    there, whatever else a forward does with a proxy."""
    twin = type(module).__new__(type(module))
    own = vars(twin)
    own.update(
        {name: copy.copy(value) if isinstance(value, HOLDERS) else value for name, value in vars(module).items()}
    )
    own["training"] = training
    before = _contents(own)
    tracer = _Leaves()
    with torch.set_grad_enabled(torch.is_grad_enabled()), _NoTensors():  # also ends what a forward switched
        graph = tracer.trace(twin)
    after = _contents(own)
    if changed := [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]:
        raise _Refused(f"it also writes to {', '.join(sorted(changed))}")
    if tracer.outlived():
        raise _Refused("it also keeps what it makes")
    return graph


HOLDERS = (dict, list, set, deque, tuple)


def _contents(own: dict[str, Any]) -> dict[str, list[int]]:
    """What the attributes are, by identity, and what those of them hold that can be written to."""
    found = {}
    for name, value in own.items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, HOLDERS) else ()
        found[name] = [id(value), *map(id, held)]
    return found


def mlp_of(module: nn.Module, is_linear: Callable[[nn.Module], bool]) -> Mlp | str:
    """The MLP that a module's forward is, or why it is none, in words. ``is_linear`` says which children may be its
    linear layers."""
    children = dict(module.named_children())
    if sum(map(is_linear, children.values())) < 2:
        return "it has fewer than two linear layers"
    if (effect := effect_of(module)) is not None:
        return effect
    try:
        graphs = [_traced(module, training) for training in (True, False)]
    except _Refused as why:
        return str(why)
    except Exception as error:  # whatever a forward does with a proxy
        return f"its forward cannot be traced ({type(error).__name__})"
    found, other = (_Traced(graph, children, is_linear).mlp() for graph in graphs)
    return found if isinstance(found, str) or found == other else "its forward is another one in evaluation"


class _Traced:
    """The graph of a forward."""

    def __init__(self, graph: fx.Graph, children: dict[str, nn.Module], is_linear: Callable[[nn.Module], bool]) -> None:
        self.children, self.is_linear = children, is_linear
        self.nodes: list[Any] = [node for node in graph.nodes if node.op != "get_attr" or node.users]
        self.known: set[Any] = set()  # nodes that were told what they are

    def mlp(self) -> Mlp | str:
        inputs = [node for node in self.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1:
            return f"it reads {len(inputs)} inputs"
        (returned,) = self.nodes[-1].args
        down, after = self._undropped(returned)
        if not self._is_layer(down):
            return "what it returns is no output of a linear layer"
        h, dropout = self._undropped(down.args[0])
        if isinstance(found := self._hidden(h), str):
            return found
        inner, activation, act, gate = found
        if any(layer.args[0] is not inputs[0] for layer in inner):
            return "its inner layers are given something else than its input"
        self.known |= {*inputs, *inner, down, self.nodes[-1]}
        if rest := [str(node.target) for node in self.nodes if not (node in self.known or node.op == "placeholder")]:
            return f"it also does {', '.join(rest)}"
        names = *(layer.target for layer in inner), down.target
        if len(set(names)) < len(names):
            return "one linear layer does two things in it"
        return Mlp(names[:-1], down.target, activation, gate, act, dropout, after)

    def _child(self, node: Any) -> nn.Module | None:
        """The child that a node calls with one argument alone."""
        called = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return self.children.get(node.target) if called else None

    def _is_layer(self, node: Any) -> bool:
        child = self._child(node)
        return child is not None and self.is_linear(child)

    def _width(self, node: Any) -> int:
        """How many columns a layer's output has."""
        child: Any = self.children[node.target]
        return child.nf if is_conv1d(child) else child.out_features

    def _undropped(self, node: Any) -> tuple[Any, str | None]:
        """(what a dropout is given, its name); another node as it is. ``F.dropout`` with p = 0 does nothing."""
        name = None
        if type(self._child(node)) is nn.Dropout:
            name = node.target
        elif _calls(node, F.dropout) and node.kwargs.get("p", node.args[1:2]) in (0, (0,)):
            pass
        else:
            return node, None
        self.known.add(node)
        return node.args[0], name

    def _hidden(self, h: Any) -> tuple[Sequence[Any], str, str | None, str | None] | str:
        """Of what the last layer is given: the layers whose outputs it is made of, the activation and its child, and
        which half is the gate; or what it is not, in words."""
        source, activation, act = self._activated(h)
        if activation is not None:
            if not self._is_layer(source):
                return "its last linear layer is not given act(gate(x)) * up(x), nor act of a layer's output"
            return (source,), activation, act, None
        if not (_calls(h, *PRODUCTS) and len(h.args) == 2):
            return "its last linear layer is given neither a product of two nor an activation that is known"
        for gated, up in (h.args, h.args[::-1]):
            before = set(self.known)
            source, activation, act = self._activated(gated)
            self.known.add(h)
            if activation is not None and self._is_layer(source) and self._is_layer(up):
                return (source, up), activation, act, None
            if activation is not None and (halves := self._halves(source, up)) is not None:
                layer, gate = halves
                return (layer,), activation, act, gate
            self.known = before
        return "its last linear layer is not given act(gate(x)) * up(x)"

    def _activated(self, node: Any) -> tuple[Any, str | None, str | None]:
        """(what an activation is given, its name, the child that it is)."""
        found: tuple[Any, str | None, str | None] = None, None, None
        if (child := self._child(node)) is not None:
            found = node.args[0], activation_of(child), node.target
        elif _calls(node, F.silu) and not any(list(node.kwargs.values()) + list(node.args[1:])):
            found = node.args[0], "silu", None
        elif _calls(node, F.gelu) and len(node.args) == 1:
            found = node.args[0], GELUS.get(str(node.kwargs.get("approximate", "none"))), None
        elif _calls(node, F.relu, torch.relu, "relu"):
            found = node.args[0], "relu", None
        elif _calls(node, torch.square, "square") or (
            _calls(node, operator.pow, torch.pow, "pow") and node.args[1:] == (2,)
        ):
            source, activation, act = self._activated(node.args[0])
            found = source, "relu2" if activation == "relu" else None, act
        if found[1] is not None:
            self.known.add(node)
        return found

    def _halves(self, gated: Any, up: Any) -> tuple[Any, str] | None:
        """(the layer whose output's two halves these are, which of them is ``gated``)."""
        one, other = self._half(gated), self._half(up)
        if one is None or other is None or one[0] is not other[0] or {one[1], other[1]} != {0, 1}:
            return None
        return one[0], ("first", "second")[one[1]]

    def _half(self, node: Any) -> tuple[Any, int] | None:
        """(a layer's node, which half of its last dimension this is)."""
        if not (_calls(node, operator.getitem) and isinstance(node.args[0], fx.Node)):
            return None
        of, index = node.args
        if self._is_layer(of):  # y[..., :n], y[..., n:]
            cols = self._width(of)
            half = cols // 2
            which = {(None, half): 0, (0, half): 0, (half, None): 1, (half, cols): 1}
            last = index[-1] if isinstance(index, tuple) and len(index) == 2 and index[0] is ... else None
            at = which.get((last.start, last.stop)) if isinstance(last, slice) and last.step in (None, 1) else None
            self.known.add(node)
            return None if cols % 2 or at is None else (of, at)
        (layer, *rest), dim = of.args, of.kwargs.get("dim", of.args[2] if len(of.args) > 2 else None)
        if not self._is_layer(layer) or dim != -1 or index not in (0, 1):
            return None
        parts = rest[0] if rest else of.kwargs.get("chunks", of.kwargs.get("split_size_or_sections"))
        half, odd = divmod(self._width(layer), 2)
        if _calls(of, torch.chunk, "chunk"):
            halves = parts == 2
        else:
            halves = _calls(of, torch.split, "split") and parts in (half, [half, half], (half, half))
        self.known |= {of, node}
        return (layer, index) if halves and not odd else None


def _calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions, or a method of such a name."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    return node.op in ("call_function", "call_method") and node.target in targets


GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # torch's word for how it is made, and ours
OF_TRANSFORMERS = {  # classes of its activations
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
}


def activation_of(module: nn.Module) -> str | None:
    """Our name for an activation, by its type; None for others. (Configurations call both GELUs "gelu".)"""
    kind = type(module)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.GELU:
        return GELUS.get(str(module.approximate))
    if kind.__module__ != "transformers.activations":
        return None
    if kind.__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu:
        return "gelu"
    return OF_TRANSFORMERS.get(kind.__name__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D itself: a linear layer whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
