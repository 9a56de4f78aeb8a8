"""What a module's own forward does: whether it is a gated MLP, and which of its layers it calls with one input.

Nothing is judged by a class's name. A gated MLP is proved by torch.fx on the instance itself, which takes the branches
of its configuration and sees a forward that somebody else has put there. Layers that share an input are predicted from
the source (each call decides anew, by the tensor's identity).
"""

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

PRODUCTS = (operator.mul, operator.imul, torch.mul)


@dataclass(frozen=True)
class Glu:
    """``down(act(gate(x)) * up(x))``: the names of the children, and how the activation is called in ``lora_glu``."""

    gate: str
    up: str
    down: str
    activation: str
    act: str | None  # the child that is the activation; None where it is a function
    dropout: str | None  # the child between the product and down


class _Leaves(fx.Tracer):
    """Traces a module's own forward; its children are what it calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def glu_of(module: nn.Module, is_linear: Callable[[nn.Module], bool]) -> Glu | str:
    """The gated MLP that a module's forward is, or why it is none, in words. ``is_linear`` says which children may be
    its linear layers."""
    children = dict(module.named_children())
    if sum(map(is_linear, children.values())) < 3:
        return "it has fewer than three linear layers"
    try:
        graph = _Leaves().trace(module)
    except Exception as error:  # whatever a forward does with a proxy
        return f"its forward cannot be traced ({type(error).__name__})"
    return _Traced(graph, children, is_linear).glu()


class _Traced:
    """The graph of a forward."""

    def __init__(self, graph: fx.Graph, children: dict[str, nn.Module], is_linear: Callable[[nn.Module], bool]) -> None:
        self.children, self.is_linear = children, is_linear
        self.nodes: list[Any] = [node for node in graph.nodes if node.op != "get_attr" or node.users]

    def glu(self) -> Glu | str:
        inputs = [node for node in self.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1:
            return f"it reads {len(inputs)} inputs"
        (down,) = self.nodes[-1].args
        if not self._is_layer(down):
            return "what it returns is no output of a linear layer"
        h, dropout = down.args[0], None
        if isinstance(self._child(h), nn.Dropout):
            h, dropout = h.args[0], h
        if not (isinstance(h, fx.Node) and h.op == "call_function" and h.target in PRODUCTS and len(h.args) == 2):
            return "its last linear layer is not given a product of two"
        two: Any = h.args
        for gated, up in (two, two[::-1]):
            gate, activation = self._activated(gated)
            layers = gate, up, down
            if activation is None or not all(map(self._is_layer, layers)):
                continue
            if any(layer.args[0] is not inputs[0] for layer in (gate, up)):
                continue
            known = {*inputs, *layers, gated, h, dropout, self.nodes[-1]}
            if rest := [str(node.target) for node in self.nodes if node not in known and node.op != "placeholder"]:
                return f"it also does {', '.join(rest)}"
            if len({layer.target for layer in layers}) < 3:
                return "one linear layer does two things in it"
            act = gated.target if gated.op == "call_module" else None
            return Glu(gate.target, up.target, down.target, activation, act, dropout and dropout.target)
        return "its last linear layer is not given act(gate(x)) * up(x)"

    def _child(self, node: Any) -> nn.Module | None:
        """The child that a node calls with one argument alone."""
        called = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return self.children.get(node.target) if called else None

    def _is_layer(self, node: Any) -> bool:
        child = self._child(node)
        return child is not None and self.is_linear(child)

    def _activated(self, node: Any) -> tuple[Any, str | None]:
        """(what an activation is given, its name)."""
        if (child := self._child(node)) is not None:
            return node.args[0], activation_of(child)
        if isinstance(node, fx.Node) and node.op == "call_function" and len(node.args) == 1:
            if node.target is F.silu and not any(node.kwargs.values()):
                return node.args[0], "silu"
            if node.target is F.gelu:
                return node.args[0], GELUS.get(str(node.kwargs.get("approximate", "none")))
        return None, None


GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # torch's word for how it is made, and ours


def activation_of(module: nn.Module) -> str | None:
    """``lora_glu``'s name for an activation, by its type; None for others. (Configurations call both GELUs "gelu".)"""
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return GELUS.get(module.approximate)
    kind = type(module)
    if kind.__module__ != "transformers.activations":
        return None
    found = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}.get(kind.__name__)
    if kind.__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu:
        return "gelu"
    return found


def siblings_of(module: nn.Module, names: Container[str]) -> list[tuple[str, ...]]:
    """Of the children with these names, those that the module's forward calls with one expression in one block of
    statements, in the order of the calls: it will probably give them one tensor. None where there is no source."""
    forward = vars(module).get("forward", type(module).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return []
    function = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if function is None or not function.args.args:
        return []
    calls = _Calls(function.args.args[0].arg, names)
    calls.block(function.body)
    found, taken = [], set[str]()
    for group in calls.by_input.values():
        own = tuple(dict.fromkeys(group))
        if len(own) > 1 and taken.isdisjoint(own):
            found.append(own)
            taken.update(own)
    return found


class _Calls(ast.NodeVisitor):
    """Calls ``self.name(expression)``, by the expression and the block of statements that they are in. A name that is
    assigned anew begins another expression."""

    def __init__(self, owner: str, names: Container[str]) -> None:
        self.owner, self.names = owner, names
        self.by_input: dict[tuple[Any, ...], list[str]] = {}
        self.blocks, self.at = 0, 0
        self.versions: dict[str, int] = {}

    def block(self, statements: Sequence[ast.AST]) -> None:
        """What runs together or not at all."""
        outer = self.at
        self.blocks += 1
        self.at = self.blocks
        for statement in statements:
            self.visit(statement)
        self.at = outer

    def generic_visit(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("body", "orelse", "finalbody") and isinstance(value, list):
                self.block(value)
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.block([node.body])
        self.block([node.orelse])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # reads come before what is written
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.versions[name.id] = self.versions.get(name.id, 0) + 1

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        func = node.func
        if not (isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == self.owner):
            return
        if func.attr in self.names and len(node.args) == 1 and not node.keywords:
            read = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
            versions = tuple(sorted((name, self.versions.get(name, 0)) for name in read))
            key = self.at, ast.dump(node.args[0]), versions
            self.by_input.setdefault(key, []).append(func.attr)
