"""The kernels of a layer in their order: what a forward and a backward of LoRA or DoRA launch, from which operands,
into which. docs/kernels.md has them in one picture.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import Read
from lora_fast.kernels.cast import Cast, cast_adapters
from lora_fast.kernels.common import padded_rank, wide
from lora_fast.kernels.decode import decode, takes_decode
from lora_fast.kernels.down import Quantised, cast_and_down, down
from lora_fast.kernels.few_rows import product_with_s
from lora_fast.kernels.gemm import product
from lora_fast.kernels.kept import gain_launches
from lora_fast.kernels.magnitudes import dz_and_dm
from lora_fast.kernels.mask import mask
from lora_fast.kernels.operands import Number, Operand, Scratch
from lora_fast.kernels.pair import OverDy, pair, takes_pair
from lora_fast.kernels.passes import Pass, a_pass, dy_passes, launches_of
from lora_fast.kernels.problem import Problem, Small
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Dora, weak_gain

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
    kept: Maybe  # as ``kept_launches`` left it; then there is no norm to make
    seed: Maybe
    keep_count: Number
    n_words: Number
    scaling: Operand | Number
    keep: Number
    held: tuple[Operand, ...]  # those of the base's tensors that y reads


def forward_launches(at: Forward, problem: Problem) -> list[Launch]:
    x, y, small, lifted = at.x.rows(), at.y.rows(), problem.small(at.room), problem.lifted
    scratch = Scratch(x.device)
    w = problem.base.y(at.held, problem.wanted(scratch))
    kept = Small() if at.kept is None else problem.kept(at.kept)
    a, b, cast = at.a, at.b, None
    if kept.a is not None:
        a, b = kept.a, kept.b
    elif problem.casts:
        a, b = small.a, small.b
        cast = Cast(at.a, at.b, a, b)
    first = [] if at.seed is None else [mask(at.seed, at.bits, at.keep_count, at.n_words)]
    gains: list[Launch] = []
    gain = small.gain if at.kept is None else kept.gain
    if problem.dora and at.kept is None:  # whose parts take y's memory, until y is there
        gains = gain_launches(problem, w, a, b, at.magnitude, at.scaling, small, scratch, y)
    simple = at.bits is None and not problem.quantises
    if simple and problem.alone and takes_decode(x, w.matrix, a):
        copies = [] if cast is None else [cast_adapters(x, cast, at.scaling, lifted)]
        return [
            *w.launches,
            *copies,
            *gains,
            *decode(x, w.matrix, a, b, y, at.scaling, scratch, bias=at.bias, gain=gain, lifted=lifted),
        ]
    z = None if at.z is None else at.z.rows()
    if simple and cast is None:
        whole = product_with_s(
            x,
            w.matrix,
            a,
            b,
            y,
            s=small.s,
            scaling=at.scaling,
            keep=at.keep,
            transposed=True,
            bias=at.bias,
            gain=gain,
            z=z,
            lifted=lifted,
        )
        if whole is not None:
            return [*w.launches, *gains, whole]
    quantised = None if at.x8 is None else Quantised(at.x8, small.x_scale)
    if cast is None:
        first.append(down(x, a, small.s, at.scaling, at.keep, bits=at.bits, quantised=quantised, lifted=lifted))
    else:
        first += cast_and_down(x, cast, small.s, at.scaling, at.keep, bits=at.bits, quantised=quantised, lifted=lifted)
    x, x_scale = (at.x8, small.x_scale) if problem.base.e4m3 else (x, None)
    last = product(
        x, w.matrix, small.s, b, y, transposed=True, bias=at.bias, gain=gain, z=z, x_scale=x_scale, w_scale=w.scale
    )
    last.late = True
    for launch in w.launches:
        launch.late = not gains
    return [*first, *w.launches, *gains, last]


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


def backward_launches(at: Backward, problem: Problem) -> list[Launch]:
    dy, r, needs, lifted = at.dy.rows(), problem.r, problem.needs, problem.lifted
    scratch = Scratch(dy.device)
    small: Maybe = None if at.room is None else problem.small(at.room)
    s, a, b = small and small.s, at.a, at.b
    if problem.casts and small is not None:
        a, b = small.a, small.b
    x, x_scale = None if at.x is None else at.x.rows(), None
    dora = gain = None
    w: Maybe = None
    first: Sequence[Launch] = ()
    wanted: Any = problem.wanted(scratch) if needs.x or problem.z_again else None
    held: list[Maybe] = [None] * len(problem.base.tensors)
    held[problem.saved] = at.held
    if problem.dora and small is not None:
        gain, kept = small.gain, at.y if at.z is None else at.z
        dora = Dora(gain, small.norm, kept, at.dz, at.grad_m)
        if problem.z_again:
            w = problem.base.y(held, wanted._replace(gain=gain, weak=weak_gain(problem.kind)))
            first = w.launches
            dora = Dora(gain, small.norm, kept, at.dz, at.grad_m, x, w.matrix, s, b, w.scale)
    if needs.x:  # which reads the same, but for e4m3
        w = problem.base.dx(held, wanted) if w is None or problem.base.e4m3 else w._replace(launches=())
    all_wanted = all(grad is not None for grad in (at.dx, at.grad_a, at.grad_b))
    if all_wanted and x is not None and not problem.base.e4m3 and takes_pair(x, [dy], r, problem.dora):
        return [*first, *_few_rows(at, problem, x, s, a, b, dora, w, scratch)]
    passes: list[Pass] = [*first]
    ds: Maybe = scratch.part((problem.m, padded_rank(r)), problem.kind) if needs.x or needs.a else None
    dz_scale, ds_here = None, ds
    if at.dz8 is not None:  # the launch that quantises makes dS, too
        dz_scale, ds_here = scratch.part((problem.m,), torch.float32), None
        passes.append(
            down(dy, b.t(), ds, at.scaling, at.keep, quantised=Quantised(at.dz8, dz_scale), gain=gain, lifted=lifted)
        )
    passes += dy_passes(
        dy,
        r,
        at.scaling,
        at.keep,
        s=s,
        b=b,
        grad_b=at.grad_b,
        ds=ds_here,
        grad_bias=at.grad_bias,
        dora=dora,
        lifted=lifted,
    )
    if at.grad_a is not None:
        if x is None:
            x, x_scale = at.x8, small.x_scale
        passes.append(a_pass(x, ds, at.grad_a, bits=at.bits, row_scale=x_scale))
    launches = launches_of(passes, wide(dy), scratch, at.dx)
    if at.dx is None:
        return launches
    source = next(t for t in (at.dz8, at.dz, dy) if t is not None)
    return [
        *launches,
        *w.launches,
        product(
            source, w.matrix, ds, a, at.dx.rows(), transposed=False, bits=at.bits, x_scale=dz_scale, w_scale=w.scale
        ),
    ]


def _few_rows(
    at: Backward,
    problem: Problem,
    x: Operand,
    s: Operand,
    a: Operand,
    b: Operand,
    dora: Dora[Operand] | None,
    w: Read,
    scratch: Scratch,
) -> list[Launch]:
    """The backward of few rows over a base that is not e4m3, with dX, dA and dB."""
    dy, dx, lifted = at.dy.rows(), at.dx.rows(), problem.lifted
    launches: list[Launch] = []
    source = dy
    if dora is not None:
        launches, source = dz_and_dm([(dy, dora)], scratch), at.dz
    launches += w.launches
    ds = scratch.part((problem.m, padded_rank(problem.r)), problem.kind)
    whole = product_with_s(
        source,
        w.matrix,
        b,
        a,
        dx,
        s=ds,
        scaling=at.scaling,
        keep=at.keep,
        transposed=False,
        bits=at.bits,
        lifted=lifted,
    )
    if whole is None:
        launches.append(down(source, b.t(), ds, at.scaling, at.keep, lifted=lifted))
        launches.append(product(source, w.matrix, ds, a, dx, transposed=False, bits=at.bits))
    else:
        launches.append(whole)
    launches.append(
        pair(
            x,
            ds,
            at.grad_a,
            [OverDy(dy, s, at.grad_b, at.grad_bias, dora and dora.gain, at.scaling if lifted else None)],
            bits=at.bits,
        )
    )
    return launches
