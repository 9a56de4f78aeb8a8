"""What the operators of blocks for torch.compile share (group_op.py, glu_op.py).

Tensors of the layers come flat: four of each (A, B, bias, magnitude), two flags of each (``round_norm``, and whether z
is kept), and needs: of x, and then of each of those tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import sibling
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.problem import MaybeTensor, Needs
from lora_fast.kernels.siblings import Sibling
from lora_fast.ops.parts import contiguous, kinds_of

LAYERS = "Tensor[] weights, Tensor?[] small, Tensor[] scalings"
library = torch.library.Library("lora_fast", "FRAGMENT")
problems = Memo()
Tensors = Sequence[torch.Tensor]
Small = Sequence[MaybeTensor]


NONE = (False,) * 17  # of up to four layers: nobody needs a gradient


def prepared(x: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, Tensors, Small, Tensors, list[bool]]:
    """x, weights, the small tensors, scalings and flags as the operators take them."""
    dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
    kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
    small, scalings, flags = [], [], []
    for layer in layers:
        small += [contiguous(t) for t in layer.tensors[1:]]
        scaling = layer.scaling
        if not isinstance(scaling, torch.Tensor):
            scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
        scalings.append(scaling)
        flags += [layer.round_norm, sibling(layer, kind, train).keep_z]
    return x.to(kind), [layer.weight.to(kind) for layer in layers], small, scalings, flags


def each_of(weights: Tensors, small: Small, flags: Sequence[bool], needs: Sequence[bool]) -> list[Sibling]:
    """What decides the launches of each layer."""
    found: list[Sibling] = []
    for i, weight in enumerate(weights):
        a, b, bias, magnitude = small[4 * i : 4 * i + 4]
        kinds, wants = kinds_of(weight.dtype, a, b, bias, magnitude), Needs(False, *needs[4 * i + 1 : 4 * i + 5])
        round_norm, keep_z = flags[2 * i : 2 * i + 2]
        r = 0 if a is None else len(a)
        found.append(Sibling(len(weight), r, kinds, wants, magnitude is not None, keep_z, round_norm))
    return found


def key_of(lead: Sequence[int], weights: Tensors, small: Small, *rest: Any) -> tuple[Any, ...]:
    flat = (None if t is None else (t.dtype, t.shape, t.stride()) for t in (*weights, *small))
    return (*lead, weights[0].device, *flat, *rest)


def kept_of(weights: Tensors, small: Small, kept: Small, siblings: Sequence[Sibling]) -> list[list[MaybeTensor]]:
    """Of each layer what is in ``Kept``, and its weight; ``kept``: y or z of each, which its magnitude's gradient
    reads."""
    return [
        [
            None if one.casts else small[4 * i + 1],
            kept[i] if one.z_again else None,
            kept[i] if one.needs.m and one.keep_z else None,
            weights[i],
        ]
        for i, one in enumerate(siblings)
    ]


def apart(grads: Sequence[Sequence[MaybeTensor]]) -> list[MaybeTensor]:
    """All of them, flat; those of A, which are parts of one matrix, in memory of their own, as an operator's must."""
    return [t.clone() if i == 0 and t is not None else t for four in grads for i, t in enumerate(four)]


def fake_gradients(x_shape: Any, kind: torch.dtype, like: torch.Tensor, small: Small, wanted: Any) -> list[Any]:
    found = [like.new_empty(x_shape, dtype=kind)] if wanted[0] else []
    found += [
        like.new_empty(t.shape, dtype=t.dtype)
        for t, want in zip(small, wanted[1:], strict=True)
        if want and t is not None
    ]
    return found


def register(name: str, run: Callable[..., Any], fake: Callable[..., Any], recorded: Any = None) -> None:
    """The operator's kernels: what it does, what it gives, what becomes of it under autograd."""
    library.impl(name, run, "CompositeExplicitAutograd")
    if recorded is not None:
        library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"lora_fast::{name}", fake, lib=library)
