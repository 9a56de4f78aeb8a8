"""DoRA's formula in plain torch, and functions held to the error rule beside it."""

import torch
import torch.nn.functional as F
from accuracy import compare

from lora_fast.functional import dora_linear

NAMES = ("dx", "dA", "dB", "dm", "dbias")


def eager(x, weight, a, b, m, bias, scaling, keep=None, keep_scale=1.0, *, detach=True):
    """The formula with V in memory: products in x's dtype, the gain m / n in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = torch.linalg.vector_norm(weight.to(wide) + scaling * (b.to(wide) @ a.to(wide)), dim=1)
    dropped = x if keep is None else x * keep * keep_scale
    z = F.linear(x, weight) + F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * scaling
    y = z * (m.to(wide) / (n.detach() if detach else n))
    return (y if bias is None else y + bias).to(x.dtype)


def magnitude(inputs, seed=0):
    """Of the size of one and of either sign."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(len(inputs.weight), generator=gen).to(inputs.lora_A.device, inputs.lora_A.dtype)


def results(fn, inputs, m, dtype=None, grad=NAMES):
    """y and the gradients asked for of ``fn(x, weight, lora_A, lora_B, m, bias)``, the inputs cast to ``dtype``."""
    values = (inputs.x, inputs.lora_A, inputs.lora_B, m, inputs.bias)
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_(name in grad)
        for name, t in zip(NAMES, values, strict=True)
    }
    x, a, b, m, bias = leaves.values()
    y = fn(x, inputs.weight.to(dtype or inputs.weight.dtype), a, b, m, bias)
    assert y.requires_grad == bool(grad)
    if grad:
        y.backward(inputs.dy.to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items() if t is not None and t.grad is not None}}


def plain(detach=True, keep=None, keep_scale=1.0):
    """``eager`` as ``results`` calls it."""
    return lambda *args: eager(*args, 2.0, keep, keep_scale, detach=detach)


def hold(fn, draws, detach=True):
    """Hold ``fn(inputs)`` to the error rule, beside eager torch and float64."""

    def formula(inputs):
        return plain(detach, inputs.keep, inputs.keep_scale)

    pairs = [(inputs, magnitude(inputs, seed)) for seed, inputs in enumerate(draws)]
    ours = [results(fn(inputs), inputs, m) for inputs, m in pairs]
    eagers = [results(formula(inputs), inputs, m) for inputs, m in pairs]
    truths = [results(formula(inputs), inputs, m, torch.float64) for inputs, m in pairs]
    for found, base in zip(ours, eagers, strict=True):
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in base.items()}
    compare(ours, eagers, truths, draws[0].x.dtype)


def op(backend, p=0.0, **kwargs):
    """dora_linear as ``results`` calls it."""
    return lambda x, w, a, b, m, bias: dora_linear(x, w, a, b, m, 2.0, bias, dropout_p=p, backend=backend, **kwargs)
