"""A layer's forward and backward: their outputs made, their programs (layer.py says what these launch) found or made,
bound and run.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward: for small problems the host's time is the layer's time.
"""

from collections.abc import Sequence

import torch

from lora_fast.kernels.binding import bound_program, kind_of
from lora_fast.kernels.common import FP8, precision
from lora_fast.kernels.kept import Keeping, kept_launches
from lora_fast.kernels.layer import Backward, Forward, backward_launches, forward_launches
from lora_fast.kernels.mask import keep_count, keep_scale
from lora_fast.kernels.memory import allocator
from lora_fast.kernels.operands import as_scaling
from lora_fast.kernels.passes import needs_dz
from lora_fast.kernels.problem import Call, Made, MaybeTensor, Problem


def forward(
    problem: Problem,
    call: Call,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: MaybeTensor,
    magnitude: MaybeTensor = None,
    kept: MaybeTensor = None,
) -> tuple[torch.Tensor, Made]:
    """y [*lead, N] = x W^T + S b^T + bias, or g * (x W^T + S b^T) + bias if magnitude [N] is given; and what it leaves
    for the backward.

    x [..., K], contiguous or the matrix of its rows; W [N, K] is in call.held, the problem's base says how; a [R, K], b
    [N, R], bias and magnitude [N] contiguous, in any dtype; with a seed (as ``mask_bits`` takes it) elements are
    dropped with call.p. ``round_norm`` rounds DoRA's norm to W's dtype. ``kept``: what ``make_kept`` made of the same
    weights, where no backward will come.
    """
    m, k, seed, new = problem.m, problem.k, call.seed, allocator(x)
    y = new(*problem.y_shape)
    z = torch.empty_like(y) if problem.keep_z else None
    bits = x8 = None
    words, count, keep = 0, 0, 1.0
    if seed is not None:
        words, count, keep = -(-k // 32), keep_count(call.p), keep_scale(call.p)
        bits = new(m, words, dtype=torch.int32)
    if problem.quantises:
        x8 = new(m, k, dtype=FP8)
    room = new(problem.bytes, dtype=torch.uint8)
    made = Made(room, bits, z, x8)
    if m == 0:
        return y, made
    scaling = as_scaling(call.scaling)
    given = (
        x,
        a,
        b,
        bias,
        magnitude,
        y,
        room,
        bits,
        z,
        x8,
        kept,
        seed,
        count,
        m * words,
        scaling,
        keep,
        *call.held[problem.for_y],
    )
    key = (
        forward_launches,
        kept is None,
        None if seed is None else kind_of(seed),
        kind_of(scaling),
        problem.is_float32 and precision(problem.kind, 256),
    )
    program = problem.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(problem, key, Forward, given)
    if call.defers and program.late:
        program.run(bound, 0, -program.late)
        call.deferred = program, bound, -program.late
    else:
        program.run(bound)
    return y, made


def make_kept(problem: Problem, call: Call, a: torch.Tensor, b: torch.Tensor, magnitude: MaybeTensor) -> torch.Tensor:
    """What a forward makes of the weights alone: DoRA's gain, and the copies of the adapters that products read."""
    kept = a.new_empty(problem.lasting.bytes, dtype=torch.uint8)
    scaling = as_scaling(call.scaling)
    given = a, b, magnitude, kept, scaling, *call.held[problem.for_y]
    program, bound = bound_program(problem, (kept_launches, kind_of(scaling)), Keeping, given)
    program.run(bound)
    return kept


def backward(
    problem: Problem, dy: torch.Tensor, saved: Sequence[MaybeTensor], scaling: float | torch.Tensor, p: float
) -> tuple[MaybeTensor, ...]:
    """(dX [*lead, K], dA [R, K], dB [N, R], dbias [N], dm [N]), each None where the problem does not need it.

    dy [*lead, N], contiguous, or the matrix of its rows, each contiguous; ``saved``, as in ``Saved``, is what is read:
    x and bits for dA, S for dB, b for dA and dX, W, a and bits for dX, g for all of them, n and z for dm. In place of z
    the output y can be given where there was no bias; that takes x, W, S and b, too. Without x, x8 stands for it.
    With many rows dX comes last, and till then its memory holds what the passes leave for their sums.
    """
    m, n, r, kinds = problem.m, problem.n, problem.r, problem.kinds
    (need_x, need_a, need_b, need_bias, need_m), new = problem.needs, allocator(dy)
    dx = new(*problem.x_shape) if need_x else None
    grad_a = new(r, problem.k, dtype=kinds.a) if need_a else None
    grad_b = new(n, r, dtype=kinds.b) if need_b else None
    grad_bias = new(n, dtype=kinds.bias) if need_bias else None
    grad_m = new(n, dtype=kinds.m) if need_m else None
    grads = dx, grad_a, grad_b, grad_bias, grad_m
    if m == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    dz = dz8 = None
    if need_x and problem.base.e4m3:
        dz8 = new(m, n, dtype=FP8)
    elif problem.dora and (need_x or needs_dz(r, need_x or need_a, need_b)):
        dz = new(m, n)
    x, _, _, _, _, bits, _, _, *held = saved
    scaling = as_scaling(scaling)
    given = dy, *grads, dz, dz8, scaling, 1.0 if bits is None else keep_scale(p), *saved
    key = (
        backward_launches,
        dy.stride(),
        x if x is None else x.stride(),
        bits is None,
        *[t if t is None else t.stride() for t in held],
        None if type(scaling) is float else kind_of(scaling),
        problem.is_float32 and precision(problem.kind, 256),
    )
    program = problem.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = bound_program(problem, key, Backward, given)
    program.run(bound)
    return grads
