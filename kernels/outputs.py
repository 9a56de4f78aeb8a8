"""The outputs of layers with one input: which launches make them, from operands. Of few rows one launch makes all, over
packed bases each comes right behind what writes its weight, else there is a product for each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.bases import Read
from lora_fast.kernels.cast import Cast, cast_adapters
from lora_fast.kernels.common import FP8
from lora_fast.kernels.down import Quantised, down
from lora_fast.kernels.fan import Result, fan, fans
from lora_fast.kernels.few_rows import product_with_s
from lora_fast.kernels.gemm import product
from lora_fast.kernels.norm import Norm, norms, norms_of
from lora_fast.kernels.operands import Number, Operand, Scratch
from lora_fast.kernels.problem import Small
from lora_fast.kernels.program import Launch
from lora_fast.kernels.siblings import Shared, Sibling, Siblings
from lora_fast.kernels.stack import Adapter, stack

Maybe = Any  # an operand, None where the problem has none


class OneForward(NamedTuple):
    """Of one layer's forward: as in ``Given``, then y and z."""

    a: Maybe
    b: Maybe
    bias: Maybe
    magnitude: Maybe
    scaling: Operand | Number
    y: Operand
    z: Maybe


def outputs(
    x: Operand,
    each: Sequence[OneForward],
    held: Sequence[Sequence[Maybe]],
    group: Siblings,
    small: Shared,
    bits: Maybe,
    keep: Number,
    ready: bool = False,
) -> list[Launch]:
    """The small things, where they are not ``ready``, and each y, whose products come last."""
    scratch, launches = Scratch(x.device), []
    rooms, made = group.rooms(scratch), []
    for one, has, sibling, tensors in zip(each, small.each, group.each, held, strict=True):
        w, b = sibling.base.y(tensors, rooms.wanted(sibling, group)), one.b if has.b is None else has.b
        made.append(_Output(one, has, sibling, w, b))
    adapters = [one for one in each if one.a]
    quantised = whole = None
    if adapters and not ready:
        if any(one.base.e4m3 for one in group.each):
            quantised = Quantised(scratch.part(x.shape, FP8), scratch.part((group.m,), torch.float32))
        launches = stacked(x, each, group, small)
        if len(made) == 1 and bits is None and not group.packed:
            whole = made[0].product_with_s(x, small, keep, lifted=group.lifted)
        if whole is None:
            launches.append(
                down(x, small.stacked, small.s, None, keep, bits=bits, scales=small.scales, quantised=quantised)
            )
    if group.packed:
        return [*launches, *(launch for one in made for launch in one.alone(x, quantised, group, scratch))]
    launches += _gains(made, group, scratch)
    if whole is not None:
        return [*launches, whole]
    together = [one for one in made if one.sibling.r and one.has.s and one.one.z is None]
    if len(together) < len(adapters) or not fans(x, [one.result for one in together]):
        together = []
    launches += [one.product(x) for one in made if one not in together]
    if together:
        whole = fan(x, [one.result for one in together])
        whole.late = not any(one.sibling.needs.m for one in together)
        launches.append(whole)
    return launches


def stacked(x: Operand, each: Sequence[OneForward], group: Siblings, small: Shared) -> list[Launch]:
    """What makes the stack of all A's and the copies that products read, ahead of what reads x."""
    adapters, launches = [], []
    for one, has, sibling in zip(each, small.each, group.each, strict=True):
        if sibling.r:
            adapters.append(Adapter(one.a, one.b, None if sibling.turned else has.b, one.scaling))
        if sibling.r and sibling.turned:
            launches.append(cast_adapters(x, Cast(one.a, one.b, has.a, has.b), one.scaling, group.lifted))
    return [*launches, stack(x, adapters, small.stacked, small.scales, group.lifted)]


class _Output(NamedTuple):
    """Of what a layer's output is made."""

    one: OneForward
    has: Small
    sibling: Sibling
    w: Read
    b: Maybe

    @property
    def result(self) -> Result:
        return Result(self.w.matrix, self.has.s, self.b, self.one.y.rows(), self.has.gain, self.one.bias)

    @property
    def norm(self) -> Norm:
        has, one = self.has, self.one
        return Norm(self.w.matrix, has.a, self.b, one.scaling, has.norm, one.magnitude, has.gain, self.w.scale)

    def gain(self, group: Siblings, scratch: Scratch) -> list[Launch]:
        """The norm and the gain, whose parts take y's memory, until y is there."""
        w, a, b, scaling, n, m, gain, w_scale = self.norm
        return norms(
            w,
            a,
            b,
            scaling,
            n,
            m=m,
            gain=gain,
            w_scale=w_scale,
            round_norm=self.sibling.round_norm,
            scratch=scratch,
            room=self.one.y,
            lifted=group.lifted,
        )

    def product(self, x: Operand, x_scale: Operand | None = None) -> Launch:
        w, s, b, y, gain, bias = self.result
        z = self.one.z and self.one.z.rows()
        made = product(x, w, s, b, y, transposed=True, bias=bias, gain=gain, z=z, x_scale=x_scale, w_scale=self.w.scale)
        made.late = not self.sibling.needs.m
        return made

    def product_with_s(self, x: Operand, small: Shared, keep: Number, *, lifted: bool) -> Launch | None:
        """The product and S, which it makes on its way; None where two launches are better, or one cannot do it."""
        w, _, b, y, gain, bias = self.result
        return product_with_s(
            x,
            w,
            small.stacked,
            b,
            y,
            s=small.s,
            scaling=self.one.scaling,
            keep=keep,
            transposed=True,
            bias=bias,
            gain=gain,
            z=self.one.z and self.one.z.rows(),
            lifted=lifted,
        )

    def alone(
        self, x: Operand, quantised: Quantised[Operand] | None, group: Siblings, scratch: Scratch
    ) -> list[Launch]:
        """All launches, where what writes W for them must come right ahead."""
        gains = self.gain(group, scratch) if self.sibling.dora else []
        last = self.product(*quantised) if self.sibling.base.e4m3 and quantised else self.product(x)
        for launch in self.w.launches:
            launch.late = last.late and not gains
        return [*self.w.launches, *gains, last]


def _gains(made: Sequence[_Output], group: Siblings, scratch: Scratch) -> list[Launch]:
    """Of all layers that have them, by one launch where they are alike."""
    made = [one for one in made if one.sibling.dora]
    if len({one.sibling.round_norm for one in made}) != 1 or any(one.norm.has_parts for one in made):
        return [launch for one in made for launch in one.gain(group, scratch)]
    return [norms_of([one.norm for one in made], round_norm=made[0].sibling.round_norm, lifted=group.lifted)]
