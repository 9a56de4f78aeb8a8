"""Which of its layers a module's forward calls with one input, as its source has it; each call decides anew, by the
tensor's identity (siblings.py).
"""

import ast
import inspect
import textwrap
from collections.abc import Container, Sequence
from typing import Any

from torch import nn


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
