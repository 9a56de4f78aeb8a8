"""Several adapters in one batch on the fused kernels, as one differentiable operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.bases.packed import PackedWeight, rounds_norm, tensors_of
from lora_fast.batch.custom_op import beside, each, gradients, kinds_of, needs_of, problem_of
from lora_fast.batch.form import Adapter, MaybeTensor
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.batch.ranks import addresses_on, numbers_of
from lora_fast.kernels.batch.run import Call, Made, forward, to_save
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, base_of, contiguous, on, saved_by


def why_apart(weight: torch.Tensor) -> str | None:
    """Why such a layer's adapters do not share launches, in words; None where they do."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    if isinstance(weight, PackedWeight):
        return f"products over an {type(weight).__name__} take x in 8 bits" if weight.E4M3_PRODUCTS else None
    return None if weight.stride(1) == 1 else "rows of the base weight are not contiguous"


class FusedBatch:
    """The fused form of ``reference.lora_linear_batch``, with magnitudes of ``reference.dora_linear_batch``, for calls,
    checked before, that are alike (see ``FusedLinear``)."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        adapters: Sequence[Adapter],
        bias: MaybeTensor,
        round_norm: bool = False,
        save: str = "auto",
    ) -> None:
        dtype = autocast_dtype(x.device)
        self.kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        a, b = [one.lora_A for one in adapters], [one.lora_B for one in adapters]
        m = [one.lora_magnitude_vector for one in adapters if one.lora_magnitude_vector is not None]
        needs, keep_z = needs_of(x, a, b, bias, m, save)
        rounds = round_norm and rounds_norm(weight)
        self.problem = problem_of(x.shape, self.kind, a, b, bias, needs, m, rounds, base_of(weight), keep_z=keep_z)
        self.records, self.kinds = any(needs), kinds_of(a, b, m)
        # Then kernels read the adapters where they lie.
        self.in_place = self.kinds is None and all(t.is_contiguous() for t in (*a, *b, *m))
        self.casts, self.tensors_of = x.dtype != self.kind, tensors_of(weight)

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
            if self.casts:
                x = x.to(self.kind)
            held = (weight.to(self.kind),) if self.tensors_of is None else self.tensors_of(weight)
            a, b, scalings, rates, m = zip(*adapters, strict=True)
            if not training:
                rates = (0.0,) * len(rates)
            seed = draw_seed(x.device) if any(rates) else None
            small = (*a, *b, *m) if self.problem.dora else (*a, *b)
            numbers = numbers_of(self.problem.ranks, scalings, rates, self.problem.lifted, x.device)
            call = Call(held, which.contiguous(), numbers, seed)
            if not self.records:
                return self.forward(call, x, small, contiguous(bias))[0]
            y = _apply(x, contiguous(bias), self, call, *small)
            if call.deferred is not None:
                program, bound, first = call.deferred
                program.run(bound, first)
        return y

    def forward(
        self, call: Call, x: torch.Tensor, small: Sequence[torch.Tensor], bias: MaybeTensor
    ) -> tuple[torch.Tensor, Made]:
        rows = addressable(x)
        if self.in_place and (found := addresses_on(small, x.device)) is not None:
            return forward(self.problem, call, rows, found, None, bias)
        a, b, magnitudes = beside(small, len(self.problem.ranks.of))
        return forward(self.problem, call, rows, a, b, bias, magnitudes)


class _Batch(torch.autograd.Function):
    """The product that makes y waits until what the backward reads is saved (see ops/linear.py)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: MaybeTensor, fused: FusedBatch, call: Call, *small: torch.Tensor
    ) -> torch.Tensor:
        problem = fused.problem
        call.defers = not problem.needs.m  # the gradient of a magnitude reads z
        y, made = fused.forward(call, x, small, bias)
        ctx.save_for_backward(*to_save(problem, call.held, call.numbers.scales, x, made, y))
        ctx.rest = problem, fused.kinds
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of torch.func is at work, and in less time.
_apply = super(torch.autograd.Function, _Batch).apply


def _backward_of(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    problem, kinds = ctx.rest
    dx, grad_a, grad_b, grad_bias, grad_m = gradients(problem, dy, saved_by(ctx))
    grads = (grad_a, grad_b, grad_m) if problem.dora else (grad_a, grad_b)
    return dx, grad_bias, None, None, *each(problem, grads, kinds, ctx.needs_input_grad[4:])


_backward_once = once_differentiable(_backward_of)
