"""The forward and the backward of a layer with several adapters in one batch: their outputs made, their programs
(layer.py says what these launch) found or made, bound and run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.batch.layer import Backward, Forward, backward_launches, forward_launches
from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.ranks import Numbers, tables_on
from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import precision
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.program import Bound, Program


class Call:
    """What one call has beside tensors that autograd looks at. If it ``defers``, the launches that make y are left
    here, to be run as ``program.run(bound, first)`` once what the backward reads is saved."""

    defers = False
    deferred: tuple[Program, Bound, int] | None = None

    def __init__(
        self, held: tuple[torch.Tensor, ...], which: torch.Tensor, numbers: Numbers, seed: torch.Tensor | int | None
    ) -> None:
        self.held, self.which, self.numbers, self.seed = held, which, numbers, seed


class Made(NamedTuple):
    """What a forward leaves for the backward."""

    room: MaybeTensor
    bits: MaybeTensor
    z: MaybeTensor = None


class Saved(NamedTuple):
    """What a backward reads, each None where it does not; then the base's tensors, where it does."""

    scales: torch.Tensor
    x: MaybeTensor  # [..., K]
    room: MaybeTensor
    bits: MaybeTensor
    kept: MaybeTensor  # z or y [*lead, N]


def forward(
    problem: Problem,
    call: Call,
    x: torch.Tensor,
    a: torch.Tensor,
    b: MaybeTensor,
    bias: MaybeTensor,
    magnitudes: MaybeTensor = None,
) -> tuple[torch.Tensor, Made]:
    """y [*lead, N], and what it leaves.

    x [..., K], contiguous or the matrix of its rows; a [sum of R, K], A's one below the other, and b [N * sum of R],
    B's one after the other, contiguous, in any dtype, and DoRA's magnitudes [adapters, N] likewise; or in place of
    a the addresses of all A's, B's and magnitudes, which are contiguous and of the problem's kinds, and neither b nor
    magnitudes; the base's tensors in call.held; its ``which`` contiguous, with a seed its numbers with counts.
    """
    y = x.new_empty(problem.y_shape)
    words = -(-problem.k // 32)
    bits = None if call.seed is None else x.new_empty(problem.m, words, dtype=torch.int32)
    z = x.new_empty(problem.y_shape) if problem.keep_z else None
    room = x.new_empty(problem.bytes, dtype=torch.uint8)
    if problem.m == 0:
        return y, Made(room, bits, z)
    counts = None if call.seed is None else call.numbers.counts
    tables = tables_on(problem.ranks, x.device)
    which = call.which.view(-1)
    given = (
        x,
        which,
        a,
        b,
        bias,
        magnitudes,
        y,
        z,
        room,
        bits,
        call.seed,
        problem.m * words,
        tables,
        call.numbers.scales,
        counts,
        *call.held,
    )
    seed = None if call.seed is None else kind_of(call.seed)
    key = (
        forward_launches,
        b is None,
        which.dtype,
        which.shape,
        x.stride(),
        call.held[0].stride(),
        seed,
        _exact(problem),
    )
    program, bound = _bound(problem, key, Forward, given)
    if call.defers:
        program.run(bound, 0, -program.late)
        call.deferred = program, bound, -program.late
    else:
        program.run(bound)
    return y, Made(room, bits, z)


def backward(problem: Problem, dy: torch.Tensor, saved: Sequence[Any]) -> tuple[MaybeTensor, ...]:
    """(dX [*lead, K], dA's [sum of R * K], dB's [N * sum of R], dbias [N], dm's [adapters, N]), each None where the
    problem does not need it, those of the adapters in the order of ``forward``'s a and b.

    dy [*lead, N], contiguous, or the matrix of its rows, each contiguous.
    """
    needs, kinds, count = problem.needs, problem.kinds, sum(problem.ranks.of)
    dx = dy.new_empty(problem.x_shape) if needs.x else None
    grad_a = dy.new_empty(count * problem.k, dtype=kinds.a) if needs.a else None
    grad_b = dy.new_empty(count * problem.n, dtype=kinds.b) if needs.b else None
    grad_bias = dy.new_empty(problem.n, dtype=kinds.bias) if needs.bias else None
    grad_m = dy.new_empty(len(problem.ranks.of), problem.n, dtype=kinds.m) if needs.m else None
    grads = dx, grad_a, grad_b, grad_bias, grad_m
    if problem.m == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    scales, x, room, bits, kept, *held = saved
    dz = dy.new_empty(problem.m, problem.n) if problem.dora and (needs.x or needs.a) else None
    given = dy, *grads, dz, tables_on(problem.ranks, dy.device), scales, x, room, bits, kept, *held
    strides = (None if t is None else t.stride() for t in (x, *held))
    key = backward_launches, dy.stride(), *strides, bits is None, _exact(problem)
    program, bound = _bound(problem, key, Backward, given)
    program.run(bound)
    return grads


def to_save(
    problem: Problem, held: Sequence[torch.Tensor], scales: torch.Tensor, x: torch.Tensor, made: Made, y: torch.Tensor
) -> tuple[MaybeTensor, ...]:
    """What ``backward`` reads, and nothing else, as in ``Saved``."""
    needs = problem.needs
    low = needs.x or needs.a or needs.b or needs.m
    return *Saved(
        scales,
        x if needs.a or problem.z_again else None,
        made.room if low else None,
        made.bits if needs.x or needs.a else None,
        y if problem.z_again else made.z,
    ), *(held if problem.reads_w else ())


def _exact(problem: Problem) -> str | bool:
    """How float32 products are made: torch's setting may change."""
    return problem.is_float32 and precision(problem.kind, 256)


def _bound(problem: Problem, key: tuple[Any, ...], args: Any, given: tuple[Any, ...]) -> tuple[Program, Bound]:
    program = problem.programs.get(key)
    if program is None or program.stale or (bound := program.bind(*given)) is None:
        return bound_program(problem, key, args, given)
    return program, bound
