"""A bottleneck adapter on the low-rank kernels as one differentiable operator, in eager and under torch.compile alike.

``y = x + act(x D^T + d) U^T + u``: x D^T is the pass that makes LoRA's S (kernels/down.py), the activation is torch's,
on [M, R], and the rest is the adapted weight's sum with x in W's place (kernels/weight.py). The backward is LoRA's
passes over dY and x (kernels/grad.py), and that sum again: dx = dY + H D.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.cast import cast_wanted
from lora_fast.kernels.common import padded_rank, wide
from lora_fast.kernels.down import down_cast_fwd, down_fwd
from lora_fast.kernels.passes import a_bwd, dy_bwd
from lora_fast.kernels.weight import weight_fwd
from lora_fast.ops.parts import dtype_of, on, some
from lora_fast.reference import ACTIVATIONS

MaybeTensor = torch.Tensor | None

aten = torch.ops.aten
DERIVATIVES: dict[str, Callable[..., torch.Tensor]] = {  # of the sum's gradient and the activation's input
    "gelu": aten.gelu_backward,
    "relu": lambda grad, h: aten.threshold_backward(grad, h, 0),
    "silu": aten.silu_backward,
    "tanh": lambda grad, h: aten.tanh_backward(grad, torch.tanh(h)),
}


def bottleneck(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, down_bias: MaybeTensor, up_bias: MaybeTensor, activation: str
) -> torch.Tensor:
    """The fused form of :func:`lora_fast.reference.bottleneck`, for arguments that were checked."""
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    return torch.ops.lora_fast.bottleneck(x, down, up, down_bias, up_bias, dtype or x.dtype, activation)[0]


def _hidden(s: torch.Tensor, down_bias: MaybeTensor) -> torch.Tensor:
    """h = x D^T + d [M, padded R] in float32 or better, the padding zero."""
    h = s.to(wide(s))
    return h if down_bias is None else h + F.pad(down_bias.to(h.dtype), (0, s.shape[1] - len(down_bias)))


@torch.library.custom_op("lora_fast::bottleneck", mutates_args=())
def _bottleneck_op(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: MaybeTensor,
    up_bias: MaybeTensor,
    dtype: torch.dtype,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and x D^T [M, padded R]; products are made in ``dtype``."""
    with on(x.device):
        r, rows = len(down), x.reshape(-1, x.shape[-1])
        h = rows.to(dtype)
        if len(rows) and cast_wanted((h.dtype, down.dtype, up.dtype), r):
            s, _, up = down_cast_fwd(h, down.contiguous(), up.contiguous(), 1.0)
        else:
            s = down_fwd(h, down, 1.0)
        low = ACTIVATIONS[activation](_hidden(s, down_bias)).to(dtype)
        y = weight_fwd(rows, up.t()[:r], low, 1.0, None, up_bias if up_bias is None else up_bias.contiguous())[0]
    return y.view(x.shape), s


@_bottleneck_op.register_fake
def _(x: Any, down: Any, up: Any, down_bias: Any, up_bias: Any, dtype: Any, activation: Any) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], padded_rank(len(down)), dtype=dtype)


@torch.library.custom_op("lora_fast::bottleneck_bwd", mutates_args=())
def _bottleneck_bwd_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: MaybeTensor,
    up_bias_dtype: torch.dtype,
    activation: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, down, up and both biases, each empty where ``needs`` does not ask for it."""
    need_x, need_down, need_up, need_down_bias, need_up_bias = needs
    (r, n), dtype = down.shape, s.dtype
    dx = grad_down = grad_down_bias = None
    with on(dy.device):
        rows = dy.reshape(-1, n)
        if rows.stride(1) != 1 or rows.stride(0) < n:
            rows = rows.contiguous()
        h = _hidden(s, down_bias)
        grad_up = up.new_empty(n, r) if need_up else None
        grad_up_bias = dy.new_empty(n, dtype=up_bias_dtype) if need_up_bias else None
        inner = need_x or need_down or need_down_bias
        dlow = dy_bwd(
            rows.to(dtype),
            ACTIVATIONS[activation](h).to(dtype),
            up.to(dtype) if inner else None,
            1.0,
            grad_up,
            grad_up_bias,
        )
        if dlow is not None:
            dh = DERIVATIVES[activation](dlow.to(h.dtype), h)
            if down_bias is not None and need_down_bias:
                grad_down_bias = dh.sum(0)[:r].to(down_bias.dtype)
            dh = dh.to(dtype)
            if need_down:
                grad_down = down.new_empty(r, n)
                a_bwd(x.reshape(-1, n).to(dtype), dh, grad_down)
            if need_x:
                dx = weight_fwd(rows, down.to(dtype), dh, 1.0)[0].view(dy.shape)
    return [some(t, dy) for t in (dx, grad_down, grad_up, grad_down_bias, grad_up_bias)]


@_bottleneck_bwd_op.register_fake
def _(
    dy: Any, x: Any, s: Any, down: Any, up: Any, down_bias: Any, up_bias_dtype: Any, activation: Any, needs: Any
) -> Any:
    (r, n), bias_dtype = down.shape, dtype_of(down_bias) or dy.dtype
    shapes = dy.shape, (r, n), (n, r), (r,), (n,)
    kinds = dy.dtype, down.dtype, up.dtype, bias_dtype, up_bias_dtype
    return [
        dy.new_empty(sh if need else 0, dtype=kind if need else None)
        for sh, kind, need in zip(shapes, kinds, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, down, up, down_bias, up_bias, _, ctx.activation = inputs
    ctx.save_for_backward(x, output[1], down, up, down_bias)
    ctx.up_bias_dtype, ctx.needs = dtype_of(up_bias) or x.dtype, list(ctx.needs_input_grad[:5])


def _backward(ctx: Any, dy: Any, _: Any) -> Any:
    grads = torch.ops.lora_fast.bottleneck_bwd(dy, *ctx.saved_tensors, ctx.up_bias_dtype, ctx.activation, ctx.needs)
    return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), None, None


_bottleneck_op.register_autograd(_backward, setup_context=_setup_context)
