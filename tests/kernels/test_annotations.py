"""What neither mypy nor ruff holds kernels/ to, half of which is in Triton's language: annotated host functions, and at
most nine arguments by position, but for a kernel itself, whose launch gives all by name."""

import ast

from checkout import ROOT

FUNCTIONS = [
    (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
    for path in sorted((ROOT / "kernels").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
]


def is_compiled(function):
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_host_functions_are_annotated():
    bare = []
    for name, function in FUNCTIONS:
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        asked = [one.annotation for one in every if one is not None and one.arg not in ("self", "cls")]
        if not is_compiled(function) and None in (*asked, function.returns):
            bare.append(name)
    assert len(FUNCTIONS) > 300 and not bare


def test_at_most_nine_arguments():
    many = [
        name
        for name, function in FUNCTIONS
        if len(function.args.posonlyargs + function.args.args) > 9
        and not (is_compiled(function) and function.name.endswith("_kernel"))
    ]
    assert not many
