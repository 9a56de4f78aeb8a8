"""The fused kernels as an operator for torch.compile: ``torch.ops.lora_fast.lora_linear``, y of a layer.

Under autograd it becomes ``lora_linear_fwd``, and its gradients ``lora_linear_bwd``: these two are what a compiled
graph holds, and they have no kernel for autograd in between. They are defined by hand and give nothing empty, since the
wrappers of ``torch.library.custom_op`` and each output take the host some microseconds in every call.
"""

from typing import Any

import torch

from lora_fast.fp8 import E4M3
from lora_fast.kernels.layout import Fp8, Made, MaybeTensor, Needs, Shared
from lora_fast.kernels.lora import lora_fwd
from lora_fast.kernels.memo import Memo
from lora_fast.ops.parts import addressable, contiguous, dtype_of, gradients, on, shared_of, to_save

_GIVEN = """(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? magnitude, Tensor scaling,
    Tensor? seed, float p, bool round_norm, bool keep_z, bool save_x8, Tensor? row_scale=None, Tensor? columns=None,
    Tensor? col_scale=None)"""
_library = torch.library.Library("lora_fast", "FRAGMENT")
_library.define(f"lora_linear{_GIVEN} -> Tensor")
_library.define(f"lora_linear_fwd{_GIVEN} -> Tensor[]")
_library.define("""lora_linear_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? y,
    Tensor? room, Tensor? bits, Tensor? z, Tensor? x8, Tensor? row_scale, Tensor? columns, Tensor? col_scale,
    Tensor scaling, float p, bool[] needs, SymInt[] shape, bool dora, bool fp8, bool quantised, ScalarType a_dtype,
    ScalarType b_dtype, ScalarType bias_dtype, ScalarType m_dtype) -> Tensor[]""")
lora_linear = torch.ops.lora_fast.lora_linear
_problems = Memo()


def _forward(
    x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, round_norm, keep_z, save_x8,
    row_scale=None, columns=None, col_scale=None,
) -> list[torch.Tensor]:  # fmt: skip
    """y, the room, and what there is of the mask's bits, z and an x in 8 bits, in this order."""
    fp8 = None if row_scale is None else Fp8(row_scale, columns, col_scale)
    lora_A, lora_B, bias, magnitude = map(contiguous, (lora_A, lora_B, bias, magnitude))
    x = addressable(x)
    key = (
        "lora_linear_fwd", x.device, x.dtype, x.shape, x.stride(), weight.dtype, weight.shape, weight.stride(),
        lora_A.dtype, lora_A.shape, lora_B.dtype, dtype_of(bias), dtype_of(magnitude), fp8 is None, save_x8,
    )  # fmt: skip
    shared = _problems.get(key) or _problems.keep(
        key, shared_of(x, weight, lora_A, lora_B, magnitude, fp8 is not None, save_x8, x.dtype)
    )
    with on(x.device):
        y, made = lora_fwd(shared, x, weight, lora_A, lora_B, scaling, bias, seed, p, magnitude, round_norm, keep_z,
                           fp8)  # fmt: skip
    found = [y, made.room, made.bits, made.z, made.x8 if save_x8 else None]
    return [t for t in found if t is not None]


def _forward_fake(
    x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, round_norm, keep_z, save_x8,
    row_scale=None, columns=None, col_scale=None,
) -> list[torch.Tensor]:  # fmt: skip
    n, k = weight.shape
    m = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    room = shared_of(x, weight, lora_A, lora_B, magnitude, row_scale is not None, save_x8, x.dtype).bytes
    found = [y, x.new_empty(room, dtype=torch.uint8)]
    if seed is not None:
        found.append(x.new_empty(m, -(-k // 32), dtype=torch.int32))
    if keep_z:
        found.append(torch.empty_like(y))
    if save_x8:
        found.append(x.new_empty(m, k, dtype=E4M3))
    return found


def _gradients(
    dy, x, weight, lora_A, lora_B, y, room, bits, z, x8, row_scale, columns, col_scale, scaling, p, needs, shape, dora,
    fp8, quantised, a_dtype, b_dtype, bias_dtype, m_dtype,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients that are needed, in the order of ``Needs``."""
    k, r = shape
    problem = dy.shape[:-1], k, dy.shape[-1], r, (dy.dtype, a_dtype, b_dtype), dora, fp8, quantised
    key = "lora_linear_bwd", dy.device, *problem
    shared = _problems.get(key) or _problems.keep(key, Shared(*problem))
    saved = x, weight, lora_A, lora_B, y, room, bits, z, x8, row_scale, columns, col_scale
    with on(dy.device):
        grads = gradients(dy, shared, Needs(*needs), saved, scaling, p, (bias_dtype, m_dtype))
    return [grad for grad in grads if grad is not None]


def _gradients_fake(dy, *rest) -> list[torch.Tensor]:
    needs, (k, r), _, _, _, *kinds = rest[14:]
    n = dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (r, k), (n, r), (n,), (n,)
    return [dy.new_empty(shape, dtype=kind)
            for shape, kind, need in zip(shapes, (dy.dtype, *kinds), needs, strict=True) if need]  # fmt: skip


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, ctx.p, _, keep_z, save_x8, *base = given
        y, room, *rest = torch.ops.lora_fast.lora_linear_fwd(*given)
        bits, z, x8 = (rest.pop(0) if there else None for there in (seed is not None, keep_z, save_x8))
        ctx.needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        fp8 = None if not base or base[0] is None else Fp8(*base)
        shared = shared_of(x, weight, lora_A, lora_B, magnitude, fp8 is not None, save_x8, x.dtype)
        made: Made = Made(room, bits, z, x8)
        saved: tuple[MaybeTensor, ...] = to_save(x, weight, lora_A, lora_B, y, made, shared, fp8, ctx.needs, save_x8)
        ctx.save_for_backward(*saved, scaling)
        ctx.rest = (
            [shared.k, shared.r], shared.dora, shared.fp8, shared.quantised, lora_A.dtype, lora_B.dtype,
            dtype_of(bias) or x.dtype, dtype_of(magnitude) or x.dtype,
        )  # fmt: skip
        ctx.given = len(given)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        found = torch.ops.lora_fast.lora_linear_bwd(dy, *ctx.saved_tensors, ctx.p, list(ctx.needs), *ctx.rest)
        dx, grad_a, grad_b, grad_bias, grad_m = (found.pop(0) if need else None for need in ctx.needs)
        return dx, None, grad_a, grad_b, grad_bias, grad_m, *(None,) * (ctx.given - 6)


def _recorded(*given: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
        return _LoRALinear.apply(*given)
    return torch.ops.lora_fast.lora_linear_fwd(*given)[0]


_library.impl("lora_linear", lambda *given: torch.ops.lora_fast.lora_linear_fwd(*given)[0], "CompositeExplicitAutograd")
_library.impl("lora_linear", _recorded, "Autograd")
_library.impl("lora_linear_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("lora_linear_bwd", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fast::lora_linear", lambda *given: _forward_fake(*given)[0], lib=_library)
torch.library.register_fake("lora_fast::lora_linear_fwd", _forward_fake, lib=_library)
torch.library.register_fake("lora_fast::lora_linear_bwd", _gradients_fake, lib=_library)
