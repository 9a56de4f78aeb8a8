"""Several adapters in one batch on the fused kernels, as one differentiable operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.bases.packed import PackedWeight
from lora_fast.batch.form import Adapter, MaybeTensor
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.ranks import Ranks, numbers_of
from lora_fast.kernels.batch.run import Call, Saved, backward, forward, to_save
from lora_fast.kernels.problem import Kinds, Needs
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, contiguous, dtype_of, on


def why_apart(weight: torch.Tensor) -> str | None:
    """Why such a layer's adapters do not share launches, in words; None where they do."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    if isinstance(weight, PackedWeight):
        return f"the base weight is an {type(weight).__name__}"
    return None if weight.stride(1) == 1 else "rows of the base weight are not contiguous"


def problem_of(
    shape: Sequence[int],
    kind: torch.dtype,
    n: int,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    bias: MaybeTensor,
    needs: Needs,
) -> Problem:
    """For x of this shape, products in this dtype, and n columns of y."""
    kinds = Kinds(kind, common(a), common(b), dtype_of(bias))
    return Problem(tuple(shape[:-1]), shape[-1], n, Ranks(tuple(map(len, a))), kinds, needs)


def common(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that all fit in."""
    found = tensors[0].dtype
    for t in tensors[1:]:
        found = torch.promote_types(found, t.dtype)
    return found


def beside(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A's one below the other, [sum of R, K], and B's one after the other, [N * sum of R]."""
    return torch.cat(list(a)), torch.cat([t.reshape(-1) for t in b])


def each(grad: MaybeTensor, like: Sequence[tuple[torch.Size, torch.dtype]], needs: Sequence[bool]) -> list[MaybeTensor]:
    """The gradients that lie one after the other in ``grad``, of these shapes and dtypes, where they are needed."""
    if grad is None:
        return [None] * len(like)
    parts = grad.split([shape.numel() for shape, _ in like])
    return [
        part.view(shape).to(kind) if need else None
        for part, (shape, kind), need in zip(parts, like, needs, strict=True)
    ]


class FusedBatch:
    """The fused form of ``reference.lora_linear_batch`` for calls, checked before, that are alike (see
    ``FusedLinear``)."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, adapters: Sequence[Adapter], bias: MaybeTensor) -> None:
        dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
        self.kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        a, b = [one.lora_A for one in adapters], [one.lora_B for one in adapters]

        def asks(*tensors: MaybeTensor) -> bool:
            return train and any(t is not None and t.requires_grad for t in tensors)

        needs = Needs(asks(x), asks(*a), asks(*b), asks(bias))
        self.problem = problem_of(x.shape, self.kind, len(weight), a, b, bias, needs)
        self.records = any(needs)
        self.casts = x.dtype != self.kind or weight.dtype != self.kind

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
                x, weight = x.to(self.kind), weight.to(self.kind)
            rates = [one.dropout_p if training else 0.0 for one in adapters]
            scalings = [one.scaling for one in adapters]
            numbers = numbers_of(self.problem.ranks, scalings, rates, self.problem.lifted, x.device)
            seed = draw_seed(x.device) if any(rates) else None
            call = Call(weight, which.contiguous(), numbers, seed)
            small = *(one.lora_A for one in adapters), *(one.lora_B for one in adapters)
            if not self.records:
                n = len(adapters)
                return forward(self.problem, call, addressable(x), *beside(small[:n], small[n:]), contiguous(bias))[0]
            y = _apply(x, contiguous(bias), self.problem, call, *small)
            if call.deferred is not None:
                program, bound = call.deferred
                program.run(bound, -1)
        return y


class _Batch(torch.autograd.Function):
    """The product that makes y waits until what the backward reads is saved (see ops/linear.py)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: MaybeTensor, problem: Problem, call: Call, *small: torch.Tensor
    ) -> torch.Tensor:
        n = len(small) // 2
        call.defers = True
        y, made = forward(problem, call, addressable(x), *beside(small[:n], small[n:]), bias)
        ctx.save_for_backward(*to_save(problem, call, x, made))
        ctx.rest = problem, [(t.shape, t.dtype) for t in small]
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of functorch is at work, and in less time.
_apply = super(torch.autograd.Function, _Batch).apply


def _backward_of(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    problem, small = ctx.rest
    dx, grad_bias, *grads = gradients(problem, dy, Saved(*ctx.saved_tensors), small, ctx.needs_input_grad[4:])
    return dx, grad_bias, None, None, *grads


_backward_once = once_differentiable(_backward_of)


def gradients(
    problem: Problem,
    dy: torch.Tensor,
    saved: Saved,
    small: Sequence[tuple[torch.Size, torch.dtype]],
    needs: Sequence[bool],
) -> tuple[MaybeTensor, ...]:
    """dx, dbias, those of all A's and of all B's; ``small``: the shapes and dtypes of these."""
    if not dy.is_contiguous():
        dy = addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    x = None if saved.x is None else addressable(saved.x)
    dx, grad_a, grad_b, grad_bias = backward(problem, dy, saved._replace(x=x))
    n = len(small) // 2
    return dx, grad_bias, *each(grad_a, small[:n], needs[:n]), *each(grad_b, small[n:], needs[n:])
