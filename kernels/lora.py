"""The kernels of a layer in their order: what a forward and a backward of LoRA or DoRA launch, from which tensors, into
which.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward, since for small problems the host's time is the layer's time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lora_fast.kernels.common import padded_rank, precision, wide
from lora_fast.kernels.down import cast_space, cast_wanted, down_plan, quantised_space
from lora_fast.kernels.gemm import gemm_plan
from lora_fast.kernels.grad import ColumnPass, DyPass, column_plan, dy_plan, needs_dz, new_parts
from lora_fast.kernels.launch import Plan, as_scaling, plan_for, scaling_kind, sig
from lora_fast.kernels.mask import keep_count, keep_scale, mask_plan, mask_space, seed_kind
from lora_fast.kernels.norm import norm_plan
from lora_fast.kernels.parts import Dora

MaybeTensor = torch.Tensor | None


class Fp8(NamedTuple):
    """What an fp8 base has beside ``weight``, W's rows in e4m3 [N, K]: row i of W is row_scale[i] * weight[i]; and W
    once more by its columns, column k of W being col_scale[k] * columns[k]. Scales are float32."""

    row_scale: torch.Tensor  # [N]
    columns: torch.Tensor  # [K, N]
    col_scale: torch.Tensor  # [K]


class Made(NamedTuple):
    """What a forward leaves for the backward."""

    s: torch.Tensor  # [M, padded R]
    bits: MaybeTensor  # of the dropout mask
    a: torch.Tensor  # as the products read it: in x's dtype
    b: torch.Tensor  # likewise, and perhaps padded to [N, padded R]
    gain: MaybeTensor = None  # DoRA's g [N]
    norm: MaybeTensor = None  # and n [N]
    z: MaybeTensor = None  # [M, N], the output before gain and bias, if wanted
    x8: MaybeTensor = None  # over an fp8 base: x in e4m3 [M, K]
    x_scale: MaybeTensor = None  # and the scales of its rows [M]


class _Forward(NamedTuple):
    cast: bool
    mask: Plan | None
    down: Plan
    norm: Plan | None
    up: Plan


def _forward_plans(x, weight, a, b, scaling, bias, seed, magnitude, round_norm, keep_z, x8) -> _Forward:
    mask, quantised = mask_plan(seed, mask_space(x)) if seed is not None else None, x8 is not None
    cast = cast_wanted(x, a, b)
    down = down_plan(x, a, scaling, mask is not None, b if cast else None, quantised)
    if cast:
        a, b = cast_space(x, a, b)
    norm = None
    if magnitude is not None:
        norm = norm_plan(weight, a, b, scaling, True, round_norm, quantised)
    y = x.new_empty(x.shape[0], weight.shape[0])
    up = gemm_plan(x8 if quantised else x, weight, b, y, True, bias is not None, False, norm is not None, keep_z)
    return _Forward(cast, mask, down, norm, up)


def lora_fwd(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float | torch.Tensor,
    bias: MaybeTensor, seed: torch.Tensor | int | None, p: float, y: torch.Tensor,
    magnitude: MaybeTensor = None, round_norm: bool = False, keep_z: bool = False, fp8: Fp8 | None = None,
) -> tuple[Made, Callable[..., None], tuple]:  # fmt: skip
    """Fill y [M, N] with x W^T + S b^T + bias, or with g * (x W^T + S b^T) + bias if magnitude [N] is given.

    The product, which fills y and z, is left to the caller: the second result, called with the third, launches it, on
    the current device.

    x [M, K], weight [N, K], bias [N] and y in one dtype, rows of y contiguous; a [R, K] and b [N, R] in any,
    contiguous; a seed (as ``mask_bits`` takes it) where elements are dropped with p. ``round_norm`` rounds DoRA's norm
    to weight's dtype. Over an fp8 base (see ``Fp8``) weight is e4m3, and x is quantised likewise for the product.
    """
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    scaling = as_scaling(scaling)
    gain = norm = None
    if magnitude is not None:
        norm = x.new_empty(weight.shape[0], dtype=wide(x))
        gain = torch.empty_like(norm)
    z = torch.empty_like(y) if keep_z else None
    x8 = x_scale = w_scale = None
    if fp8 is not None:
        (x8, x_scale), w_scale = quantised_space(x), fp8.row_scale
    if x.shape[0] == 0:
        bits = mask_space(x) if seed is not None else None
        return Made(s, bits, a.to(x.dtype), b.to(x.dtype), gain, norm, z, x8, x_scale), _nothing, ()
    key = ("lora_fwd", sig(x), sig(weight), sig(a), sig(b), sig(bias), seed_kind(seed), scaling_kind(scaling),
           precision(x.dtype, 256), sig(magnitude), round_norm, keep_z)  # fmt: skip
    plans = plan_for(key, _forward_plans, x, weight, a, b, scaling, bias, seed, magnitude, round_norm, keep_z, x8)
    bits, keep = None, 1.0
    if plans.mask is not None:
        bits, keep = mask_space(x), keep_scale(p)
        plans.mask(seed, bits, keep_count(p), bits.numel())
    a_cast, b_cast = cast_space(x, a, b) if plans.cast else (a, b)
    plans.down(x, a, s, bits, b, a_cast, b_cast, scaling, keep, x, x8, x_scale, None)
    if plans.norm is not None:
        plans.norm(weight, a_cast, b_cast, magnitude, norm, gain, w_scale, scaling)
    made = Made(s, bits, a_cast, b_cast, gain, norm, z, x8, x_scale)
    product = x if x8 is None else x8, weight, s, b_cast, y, z, gain, bias, None, x_scale, w_scale
    return made, plans.up, product


def _nothing() -> None:
    pass


class _Backward(NamedTuple):
    quantise: Plan | None  # dS and dZ in e4m3, where dX is made over an fp8 base
    over_dy: DyPass
    over_x: ColumnPass | None
    dx: Plan | None
    parts: int  # numbers of the larger one of the two passes' parts


def _backward_plans(dy, x, weight, a, b, scaling, masked, r, grad_a, grad_b, grad_bias, dora, dz) -> _Backward:
    quantise = over_x = dx = None
    if dz is not None and dz.dtype != dy.dtype:
        quantise = down_plan(dy, b.t()[:r], scaling, False, None, True, dora is not None)
    over_dy = dy_plan(dy, r, b if quantise is None else None, scaling, grad_b, grad_bias, dora)
    if grad_a is not None:
        over_x = column_plan(x, r, grad_a.t(), masked=masked, kind=dy.dtype if x.dtype != dy.dtype else None)
    if weight is not None:
        out = dy.new_empty(dy.shape[0], a.shape[1])
        dx = gemm_plan(dz, weight, a, out, False, False, masked)
    return _Backward(quantise, over_dy, over_x, dx, max(over_dy.parts, 0 if over_x is None else over_x.parts))


def lora_bwd(
    dy: torch.Tensor, x: MaybeTensor, weight: MaybeTensor, made: Made, scaling: float | torch.Tensor, p: float, r: int,
    need_x: bool, grad_a: MaybeTensor, grad_b: MaybeTensor, grad_bias: MaybeTensor, grad_m: MaybeTensor = None,
    y: MaybeTensor = None, fp8: Fp8 | None = None,
) -> MaybeTensor:  # fmt: skip
    """Fill grad_a [R, K], grad_b [N, R], grad_bias [N] and grad_m [N], those that are given; return dX [M, K] if
    wanted.

    dy [M, N] with contiguous rows; x, weight and what ``lora_fwd`` made, as far as it is read: x and bits for grad_a, s
    for grad_b, b for grad_a and dX, weight, a and bits for dX, gain for all of them, norm and z for grad_m. In place of
    z the output y can be given where there was no bias; that takes x, weight, s and b, too. dX comes last: what the
    passes before it need is freed by then, so it alone (and dZ) makes the peak of memory. Over an fp8 base weight is
    e4m3; without x, x8 and its scales stand for it.
    """
    if dy.shape[0] == 0:
        for grad in (grad_a, grad_b, grad_bias, grad_m):
            if grad is not None:
                grad.zero_()
        return dy.new_empty(0, weight.shape[1]) if need_x and weight is not None else None
    s, bits, a, b, gain, norm, z, x8, x_scale = made
    need_ds, scaling, dora = need_x or grad_a is not None, as_scaling(scaling), None
    b_read = b if need_ds else None
    dz8 = dz_scale = w_scale = None
    w_read = weight if need_x else None
    if need_x and fp8 is not None:
        (dz8, dz_scale), w_read, w_scale = quantised_space(dy), fp8.columns, fp8.col_scale
    if x is None and grad_a is not None:
        x = x8
    if gain is not None:
        in_memory = need_x or needs_dz(r, need_ds, grad_b is not None)
        dz = dy.new_empty(dy.shape) if in_memory and dz8 is None else None
        again = None
        if grad_m is not None and z is None:
            assert x is not None and weight is not None
            again = x, weight, s, b, None if fp8 is None else fp8.row_scale
        dora = Dora(gain, norm, y if z is None else z, dz, grad_m, again)
    kinds = tuple([None if grad is None else grad.dtype for grad in (grad_a, grad_b, grad_bias)])
    key = ("lora_bwd", sig(dy), sig(x), sig(w_read), sig(a), sig(b_read), bits is None, scaling_kind(scaling), kinds,
           r, precision(dy.dtype, 256), dora and dora.sigs())  # fmt: skip
    dz = dz8 if dz8 is not None else dy if dora is None else dora.dz  # what dX is made from
    plans = plan_for(key, _backward_plans, dy, x, w_read, a, b_read, scaling, bits is not None, r, grad_a, grad_b,
                     grad_bias, dora, dz)  # fmt: skip
    keep = keep_scale(p) if bits is not None else 1.0
    ds = dy.new_empty(dy.shape[0], padded_rank(r)) if need_ds else None
    parts = new_parts(dy, plans.parts) if plans.parts else None
    if plans.quantise is not None:
        plans.quantise(dy, b_read, ds, None, None, None, None, scaling, keep, dy, dz8, dz_scale, gain)
    plans.over_dy(dy, s, b_read, grad_b, ds, grad_bias, scaling, keep, parts, dora)
    if plans.over_x is not None:
        plans.over_x(x, ds, None, bits, grad_a, None, None, 1.0, 1.0, parts, None, x_scale)
    del parts
    if plans.dx is None or w_read is None:
        return None
    dx = dy.new_empty(dy.shape[0], a.shape[1])
    plans.dx(dz, w_read, ds, a, dx, None, None, None, bits, dz_scale, w_scale)
    return dx
