"""Batches of several adapters under the error rule: random adapters, the gradients on a path, runs of their own."""

import torch
from accuracy import Results
from blocks import keep_mask

from lora_fast import Adapter
from lora_fast.functional import dora_linear, lora_linear

NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")


def an_adapter(n, k, r, dtype, device="cpu", *, gen, dora=False, scaling=2.0, p=0.0):
    def normal(*shape, std=1.0):
        return (std * torch.randn(*shape, generator=gen, device=device)).to(dtype)

    magnitude = normal(n).abs() + 0.5 if dora else None
    return Adapter(normal(r, k, std=k**-0.5), normal(n, r, std=0.3), scaling, p, magnitude)


def trained(one, dtype=None):
    """The adapter with leaves, in another dtype if one is given."""
    leaves = {name: getattr(one, name) for name in NAMES}
    return one._replace(
        **{name: t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in leaves.items()}
    )


def results(fn, x, weight, adapters, which, bias, dy, dtype=None) -> Results:
    """What ``fn(x, weight, adapters, which, bias)`` gives, and every gradient."""
    x, bias = (t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias))
    adapters = [trained(one, dtype) for one in adapters]
    y = fn(x, weight.to(dtype or weight.dtype), adapters, which, bias)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad} | ({} if bias is None else {"dbias": bias.grad})
    for i, one in enumerate(adapters):
        found |= {f"d{name}{i}": getattr(one, name).grad for name in NAMES if getattr(one, name) is not None}
    return found


def apart(x, weight, adapters, which, bias):
    """Each adapter's rows as a batch of their own."""
    rows = which.reshape(*which.shape, *(1,) * (x.dim() - 1 - which.dim())).expand(x.shape[:-1])
    y = torch.nn.functional.linear(x, weight, bias)
    for j, (a, b, scaling, _, magnitude) in enumerate(adapters):
        if magnitude is None:
            own = lora_linear(x[rows == j], weight, a, b, scaling, bias, backend="reference")
        else:
            own = dora_linear(x[rows == j], weight, a, b, magnitude, scaling, bias, backend="reference")
        y = y.index_put((rows == j,), own)
    return y


def keeps(which, adapters, k, device, seed=1):
    """The mask that a fused call after this seed draws, each row with its adapter's rate, and each row's factor."""
    masks, scales = zip(*(keep_mask(one.dropout_p, len(which), k, device, seed) for one in adapters), strict=True)
    return masks, scales
