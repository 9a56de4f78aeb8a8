"""LoRA and DoRA over an fp8 base from stock parts, the best that torch alone offers: ``torch._scaled_mm`` for both base
products, quantisation by rows under torch.compile, addmm for the adapter. Without fp8 products (on a CPU) the operands
are quantised all the same and multiplied in x's dtype."""

import torch
from torch import Tensor

from lora_fast import reference
from lora_fast.fp8 import Fp8Weight, emulated_product, fp8_linear, quantise_rows


def lora_linear(
    x: Tensor, weight: Fp8Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: None, p: float
) -> Tensor:
    dropped = torch.nn.functional.dropout(x, p) if p > 0 else x
    low = torch.nn.functional.linear(dropped, lora_A.to(x.dtype)) * scaling
    return torch.addmm(fp8_linear(x, weight, product=_product), low, lora_B.to(x.dtype).t())


def dora_linear(
    x: Tensor,
    weight: Fp8Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: None,
    p: float,
) -> Tensor:
    norm = reference.dora_norm(weight, lora_A, lora_B, scaling)
    return reference.dora_scale(
        lora_linear(x, weight, lora_A, lora_B, scaling, None, p), reference.dora_gain(magnitude, norm), bias
    )


_quantise = torch.compile(quantise_rows, dynamic=True)


def _product(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    if not x.is_cuda:
        return emulated_product(x, rows, scale)
    x8, x_scale = _quantise(x)
    return torch._scaled_mm(x8, rows.t(), x_scale[:, None], scale[None, :], out_dtype=x.dtype, use_fast_accum=True)
