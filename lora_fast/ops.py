"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op under torch.compile."""

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import autocast_dtype
from lora_fast.fp8 import Fp8Weight
from lora_fast.kernels.common import padded_rank, wide
from lora_fast.kernels.lora import Fp8, Made, lora_bwd, lora_fwd

MaybeTensor = torch.Tensor | None


def lora_linear(
    x, weight, lora_A, lora_B, scaling, bias, p: float, magnitude=None, save: str = "auto", round_norm: bool = False,
    save_x: str = "x",
) -> torch.Tensor:  # fmt: skip
    """The fused form of ``reference.lora_linear``, for arguments that were checked; p = 0 means no dropout. With a
    magnitude that of ``reference.dora_linear``."""
    dtype, fp8 = autocast_dtype(x.device), None
    if isinstance(weight, Fp8Weight):
        weight, fp8, round_norm = weight.rows, Fp8(weight.row_scale, weight.columns, weight.col_scale), False
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight if fp8 is not None else weight.to(dtype)
    save_x8 = fp8 is not None and save_x == "fp8"
    seed = draw_seed(x.device) if p > 0 else None
    # z is kept where y cannot stand for it: y lacks what the bias drowns, and z again takes all that A and B keep.
    keep_z = (
        magnitude is not None and torch.is_grad_enabled() and magnitude.requires_grad
        and not (save == "auto" and bias is None and lora_A.requires_grad and lora_B.requires_grad and not save_x8)
    )  # fmt: skip
    if torch.compiler.is_compiling():
        if not isinstance(scaling, torch.Tensor):
            scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
        return torch.ops.lora_fast.lora_linear(
            x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, round_norm, keep_z, save_x8, *(fp8 or ())
        )[0]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or (bias is not None and bias.requires_grad)
        or (magnitude is not None and magnitude.requires_grad)
    ):
        late: list[tuple] = []
        call = _Call(scaling, seed, p, round_norm, keep_z, save_x8, fp8, late)
        y = _LoRALinear.apply(x, weight, lora_A, lora_B, bias, magnitude, call)
        for launch, args in late:
            with _on(x.device):
                launch(*args)
        return y
    call = _Call(scaling, seed, p, round_norm, False, save_x8, fp8, None)
    return _forward(x, weight, lora_A, lora_B, bias, magnitude, call)[0]


class _Call(NamedTuple):
    """What of a call autograd does not follow."""

    scaling: float | torch.Tensor
    seed: torch.Tensor | int | None
    p: float
    round_norm: bool
    keep_z: bool
    save_x8: bool
    fp8: Fp8 | None
    late: list[tuple] | None  # where the product, which comes last, is left to the caller: its launch and arguments


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


_HERE = nullcontext()


@cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def _on(device: torch.device):
    if device.type != "cuda" or _one_gpu() or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _forward(x, weight, lora_A, lora_B, bias, magnitude, call: _Call) -> tuple[torch.Tensor, Made]:
    """y [..., N], and what was made on the way to it. The product that fills y comes last, perhaps by the caller."""
    n, k = weight.shape
    with _on(x.device):
        y = x.new_empty(*x.shape[:-1], n)
        rows, out = (x, y) if x.dim() == 2 else (x.reshape(-1, k), y.view(-1, n))
        made, launch, args = lora_fwd(
            rows, weight, lora_A.contiguous(), lora_B.contiguous(), call.scaling, bias, call.seed, call.p, out,
            magnitude if magnitude is None else magnitude.contiguous(), call.round_norm, call.keep_z, call.fp8,
        )  # fmt: skip
        if call.late is None:
            launch(*args)
        else:
            call.late.append((launch, args))
    return y, made


def _backward(dy, x, weight, y, made: Made, fp8, scaling, p, needs, shape, dtypes) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias, dm), each None where ``needs`` (in this order) does not ask for it.

    The tensors are those of ``_to_save``; ``shape`` is (K, R), ``dtypes`` are those of lora_A, lora_B, bias and m.
    """
    need_x, need_a, need_b, need_bias, need_m = needs
    (k, r), n = shape, dy.shape[-1]
    with _on(dy.device):
        rows = dy if dy.dim() == 2 else dy.reshape(-1, n)
        if rows.stride(1) != 1 or rows.stride(0) < n:
            rows = rows.contiguous()
        if x is not None and x.dim() != 2:
            x = x.reshape(-1, k)
        if y is not None and y.dim() != 2:
            y = y.reshape(-1, n)
        grad_a = dy.new_empty(r, k, dtype=dtypes[0]) if need_a else None
        grad_b = dy.new_empty(n, r, dtype=dtypes[1]) if need_b else None
        grad_bias = dy.new_empty(n, dtype=dtypes[2]) if need_bias else None
        grad_m = dy.new_empty(n, dtype=dtypes[3]) if need_m else None
        dx = lora_bwd(rows, x, weight, made, scaling, p, r, need_x, grad_a, grad_b, grad_bias, grad_m, y, fp8)
    if need_x and dy.dim() != 2:
        dx = torch.ops.aten._unsafe_view(dx, [*dy.shape[:-1], k])
    return dx, grad_a, grad_b, grad_bias, grad_m


def _to_save(x, weight, y, made: Made, fp8: Fp8 | None, scaling, needs, save_x8) -> tuple[MaybeTensor, ...]:
    """What the backward will read, and nothing else: x, weight, y, what the forward made, an fp8 base, scaling."""
    need_x, need_a, need_b, _, need_m = needs
    both = need_x or need_a
    dora = made.gain is not None and (both or need_b or need_m)
    again = need_m and made.z is None  # dm from y, which may have to make z again
    row_scale, columns, col_scale = fp8 or (None, None, None)
    return (
        x if (need_a and not save_x8) or again else None,
        weight if need_x or again else None,
        y if again else None,
        made.s if need_b or again else None,
        made.bits if both else None,
        made.a if need_x else None,
        made.b if both or again else None,
        made.gain if dora else None,
        made.norm if need_m else None,
        made.z if need_m else None,
        made.x8 if need_a and save_x8 else None,
        made.x_scale if need_a and save_x8 else None,
        row_scale if again or need_x else None,
        columns if need_x else None,
        col_scale if need_x else None,
        scaling if both and isinstance(scaling, torch.Tensor) else None,
    )


def _dtype(t: MaybeTensor) -> torch.dtype | None:
    return None if t is None else t.dtype


def _needs(ctx) -> tuple[bool, bool, bool, bool, bool]:
    """Of x, lora_A, lora_B, bias and magnitude."""
    need_x, _, *rest = ctx.needs_input_grad[:6]
    return need_x, *rest


class _LoRALinear(torch.autograd.Function):
    """Where the product makes nothing that the backward reads, it waits in the list ``late`` until ``apply`` has saved
    what it does read. A checkpoint's second forward (not reentrant) ends when the last tensor is saved: it then skips
    the product of its last layer, as it does that of a frozen ``nn.Linear``.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, magnitude, call: _Call):
        if magnitude is not None and magnitude.requires_grad:
            call = call._replace(late=None)  # its gradient reads y or z
        y, made = _forward(x, weight, lora_A, lora_B, bias, magnitude, call)
        ctx.save_for_backward(*_to_save(x, weight, y, made, call.fp8, call.scaling, _needs(ctx), call.save_x8))
        number = None if isinstance(call.scaling, torch.Tensor) else call.scaling
        dtypes = lora_A.dtype, lora_B.dtype, _dtype(bias), _dtype(magnitude)
        ctx.rest = number, call.p, (weight.shape[1], lora_A.shape[0]), dtypes
        return y

    @staticmethod
    def backward(ctx, dy):
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


def _made_and_base(saved) -> tuple[Made, Fp8 | None]:
    """What lies between y and scaling in ``_to_save``; no base where the backward does not read an fp8 one."""
    *made, row_scale, columns, col_scale = saved
    return Made(*made), None if row_scale is None else Fp8(row_scale, columns, col_scale)


def _saved(ctx) -> tuple[MaybeTensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f'{error}\nDoRA without a bias keeps its output for the gradient of the magnitude. With save="z" (an '
            "argument of dora_linear, an attribute of DoRALinear and of patched PEFT layers) it keeps a tensor of its "
            "own, and the output may be changed in place."
        ) from error


def _backward_of(ctx, dy):
    x, weight, y, *rest, scaling = _saved(ctx)
    made, fp8 = _made_and_base(rest)
    number, p, shape, dtypes = ctx.rest
    scaling = number if scaling is None else scaling
    dx, grad_a, grad_b, grad_bias, grad_m = _backward(
        dy, x, weight, y, made, fp8, scaling, p, _needs(ctx), shape, dtypes
    )
    return dx, None, grad_a, grad_b, grad_bias, grad_m, None


_backward_once = once_differentiable(_backward_of)


def _some(t: MaybeTensor, like: torch.Tensor) -> torch.Tensor:
    """A custom op returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t


@torch.library.custom_op("lora_fast::lora_linear", mutates_args=())
def _lora_linear_op(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: MaybeTensor,
    magnitude: MaybeTensor, scaling: torch.Tensor, seed: MaybeTensor, p: float, round_norm: bool, keep_z: bool,
    save_x8: bool, row_scale: MaybeTensor = None, columns: MaybeTensor = None, col_scale: MaybeTensor = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
           torch.Tensor]:  # fmt: skip
    fp8 = None if row_scale is None else Fp8(row_scale, columns, col_scale)  # type: ignore[arg-type]
    call = _Call(scaling, seed, p, round_norm, keep_z, save_x8, fp8, None)
    y, made = _forward(x, weight, lora_A, lora_B, bias, magnitude, call)
    x8, x_scale = (made.x8, made.x_scale) if save_x8 else (None, None)
    return (y, made.s, _some(made.bits, y), _some(made.gain, y), _some(made.norm, y), _some(made.z, y), _some(x8, y),
            _some(x_scale, y))  # fmt: skip


@_lora_linear_op.register_fake
def _(
    x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, round_norm, keep_z, save_x8,
    row_scale=None, columns=None, col_scale=None,
):  # fmt: skip
    n, k = weight.shape
    m = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    s = x.new_empty(m, padded_rank(lora_A.shape[0]))
    bits = x.new_empty(0) if seed is None else x.new_empty(m, -(-k // 32), dtype=torch.int32)
    gain, norm = (x.new_empty(0) if magnitude is None else x.new_empty(n, dtype=wide(x)) for _ in range(2))
    z = x.new_empty(m, n) if keep_z else x.new_empty(0)
    x8 = x.new_empty(m, k, dtype=weight.dtype) if save_x8 else x.new_empty(0)
    return y, s, bits, gain, norm, z, x8, x.new_empty(m, dtype=torch.float32) if save_x8 else x.new_empty(0)


@torch.library.custom_op("lora_fast::lora_linear_bwd", mutates_args=())
def _lora_linear_bwd_op(
    dy: torch.Tensor, x: MaybeTensor, weight: MaybeTensor, y: MaybeTensor, s: MaybeTensor, bits: MaybeTensor,
    lora_A: MaybeTensor, lora_B: MaybeTensor, gain: MaybeTensor, norm: MaybeTensor, z: MaybeTensor,
    x8: MaybeTensor, x_scale: MaybeTensor, row_scale: MaybeTensor, columns: MaybeTensor, col_scale: MaybeTensor,
    scaling: MaybeTensor, p: float, needs: list[bool], shape: list[int],
    a_dtype: torch.dtype, b_dtype: torch.dtype, bias_dtype: torch.dtype, m_dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    a, b = (t if t is None else t.to(dy.dtype) for t in (lora_A, lora_B))
    made, fp8 = _made_and_base((s, bits, a, b, gain, norm, z, x8, x_scale, row_scale, columns, col_scale))
    dtypes = a_dtype, b_dtype, bias_dtype, m_dtype
    return [_some(g, dy) for g in _backward(dy, x, weight, y, made, fp8, scaling, p, needs, shape, dtypes)]


@_lora_linear_bwd_op.register_fake
def _(
    dy, x, weight, y, s, bits, lora_A, lora_B, gain, norm, z, x8, x_scale, row_scale, columns, col_scale, scaling, p,
    needs, shape, *dtypes,
):  # fmt: skip
    (k, r), n = shape, dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (r, k), (n, r), (n,), (n,)
    kinds = dy.dtype, *dtypes
    return [dy.new_empty(sh if need else 0, dtype=kind if need else None)
            for sh, kind, need in zip(shapes, kinds, needs, strict=True)]  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, bias, magnitude, scaling, _, ctx.p, _, keep_z, save_x8, *fp8 = inputs
    y, s, bits, gain, norm, z, x8, x_scale = output
    ctx.needs = list(_needs(ctx))
    dora = magnitude is not None
    made = Made(s, bits if ctx.p > 0 else None, lora_A, lora_B, gain if dora else None, norm if dora else None,
                z if keep_z else None, x8, x_scale)  # fmt: skip
    base = None if fp8[0] is None else Fp8(*fp8)
    ctx.save_for_backward(*_to_save(x, weight, y, made, base, scaling, ctx.needs, save_x8))
    ctx.shape = [weight.shape[1], lora_A.shape[0]]
    ctx.dtypes = [lora_A.dtype, lora_B.dtype, _dtype(bias) or x.dtype, _dtype(magnitude) or x.dtype]


def _op_backward(ctx, dy, *_):
    grads = torch.ops.lora_fast.lora_linear_bwd(dy, *ctx.saved_tensors, ctx.p, ctx.needs, ctx.shape, *ctx.dtypes)
    dx, grad_a, grad_b, grad_bias, grad_m = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, grad_a, grad_b, grad_bias, grad_m, *(None,) * 9


_lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
