"""The kernels of a layer in their order: what a forward and a backward of LoRA launch, from which tensors, into which.

Everything that can be decided once per problem (shapes, strides, dtypes) is kept under one key for a whole forward and
one for a whole backward, since for small problems the host's time is the layer's time.
"""

from typing import NamedTuple

import torch

from lora_fast.kernels.common import padded_rank, precision
from lora_fast.kernels.down import cast_space, cast_wanted, down_plan
from lora_fast.kernels.gemm import gemm_plan
from lora_fast.kernels.grad import ColumnPass, column_plan, fuses, new_parts
from lora_fast.kernels.launch import Plan, as_scaling, plan_for, scaling_kind, sig
from lora_fast.kernels.mask import keep_count, keep_scale, mask_plan, mask_space, seed_kind

MaybeTensor = torch.Tensor | None


class _Forward(NamedTuple):
    cast: bool
    mask: Plan | None
    down: Plan
    up: Plan


def _forward_plans(x, weight, a, b, scaling, bias, seed) -> _Forward:
    mask = mask_plan(seed, mask_space(x)) if seed is not None else None
    cast = cast_wanted(x, a, b)
    down = down_plan(x, a, scaling, mask is not None, b if cast else None)
    if cast:
        b = cast_space(x, a, b)[1]
    up = gemm_plan(x, weight, b, x.new_empty(x.shape[0], weight.shape[0]), True, bias is not None, False)
    return _Forward(cast, mask, down, up)


def lora_fwd(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float | torch.Tensor,
    bias: MaybeTensor, seed: torch.Tensor | int | None, p: float, y: torch.Tensor,
) -> tuple[torch.Tensor, MaybeTensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill y [M, N] with x W^T + S b^T + bias. x [M, K], weight [N, K], bias [N] and y in one dtype, rows of y
    contiguous; a [R, K] and b [N, R] in any, contiguous; a seed (as ``mask_bits`` takes it) where elements are dropped
    with p.

    Returns what the backward needs: S [M, padded R], the mask bits or None, a and b as the products read them (in x's
    dtype, b perhaps padded).
    """
    s = x.new_empty(x.shape[0], padded_rank(a.shape[0]))
    bits, keep, scaling = None, 1.0, as_scaling(scaling)
    if x.shape[0] == 0:
        return s, mask_space(x) if seed is not None else None, a.to(x.dtype), b.to(x.dtype)
    key = ("lora_fwd", sig(x), sig(weight), sig(a), sig(b), sig(bias), seed_kind(seed), scaling_kind(scaling),
           precision(x.dtype, 256))  # fmt: skip
    plans = plan_for(key, _forward_plans, x, weight, a, b, scaling, bias, seed)
    if plans.mask is not None:
        bits, keep = mask_space(x), keep_scale(p)
        plans.mask(seed, bits, keep_count(p), bits.numel())
    a_cast, b_cast = cast_space(x, a, b) if plans.cast else (a, b)
    plans.down(x, a, s, bits, b, a_cast, b_cast, scaling, keep)
    plans.up(x, weight, s, b_cast, y, bias, None)
    return s, bits, a_cast, b_cast


class _Backward(NamedTuple):
    ds: Plan | None
    over_dy: ColumnPass | None
    over_x: ColumnPass | None
    dx: Plan | None


def _backward_plans(dy, x, weight, a, b, scaling, masked, r, grad_a, grad_b, grad_bias, need_x) -> _Backward:
    ds = over_dy = over_x = dx = None
    b_fused = None
    if b is not None:
        if fuses(r, grad_b is not None):
            b_fused = b
        else:
            ds = down_plan(dy, b.t()[:r], scaling, False)
    if b_fused is not None or grad_b is not None or grad_bias is not None:
        over_dy = column_plan(dy, r if grad_b is not None else 0, grad_b, b_fused, scaling, grad_bias is not None)
    if grad_a is not None:
        over_x = column_plan(x, r, grad_a.t(), masked=masked)
    if need_x:
        dx = gemm_plan(dy, weight, a, dy.new_empty(dy.shape[0], weight.shape[1]), False, False, masked)
    return _Backward(ds, over_dy, over_x, dx)


def lora_bwd(
    dy: torch.Tensor, x: MaybeTensor, weight: MaybeTensor, a: MaybeTensor, b: MaybeTensor, s: MaybeTensor,
    bits: MaybeTensor, scaling: float | torch.Tensor, p: float, r: int,
    grad_a: MaybeTensor, grad_b: MaybeTensor, grad_bias: MaybeTensor,
) -> MaybeTensor:  # fmt: skip
    """Fill grad_a [R, K], grad_b [N, R] and grad_bias [N], those that are given, and return dX [M, K] if weight is.

    dy [M, N] with contiguous rows, x, weight, and a, b, s, bits as ``lora_fwd`` returned them. What is read: x and bits
    for grad_a, s for grad_b, b for grad_a and dX, weight, a and bits for dX. dX comes last: what the passes before it
    need is freed by then, so it alone makes the peak of memory.
    """
    if dy.shape[0] == 0:
        for grad in (grad_a, grad_b, grad_bias):
            if grad is not None:
                grad.zero_()
        return dy.new_empty(0, weight.shape[1]) if weight is not None else None
    scaling = as_scaling(scaling)
    key = ("lora_bwd", sig(dy), sig(x), sig(weight), sig(a), sig(b), bits is None, scaling_kind(scaling), sig(grad_a),
           sig(grad_b), sig(grad_bias), r, precision(dy.dtype, 256))  # fmt: skip
    plans = plan_for(key, _backward_plans, dy, x, weight, a, b, scaling, bits is not None, r, grad_a, grad_b,
                     grad_bias, weight is not None)  # fmt: skip
    keep = keep_scale(p) if bits is not None else 1.0
    ds = dy.new_empty(dy.shape[0], padded_rank(r)) if b is not None else None
    if plans.ds is not None:
        plans.ds(dy, b, ds, None, None, None, None, scaling, keep)
    sizes = [step.parts for step in (plans.over_dy, plans.over_x) if step is not None]
    parts = new_parts(dy, max(sizes)) if sizes else None
    if plans.over_dy is not None:
        b_fused = b if plans.ds is None else None
        plans.over_dy(dy, s, b_fused, None, grad_b, ds, grad_bias, scaling, keep, parts)
    if plans.over_x is not None:
        plans.over_x(x, ds, None, bits, grad_a, None, None, 1.0, 1.0, parts)
    del parts
    if plans.dx is None or weight is None:
        return None
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    plans.dx(dy, weight, ds, a, dx, None, bits)
    return dx
