"""Blocks under the error rule: random layers, their gradients on a path, the reference's in float64."""

import torch
from accuracy import Results
from fused import seed_drawn

from lora_fast import Layer
from lora_fast.kernels import mask


def a_layer(
    n,
    k,
    r,
    dtype,
    device="cpu",
    *,
    gen,
    adapter=None,
    dora=False,
    bias=False,
    scaling=2.0,
    p=0.0,
    magnitude=None,
    **others,
):
    """A random layer, r = 0 without adapters, in which all terms of y are of the size of one."""

    def normal(*shape, std=1.0, kind=dtype):
        return (std * torch.randn(*shape, generator=gen, device=device)).to(kind)

    weight, offset = normal(n, k, std=k**-0.5), normal(n) if bias else None
    if not r:
        return Layer(weight, bias=offset)
    kind = adapter or dtype
    if dora and magnitude is None:
        magnitude = normal(n, kind=kind).abs() + 0.5
    return Layer(
        weight,
        normal(r, k, std=k**-0.5, kind=kind),
        normal(n, r, std=0.3, kind=kind),
        scaling,
        offset,
        p,
        magnitude,
        **others,
    )


def trained(layer, dtype=None):
    """The layer with leaves, in another dtype if one is given; the base's dtype for what is in x's."""

    def leaf(t):
        return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

    return layer._replace(
        weight=layer.weight.to(dtype or layer.weight.dtype),
        **{name: leaf(getattr(layer, name)) for name in ("lora_A", "lora_B", "bias", "lora_magnitude_vector")},
    )


def results(fn, x, layers, dys, dtype=None) -> Results:
    """What ``fn(x, layers)`` gives, a tensor or several, and every gradient; dys None for an output that is unused."""
    x, layers = x.detach().to(dtype or x.dtype).requires_grad_(), [trained(layer, dtype) for layer in layers]
    ys = fn(x, layers)
    ys = (ys,) if isinstance(ys, torch.Tensor) else ys
    used = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    for i, layer in enumerate(layers):
        found |= {f"{name}{i}": t.grad for name, t in zip("ABbm", layer.tensors[1:], strict=True) if t is not None}
    return {name: t for name, t in found.items() if t is not None}


def keep_mask(p, m, k, device, seed=1):
    """The mask of the next fused call after this seed, and what kept elements are multiplied by."""
    bits = mask.mask_bits(seed_drawn(torch.device(device), seed), p, m, k, torch.device(device))
    return mask.unpack(bits, k), mask.keep_scale(p)


def close(found, expected, name):
    """Of float32 results whose sums have another order."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
