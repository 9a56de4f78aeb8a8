"""What the operators of blocks for torch.compile share (group_op.py, mlp_op.py).

What the layers have comes flat: ``held``, the tensors of each one's base, which ``bases`` name; four small tensors of
each (A, B, bias, magnitude), contiguous; two flags of each (``round_norm``, and whether z is kept); ``sizes``, K of x
and then N of each.

What compiled graphs hold takes one text for what is neither tensor nor size (``text_of``; in it is also who needs a
gradient): every argument of an operator, and every element of a list, takes the host its time in each call, and so
would finding out anew what layers these are. Graphs give tensors the strides that they were made for.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch

from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import Bases, given, sibling
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.problem import Kinds, MaybeTensor, Needs
from lora_fast.kernels.siblings import Given, Sibling, Spec
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


class Layers(NamedTuple):
    """What decides the launches of layers, apart from sizes, and which of what holds their bases is each one's."""

    needs_x: bool
    each: tuple[Sibling, ...]
    held: tuple[slice, ...]

    def sized(self, sizes: Sequence[int]) -> tuple[Sibling, ...]:
        return tuple(replace(one, n=n) for one, n in zip(self.each, sizes[1:], strict=True))

    def bases(self, held: Tensors) -> list[Tensors]:
        """What holds each one's base."""
        return [held[own] for own in self.held]

    def givens(self, held: Tensors, small: Small, scalings: Tensors) -> list[Given]:
        return [given(base, small[4 * i : 4 * i + 4], scalings[i]) for i, base in enumerate(self.bases(held))]


def text_of(
    kind: torch.dtype, small: Small, bases: Sequence[str], flags: Sequence[bool], needs: Sequence[bool] = NONE
) -> str:
    """What ``layers_of`` reads, of layers whose products are made in ``kind``; in JSON, for a graph may outlive its
    process. ``needs``, a gradient: x, then each of the small tensors."""
    rows = []
    for i, base in enumerate(bases):
        a, b, bias, magnitude = small[4 * i : 4 * i + 4]
        kinds, (round_norm, keep_z) = kinds_of(kind, a, b, bias, magnitude), flags[2 * i : 2 * i + 2]
        own = *map(str, kinds), False, *needs[4 * i + 1 : 4 * i + 5], magnitude is not None, keep_z, round_norm, base
        rows.append((0 if a is None else len(a), *own))
    return json.dumps([needs[0], *rows])


@cache
def layers_of(text: str) -> Layers:
    """What ``text_of`` wrote."""
    needs_x, *rows = json.loads(text)
    each, held, first = [], [], 0
    for r, *rest in rows:
        kinds: Any = [getattr(torch, name.removeprefix("torch."), None) for name in rest[:5]]
        each.append(Sibling(0, r, Kinds(*kinds), Needs(*rest[5:10]), *rest[10:]))
        count = len(each[-1].base.tensors)
        held.append(slice(first, first + count))
        first += count
    return Layers(needs_x, tuple(each), tuple(held))


def key_of(x: torch.Tensor, read: Small, *rest: Any) -> tuple[Any, ...]:
    """What a problem is kept under whose launches read x, or dY, and these tensors; ``rest`` says what layers."""
    others = [None if t is None else (t.dtype, t.shape, t.stride()) for t in read]
    return (*rest, x.device, x.dtype, x.shape, x.stride(), *others)


def new_of(like: torch.Tensor, specs: Sequence[Spec]) -> list[torch.Tensor]:
    """Tensors of those of the shapes and dtypes that are wanted."""
    return [like.new_empty(spec[0], dtype=spec[1]) for spec in specs if spec is not None]


def placed(found: Sequence[torch.Tensor], specs: Sequence[Spec]) -> list[MaybeTensor]:
    """What was wanted, with None where it was not."""
    rest = iter(found)
    return [None if spec is None else next(rest) for spec in specs]


def register(name: str, run: Callable[..., Any], fake: Callable[..., Any], recorded: Any = None) -> None:
    """The operator's kernels: what it does, what it gives, what becomes of it under autograd."""
    library.impl(name, run, "CompositeExplicitAutograd")
    if recorded is not None:
        library.impl(name, recorded, "Autograd")
    torch.library.register_fake(f"lora_fast::{name}", fake, lib=library)
