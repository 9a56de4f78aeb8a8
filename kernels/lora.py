"""The kernels of a layer in their order: what a forward and a backward of LoRA or DoRA launch, from which tensors, into
which.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward: for small problems the host's time is the layer's time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.cast import Cast
from lora_fast.kernels.common import FP8, padded_rank, precision, wide
from lora_fast.kernels.down import Quantised, cast_and_down, down
from lora_fast.kernels.gemm import product
from lora_fast.kernels.layout import Fp8, Made, MaybeTensor, Needs, Saved, Shared
from lora_fast.kernels.mask import keep_count, keep_scale, mask
from lora_fast.kernels.norm import norms
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling, operand
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of, needs_dz
from lora_fast.kernels.program import Bound, Launch, Program, starts
from lora_fast.kernels.sums import Dora

Maybe = Any  # an operand (a seed may be a number), None where the problem has none


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    weight: Operand
    a: Operand
    b: Operand
    bias: Maybe
    magnitude: Maybe
    y: Operand
    room: Operand
    bits: Maybe
    z: Maybe
    x8: Maybe
    w_scale: Maybe
    seed: Maybe
    keep_count: Number
    n_words: Number
    scaling: Operand | Number
    keep: Number


def _forward(at: Forward, shared: Shared, round_norm: bool) -> list[Launch]:
    x, y, small, lifted = at.x.rows(), at.y.rows(), shared.small(at.room), shared.lifted
    launches, a, b, quantised = [], at.a, at.b, None
    if at.seed is not None:
        launches.append(mask(at.seed, at.bits, at.keep_count, at.n_words))
    if at.x8 is not None:
        quantised = Quantised(at.x8, small.x_scale)
    if shared.cast:
        a, b = small.a, small.b
        launches += cast_and_down(x, Cast(at.a, at.b, a, b), small.s, at.scaling, at.keep, bits=at.bits,
                                  quantised=quantised, lifted=lifted)  # fmt: skip
    else:
        launches.append(down(x, a, small.s, at.scaling, at.keep, bits=at.bits, quantised=quantised))
    if shared.dora:  # whose parts take y's memory, until y is there
        launches += norms(at.weight, a, b, at.scaling, small.norm, m=at.magnitude, gain=small.gain, w_scale=at.w_scale,
                          round_norm=round_norm, room=y, lifted=lifted)  # fmt: skip
    x, x_scale = (at.x8, small.x_scale) if shared.fp8 else (x, None)
    z = None if at.z is None else at.z.rows()
    return [*launches, product(x, at.weight, small.s, b, y, transposed=True, bias=at.bias, gain=small.gain, z=z,
                               x_scale=x_scale, w_scale=at.w_scale)]  # fmt: skip


def lora_fwd(
    shared: Shared, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    scaling: float | torch.Tensor, bias: MaybeTensor, seed: torch.Tensor | int | None, p: float,
    magnitude: MaybeTensor = None, round_norm: bool = False, keep_z: bool = False, fp8: Fp8 | None = None,
    late: list | None = None,
) -> tuple[torch.Tensor, Made]:  # fmt: skip
    """y [*lead, N] = x W^T + S b^T + bias, or g * (x W^T + S b^T) + bias if magnitude [N] is given; and what it leaves
    for the backward. A list ``late`` takes the program and the bound arguments of the last product, which fills y and
    z, for the caller to run as ``program.run(bound, -1)``; there is none without rows.

    x [..., K], contiguous or the matrix of its rows, weight [N, K], both in one dtype; a [R, K], b [N, R], bias and
    magnitude [N] contiguous, in any; a seed (as ``mask_bits`` takes it) where elements are dropped with p.
    ``round_norm`` rounds DoRA's norm to weight's dtype. Over an fp8 base (see ``Fp8``) weight is e4m3, and x is
    quantised likewise for the product.
    """
    m, k = shared.m, shared.k
    y = x.new_empty(shared.y_shape)
    z = torch.empty_like(y) if keep_z else None
    bits = x8 = w_scale = None
    words, count, keep = 0, 0, 1.0
    if seed is not None:
        words, count, keep = -(-k // 32), keep_count(p), keep_scale(p)
        bits = x.new_empty(m, words, dtype=torch.int32)
    if shared.quantised:
        x8 = x.new_empty(m, k, dtype=FP8)
    if fp8 is not None:
        w_scale = fp8.row_scale
    room = x.new_empty(shared.bytes, dtype=torch.uint8)
    made = Made(room, bits, z, x8)
    if m == 0:
        return y, made
    scaling = as_scaling(scaling)
    given = x, weight, a, b, bias, magnitude, y, room, bits, z, x8, w_scale, seed, count, m * words, scaling, keep
    key = (
        None if seed is None else _kind(seed), _kind(scaling),
        precision(shared.kind, 256) if shared.wide else None, round_norm, keep_z,
    )  # fmt: skip
    program = shared.forwards.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(shared.forwards, key, given, _forward, Forward, shared, round_norm)
    if late is None:
        program.run(bound)
    else:
        program.run(bound, 0, -1)
        late += program, bound
    return y, made


def _kind(value: float | int | torch.Tensor) -> object:
    """What of a scaling or of a seed a program depends on: not the number."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else type(value)


def _bound(
    programs: dict[tuple, Program], key: tuple, given: tuple, make: Callable[..., list[Launch]], args: type, *rest
) -> tuple[Program, Bound]:
    """The program for what is ``given``, bound to it. Programs are kept under their keys for tensors that start at
    multiples of 16 bytes, and under longer ones for other tensors; new ones are of ``make(args of operands, *rest)``.
    """
    if (found := starts(given)) is not None:
        key = *key, found
    program = programs.get(key)
    if program is None:
        at = args(*(operand(i, value) for i, value in enumerate(given)))
        program = programs[key] = Program(len(given), make(at, *rest), found is None)
    bound = program.bind(*given)
    assert bound is not None
    return program, bound


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    dy: Operand
    x: Maybe  # from here on as in ``Saved``
    weight: Maybe
    a: Maybe
    b: Maybe
    y: Maybe
    room: Maybe
    bits: Maybe
    z: Maybe
    x8: Maybe
    row_scale: Maybe
    columns: Maybe
    col_scale: Maybe
    dx: Maybe  # the gradients
    grad_a: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe  # dY * g, or that or dY in e4m3
    dz8: Maybe
    scaling: Operand | Number
    keep: Number


def _backward(at: Backward, shared: Shared, needs: Needs) -> list[Launch]:
    dy, r, lifted, scratch = at.dy.rows(), shared.r, shared.lifted, Scratch(at.dy.device)
    small: Maybe = None if at.room is None else shared.small(at.room)
    s, a, b = small and small.s, at.a, at.b
    if shared.cast and small is not None:
        a, b = small.a, small.b
    x, x_scale = None if at.x is None else at.x.rows(), None
    dora = gain = None
    if shared.dora and small is not None:
        gain, kept = small.gain, at.y if at.z is None else at.z
        dora = Dora(gain, small.norm, kept, at.dz, at.grad_m)
        if needs.m and at.z is None:
            dora = Dora(gain, small.norm, kept, at.dz, at.grad_m, x, at.weight, s, b, at.row_scale)
    passes: list[Pass] = []
    ds: Maybe = scratch.part((shared.m, padded_rank(r)), shared.kind) if needs.x or needs.a else None
    dz_scale, ds_here = None, ds
    if at.dz8 is not None:  # the launch that quantises makes dS, too
        dz_scale, ds_here = scratch.part((shared.m,), torch.float32), None
        passes.append(down(dy, b.t(), ds, at.scaling, at.keep, quantised=Quantised(at.dz8, dz_scale),
                           gain=gain, lifted=lifted))  # fmt: skip
    passes += dy_passes(dy, r, at.scaling, at.keep, s=s, b=b, grad_b=at.grad_b, ds=ds_here, grad_bias=at.grad_bias,
                        dora=dora, lifted=lifted)  # fmt: skip
    if at.grad_a is not None:
        if x is None:
            x, x_scale = at.x8, small.x_scale
        passes.append(a_pass(x, ds, at.grad_a, bits=at.bits, row_scale=x_scale))
    launches = launches_of(passes, wide(dy), scratch, at.dx)
    if at.dx is None:
        return launches
    source, weight = dy if at.dz is None else at.dz, at.weight
    if at.dz8 is not None:
        source, weight = at.dz8, at.columns
    return [*launches, product(source, weight, ds, a, at.dx.rows(), transposed=False, bits=at.bits, x_scale=dz_scale,
                               w_scale=at.col_scale)]  # fmt: skip


def lora_bwd(
    shared: Shared, needs: Needs, dy: torch.Tensor, saved: Saved | tuple, scaling: float | torch.Tensor, p: float,
    kinds: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[MaybeTensor, ...]:  # fmt: skip
    """(dX [*lead, K], dA [R, K], dB [N, R], dbias [N], dm [N]), each None where it is not needed. ``kinds`` are the
    dtypes of the last two.

    dy [*lead, N], contiguous, or the matrix of its rows, each contiguous; ``saved``, as in ``lora_fwd``, is what is
    read: x and bits for dA, S for dB, b for dA and dX, weight (an fp8 base's columns), a and bits for dX, g for all of
    them, n and z for dm. In place of z the output y can be given where there was no bias; that takes x, weight, S and
    b, too. Without x, x8 stands for it. dX comes last, and till then its memory holds what the passes leave for their
    sums.
    """
    m, n, r = shared.m, shared.n, shared.r
    dx = dy.new_empty(shared.x_shape) if needs.x else None
    grad_a = dy.new_empty(r, shared.k, dtype=shared.kinds[1]) if needs.a else None
    grad_b = dy.new_empty(n, r, dtype=shared.kinds[2]) if needs.b else None
    grad_bias = dy.new_empty(n, dtype=kinds[0]) if needs.bias else None
    grad_m = dy.new_empty(n, dtype=kinds[1]) if needs.m else None
    grads = dx, grad_a, grad_b, grad_bias, grad_m
    if m == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    dz = dz8 = None
    if needs.x and shared.fp8:
        dz8 = dy.new_empty(m, n, dtype=FP8)
    elif shared.dora and (needs.x or needs_dz(r, needs.x or needs.a, needs.b)):
        dz = dy.new_empty(m, n)
    x, weight, _, _, y, room, bits, z, _, _, columns, _ = saved
    scaling = as_scaling(scaling)
    given = dy, *saved, *grads, dz, dz8, scaling, 1.0 if bits is None else keep_scale(p)
    key = (
        needs, dy.stride(), x if x is None else x.stride(), weight if weight is None else weight.stride(), y is None,
        z is None, bits is None, room is None, columns if columns is None else columns.stride(), kinds,
        _kind(scaling),
        precision(shared.kind, 256) if shared.wide else None,
    )  # fmt: skip
    program = shared.backwards.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(shared.backwards, key, given, _backward, Backward, shared, needs)
    program.run(bound)
    return grads
