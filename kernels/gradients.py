"""The gradients of layers with one input: which launches make them, from operands. Of few rows one launch of each kind
serves all layers, over packed bases each adds to dX right behind what writes its weight, else a pass over each dY makes
what needs it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_fast.kernels.bases import Read
from lora_fast.kernels.down import down
from lora_fast.kernels.downs import downs, takes_downs
from lora_fast.kernels.gemm import product
from lora_fast.kernels.magnitudes import dz_and_dm
from lora_fast.kernels.operands import Number, Operand, Scratch
from lora_fast.kernels.pair import OverDy, pair, takes_pair
from lora_fast.kernels.passes import Pass, dy_passes
from lora_fast.kernels.problem import Small
from lora_fast.kernels.products import products
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Rooms, Shared, Sibling, Siblings
from lora_fast.kernels.sums import Dora

Maybe = Any  # an operand, None where the problem has none


class OneBackward(NamedTuple):
    """Of one layer's backward: dY, None where no gradient came; the gradients and dZ, each None where it is not
    wanted; the scaling; then as in ``Kept``, but for the base's tensors."""

    dy: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe
    dz: Maybe
    scaling: Operand | Number
    b: Maybe
    y: Maybe
    z: Maybe


class Gradients(NamedTuple):
    """Of what a layer's gradients are made: ``ds`` are its columns of dS, ``held`` the tensors of its base. ``again``:
    what z is made of again beside x, W, S and B."""

    one: OneBackward
    has: Small
    sibling: Sibling
    ds: Maybe
    held: Sequence[Maybe]
    again: dict[str, Any] = {}

    @property
    def b(self) -> Maybe:
        return self.one.b if self.has.b is None else self.has.b

    @property
    def source(self) -> tuple[Operand, Operand]:
        """dZ and W as they are, of which dX is made."""
        return (self.one.dy.rows() if self.one.dz is None else self.one.dz), self.held[0]

    def dora(self, x: Maybe, w: Read | None = None) -> Dora[Any] | None:
        """What the pass over dY does for DoRA."""
        one, has, sibling = self.one, self.has, self.sibling
        if not sibling.dora or sibling.scaled:
            return None
        found = Dora(has.gain, has.norm, one.y if one.z is None else one.z, one.dz, one.grad_m)
        if sibling.z_again:
            w = w or Read(self.held[0])
            found = found._replace(x=x, weight=w.matrix, s=has.s, b=self.b, w_scale=w.scale, **self.again)
        return found

    def passes(self, x: Maybe, keep: Number, group: Siblings, rooms: Rooms) -> list[Pass]:
        """What is wanted of dY, ahead of dX."""
        one, has, sibling, dy, base = self.one, self.has, self.sibling, self.one.dy.rows(), self.sibling.base
        w, found, ds = None, list[Pass](), self.ds
        if sibling.z_again:
            w = base.y(self.held, rooms.wanted(sibling, group, has.gain))
            found += w.launches
        dora = self.dora(x, w)
        if group.needs_x and base.e4m3:  # the launch that quantises makes dS, too
            to, gain = rooms.dz8(sibling, group), None if dora is None else dora.gain
            found.append(down(dy, self.b.t(), ds, one.scaling, keep, quantised=to, gain=gain, lifted=group.lifted))
            ds = None
        return found + dy_passes(
            dy,
            sibling.r,
            one.scaling,
            keep,
            s=has.s,
            b=self.b,
            grad_b=one.grad_b,
            ds=ds,
            grad_bias=one.grad_bias,
            dora=dora,
            lifted=group.lifted,
        )

    def into(self, dx: Operand, bits: Maybe, group: Siblings, rooms: Rooms, adds: bool = False) -> list[Launch]:
        """What makes dX, or adds to it."""
        sibling, base = self.sibling, self.sibling.base
        w, x, x_scale = base.dx(self.held, rooms.wanted(sibling, group)), self.source[0], None
        if base.e4m3:
            x, x_scale = rooms.dz8(sibling, group)
        p, q, bits = (self.ds, self.has.a, bits) if sibling.r else (None, None, None)
        made = product(x, w.matrix, p, q, dx, transposed=False, bits=bits, adds=adds, x_scale=x_scale, w_scale=w.scale)
        return [*w.launches, made]


class Wanted(NamedTuple):
    """What a backward makes of all layers together: dX, dA, and dS on the way; the mask's bits, and its scale."""

    dx: Maybe
    grad_a: Maybe
    ds: Maybe
    bits: Maybe
    keep: Number


def few_rows(
    at: Wanted, x: Operand, made: Sequence[Gradients], group: Siblings, small: Shared, scratch: Scratch
) -> list[Launch]:
    """All launches for few rows, each for all layers; none where they do not serve."""
    adapted = [one for one in made if one.sibling.r]
    if len(made) < len(group.each) or at.ds is None or at.dx is None or at.grad_a is None:
        return []
    forms = {
        tuple(t and t.dtype for t in (one.grad_b, one.grad_bias, one.grad_m, one.z, one.dz)) for one, *_ in adapted
    }
    if len(forms) > 1 or any(one.one.grad_b is None for one in adapted):
        return []
    if any(one.one.grad_bias is not None for one in made if not one.sibling.r):
        return []
    dys, r = [one.one.dy.rows() for one in adapted], max(one.r for one in group.each)
    if not takes_downs(group.m, r, x) or not takes_pair(x, [t for one in made for t in one.source[:1]] + dys, r, False):
        return []
    gained, ranks, over = [], [], []
    for dy, layer in zip(dys, adapted, strict=True):
        one, dora = layer.one, layer.dora(x)
        if one.dz is not None and dora is not None:
            gained.append((dy, dora))
        ranks.append((layer.source[0], layer.b, layer.sibling.r))
        scaling = one.scaling if group.lifted else None
        over.append(OverDy(dy, layer.has.s, one.grad_b, one.grad_bias, dora and dora.gain, scaling))
    return [
        *(dz_and_dm(gained, scratch) if gained else ()),
        downs(ranks, at.ds, small.scales, at.keep),
        pair(x, at.ds, at.grad_a, over, bits=at.bits),
        products([one.source for one in made], at.ds, small.stacked, at.dx.rows(), bits=at.bits),
    ]
