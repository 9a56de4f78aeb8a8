"""Programs found for what a call gives, or made and kept."""

from typing import Any

import torch

from lora_fast.kernels.operands import operand
from lora_fast.kernels.program import Bound, Program, starts


def kind_of(value: float | int | torch.Tensor) -> object:
    """What of a scaling or of a seed a program depends on: not the number."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else type(value)


def bound_program(problem: Any, key: tuple[Any, ...], args: Any, given: tuple[Any, ...]) -> tuple[Program, Bound]:
    """The program for what is ``given``, bound to it. Programs are kept under their keys for tensors that start at
    multiples of 16 bytes, and under longer ones for other tensors. A key begins with the function that says what a new
    one launches, from ``args`` of operands, the last of which is a tuple of those that are left."""
    if (found := starts(given)) is not None:
        key = *key, found
    program = problem.programs.get(key)
    if program is None or program.stale:
        operands, last = tuple(operand(i, value) for i, value in enumerate(given)), len(args._fields) - 1
        at = args(*operands[:last], operands[last:])
        program = problem.programs[key] = Program(len(given), key[0](at, problem), found is None)
    bound = program.bind(*given)
    assert bound is not None
    return program, bound
