"""What programs are made from: operands, which stand for tensors, and launches whose arguments have names.

A program is made once for each problem (its shapes, strides, dtypes) and run in every step. While it is made there are
operands in the place of tensors: a function that makes launches reads their shapes and strides, and says by name which
of them each kernel gets. ``run`` makes a program of such a function and runs it at once.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.launchers import INTERPRETED
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.program import OWN, Block, Launch, Program, View

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a program before it is there: where it will be, and all that launches depend on. It answers like a
    tensor."""

    place: int | View  # among the program's arguments, or in the memory of one
    shape: Size
    strides: Size
    dtype: torch.dtype
    device: torch.device
    start: int = 0  # its address modulo 16

    @classmethod
    def of(cls, place: int, t: torch.Tensor) -> "Operand":
        return cls(place, tuple(t.shape), t.stride(), t.dtype, t.device, t.data_ptr() % 16)

    def __len__(self) -> int:
        return self.shape[0]

    def stride(self, dim: int) -> int:
        return self.strides[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.start

    @property
    def turned(self) -> bool:
        """Whether it is a matrix seen from the side: its columns are contiguous, its rows are not."""
        return self.strides[0] == 1 < self.strides[1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def t(self) -> "Operand":
        return replace(self, shape=self.shape[::-1], strides=self.strides[::-1])

    def rows(self) -> "Operand":
        """The matrix of its rows; with more dimensions than two it is contiguous."""
        if len(self.shape) == 2:
            return self
        *lead, cols = self.shape
        return replace(self, shape=(math.prod(lead), cols), strides=(cols, 1))

    def holds(self, shape: Size, dtype: torch.dtype) -> bool:
        return math.prod(shape) * dtype.itemsize <= self.nbytes

    def part(self, shape: Size, dtype: torch.dtype, start: int = 0) -> "Operand":
        """A contiguous operand in the memory of this one, ``start`` bytes from its beginning."""
        assert isinstance(self.place, int)
        view = View(self.place, start, math.prod(shape) * dtype.itemsize, dtype)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return Operand(view, shape, strides, dtype, self.device, (self.start + start) % 16)

    def block(self, row: int, col: int, rows: int, cols: int) -> "Operand":
        """So many rows and columns of this matrix, from there on."""
        (down, right), size = self.strides, self.dtype.itemsize
        arg, start = (self.place, 0) if isinstance(self.place, int) else self.place[:2]
        offset = (row * down + col * right) * size
        view = View(arg, start + offset, ((rows - 1) * down + (cols - 1) * right + 1) * size, self.dtype)
        return replace(self, place=view, shape=(rows, cols), start=(self.start + offset) % 16)

    def seen_as(self, shape: Size, dtype: torch.dtype) -> "Operand":
        """The same memory, which is contiguous, from its beginning."""
        if isinstance(self.place, int):
            return self.part(shape, dtype)
        whole = replace(self, place=self.place.arg, start=(self.start - self.place.start) % 16)
        return whole.part(shape, dtype, self.place.start)


T = TypeVar("T", Operand, torch.Tensor)  # of records that hold operands while a program is made, and tensors elsewhere


class Number(NamedTuple):
    """A number that changes from run to run."""

    place: int


class Tiles(NamedTuple):
    """An operand that a kernel takes as a tensor descriptor, tile by tile."""

    of: Operand
    tile: list[int]


def rounded(size: int) -> int:
    """A size in bytes such that what follows starts well."""
    return -(-size // 128) * 128


class Scratch:
    """Memory that the launches of one program alone use. All of it lies in one piece, made anew in each run."""

    def __init__(self, device: torch.device) -> None:
        self.memory, self.used = Operand(OWN, (0,), (1,), torch.uint8, device), 0

    def part(self, shape: Size, dtype: torch.dtype) -> Operand:
        """A contiguous operand in memory that no other part has."""
        found = self.memory.part(shape, dtype, self.used)
        self.used += rounded(found.nbytes)
        return found


def pdl(chip: Chip, rows: int) -> int:
    """Programmatic dependent launch (Hopper and later): a kernel is set up while the one ahead of it in the stream
    ends, and waits for it on the device. 0: not; 1: so; 2: already while that one runs, which pays for short kernels.
    """
    if not chip.has_tma or INTERPRETED:
        return 0
    return 2 if rows <= 2048 else 1


@cache
def _signature(kernel: Any) -> tuple[list[str], list[str]]:
    """The names of what a kernel takes at run time and of its constants, in order."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    constants = [p.name for p in parameters if p.annotation is tl.constexpr]
    return [p.name for p in parameters if p.name not in constants], constants


def launch(
    kernel: Any, grid: Size, options: dict[str, int], like: Operand, *, short: Any = False, **given: Any
) -> Launch:
    """A launch of ``kernel``, whose arguments are all given by name, but for the constant PDL, which follows from
    ``like``: a matrix that is read, on its device, by whose rows we know how long the kernel takes, but for one that
    is ``short`` in any case.

    In a kernel's signature operands and numbers come first (None stays None), then integers, which belong to the
    problem, then constants.
    """
    at_run_time, constants = _signature(kernel)
    early = pdl(Chip.of(like.device), 0 if short else like.shape[0])
    given["PDL"] = early
    if wrong := given.keys() ^ {*at_run_time, *constants}:
        raise TypeError(f"{kernel.fn.__name__}: missing or unknown arguments {', '.join(sorted(wrong))}")
    args: list[int | View | None] = []
    blocks: dict[int, Block] = {}
    ints: list[int] = []
    for name in at_run_time:
        value = given[name]
        if isinstance(value, int):
            ints.append(value)
            continue
        if ints:
            raise TypeError(f"{kernel.fn.__name__}: {name} comes after integers")
        if isinstance(value, Tiles):
            blocks[len(args)] = Block(value.of.shape, value.of.strides, value.tile)
            value = value.of
        args.append(None if value is None else value.place)
    # Fused multiply-adds are Triton's default, which it says will change; no exact result rests on them.
    options = {**options, "enable_fp_fusion": True, **({"launch_pdl": True} if early else {})}
    given = {name: given[name] for name in constants}
    return Launch(kernel, (*grid, 1, 1)[:3], tuple(args), blocks, tuple(ints), given, options, like.device.index)


def operand(place: int, value: Any) -> Any:
    """What stands for an argument of a program, at this place among them, while the program is made."""
    if isinstance(value, torch.Tensor):
        return Operand.of(place, value)
    return Number(place) if type(value) in (int, float) else value


def as_scaling(scaling: float | torch.Tensor) -> float | torch.Tensor:
    """A tensor as it is, a number as a float: Triton compiles some integers in."""
    return scaling if isinstance(scaling, torch.Tensor) else float(scaling)


_programs = Memo()


def run(make: Callable[..., Launch | list[Launch]], /, **given: Any) -> None:
    """Launch what ``make`` gives for these tensors and numbers, given by name, some perhaps in a tuple, and for flags,
    which it gets as they are. The first is a tensor in the dtype of the products. The program is kept for calls that
    are alike."""
    values = _flat(given)
    tf32 = values[0].dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    key = make, tf32, *given, *map(kind, values)
    found = _programs.get(key)
    if found is None:
        found = _programs.keep(key, program(make, **given))
    found(*values)


def _flat(given: dict[str, Any]) -> list[Any]:
    return [v for value in given.values() for v in (value if isinstance(value, tuple) else (value,))]


def kind(value: Any) -> Any:
    """What of an argument launches depend on: not on a number, nor on where in memory a tensor lies, but for its start
    (modulo 16)."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16, value.device
    return type(value) if type(value) in (int, float) else value


def program(make: Callable[..., Launch | list[Launch]], /, **given: Any) -> Program:
    """The program that ``run`` makes, whose arguments are the values given, in their order."""
    places = itertools.count()
    stand_ins: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            stand_ins[name] = type(value)._make(operand(next(places), v) for v in value)  # type: ignore[attr-defined]
        else:
            stand_ins[name] = operand(next(places), value)
    made = make(**stand_ins)
    return Program(next(places), made if isinstance(made, list) else [made])
