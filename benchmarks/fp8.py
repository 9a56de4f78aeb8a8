"""LoRA and DoRA over an fp8 base from stock parts, the best that torch alone offers: ``torch._scaled_mm`` for both base
products, quantisation by rows under torch.compile, addmm for the adapter. Without fp8 products (on a CPU) the operands
are quantised all the same and multiplied in x's dtype."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_fast import reference
from lora_fast.fp8 import Fp8Weight, dequantise_rows, quantise_rows


def linear(x: Tensor, weight: Fp8Weight) -> Tensor:
    """x W^T, x [M, K]."""
    return _Product.apply(x, weight.rows, weight.row_scale, weight.columns, weight.col_scale)


def lora_linear(x, weight, lora_A, lora_B, scaling, bias, p) -> Tensor:
    dropped = torch.nn.functional.dropout(x, p) if p > 0 else x
    low = torch.nn.functional.linear(dropped, lora_A.to(x.dtype)) * scaling
    return torch.addmm(linear(x, weight), low, lora_B.to(x.dtype).t())


def dora_linear(x, weight, lora_A, lora_B, magnitude, scaling, bias, p) -> Tensor:
    norm = reference.dora_norm(weight, lora_A, lora_B, scaling)
    return reference.dora_scale(lora_linear(x, weight, lora_A, lora_B, scaling, None, p), magnitude, norm, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, row_scale, columns, col_scale):
        ctx.save_for_backward(columns, col_scale)
        return _product(x, rows, row_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _product(dy, *ctx.saved_tensors), None, None, None, None


_quantise = torch.compile(quantise_rows, dynamic=True)


def _product(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    if not x.is_cuda:
        return dequantise_rows(*quantise_rows(x), x.dtype) @ dequantise_rows(rows, scale, x.dtype).t()
    x8, x_scale = _quantise(x)
    return torch._scaled_mm(x8, rows.t(), x_scale[:, None], scale[None, :], out_dtype=x.dtype, use_fast_accum=True)
