"""Calls of layers over packed bases, which are compared bit for bit with those over their dense forms."""

import pytest
import torch
from devices import TRITON

from lora_fast.bases.scaled import E8M0, ScaledFp8Weight
from lora_fast.fp8 import E4M3
from lora_fast.functional import dora_linear, lora_linear

needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")


def normal(n, k, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


FORMS = ["float32", "e8m0", "rows", "bf16 rows"]  # of scales


def scaled(form, n, k, dtype=torch.float32, device="cpu", seed=1):
    """A weight of bytes at random, none of them NaN, with scales at random."""
    gen = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=gen)
    stored[stored & 0x7F == 0x7F] = 3
    scale: torch.Tensor
    if "rows" in form:
        scale = (0.001 + 0.01 * torch.rand(n, 1, generator=gen)).to(torch.bfloat16 if "bf16" in form else torch.float32)
    else:
        blocks = -(-n // 128), -(-k // 128)
        scale = 0.001 + 0.01 * torch.rand(blocks, generator=gen)
        if form == "e8m0":
            scale = torch.randint(115, 123, blocks, dtype=torch.uint8, generator=gen).view(E8M0)
    tensors = {"": stored.view(E4M3).to(device), "_scale" if "rows" in form else "_scale_inv": scale.to(device)}
    return ScaledFp8Weight.from_tensors(tensors, (n, k), dtype)


def results(weight, device, dtype, *, dora, bias, p, x_grad, backend="triton", save="auto", save_x="x", m=70):
    torch.manual_seed(0)
    n, k = weight.shape
    shapes = (m, k), (3, k), (n, 3), (n,), (n,), (m, n)
    x, a, b, magnitude, offset, dy = (torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
    magnitude[::5] = 0  # whose gradients need z again
    leaves = [a, b, *([x] if x_grad else []), *([magnitude] if dora else []), *([offset] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    options = {"bias": offset if bias else None, "dropout_p": p, "backend": backend, "save_x": save_x}
    if dora:
        y = dora_linear(x, weight, a, b, magnitude, 2.0, save=save, **options)
    else:
        y = lora_linear(x, weight, a, b, 2.0, **options)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


CALLS = [
    {"dora": False, "bias": False, "p": 0.0, "x_grad": True},
    {"dora": False, "bias": True, "p": 0.5, "x_grad": True},
    {"dora": False, "bias": False, "p": 0.0, "x_grad": False},
    {"dora": True, "bias": False, "p": 0.0, "x_grad": True},
    {"dora": True, "bias": True, "p": 0.5, "x_grad": True},
    {"dora": True, "bias": False, "p": 0.0, "x_grad": True, "save": "z"},
    {"dora": True, "bias": False, "p": 0.5, "x_grad": False, "save_x": "fp8"},
]


def named(call):
    return "-".join(f"{k}{v}" for k, v in call.items())
