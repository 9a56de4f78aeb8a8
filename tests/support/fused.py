"""The fused operator as a function for the error rule, the mask that it will draw, the memory that it takes."""

import torch
from accuracy import with_mask

from lora_fast.functional import dora_linear, lora_linear
from lora_fast.kernels import mask
from lora_fast.ops import linear as ops


def seed_drawn(device, seed):
    """The dropout seed that the next fused call draws, and the generator as it was before."""
    torch.manual_seed(seed)
    drawn = ops.draw_seed(device)
    torch.manual_seed(seed)
    return drawn


def masked(inputs, p, seed=1):
    """The inputs with the mask that ``fused`` will draw with this p and seed."""
    if p == 0:
        return inputs
    x = inputs.x
    bits = mask.mask_bits(seed_drawn(x.device, seed), p, x.numel() // x.shape[-1], x.shape[-1], x.device)
    return with_mask(inputs, mask.unpack(bits, x.shape[-1]), mask.keep_scale(p))


def fused(p=0.0, seed=1, scaling=None):
    def of(inputs):
        def fn(x, weight, lora_A, lora_B, bias):
            torch.manual_seed(seed)
            by = inputs.scaling if scaling is None else scaling
            return lora_linear(x, weight, lora_A, lora_B, by, bias, dropout_p=p, backend="triton")

        return fn

    return of


def fused_dora(p=0.0, **kwargs):
    """dora_linear as ``hold`` of dora_forms calls it, with the mask of ``masked``."""

    def of(inputs):
        def fn(x, w, a, b, m, bias):
            torch.manual_seed(1)
            return dora_linear(x, w, a, b, m, inputs.scaling, bias, dropout_p=p, backend="triton", **kwargs)

        return fn

    return of


def forgetful(honest):
    """What makes a product's launch, but for its low-rank term."""

    def mutant(*args, **others):
        launch = honest(*args, **others)
        if launch is not None:
            launch.ints = (*launch.ints[:3], 0, *launch.ints[4:])  # no ranks
        return launch

    return mutant


def peak(forward, leaves, dy):
    """Bytes on the GPU beyond what was there before a step, which starts without gradients."""
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        forward().backward(dy)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start
