"""What a module's forward does beside its output, as its bytecode has it. torch.fx runs a forward once and keeps its
steps alone: a write into another object would never be done again, and what a global held then would hold for ever.
"""

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
WRITES_OF_ITEMS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
CONSTANTS = (int, float, complex, str, bytes, tuple, frozenset, torch.dtype, torch.device, ModuleType, type(None))


def effect_of(module: nn.Module) -> str | None:
    """What else its forward does, or what it reads from outside that may change, in words; None where it does neither.

    Looked at are the forward and what it calls by name: methods of its class, and functions, but torch's. What a
    method of another object writes there is not seen, if the call's result is used.
    """
    for function in _functions(module):
        free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for code in _codes(function.__code__):
            if (effect := _effect(code)) is not None:
                return effect
            for name in _read(code):
                if _may_change(_held(free[name]) if name in free else function.__globals__.get(name)):
                    return f"it reads {name}, which is not its own and may change"
    return None


def _functions(module: nn.Module) -> list[FunctionType]:
    """The module's forward and what is called from there, as far as names tell."""
    kinds = type(module).__mro__
    found: list[FunctionType] = []
    todo: list[Any] = [type(module).forward]
    while todo:
        function = todo.pop()
        if isinstance(function, property):
            function = function.fget
        function = getattr(function, "__func__", function)  # of a static, class or bound method
        if not isinstance(function, FunctionType) or function in found or _of_torch(function):
            continue
        found.append(function)
        todo += [_held(cell) for cell in function.__closure__ or ()]
        for code in _codes(function.__code__):
            for name in code.co_names:
                todo += [owner[name] for owner in (function.__globals__, vars(module)) if name in owner]
                todo += [vars(kind)[name] for kind in kinds if name in vars(kind)]
    return found


def _of_torch(function: FunctionType) -> bool:
    return function.__module__ is not None and function.__module__.partition(".")[0] == "torch"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """With the functions that are written in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it holds nothing yet
        return None


def _may_change(value: Any) -> bool:
    return not (callable(value) or isinstance(value, CONSTANTS))


def _read(code: CodeType) -> Iterator[str]:
    """Names from outside of the function."""
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL" or (step.opname == "LOAD_DEREF" and step.argval in code.co_freevars):
            yield step.argval


def _effect(code: CodeType) -> str | None:
    steps = [step for step in dis.get_instructions(code) if step.opname != "PRECALL"]
    for step in steps:
        if step.opname in WRITES or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
            return f"it also writes to {step.argval}"
        if step.opname in WRITES_OF_ITEMS:
            return "it also writes to an item of something"
    for i, step in enumerate(steps):
        if step.opname == "BINARY_OP" and step.argrepr.endswith("=") and step.argrepr != "*=":  # which a graph has
            return f"it also changes something in place ({step.argrepr})"
        if step.opname == "POP_TOP" and i and steps[i - 1].opname.startswith("CALL") and not _of_a_with(steps[: i - 1]):
            return "it also calls something for nothing but its effect"
    return None


def _of_a_with(before: list[dis.Instruction]) -> bool:
    """Whether what is called then belongs to a ``with``: its exit is given None three times, its entry is looked up in
    a way of its own (from Python 3.14 on; until then it is no call)."""
    last = [(step.opname, step.argval) for step in before[-3:]]
    return last == [("LOAD_CONST", None)] * 3 or last[-1:] == [("LOAD_SPECIAL", "__enter__")]
