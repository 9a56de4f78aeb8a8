"""An experts layer's forward and backward: their outputs made, their programs (layer.py says what these launch) found
or made, bound and run."""

from typing import Any

import torch

from lora_fast.kernels.binding import bound_program
from lora_fast.kernels.common import precision
from lora_fast.kernels.experts.layer import Backward, Forward, backward_launches, forward_launches
from lora_fast.kernels.experts.problem import Problem
from lora_fast.kernels.program import Bound, Program

MaybeTensor = torch.Tensor | None
Held = tuple[MaybeTensor, ...]  # the tensors of gate_up and of down (one each, if they are plain), and their biases


class Call:
    """The scalings of one call. If it ``defers``, the launches that make y of the rest are left here, to be run as
    ``program.run(bound, first)`` once what the backward reads is saved."""

    defers = False
    deferred: tuple[Program, Bound, int] | None = None

    def __init__(self, s1: float, s2: float) -> None:
        self.s1, self.s2 = float(s1), float(s2)


def forward(
    problem: Problem,
    call: Call,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    adapters: tuple[MaybeTensor, ...],
    held: Held,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [T, H], h [S, 2I] and the room.

    x [T, H], ids and weights [T, K], the adapters (lora_A and lora_B of gate_up, and of down, None where there are
    none) and the biases contiguous; gate_up and down, if plain, in x's dtype, of any strides.
    """
    y, h = torch.empty_like(x), x.new_empty(problem.slots, 2 * problem.i)
    room = x.new_empty(problem.bytes, dtype=torch.uint8)
    if problem.tokens == 0:
        return y, h, room
    given = x, ids, weights, *adapters, y, h, room, call.s1, call.s2, *held
    program, bound = _bound(problem, (forward_launches, _exact(problem)), Forward, given)
    if call.defers:
        program.run(bound, 0, -problem.last)
        call.deferred = program, bound, -problem.last
    else:
        program.run(bound)
    return y, h, room


def backward(
    problem: Problem,
    call: Call,
    dout: torch.Tensor,
    saved: tuple[MaybeTensor, ...],
    held: tuple[MaybeTensor, ...],
) -> tuple[MaybeTensor, ...]:
    """Gradients in the order of ``Needs``: dx [T, H], dw [T, K], of the adapters in their shapes and dtypes; each None
    where the problem does not need it.

    dout [T, H], contiguous; ``saved``: x, h, the room, and lora_A of each projection, each None where ``to_save`` says
    that it is not read.
    """
    needs, kinds, e = problem.needs, problem.kinds, problem.experts
    shapes = (
        (problem.tokens, problem.h),
        (problem.tokens, problem.k),
        (e * problem.r1, problem.h),
        (2 * problem.i, e * problem.r1),
        (e * problem.r2, problem.i),
        (problem.h, e * problem.r2),
    )
    grads = tuple(
        dout.new_empty(shape, dtype=kind) if need else None
        for shape, kind, need in zip(shapes, kinds, needs, strict=True)
    )
    if problem.tokens == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    given = dout, *grads, call.s1, call.s2, *saved, *held
    program, bound = _bound(problem, (backward_launches, _exact(problem)), Backward, given)
    program.run(bound)
    return grads


def to_save(
    problem: Problem,
    x: torch.Tensor,
    h: torch.Tensor,
    room: torch.Tensor,
    adapters: tuple[MaybeTensor, ...],
    held: Held,
) -> tuple[MaybeTensor, ...]:
    """What ``backward`` reads and nothing else: its ``saved``, and after these its ``held``."""
    needs, (gate_up, down, _, bias2) = problem.needs, problem.parts(held)
    return (
        x if needs.a1 else None,
        h if problem.needs_da or needs.a2 else None,
        room,
        adapters[0] if needs.x and problem.r1 and not problem.a_packed(0) else None,
        adapters[2] if problem.needs_da and problem.r2 and not problem.a_packed(1) else None,
        *(t if needs.x else None for t in gate_up),
        *(t if problem.needs_da else None for t in down),
        None,
        bias2 if needs.weights else None,
    )


def _exact(problem: Problem) -> str:
    """How float32 products are made: torch's setting may change."""
    return precision(problem.kind, 256)


def _bound(problem: Problem, key: tuple[Any, ...], args: Any, given: tuple[Any, ...]) -> tuple[Program, Bound]:
    program = problem.programs.get(key)
    if program is None or program.stale or (bound := program.bind(*given)) is None:
        return bound_program(problem, key, args, given)
    return program, bound
