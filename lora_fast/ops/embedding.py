"""An adapted embedding on its kernels (kernels/embedding): an autograd Function, under torch.compile an operator."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import refuse_transforms
from lora_fast.kernels.embedding.step import Needs, Problem, backward, forward
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.operands import kind
from lora_fast.ops.parts import on, one_gpu, some

MaybeTensor = torch.Tensor | None


class FusedEmbedding:
    """The fused form of :func:`lora_fast.reference.lora_embedding` for calls, checked before, whose tensors agree in
    dtype, shape, strides, device and in whether they ask for a gradient: what follows from that is decided once. The
    host's time is most of an embedding's."""

    def __init__(
        self,
        ids: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        magnitude: MaybeTensor,
        padding_idx: int | None,
        round_norm: bool,
    ) -> None:
        self.problem, self.shape = Problem(round_norm), (*ids.shape, weight.shape[1])
        self.padding = -1 if padding_idx is None else padding_idx
        self.factors: dict[float, torch.Tensor] = {}
        adapter = lora_A, lora_B, magnitude
        self.needs = Needs(*(t is not None and torch.is_grad_enabled() and t.requires_grad for t in adapter))
        self.kind, self.records = None if magnitude is None else magnitude.dtype, any(self.needs)
        self.flat, self.compiling = ids.dim() == 1 and ids.is_contiguous(), torch.compiler.is_compiling()
        self.elsewhere = None if self.compiling or weight.device.type != "cuda" or one_gpu() else weight.device

    def __call__(
        self,
        ids: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float | torch.Tensor,
        magnitude: MaybeTensor,
        factor: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """y."""
        if self.elsewhere is not None and self.elsewhere.index != torch.cuda.current_device():
            with torch.cuda.device(self.elsewhere):
                return self(ids, weight, lora_A, lora_B, scaling, magnitude, factor)
        if factor is not None and not isinstance(factor, torch.Tensor):
            factor = self._as_tensor(factor, weight)
        if self.compiling:
            return self._compiled(ids, weight, lora_A, lora_B, scaling, magnitude, factor)
        refuse_transforms()
        if not self.flat:
            ids = ids.reshape(-1).contiguous()
        if magnitude is not None:
            magnitude = magnitude.contiguous()
        if not self.records:
            return forward(self.problem, ids, weight, lora_A, lora_B, scaling, factor, magnitude)[0].view(self.shape)
        y: torch.Tensor = _apply(lora_A, lora_B, magnitude, self, ids, weight, scaling, factor)
        return y

    def _as_tensor(self, factor: float, like: torch.Tensor) -> torch.Tensor:
        if self.compiling or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return torch.full((), factor, device=like.device, dtype=torch.float32)
        if (found := self.factors.get(factor)) is None:
            found = self.factors[factor] = torch.full((), factor, device=like.device, dtype=torch.float32)
        return found

    def _compiled(
        self, ids: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, magnitude: Any, factor: Any
    ) -> torch.Tensor:
        if not isinstance(scaling, torch.Tensor):  # a constant would recompile
            scaling = torch.ones((), device=weight.device, dtype=torch.float32) * scaling
        given = ids, weight, lora_A, lora_B, magnitude, scaling, factor, self.padding, self.problem.round_norm
        y: torch.Tensor = torch.ops.lora_fast.lora_embedding(*given)[0]
        return y


class _Embedding(torch.autograd.Function):
    """In eager mode, where an operator costs the host more than its launches."""

    @staticmethod
    def forward(
        ctx: Any, lora_A: Any, lora_B: Any, magnitude: Any, fused: Any, ids: Any, weight: Any, scaling: Any, factor: Any
    ) -> Any:
        y, norm, gain = forward(fused.problem, ids, weight, lora_A, lora_B, scaling, factor, magnitude)
        at, ctx.scaling = (scaling, None) if isinstance(scaling, torch.Tensor) else (None, scaling)
        ctx.save_for_backward(ids, weight, lora_A, lora_B, factor, norm, gain, at)
        ctx.fused = fused
        return y.view(fused.shape)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of torch.func is at work, and in less time.
_apply = super(torch.autograd.Function, _Embedding).apply


def _backward_of(ctx: Any, dy: Any) -> Any:
    ids, weight, lora_A, lora_B, factor, norm, gain, at = ctx.saved_tensors
    fused, scaling = ctx.fused, ctx.scaling if at is None else at
    da, db, dm = backward(
        fused.problem,
        _rows(dy),
        ids,
        weight,
        lora_A,
        lora_B,
        scaling,
        factor,
        norm=norm,
        gain=gain,
        padding=fused.padding,
        needs=fused.needs,
    )
    return da, db, None if dm is None else dm.to(fused.kind), *(None,) * 5


_backward_once = once_differentiable(_backward_of)


def _rows(dy: torch.Tensor) -> torch.Tensor:
    return dy.reshape(-1, dy.shape[-1]).contiguous()


_problems = Memo()


def _problem(*given: Any) -> Problem:
    """That of an operator's call, of which the last is whether the norm is rounded."""
    key = tuple(map(kind, given))
    found: Problem | None = _problems.get(key)
    return found or _problems.keep(key, Problem(given[-1]))


_ADAPTED = "Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B"
_SCALED = "Tensor scaling, Tensor? embed_scale, int padding, bool round_norm"


@torch.library.custom_op(
    "lora_fast::lora_embedding",
    mutates_args=(),
    schema=f"({_ADAPTED}, Tensor? magnitude, {_SCALED}) -> (Tensor, Tensor, Tensor)",
)
def _embedding_op(
    ids: Any, weight: Any, lora_A: Any, lora_B: Any, magnitude: Any, scaling: Any, factor: Any, _: int, round_norm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [..., N], DoRA's norm and gain [N], or empty tensors for these."""
    given = ids.reshape(-1).contiguous(), weight, lora_A, lora_B, scaling, factor
    if magnitude is not None:
        magnitude = magnitude.contiguous()
    with on(weight.device):
        y, norm, gain = forward(_problem(*given, magnitude, round_norm), *given, magnitude)
    return y.view(*ids.shape, y.shape[1]), some(norm, y), some(gain, y)


@_embedding_op.register_fake
def _(ids: Any, weight: Any, lora_A: Any, lora_B: Any, magnitude: Any, *_: Any) -> Any:
    n = weight.shape[1]
    kind = torch.float64 if torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype) else torch.float32
    small = [weight.new_empty(0) if magnitude is None else weight.new_empty(n, dtype=kind) for _ in range(2)]
    return weight.new_empty(*ids.shape, n), *small


@torch.library.custom_op(
    "lora_fast::lora_embedding_bwd",
    mutates_args=(),
    schema=f"(Tensor dy, {_ADAPTED}, Tensor? norm, Tensor? gain, {_SCALED}, bool[] needs) -> Tensor[]",
)
def _embedding_bwd_op(dy: torch.Tensor, ids: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    """The gradients of lora_A, lora_B and the magnitude, or empty tensors."""
    weight, lora_A, lora_B, norm, gain, scaling, factor, padding, round_norm, needs = given
    read = ids.reshape(-1).contiguous(), weight, lora_A, lora_B, scaling, factor
    with on(dy.device):
        problem = _problem(*read, norm, round_norm)
        found = backward(problem, _rows(dy), *read, norm=norm, gain=gain, padding=padding, needs=needs)
    return [some(t, dy) for t in found]


@_embedding_bwd_op.register_fake
def _(dy: Any, ids: Any, weight: Any, lora_A: Any, lora_B: Any, norm: Any, *rest: Any) -> Any:
    kind = torch.float64 if torch.float64 in (dy.dtype, lora_A.dtype, lora_B.dtype) else torch.float32
    like = (lora_A.shape, lora_A.dtype), (lora_B.shape, lora_B.dtype), ((dy.shape[-1],), kind)
    return [
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for (shape, dtype), need in zip(like, rest[-1], strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ids, weight, lora_A, lora_B, magnitude, scaling, factor, ctx.padding, ctx.round_norm = inputs
    norm, gain = (None, None) if magnitude is None else output[1:]
    ctx.save_for_backward(ids, weight, lora_A, lora_B, norm, gain, scaling, factor)
    ctx.kind, ctx.needs = magnitude is not None and magnitude.dtype, list(ctx.needs_input_grad[2:5])


def _backward(ctx: Any, dy: Any, *_: Any) -> Any:
    rest = ctx.padding, ctx.round_norm, ctx.needs
    found = torch.ops.lora_fast.lora_embedding_bwd(dy, *ctx.saved_tensors, *rest)
    da, db, dm = (grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
    return None, None, da, db, None if dm is None else dm.to(ctx.kind), *(None,) * 4


_embedding_op.register_autograd(_backward, setup_context=_setup_context)
