"""What passes from a layer's forward to its backward, and where it lies: all that is small in one piece of memory."""

import math
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.cast import cast_wanted
from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.operands import Operand, rounded
from lora_fast.kernels.program import Program

MaybeTensor = torch.Tensor | None


class Fp8(NamedTuple):
    """What an fp8 base has beside ``weight``, W's rows in e4m3 [N, K]: row i of W is row_scale[i] * weight[i]; and W
    once more by its columns, column k of W being col_scale[k] * columns[k]. Scales are float32. A backward has of them
    what it reads."""

    row_scale: MaybeTensor  # [N]
    columns: MaybeTensor  # [K, N]
    col_scale: MaybeTensor  # [K]


class Made(NamedTuple):
    """What a forward leaves for the backward."""

    room: MaybeTensor  # bytes, see ``Shared``
    bits: MaybeTensor = None  # of the dropout mask
    z: MaybeTensor = None  # [..., N], the output before gain and bias, if wanted
    x8: MaybeTensor = None  # x in e4m3 [M, K], which an fp8 base's product reads, or dA


class Saved(NamedTuple):
    """What a backward reads, each None where it does not."""

    x: MaybeTensor  # [..., K]
    weight: MaybeTensor
    a: MaybeTensor
    b: MaybeTensor
    y: MaybeTensor
    room: MaybeTensor  # from here on as in ``Made``
    bits: MaybeTensor
    z: MaybeTensor
    x8: MaybeTensor
    row_scale: MaybeTensor  # from here on as in ``Fp8``
    columns: MaybeTensor
    col_scale: MaybeTensor


class Needs(NamedTuple):
    """Whose gradients a backward makes."""

    x: bool
    a: bool
    b: bool
    bias: bool
    m: bool


class Small(NamedTuple):
    """The small things that a forward makes, operands, None where the problem has none: all of them lie in the ``room``
    that it leaves for the backward."""

    a: Any  # [R, K] and b [N, padded R] in x's dtype, where the products cannot read the adapters
    b: Any
    norm: Any  # [N], DoRA's norm n and gain g
    gain: Any
    x_scale: Any  # [M], scales of the rows of an e4m3 x
    s: Any  # [M, padded R]


class Shared:
    """What a forward and its backward both know of a problem, and where in the room the small things lie. In float16
    the products never read the adapters themselves: there b carries a part of the scaling (``lifted``). An e4m3 x
    (``quantised``) is made for an fp8 base's product, or to be kept. It serves calls whose tensors agree in dtype,
    shape, strides and device, and keeps the programs that were made for them."""

    def __init__(self, lead: torch.Size, k: int, n: int, r: int, kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
                 dora: bool, fp8: bool, quantised: bool) -> None:  # fmt: skip
        self.x_shape, self.y_shape, self.m, self.k, self.n, self.r = (*lead, k), (*lead, n), math.prod(lead), k, n, r
        self.kinds, self.dora, self.fp8, self.quantised, m = kinds, dora, fp8, quantised, self.m
        self.kind, ranks = kinds[0], padded_rank(r)  # kinds: of x, lora_A and lora_B
        self.lifted = self.kind == torch.float16
        self.cast = self.lifted or cast_wanted(kinds, r)
        self.wide = self.kind.itemsize > 2
        gains = torch.float64 if self.kind == torch.float64 else torch.float32
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
            "a": ((r, k), self.kind) if self.cast else None, "b": ((n, ranks), self.kind) if self.cast else None,
            "norm": ((n,), gains) if dora else None, "gain": ((n,), gains) if dora else None,
            "x_scale": ((m,), torch.float32) if quantised else None, "s": ((m, ranks), self.kind),
        }  # fmt: skip
        self.bytes = sum(rounded(math.prod(found[0]) * found[1].itemsize) for found in self.shapes.values() if found)
        self.forwards: dict[tuple, Program] = {}
        self.backwards: dict[tuple, Program] = {}

    def small(self, room: Operand) -> Small:
        start = 0
        found: dict[str, Any] = dict.fromkeys(self.shapes)
        for name, wanted in self.shapes.items():
            if wanted is not None:
                shape, kind = wanted
                found[name] = room.part(shape, kind, start)
                start += rounded(found[name].nbytes)
        return Small(**found)
