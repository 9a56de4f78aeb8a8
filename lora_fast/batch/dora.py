"""DoRA adapters in one batch on the fused kernels: the product of the LoRA form, then each row's gain."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.batch.form import Adapter, MaybeTensor
from lora_fast.batch.fused import FusedBatch
from lora_fast.kernels.batch.gain import dots, scaled
from lora_fast.kernels.norm import norm_fwd
from lora_fast.ops.parts import addressable, contiguous, on


class FusedDoraBatch:
    """The fused form of ``reference.dora_linear_batch`` for calls, checked before, that are alike."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, adapters: Sequence[Adapter], bias: MaybeTensor, round_norm: bool
    ) -> None:
        self.product, self.round_norm = FusedBatch(x, weight, adapters, None), round_norm

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        adapters: Sequence[Adapter],
        which: torch.Tensor,
        bias: MaybeTensor,
        training: bool,
    ) -> torch.Tensor:
        with on(x.device):
            z = self.product(x, weight, adapters, which, None, training)
            weight, magnitudes = weight.to(z.dtype), [one.lora_magnitude_vector for one in adapters]
            with torch.no_grad():
                made = [
                    norm_fwd(weight, a.contiguous(), b.contiguous(), scaling, contiguous(m), self.round_norm)
                    for a, b, scaling, _, m in adapters
                ]
                norms = torch.stack([norm for norm, _ in made])
                gains = torch.stack([gain for _, gain in made if gain is not None])
            bias = None if bias is None else bias.to(z.dtype)
            return _Gain.apply(z, contiguous(bias), which.contiguous().view(-1), norms, gains, *magnitudes)


class _Gain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        bias: MaybeTensor,
        which: torch.Tensor,
        norms: torch.Tensor,
        gains: torch.Tensor,
        *magnitudes: torch.Tensor,
    ) -> torch.Tensor:
        needs = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(z if needs else None, which, norms if needs else None, gains)
        ctx.kinds = [m.dtype for m in magnitudes]
        return scaled(z.reshape(-1, z.shape[-1]), which, gains, bias).view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        z, which, norms, gains = ctx.saved_tensors
        rows = addressable(dy) if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        rows = rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()
        dz = scaled(rows, which, gains).view(dy.shape) if ctx.needs_input_grad[0] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[1] else None
        grads: list[MaybeTensor] = [None] * len(ctx.kinds)
        if z is not None:
            alive = norms != 0
            all_of = dots(rows, z.reshape(rows.shape), which, len(norms)) / torch.where(alive, norms, 1.0)
            all_of = torch.where(alive, all_of, 0.0)
            needs = ctx.needs_input_grad[5:]
            grads = [dm.to(kind) if need else None for dm, kind, need in zip(all_of, ctx.kinds, needs, strict=True)]
        return dz, grad_bias, None, None, None, *grads
