"""An adapted embedding on its kernels (kernels/embedding): an autograd Function, under torch.compile an operator."""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_fast.kernels.embedding.grad import Needs, embedding_bwd
from lora_fast.kernels.embedding.norm import embedding_norm
from lora_fast.kernels.embedding.rows import embedding_fwd
from lora_fast.ops.parts import on, some

MaybeTensor = torch.Tensor | None


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    magnitude: MaybeTensor,
    embed_scale: float | torch.Tensor | None,
    padding_idx: int | None,
    round_norm: bool,
) -> torch.Tensor:
    """The fused form of :func:`lora_fast.reference.lora_embedding`, for arguments that were checked."""
    number, at = (1.0, scaling) if isinstance(scaling, torch.Tensor) else (scaling, None)
    if torch.compiler.is_compiling() and at is None:
        at = torch.ones((), device=weight.device, dtype=torch.float32) * number  # a constant would recompile
    if embed_scale is not None and not isinstance(embed_scale, torch.Tensor):
        embed_scale = torch.full((), embed_scale, device=weight.device, dtype=torch.float32)
    padding = -1 if padding_idx is None else padding_idx
    given = ids, weight, lora_A, lora_B, magnitude, 1.0 if at is not None else number, at, embed_scale
    if not torch.compiler.is_compiling():
        found: torch.Tensor = _Embedding.apply(*given, padding, round_norm)
        return found
    return torch.ops.lora_fast.lora_embedding(*given, padding, round_norm)[0]


def _flat(ids: torch.Tensor) -> torch.Tensor:
    return ids.reshape(-1).contiguous()


class _Scaled(NamedTuple):
    """Numbers of a call, in the operators' order: the scaling is the first or, where there is a tensor, that."""

    number: float
    at: MaybeTensor
    embed_scale: MaybeTensor
    padding: int  # whose row of dA is zero

    @property
    def scaling(self) -> float | torch.Tensor:
        return self.number if self.at is None else self.at


def _forward(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: MaybeTensor,
    *rest: Any,
) -> tuple[torch.Tensor, MaybeTensor, MaybeTensor]:
    """y [..., N]; DoRA's norm and gain [N]. ``rest``: ``_Scaled``, and whether the norm is rounded."""
    *scaled, round_norm = rest
    of = _Scaled(*scaled)
    by, norm, gain = of.scaling, None, None
    with on(weight.device):
        if magnitude is not None:
            norm, gain = embedding_norm(weight, lora_A, lora_B, by, magnitude.contiguous(), round_norm)
        y = embedding_fwd(_flat(ids), weight, lora_A, lora_B, by, of.embed_scale, gain)
    return y.view(*ids.shape, y.shape[1]), norm, gain


def _gradients(
    dy: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    norm: MaybeTensor,
    gain: MaybeTensor,
    *rest: Any,
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
    """Of lora_A, lora_B and the magnitude, each None where it is not needed. ``rest``: ``_Scaled``, and which are."""
    *scaled, needs = rest
    of = _Scaled(*scaled)
    with on(dy.device):
        rows = dy.reshape(-1, dy.shape[-1]).contiguous()
        return embedding_bwd(
            rows,
            _flat(ids),
            weight,
            lora_A,
            lora_B,
            of.scaling,
            of.embed_scale,
            norm,
            gain,
            padding=of.padding,
            needs=Needs(*needs),
        )


class _Embedding(torch.autograd.Function):
    """In eager mode, where an operator costs the host more than its launches."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        made = _forward(*given)
        _setup_context(ctx, given, made)
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        return _backward(ctx, dy, by=_gradients)


_ADAPTED = "Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B"
_SCALED = "float scaling, Tensor? scaling_at, Tensor? embed_scale, int padding"


@torch.library.custom_op(
    "lora_fast::lora_embedding",
    mutates_args=(),
    schema=f"({_ADAPTED}, Tensor? magnitude, {_SCALED}, bool round_norm) -> (Tensor, Tensor, Tensor)",
)
def _embedding_op(*given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``_forward``, with empty tensors for None."""
    y, norm, gain = _forward(*given)
    return y, some(norm, y), some(gain, y)


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
def _embedding_bwd_op(dy: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    """``_gradients``, with empty tensors for None."""
    return [some(t, dy) for t in _gradients(dy, *given)]


@_embedding_bwd_op.register_fake
def _(dy: Any, ids: Any, weight: Any, lora_A: Any, lora_B: Any, norm: Any, *rest: Any) -> Any:
    kind = torch.float64 if torch.float64 in (dy.dtype, lora_A.dtype, lora_B.dtype) else torch.float32
    like = (lora_A.shape, lora_A.dtype), (lora_B.shape, lora_B.dtype), ((dy.shape[-1],), kind)
    return [
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for (shape, dtype), need in zip(like, rest[-1], strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ids, weight, lora_A, lora_B, magnitude, ctx.scaling, scaling_at, embed_scale, ctx.padding, _ = inputs
    norm, gain = (None, None) if magnitude is None else output[1:]
    ctx.save_for_backward(ids, weight, lora_A, lora_B, norm, gain, scaling_at, embed_scale)
    ctx.kind, ctx.needs = magnitude is not None and magnitude.dtype, list(ctx.needs_input_grad[2:5])


def _backward(ctx: Any, dy: Any, *_: Any, by: Any = None) -> Any:
    *saved, scaling_at, embed_scale = ctx.saved_tensors
    rest = ctx.scaling, scaling_at, embed_scale, ctx.padding, ctx.needs
    found = (by or torch.ops.lora_fast.lora_embedding_bwd)(dy, *saved, *rest)
    da, db, dm = (grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
    return None, None, da, db, None if dm is None else dm.to(ctx.kind), *(None,) * 5


_embedding_op.register_autograd(_backward, setup_context=_setup_context)
