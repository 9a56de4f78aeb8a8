"""The kernels of a layer in their order: what a forward and a backward of LoRA or DoRA launch, from which tensors, into
which.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward: for small problems the host's time is the layer's time.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from lora_fast.kernels.common import FP8, padded_rank, precision, wide
from lora_fast.kernels.down import cast_plan, cast_space, down_plan
from lora_fast.kernels.gemm import gemm_plan
from lora_fast.kernels.grad import column_plan, dy_plan, needs_dz
from lora_fast.kernels.launch import Bound, Program, Steps, View, as_scaling, places, scaling_kind
from lora_fast.kernels.layout import Fp8, Made, MaybeTensor, Needs, Saved, Shared, rounded
from lora_fast.kernels.mask import keep_count, keep_scale, mask_plan, mask_space, seed_kind
from lora_fast.kernels.norm import norm_plan
from lora_fast.kernels.parts import Dora
from lora_fast.kernels.tiles import casts_first


def _names(names: str) -> SimpleNamespace:
    """A program's arguments by name, numbered."""
    return SimpleNamespace(**{name: i for i, name in enumerate(names.split())})


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])


_F = _names("x weight a b bias magnitude y room bits z x8 w_scale seed count words scaling keep")


def _forward(aligned: bool, shared: Shared, x, weight, a, b, scaling, bias, seed, magnitude, round_norm, y, z,
             x8) -> Program:  # fmt: skip
    at, rows, fp8 = _F, _rows(x), shared.fp8
    steps: Steps = []
    if seed is not None:
        steps.append((mask_plan(seed, mask_space(rows)), (at.seed, at.bits, at.count, at.words)))
    s, x_scale = shared.view(at.room, "s"), None if x8 is None else shared.view(at.room, "x_scale")
    a_at, b_at, read, read_at, also = at.a, at.b, a, at.a, None
    if shared.cast:
        a_at, b_at, also = shared.view(at.room, "a"), shared.view(at.room, "b"), b
        cast = cast_space(x, a, b)
        if casts_first(len(rows), len(a), x.dtype, seed is not None):
            steps.append((cast_plan(rows, a, b, scaling, shared.lifted), (at.a, at.b, a_at, b_at, at.scaling)))
            (read, _), read_at, also = cast, a_at, None
        a, b = cast
    down = down_plan(rows, read, scaling, seed is not None, also, x8 is not None, lifted=shared.lifted)
    steps.append((down, (at.x, read_at, s, at.bits, at.b, a_at, b_at, at.scaling, at.keep, at.x, at.x8, x_scale, None)))
    gain = None
    if magnitude is not None:
        norm, gain = shared.view(at.room, "norm"), shared.view(at.room, "gain")
        norms = norm_plan(weight, a, b, scaling, True, round_norm, fp8, y.nbytes // 4, shared.lifted)
        parts = View(at.y, 0, 4 * norms.parts, torch.float32) if norms.parts else None  # until y is there
        steps += norms.steps(
            at.weight, a_at, b_at, at.magnitude, norm, gain, at.w_scale if fp8 else None, at.scaling, parts
        )
    up = gemm_plan(x8 if fp8 else rows, weight, b, _rows(y), True, bias is not None, False, gain is not None,
                   z is not None)  # fmt: skip
    scales = (x_scale, at.w_scale) if fp8 else (None, None)
    steps.append((up, (at.x8 if fp8 else at.x, at.weight, s, b_at, at.y, at.z, gain, at.bias, None, *scales)))
    return Program(len(vars(at)), steps, aligned)


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
        seed if seed is None else seed_kind(seed), None if type(scaling) is float else scaling_kind(scaling),
        precision(shared.kind, 256) if shared.wide else None, round_norm, keep_z,
    )  # fmt: skip
    program = shared.forwards.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(shared.forwards, key, given, _forward, shared, x, weight, a, b, scaling, bias, seed,
                                magnitude, round_norm, y, z, x8)  # fmt: skip
    if late is None:
        program.run(bound)
    else:
        program.run(bound, 0, -1)
        late += program, bound
    return y, made


def _bound(programs: dict[tuple, Program], key: tuple, given: tuple, make: Callable, *args) -> tuple[Program, Bound]:
    """The program for what is ``given``, bound to it. Programs are kept under their keys for tensors that start at
    multiples of 16 bytes, and under longer ones for other tensors; new ones are ``make(whether they do, *args)``."""
    if (starts := places(given)) is not None:
        key = *key, starts
    program = programs.get(key)
    if program is None:
        program = programs[key] = make(starts is None, *args)
    bound = program.bind(*given)
    assert bound is not None
    return program, bound


_B = _names(
    "dy x weight a b y room bits z x8 row_scale columns col_scale dx grad_a grad_b grad_bias grad_m dz dz8 scaling "
    "keep one own"
)


def _backward(aligned: bool, shared: Shared, needs: Needs, dy, saved, scaling, dx, grad_a, grad_b, grad_bias, grad_m,
              dz, dz8) -> Program:  # fmt: skip
    (x, weight, a, b, y), made, fp8 = saved[:5], Made(*saved[5:9]), Fp8(*saved[9:])
    at, own, r, quantised, masked = _B, 0, shared.r, dz8 is not None, made.bits is not None
    dy, x_at, x_scale, need_ds = _rows(dy), at.x, None, needs.x or needs.a
    if x is not None:
        x = _rows(x)
    elif needs.a:
        x, x_at, x_scale = made.x8, at.x8, shared.view(at.room, "x_scale")
    s, a_at, b_at = None if made.room is None else shared.view(at.room, "s"), at.a, at.b
    if shared.cast and made.room is not None:
        a, b = shared.part(made, "a"), shared.part(made, "b")
        a_at, b_at = shared.view(at.room, "a"), shared.view(at.room, "b")
    gain = dora = dora_at = None
    if shared.dora and made.room is not None:
        gain, norm, again, again_at = shared.view(at.room, "gain"), shared.view(at.room, "norm"), None, None
        kept, kept_at = (y, at.y) if made.z is None else (made.z, at.z)
        if needs.m and made.z is None:
            again = x, weight, shared.part(made, "s"), b, fp8.row_scale
            again_at = at.x, at.weight, s, b_at, at.row_scale
        dora = Dora(shared.part(made, "gain"), shared.part(made, "norm"), kept, dz, grad_m, again)
        dora_at = Dora(gain, norm, kept_at, dz if dz is None else at.dz, at.grad_m, again_at)  # type: ignore[arg-type]

    def new(numbers: int, kind: torch.dtype) -> View:
        nonlocal own
        view = View(at.own, own, numbers * kind.itemsize, kind)
        own += rounded(view.size)
        return view

    ds = new(shared.m * padded_rank(r), shared.kind) if need_ds else None
    dz_scale = new(shared.m, torch.float32) if quantised else None
    b_read = b if need_ds and not quantised else None
    over_dy, over_x, numbers = dy_plan(dy, r, b_read, scaling, grad_b, grad_bias, dora, shared.lifted), None, 0
    if grad_a is not None:
        over_x = column_plan(x, r, grad_a.t(), masked=masked, kind=shared.kind if x.dtype != shared.kind else None)
        numbers = over_x.parts
    numbers, kind, parts = max(numbers, over_dy.parts), wide(dy), None
    if dx is not None and numbers * kind.itemsize <= dx.nbytes:
        parts = View(at.dx, 0, numbers * kind.itemsize, kind)
    elif numbers:
        parts = new(numbers, kind)
    steps: Steps = []
    if quantised:
        quantise = down_plan(dy, b.t()[:r], scaling, False, None, True, shared.dora, shared.lifted)
        steps.append((quantise, (at.dy, b_at, ds, *(None,) * 4, at.scaling, at.keep, at.dy, at.dz8, dz_scale, gain)))
    steps += over_dy.steps(at.dy, s, b_read if b_read is None else b_at, grad_b if grad_b is None else at.grad_b, ds,
                           at.grad_bias, at.scaling, at.keep, at.one, parts, dora_at)  # fmt: skip
    if over_x is not None:
        steps += over_x.steps(x_at, ds, None, at.bits, at.grad_a, None, None, at.one, at.one, parts, None, x_scale)
    if dx is not None:
        source, source_at, w, w_at, w_scale = dy, at.dy, weight, at.weight, None
        if quantised:
            source, source_at, w, w_at, w_scale = dz8, at.dz8, fp8.columns, at.columns, at.col_scale
        elif dz is not None:
            source, source_at = dz, at.dz
        product = gemm_plan(source, w, a, _rows(dx), False, False, masked)
        steps.append((product, (source_at, w_at, ds, a_at, at.dx, *(None,) * 3, at.bits, dz_scale, w_scale)))
    return Program(len(vars(at)), steps, aligned, own)


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
    given = dy, *saved, *grads, dz, dz8, scaling, 1.0 if bits is None else keep_scale(p), 1.0
    key = (
        needs, dy.stride(), x if x is None else x.stride(), weight if weight is None else weight.stride(), y is None,
        z is None, bits is None, room is None, columns if columns is None else columns.stride(), kinds,
        None if type(scaling) is float else scaling_kind(scaling),
        precision(shared.kind, 256) if shared.wide else None,
    )  # fmt: skip
    program = shared.backwards.get(key)
    if program is None or (bound := program.bind(*given)) is None:
        program, bound = _bound(shared.backwards, key, given, _backward, shared, needs, dy, saved, scaling, *grads, dz,
                                dz8)  # fmt: skip
    program.run(bound)
    return grads
