"""The kernels of a layer in their order: what a forward and a backward of LoRA or DoRA launch, from which tensors, into
which.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward: for small problems the host's time is the layer's time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import Read
from lora_fast.kernels.cast import Cast, cast_adapters
from lora_fast.kernels.common import FP8, padded_rank, precision, wide
from lora_fast.kernels.decode import decode, takes_decode
from lora_fast.kernels.down import Quantised, cast_and_down, down
from lora_fast.kernels.few_rows import makes_s, product_with_s
from lora_fast.kernels.gemm import product
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import norms
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling, operand
from lora_fast.kernels.pair import dz_and_dm, pair, takes_pair
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of, needs_dz
from lora_fast.kernels.problem import Call, Made, MaybeTensor, Problem
from lora_fast.kernels.program import Bound, Launch, Program, starts
from lora_fast.kernels.sums import Dora

Maybe = Any  # an operand (a seed may be a number), None where the problem has none


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    a: Operand
    b: Operand
    bias: Maybe
    magnitude: Maybe
    y: Operand
    room: Operand
    bits: Maybe
    z: Maybe
    x8: Maybe
    seed: Maybe
    keep_count: Number
    n_words: Number
    scaling: Operand | Number
    keep: Number
    held: tuple[Operand, ...]  # those of the base's tensors that y reads


def _forward(at: Forward, problem: Problem) -> list[Launch]:
    x, y, small, lifted = at.x.rows(), at.y.rows(), problem.small(at.room), problem.lifted
    launches: list[Launch] = []
    a, b, quantised = at.a, at.b, None
    scratch = Scratch(x.device)
    w = problem.base.y(at.held, scratch)
    if at.seed is not None:
        launches.append(mask(at.seed, at.bits, at.keep_count, at.n_words))
    alone = problem.alone and at.bits is None and not problem.quantises
    if alone and takes_decode(x, w.matrix, small.a if problem.casts else a):
        launches += w.launches
        if problem.casts:
            a, b = small.a, small.b
            launches.append(cast_adapters(x, Cast(at.a, at.b, a, b), at.scaling, lifted))
        if problem.dora:
            launches += norms(w.matrix, a, b, at.scaling, small.norm, m=at.magnitude, gain=small.gain,
                              round_norm=problem.round_norm, room=y, lifted=lifted)  # fmt: skip
        return launches + decode(x, w.matrix, a, b, y, at.scaling, scratch, bias=at.bias, gain=small.gain,
                                 lifted=lifted)  # fmt: skip
    if at.x8 is not None:
        quantised = Quantised(at.x8, small.x_scale)
    if problem.casts:
        a, b = small.a, small.b
        made = cast_and_down(x, Cast(at.a, at.b, a, b), small.s, at.scaling, at.keep, bits=at.bits,
                             quantised=quantised, lifted=lifted)  # fmt: skip
    else:
        made = [down(x, a, small.s, at.scaling, at.keep, bits=at.bits, quantised=quantised)]
    z = None if at.z is None else at.z.rows()
    whole = None
    if not problem.casts and at.bits is None and quantised is None:
        whole = product_with_s(x, w.matrix, a, b, y, s=small.s, scaling=at.scaling, keep=at.keep, transposed=True,
                               bias=at.bias, gain=small.gain, z=z)  # fmt: skip
    if whole is None:
        launches += made
    launches += w.launches
    if problem.dora:  # whose parts take y's memory, until y is there
        launches += norms(w.matrix, a, b, at.scaling, small.norm, m=at.magnitude, gain=small.gain, w_scale=w.scale,
                          round_norm=problem.round_norm, room=y, lifted=lifted)  # fmt: skip
    if whole is not None:
        return [*launches, whole]
    x, x_scale = (at.x8, small.x_scale) if problem.base.e4m3 else (x, None)
    return [*launches, product(x, w.matrix, small.s, b, y, transposed=True, bias=at.bias, gain=small.gain, z=z,
                               x_scale=x_scale, w_scale=w.scale)]  # fmt: skip


def forward(
    problem: Problem, call: Call, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: MaybeTensor,
    magnitude: MaybeTensor = None,
) -> tuple[torch.Tensor, Made]:  # fmt: skip
    """y [*lead, N] = x W^T + S b^T + bias, or g * (x W^T + S b^T) + bias if magnitude [N] is given; and what it leaves
    for the backward.

    x [..., K], contiguous or the matrix of its rows; W [N, K] is in call.held, the problem's base says how; a [R, K], b
    [N, R], bias and magnitude [N] contiguous, in any dtype; with a seed (as ``mask_bits`` takes it) elements are
    dropped with call.p. ``round_norm`` rounds DoRA's norm to W's dtype.
    """
    m, k, seed = problem.m, problem.k, call.seed
    y = x.new_empty(problem.y_shape)
    z = torch.empty_like(y) if problem.keep_z else None
    bits = x8 = None
    words, count, keep = 0, 0, 1.0
    if seed is not None:
        words, count, keep = -(-k // 32), keep_count(call.p), keep_scale(call.p)
        bits = x.new_empty(m, words, dtype=torch.int32)
    if problem.quantises:
        x8 = x.new_empty(m, k, dtype=FP8)
    room = x.new_empty(problem.bytes, dtype=torch.uint8)
    made = Made(room, bits, z, x8)
    if m == 0:
        return y, made
    scaling = as_scaling(call.scaling)
    given = (
        x, a, b, bias, magnitude, y, room, bits, z, x8, seed, count, m * words, scaling, keep,
        *call.held[problem.for_y],
    )  # fmt: skip
    key = (
        _forward,
        None if seed is None else _kind(seed),
        _kind(scaling),
        problem.is_float32 and precision(problem.kind, 256),
    )
    program = problem.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(problem, key, Forward, given)
    if call.defers and not makes_s(program.launches[-1]):
        program.run(bound, 0, -1)
        call.deferred = program, bound
    else:
        program.run(bound)
    return y, made


def _kind(value: float | int | torch.Tensor) -> object:
    """What of a scaling or of a seed a program depends on: not the number."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else type(value)


def _bound(problem: Problem, key: tuple, args: Any, given: tuple) -> tuple[Program, Bound]:
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


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    dy: Operand
    dx: Maybe  # the gradients
    grad_a: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe  # dY * g, or that or dY in e4m3
    dz8: Maybe
    scaling: Operand | Number
    keep: Number
    x: Maybe  # from here on as in ``Saved``
    a: Maybe
    b: Maybe
    y: Maybe
    room: Maybe
    bits: Maybe
    z: Maybe
    x8: Maybe
    held: tuple[Operand, ...]  # those of the base's tensors that are saved


def _backward(at: Backward, problem: Problem) -> list[Launch]:
    dy, r, needs, lifted = at.dy.rows(), problem.r, problem.needs, problem.lifted
    scratch = Scratch(dy.device)
    small: Maybe = None if at.room is None else problem.small(at.room)
    s, a, b = small and small.s, at.a, at.b
    if problem.casts and small is not None:
        a, b = small.a, small.b
    x, x_scale = None if at.x is None else at.x.rows(), None
    dora = gain = None
    again: Sequence[Launch] = ()
    held: list[Maybe] = [None] * len(problem.base.tensors)
    held[problem.saved] = at.held
    if problem.dora and small is not None:
        gain, kept = small.gain, at.y if at.z is None else at.z
        dora = Dora(gain, small.norm, kept, at.dz, at.grad_m)
        if problem.z_again:
            w = problem.base.y(held, scratch)
            again = w.launches
            dora = Dora(gain, small.norm, kept, at.dz, at.grad_m, x, w.matrix, s, b, w.scale)
    wanted = all(grad is not None for grad in (at.dx, at.grad_a, at.grad_b))
    if wanted and x is not None and not problem.base.e4m3 and takes_pair(x, dy, r, problem.dora):
        w = problem.base.dx(held, scratch)
        return [*again, *_few_rows(at, problem, x, s, a, b, dora, w, scratch)]
    passes: list[Pass] = [*again]
    ds: Maybe = scratch.part((problem.m, padded_rank(r)), problem.kind) if needs.x or needs.a else None
    dz_scale, ds_here = None, ds
    if at.dz8 is not None:  # the launch that quantises makes dS, too
        dz_scale, ds_here = scratch.part((problem.m,), torch.float32), None
        passes.append(down(dy, b.t(), ds, at.scaling, at.keep, quantised=Quantised(at.dz8, dz_scale), gain=gain,
                           lifted=lifted))  # fmt: skip
    passes += dy_passes(dy, r, at.scaling, at.keep, s=s, b=b, grad_b=at.grad_b, ds=ds_here, grad_bias=at.grad_bias,
                        dora=dora, lifted=lifted)  # fmt: skip
    if at.grad_a is not None:
        if x is None:
            x, x_scale = at.x8, small.x_scale
        passes.append(a_pass(x, ds, at.grad_a, bits=at.bits, row_scale=x_scale))
    launches = launches_of(passes, wide(dy), scratch, at.dx)
    if at.dx is None:
        return launches
    source = next(t for t in (at.dz8, at.dz, dy) if t is not None)
    w = problem.base.dx(held, scratch)
    return [*launches, *w.launches, product(source, w.matrix, ds, a, at.dx.rows(), transposed=False, bits=at.bits,
                                            x_scale=dz_scale, w_scale=w.scale)]  # fmt: skip


def _few_rows(
    at: Backward, problem: Problem, x: Operand, s: Operand, a: Operand, b: Operand, dora: Dora[Operand] | None,
    w: Read, scratch: Scratch,
) -> list[Launch]:  # fmt: skip
    """The backward of few rows over a base that is not e4m3, with dX, dA and dB."""
    dy, dx, lifted = at.dy.rows(), at.dx.rows(), problem.lifted
    launches: list[Launch] = []
    source = dy
    if dora is not None:
        launches, source = dz_and_dm(dy, dora, scratch), at.dz
    launches += w.launches
    ds = scratch.part((problem.m, padded_rank(problem.r)), problem.kind)
    whole = product_with_s(source, w.matrix, b, a, dx, s=ds, scaling=at.scaling, keep=at.keep, transposed=False,
                           bits=at.bits, lifted=lifted)  # fmt: skip
    if whole is None:
        launches.append(down(source, b.t(), ds, at.scaling, at.keep, lifted=lifted))
        launches.append(product(source, w.matrix, ds, a, dx, transposed=False, bits=at.bits))
    else:
        launches.append(whole)
    launches.append(pair(x, dy, ds, s, at.grad_a, at.grad_b, bits=at.bits, grad_bias=at.grad_bias,
                         gain=dora and dora.gain, scaling=at.scaling if lifted else None))  # fmt: skip
    return launches


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
    need_x, need_a, need_b, need_bias, need_m = problem.needs
    dx = dy.new_empty(problem.x_shape) if need_x else None
    grad_a = dy.new_empty(r, problem.k, dtype=kinds.a) if need_a else None
    grad_b = dy.new_empty(n, r, dtype=kinds.b) if need_b else None
    grad_bias = dy.new_empty(n, dtype=kinds.bias) if need_bias else None
    grad_m = dy.new_empty(n, dtype=kinds.m) if need_m else None
    grads = dx, grad_a, grad_b, grad_bias, grad_m
    if m == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    dz = dz8 = None
    if need_x and problem.base.e4m3:
        dz8 = dy.new_empty(m, n, dtype=FP8)
    elif problem.dora and (need_x or needs_dz(r, need_x or need_a, need_b)):
        dz = dy.new_empty(m, n)
    x, _, _, _, _, bits, _, _, *held = saved
    scaling = as_scaling(scaling)
    given = dy, *grads, dz, dz8, scaling, 1.0 if bits is None else keep_scale(p), *saved
    key = (
        _backward, dy.stride(), x if x is None else x.stride(), bits is None,
        *[t if t is None else t.stride() for t in held],
        None if type(scaling) is float else _kind(scaling), problem.is_float32 and precision(problem.kind, 256),
    )  # fmt: skip
    program = problem.programs.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(problem, key, Backward, given)
    program.run(bound)
    return grads
