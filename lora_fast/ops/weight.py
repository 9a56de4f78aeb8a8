"""The fused weight kernels as one differentiable operator, a custom op in eager and under torch.compile alike."""

from typing import Any

import torch

from lora_fast.kernels.common import wide
from lora_fast.kernels.weight import weight_bwd, weight_fwd
from lora_fast.ops.parts import on, some

MaybeTensor = torch.Tensor | None


def lora_weight(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, magnitude: MaybeTensor = None
) -> torch.Tensor:
    """The fused form of :func:`lora_fast.reference.lora_weight`, for arguments that fit; [N, ...]."""
    v = torch.ops.lora_fast.lora_weight(weight.flatten(1), lora_A, lora_B, float(scaling), magnitude)[0]
    return v.view(weight.shape)


@torch.library.custom_op("lora_fast::lora_weight", mutates_args=())
def _lora_weight_op(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, magnitude: MaybeTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with on(weight.device):
        m = None if magnitude is None else magnitude.contiguous()
        v, norm = weight_fwd(weight, lora_A, lora_B, scaling, m)
    return v, some(norm, v)


@_lora_weight_op.register_fake
def _(weight: Any, lora_A: Any, lora_B: Any, scaling: Any, magnitude: Any) -> Any:
    n = 0 if magnitude is None else weight.shape[0]
    kind = weight.dtype if magnitude is None else wide(weight, lora_A, lora_B)
    return weight.new_empty(weight.shape), weight.new_empty(n, dtype=kind)


@torch.library.custom_op("lora_fast::lora_weight_bwd", mutates_args=())
def _lora_weight_bwd_op(
    grad: torch.Tensor,
    weight: MaybeTensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: MaybeTensor,
    norm: MaybeTensor,
    need_w: bool,
) -> list[torch.Tensor]:
    """dA, dB and for DoRA (weight, magnitude and norm are then given) dm and, if asked for, dW."""
    with on(grad.device):
        m = None if magnitude is None else magnitude.contiguous()
        da, db, dm, dw = weight_bwd(grad, weight, lora_A, lora_B, scaling, m, norm, need_w and weight is not None)
    kind = da.dtype if magnitude is None else magnitude.dtype
    return [da.to(lora_A.dtype), db.to(lora_B.dtype), some(dm, da).to(kind), some(dw, grad)]


@_lora_weight_bwd_op.register_fake
def _(grad: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, magnitude: Any, norm: Any, need_w: bool) -> Any:
    dm = grad.new_empty(0, dtype=wide(grad)) if magnitude is None else magnitude.new_empty(magnitude.shape)
    dw = grad.new_empty(grad.shape if need_w and weight is not None else 0)
    return [lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), dm, dw]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    weight, lora_A, lora_B, ctx.scaling, magnitude = inputs
    dora = magnitude is not None
    for_dora = (weight, magnitude, output[1]) if dora else (None, None, None)
    ctx.save_for_backward(lora_A, lora_B, *for_dora)


def _backward(ctx: Any, grad: Any, _: Any) -> Any:
    need_w, need_a, need_b, _, need_m = ctx.needs_input_grad
    lora_A, lora_B, weight, magnitude, norm = ctx.saved_tensors
    if magnitude is None and not (need_a or need_b):
        return grad, None, None, None, None
    da, db, dm, dw = torch.ops.lora_fast.lora_weight_bwd(
        grad, weight, lora_A, lora_B, ctx.scaling, magnitude, norm, need_w
    )
    return (
        (grad if magnitude is None else dw) if need_w else None,
        da if need_a else None,
        db if need_b else None,
        None,
        dm if need_m else None,
    )


_lora_weight_op.register_autograd(_backward, setup_context=_setup_context)
