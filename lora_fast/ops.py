"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op under torch.compile."""

from contextlib import nullcontext

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.down import down_cast_fwd
from lora_fast.kernels.gemm import gemm
from lora_fast.kernels.grad import a_bwd, dy_bwd
from lora_fast.kernels.mask import keep_scale, mask_bits

MaybeTensor = torch.Tensor | None


def lora_linear(x, weight, lora_A, lora_B, scaling, bias, p: float) -> torch.Tensor:
    """The fused form of ``reference.lora_linear``, for arguments that were checked; p = 0 means no dropout.

    The dropout seed is drawn here, outside the operator, from the device's generator: so checkpointing, which restores
    that generator, draws the same one again, and a CUDA graph draws a new one in every replay.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if p > 0 else None
    if torch.compiler.is_compiling():
        if not isinstance(scaling, torch.Tensor):
            scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
        return torch.ops.lora_fast.lora_linear(x, weight, lora_A, lora_B, scaling, bias, seed, p)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias)):
        return _LoRALinear.apply(x, weight, lora_A, lora_B, scaling, bias, seed, p)
    return _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p)[0]


def _on(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p):
    """y [..., N], S [M, padded R], the mask bits [M, K / 32] or None, and both adapters in x's dtype."""
    k = weight.shape[1]
    with _on(x.device):
        rows = x.reshape(-1, k)
        bits = mask_bits(seed, p, rows.shape[0], k) if seed is not None else None
        s, a, b = down_cast_fwd(rows, lora_A, lora_B, scaling, bits, keep_scale(p) if bits is not None else 1.0)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        gemm(rows, weight, s, b, transposed=True, bias=bias, out=y.view(-1, y.shape[-1]))
    return y, s, bits, a, b


def _backward(dy, x, weight, lora_A, lora_B, s, bits, scaling, p, needs, r, dtypes) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias), each None where ``needs`` (in this order) does not ask for it.

    The tensors are those of ``_to_save``; ``dtypes`` are those of lora_A, lora_B and bias. dX comes last: what the
    passes before it need is freed by then, so it alone makes the peak of memory.
    """
    need_x, need_a, need_b, need_bias = needs
    n = dy.shape[-1]
    scale = keep_scale(p) if bits is not None else 1.0
    dx = grad_a = grad_b = None
    with _on(dy.device):
        rows = dy.reshape(-1, n)
        if rows.stride(1) != 1 or rows.stride(0) < n:
            rows = rows.contiguous()
        if need_b:
            grad_b = torch.empty(n, r, dtype=dtypes[1], device=dy.device)
        ds, grad_bias = dy_bwd(rows, s, lora_B, scaling, grad_b, dtypes[2] if need_bias else None)
        if need_a and ds is not None:
            flat = x.reshape(-1, x.shape[-1])
            grad_a = torch.empty(r, flat.shape[1], dtype=dtypes[0], device=dy.device)
            a_bwd(flat, ds, grad_a, bits, scale)
        if need_x and ds is not None:
            dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
            gemm(rows, weight, ds, lora_A, False, bits=bits, keep_scale=scale, out=dx.view(-1, dx.shape[-1]))
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


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, seed, p):
        y, s, bits, a, b = _forward(x, weight, lora_A, lora_B, scaling, bias, seed, p)
        need = ctx.needs_input_grad
        ctx.needs = (need[0], need[2], need[3], need[5])
        ctx.save_for_backward(*_to_save(x, weight, a, b, s, bits, scaling, ctx.needs))
        ctx.scaling = None if isinstance(scaling, torch.Tensor) else scaling
        ctx.p, ctx.r, ctx.dtypes = p, lora_A.shape[0], (lora_A.dtype, lora_B.dtype, _dtype(bias))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, s, bits, scaling = ctx.saved_tensors
        scaling = ctx.scaling if scaling is None else scaling
        dx, grad_a, grad_b, grad_bias = _backward(
            dy, x, weight, lora_A, lora_B, s, bits, scaling, ctx.p, ctx.needs, ctx.r, ctx.dtypes
        )
        return dx, None, grad_a, grad_b, None, grad_bias, None, None


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
    grads = _backward(dy, x, weight, a, b, s, bits, scaling, p, needs, shape[1],
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
    need = ctx.needs_input_grad
    ctx.needs = [need[0], need[2], need[3], need[5]]
    ctx.save_for_backward(*_to_save(x, weight, lora_A, lora_B, s, bits if ctx.p > 0 else None, scaling, ctx.needs))
    ctx.shape = [weight.shape[1], lora_A.shape[0]]
    ctx.dtypes = [lora_A.dtype, lora_B.dtype, _dtype(bias) or x.dtype]


def _op_backward(ctx, dy, _s, _bits):
    grads = torch.ops.lora_fast.lora_linear_bwd(dy, *ctx.saved_tensors, ctx.p, ctx.needs, ctx.shape, *ctx.dtypes)
    dx, grad_a, grad_b, grad_bias = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, grad_a, grad_b, None, grad_bias, None, None


_lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
