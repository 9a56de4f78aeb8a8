"""What the operators of blocks for torch.compile share (group_op.py, mlp_op.py).

What the layers have comes flat: ``held``, the tensors of each one's base, which ``bases`` name; four small tensors of
each (A, B, bias, magnitude); two flags of each (``round_norm``, and whether z is kept); ``sizes``, K of x and then N of
each; needs, of x and then of each of those small tensors.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import Bases, kept_held, sibling
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.bases import BASES
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.problem import MaybeTensor, Needs
from lora_fast.kernels.siblings import Sibling
from lora_fast.ops.parts import contiguous, kinds_of

LAYERS = "Tensor[] held, Tensor?[] small, Tensor[] scalings, str[] bases, SymInt[] sizes"
library = torch.library.Library("lora_fast", "FRAGMENT")
problems = Memo()
Tensors = Sequence[torch.Tensor]
Small = Sequence[MaybeTensor]


NONE = (False,) * 17  # of up to four layers: nobody needs a gradient


def prepared(x: torch.Tensor, layers: Sequence[Layer]) -> tuple[Any, ...]:
    """x, what ``LAYERS`` names, and flags, as the operators take them."""
    dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
    kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
    small, scalings, flags, bases = [], [], [], []
    for layer in layers:
        small += [contiguous(t) for t in layer.tensors[1:]]
        scaling = layer.scaling
        if not isinstance(scaling, torch.Tensor):
            scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
        scalings.append(scaling)
        one = sibling(layer, kind, train)
        flags += [one.round_norm, one.keep_z]
        bases.append(one.base_name)
    held = list(chain.from_iterable(Bases(layers, kind).held(layers)))
    return x.to(kind), held, small, scalings, bases, [x.shape[-1], *(layer.weight.shape[0] for layer in layers)], flags


def each_of(
    kind: torch.dtype, small: Small, bases: Sequence[str], sizes: Sequence[int], flags: Sequence[bool], needs: Any
) -> list[Sibling]:
    """What decides the launches of each layer, whose products are made in ``kind``."""
    found: list[Sibling] = []
    for i, (base, n) in enumerate(zip(bases, sizes[1:], strict=True)):
        a, b, bias, magnitude = small[4 * i : 4 * i + 4]
        kinds, wants = kinds_of(kind, a, b, bias, magnitude), Needs(False, *needs[4 * i + 1 : 4 * i + 5])
        round_norm, keep_z = flags[2 * i : 2 * i + 2]
        r = 0 if a is None else len(a)
        found.append(Sibling(n, r, kinds, wants, magnitude is not None, keep_z, round_norm, base))
    return found


def held_of(held: Tensors, bases: Sequence[str]) -> list[Tensors]:
    """The tensors of each layer's base."""
    found, first = [], 0
    for base in bases:
        count = len(BASES[base].tensors)
        found.append(held[first : first + count])
        first += count
    return found


def key_of(lead: Sequence[int], held: Tensors, small: Small, *rest: Any) -> tuple[Any, ...]:
    flat = (None if t is None else (t.dtype, t.shape, t.stride()) for t in (*held, *small))
    return (*lead, held[0].device, *flat, *rest)


def kept_of(
    held: Sequence[Tensors], saved: Sequence[slice], small: Small, kept: Small, siblings: Sequence[Sibling]
) -> list[list[MaybeTensor]]:
    """Of each layer what is in ``Kept``, and of its base's tensors those that are ``saved``; ``kept``: y or z of each,
    which its magnitude's gradient reads."""
    return [
        [
            None if one.casts else small[4 * i + 1],
            kept[i] if one.z_again else None,
            kept[i] if one.needs.m and one.keep_z else None,
            *kept_held(held[i], saved[i]),
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
