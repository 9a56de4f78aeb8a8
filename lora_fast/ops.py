"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op under torch.compile."""

from contextlib import nullcontext

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.lora import lora_bwd, lora_fwd

MaybeTensor = torch.Tensor | None


def lora_linear(x, weight, lora_A, lora_B, scaling, bias, p: float) -> torch.Tensor:
    """The fused form of ``reference.lora_linear``, for arguments that were checked; p = 0 means no dropout."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
    seed = draw_seed(x.device) if p > 0 else None
    if torch.compiler.is_compiling():
        if not isinstance(scaling, torch.Tensor):
            scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
        return torch.ops.lora_fast.lora_linear(x, weight, lora_A, lora_B, scaling, bias, seed, p)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LoRALinear.apply(x, weight, lora_A, lora_B, scaling, bias, seed, p)
    return _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p)[0]


def draw_seed(device: torch.device) -> torch.Tensor | int:
    """A dropout seed from the device's generator, drawn outside the operator: so checkpointing, which restores that
    generator, draws the same one again.

    Where the launches are recorded (a CUDA graph, a compiled function) it is a tensor that every replay draws anew.
    Else it is a number, made on the host from the generator's seed and offset, which saves a launch.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # it counts in fours
    # Distinct for distinct (seed, offset), but for one in 2^62; bit 62 keeps it 64 bits wide.
    return (generator.initial_seed() + offset * 0x9E3779B97F4A7C15) % 2**62 + 2**62


def _on(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p):
    """y [..., N], S [M, padded R], the mask bits [M, K / 32] or None, and both adapters in x's dtype."""
    n, k = weight.shape
    with _on(x.device):
        y = x.new_empty(*x.shape[:-1], n)
        saved = lora_fwd(x if x.dim() == 2 else x.reshape(-1, k), weight, lora_A.contiguous(), lora_B.contiguous(),
                         scaling, bias, seed, p, y if x.dim() == 2 else y.view(-1, n))  # fmt: skip
    return y, *saved


def _backward(dy, x, weight, lora_A, lora_B, s, bits, scaling, p, needs, shape, dtypes) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias), each None where ``needs`` (in this order) does not ask for it.

    The tensors are those of ``_to_save``; ``shape`` is (K, R), ``dtypes`` are those of lora_A, lora_B and bias.
    """
    need_x, need_a, need_b, need_bias = needs
    (k, r), n = shape, dy.shape[-1]
    with _on(dy.device):
        rows = dy if dy.dim() == 2 else dy.reshape(-1, n)
        if rows.stride(1) != 1 or rows.stride(0) < n:
            rows = rows.contiguous()
        if x is not None and x.dim() != 2:
            x = x.reshape(-1, k)
        grad_a = dy.new_empty(r, k, dtype=dtypes[0]) if need_a else None
        grad_b = dy.new_empty(n, r, dtype=dtypes[1]) if need_b else None
        grad_bias = dy.new_empty(n, dtype=dtypes[2]) if need_bias else None
        dx = lora_bwd(rows, x, weight, lora_A, lora_B, s, bits, scaling, p, r, grad_a, grad_b, grad_bias)
    if need_x and dy.dim() != 2:
        dx = torch.ops.aten._unsafe_view(dx, [*dy.shape[:-1], k])
    return dx, grad_a, grad_b, grad_bias


def _to_save(x, weight, lora_A, lora_B, s, bits, scaling, needs) -> tuple[MaybeTensor, ...]:
    """What the backward will read, and nothing else."""
    need_x, need_a, need_b, _ = needs
    both = need_x or need_a
    return (
        x if need_a else None,
        weight if need_x else None,
        lora_A if need_x else None,
        lora_B if both else None,
        s if need_b else None,
        bits if both else None,
        scaling if both and isinstance(scaling, torch.Tensor) else None,
    )


def _dtype(t: MaybeTensor) -> torch.dtype | None:
    return None if t is None else t.dtype


def _needs(ctx) -> tuple[bool, bool, bool, bool]:
    need = ctx.needs_input_grad
    return need[0], need[2], need[3], need[5]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, seed, p):
        y, s, bits, a, b = _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p)
        ctx.save_for_backward(*_to_save(x, weight, a, b, s, bits, scaling, _needs(ctx)))
        number = None if isinstance(scaling, torch.Tensor) else scaling
        dtypes = lora_A.dtype, lora_B.dtype, _dtype(bias)
        ctx.rest = number, p, (weight.shape[1], lora_A.shape[0]), dtypes
        return y

    @staticmethod
    def backward(ctx, dy):
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


def _backward_of(ctx, dy):
    *saved, scaling = ctx.saved_tensors
    number, p, shape, dtypes = ctx.rest
    scaling = number if scaling is None else scaling
    dx, grad_a, grad_b, grad_bias = _backward(dy, *saved, scaling, p, _needs(ctx), shape, dtypes)
    return dx, None, grad_a, grad_b, None, grad_bias, None, None


_backward_once = once_differentiable(_backward_of)


def _some(t: MaybeTensor, like: torch.Tensor) -> torch.Tensor:
    """A custom op returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t


@torch.library.custom_op("lora_fast::lora_linear", mutates_args=())
def _lora_linear_op(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: torch.Tensor,
    bias: MaybeTensor, seed: MaybeTensor, p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    y, s, bits, _, _ = _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p)
    return y, s, _some(bits, s)


@_lora_linear_op.register_fake
def _(x, weight, lora_A, lora_B, scaling, bias, seed, p):
    n, k = weight.shape
    m = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    s = x.new_empty(m, padded_rank(lora_A.shape[0]))
    bits = x.new_empty(0) if seed is None else x.new_empty(m, -(-k // 32), dtype=torch.int32)
    return y, s, bits


@torch.library.custom_op("lora_fast::lora_linear_bwd", mutates_args=())
def _lora_linear_bwd_op(
    dy: torch.Tensor, x: MaybeTensor, weight: MaybeTensor, lora_A: MaybeTensor, lora_B: MaybeTensor, s: MaybeTensor,
    bits: MaybeTensor, scaling: MaybeTensor, p: float, needs: list[bool], shape: list[int],
    a_dtype: torch.dtype, b_dtype: torch.dtype, bias_dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    a, b = (t if t is None else t.to(dy.dtype) for t in (lora_A, lora_B))
    grads = _backward(dy, x, weight, a, b, s, bits, scaling, p, needs, shape,
                      (a_dtype, b_dtype, bias_dtype))  # fmt: skip
    return [_some(g, dy) for g in grads]


@_lora_linear_bwd_op.register_fake
def _(dy, x, weight, lora_A, lora_B, s, bits, scaling, p, needs, shape, a_dtype, b_dtype, bias_dtype):
    (k, r), n = shape, dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (r, k), (n, r), (n,)
    kinds = dy.dtype, a_dtype, b_dtype, bias_dtype
    return [dy.new_empty(sh if need else 0, dtype=kind if need else None)
            for sh, kind, need in zip(shapes, kinds, needs, strict=True)]  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, scaling, bias, _, ctx.p = inputs
    _, s, bits = output
    ctx.needs = list(_needs(ctx))
    ctx.save_for_backward(*_to_save(x, weight, lora_A, lora_B, s, bits if ctx.p > 0 else None, scaling, ctx.needs))
    ctx.shape = [weight.shape[1], lora_A.shape[0]]
    ctx.dtypes = [lora_A.dtype, lora_B.dtype, _dtype(bias) or x.dtype]


def _op_backward(ctx, dy, _s, _bits):
    grads = torch.ops.lora_fast.lora_linear_bwd(dy, *ctx.saved_tensors, ctx.p, ctx.needs, ctx.shape, *ctx.dtypes)
    dx, grad_a, grad_b, grad_bias = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, grad_a, grad_b, None, grad_bias, None, None


_lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
