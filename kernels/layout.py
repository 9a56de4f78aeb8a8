"""What passes from a layer's forward to its backward, and where it lies: all that is small in one piece of memory."""

import math
from typing import NamedTuple

import torch

from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.down import cast_wanted
from lora_fast.kernels.launch import Program, View

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


def rounded(size: int) -> int:
    """A size in bytes such that what follows starts well."""
    return -(-size // 128) * 128


class Shared:
    """What a forward and its backward both know of a problem, and where in the ``room`` that the forward leaves the
    small things lie: a [R, K] and b [N, padded R] in x's dtype where the products cannot read the adapters themselves
    (in float16 they never do: there b carries a part of the scaling, ``lifted``), DoRA's norm n and gain g [N], the
    scales of the rows of an e4m3 x [M] (``quantised``: for an fp8 base's product, or to be kept), and S [M, padded R].
    It serves calls whose tensors agree in dtype, shape, strides and device, and keeps the programs that were made for
    them."""

    def __init__(self, lead: torch.Size, k: int, n: int, r: int, kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
                 dora: bool, fp8: bool, quantised: bool) -> None:  # fmt: skip
        self.x_shape, self.y_shape, self.m, self.k, self.n, self.r = (*lead, k), (*lead, n), math.prod(lead), k, n, r
        self.kinds, self.dora, self.fp8, self.quantised, m = kinds, dora, fp8, quantised, self.m
        self.kind, ranks = kinds[0], padded_rank(r)  # kinds: of x, lora_A and lora_B
        self.lifted = self.kind == torch.float16
        self.cast = self.lifted or cast_wanted(kinds, r)
        self.wide = self.kind.itemsize > 2
        gains = torch.float64 if self.kind == torch.float64 else torch.float32
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "a": ((r, k) if self.cast else (0,), self.kind), "b": ((n, ranks) if self.cast else (0,), self.kind),
            "norm": ((n if dora else 0,), gains), "gain": ((n if dora else 0,), gains),
            "x_scale": ((m if quantised else 0,), torch.float32),
            "s": ((m, ranks), self.kind),
        }  # fmt: skip
        self.bytes, self.parts = 0, {}
        for name, (shape, kind) in shapes.items():
            size = math.prod(shape) * kind.itemsize
            self.parts[name] = self.bytes, size, kind, shape
            self.bytes += rounded(size)
        self.forwards: dict[tuple, Program] = {}
        self.backwards: dict[tuple, Program] = {}

    def view(self, room: int, name: str) -> View:
        """A part of the room, which is a program's argument with this number."""
        return View(room, *self.parts[name][:3])

    def part(self, made: Made, name: str) -> torch.Tensor:
        """A part of the room as a tensor: where things are decided once per problem."""
        return self.view(0, name).of(made).view(self.parts[name][3])
