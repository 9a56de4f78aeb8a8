"""How kernels are started: choices made once per problem, and a launch that costs the host microseconds.

Triton's own launch looks the kernel up, re-encodes every tensor descriptor and walks over every constant in Python: 40
to 130 us a kernel, more than small problems take on the GPU. A :class:`Program` of :class:`Plan` s remembers the
compiled kernels and their arguments; later launches put addresses among them and call Triton's C function
(``launchers.py``), or where that is not known the compiled kernel, which still need not be looked up.
"""

import copy
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple, Self

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import lora_fast.kernels.launchers as launchers
from lora_fast.kernels.launchers import INTERPRETED
from lora_fast.kernels.tiles import arch


def pdl(device: torch.device, rows: int) -> int:
    """Programmatic dependent launch (Hopper and later): a kernel is set up while the one ahead of it in the stream
    ends, and waits for it on the device. 0: not; 1: so; 2: already while that one runs, which pays for short kernels.
    """
    if device.type != "cuda" or arch(device) < 90 or INTERPRETED:
        return 0
    return 2 if rows <= 2048 else 1


def sig(t: torch.Tensor | None) -> tuple | None:
    """What of a tensor a plan depends on."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16, t.device)


def places(args: tuple) -> tuple | None:
    """Where the tensors among these start if not all do at multiples of 16 bytes: plans depend on that."""
    found = tuple(arg.data_ptr() % 16 for arg in args if isinstance(arg, torch.Tensor))
    return found if any(found) else None


def as_scaling(scaling: float | torch.Tensor) -> float | torch.Tensor:
    """A tensor as it is, a number as a float: Triton compiles some integers in."""
    return scaling if isinstance(scaling, torch.Tensor) else float(scaling)


def scaling_kind(scaling: float | torch.Tensor) -> tuple | None:
    """What of a scaling a plan depends on: not the number."""
    return (scaling.dtype, scaling.data_ptr() % 16) if isinstance(scaling, torch.Tensor) else None


class Block(NamedTuple):
    """A matrix that a kernel reads or writes through a tensor descriptor, in tiles."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    tile: list[int]

    @classmethod
    def of(cls, t: torch.Tensor, tile: list[int]) -> Self:
        return cls(tuple(t.shape), t.stride(), tile)


class Plan:
    """A launch of ``kernel`` on ``grid`` with these constants (by name, in the kernel's order, which ends with PDL) and
    compile options, on the device of the matrix ``like``, whose rows say how long it takes.

    Called with the tensors and numbers that come first in the kernel's signature; ``ints``, which never change under
    one plan, follow them. ``blocks`` says which of the arguments, by position, the kernel takes as descriptors. A plan
    must be kept under a key that holds all that it depends on (``plan_for``).
    """

    def __init__(self, kernel, grid, constants: dict, options: dict, like: torch.Tensor, ints=(), blocks=None):
        device, early = like.device, pdl(like.device, like.shape[0])
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], {**constants, "PDL": early}
        # Fused multiply-adds are Triton's default, which it says will change; no exact result rests on them.
        self.options = {**options, "enable_fp_fusion": True, **({"launch_pdl": True} if early else {})}
        self.device, self.ints = device.index, tuple(ints)
        self.blocks: dict[int, Block] = blocks or {}
        self.alone: Program | None = None
        self.descriptors: dict[int, TensorDescriptor] = {}

    def __call__(self, *args) -> None:
        if self.alone is None:
            self.alone = Program(len(args), [(self, tuple(range(len(args))))])
        self.alone(*args)

    def launch(self, args: list):
        """Through Triton, which compiles the kernel if it must; returns what it compiled."""
        return self.kernel[self.grid](*map(self._given, range(len(args)), args), *self.ints, **self.constants,
                                      **self.options)  # fmt: skip

    def launch_again(self, compiled, args: list) -> None:
        """What :meth:`launch` returned, past the look-up of the kernel; constants keep the others' places alone."""
        compiled[self.grid](*map(self._given, range(len(args)), args), *self.ints, *self.constants.values())

    def _given(self, at: int, arg):
        """An argument as Triton takes it."""
        block = self.blocks.get(at)
        if block is None:
            return arg
        if (checked := self.descriptors.get(at)) is None:
            checked = TensorDescriptor(arg, list(block.shape), list(block.strides), block.tile)
            self.descriptors[at] = copy.copy(checked)
            self.descriptors[at].base = None  # holds no tensor
            return checked
        descriptor = copy.copy(checked)
        descriptor.base = arg
        return descriptor


Steps = list[tuple[Plan, tuple]]  # each plan with its arguments, or with what they are in a program


def launch(steps: Steps) -> None:
    for plan, args in steps:
        plan(*args)


class View(NamedTuple):
    """``size`` bytes in the memory of a program's argument, which is contiguous, as numbers of this dtype."""

    arg: int
    start: int  # in bytes
    size: int
    dtype: torch.dtype

    def of(self, args: tuple) -> torch.Tensor:
        return args[self.arg].view(-1).view(torch.uint8)[self.start : self.start + self.size].view(self.dtype)


class Bound(NamedTuple):
    """A program's arguments as its launches take them."""

    launches: list[tuple] | None  # None: Triton launches, and the values are tensors and numbers
    values: list
    own: torch.Tensor | None  # memory among the values


class Program:
    """Launches in their order over the same ``n`` arguments, tensors and numbers. Each launch comes with what its
    plan's arguments are: places in the program's arguments, or views into the memory of one; None stays None.

    Once Triton has launched each plan, what is left is to take every tensor's address once and to call Triton's C
    launchers.

    ``aligned``: its plans hold for tensors that all start at multiples of 16 bytes, and for no others. ``own``: so many
    bytes are the program's last argument, which no caller gives: memory that its launches alone use.
    """

    def __init__(self, n: int, steps: Steps, aligned: bool = False, own: int | None = None) -> None:
        self.n, self.plans, self.aligned, self.own = n, [plan for plan, _ in steps], aligned, own
        self.views = list(dict.fromkeys(arg for _, args in steps for arg in args if isinstance(arg, View)))
        place: dict[int | View | None, int] = {view: n + i for i, view in enumerate(self.views)}
        place[None] = n + len(self.views)
        self.places = [[arg if isinstance(arg, int) else place[arg] for arg in args] for _, args in steps]
        self.compiled: list = [None] * len(steps)
        self.direct: list[launchers.Launch] | None = None

    def __call__(self, *args) -> None:
        bound = self.bind(*args)
        assert bound is not None
        self.run(bound)

    def bind(self, *args) -> Bound | None:
        """The arguments, of which the first is a tensor, as the launches take them; None where the plans do not hold
        for where they start."""
        own = None
        if self.own is not None:
            if self.own:
                own = args[0].new_empty(self.own, dtype=torch.uint8)
            args = *args, own
        values = list(args)
        if self.direct is None:
            if self.aligned and places(args) is not None:
                return None
            return Bound(None, [*values, *(view.of(args) for view in self.views), None], own)
        bits = 0
        for i in self.tensors:
            values[i] = address = values[i].data_ptr()
            bits |= address
        if bits % 16 and self.aligned:
            return None
        for i, start in self.starts:
            values.append(values[i] + start)
        values.append(None)
        for i, maps in self.maps:
            values.append(maps.known.get(values[i]) or maps.encode(values[i]))
        values += self.fixed
        return Bound(self.direct, values, own)

    def run(self, bound: Bound, first: int = 0, last: int | None = None) -> None:
        """Launch these of the steps, all but the last for ``last=-1``, on the device's current stream."""
        launches, values, _ = bound
        if launches is not None:
            self.start(launches[first:last], values, self.stream(self.device))
            return
        for i in range(len(self.plans))[first:last]:
            plan, args = self.plans[i], [values[place] for place in self.places[i]]
            if self.compiled[i] is None:
                self.compiled[i] = plan.launch(args)
            else:
                plan.launch_again(self.compiled[i], args)
        if self.direct is None and None not in self.compiled and (form := launchers.known()) is not None:
            if all(map(launchers.is_plain, self.compiled)):
                self._call_directly(form, values)

    def _call_directly(self, form: launchers.Form, values: list) -> None:
        """From now on. Values are then the arguments, addresses of views, None, tensor maps, and what never changes."""
        self.start, self.stream = form.start, triton.runtime.driver.active.get_current_stream
        self.device = self.plans[0].device
        self.tensors = [i for i, value in enumerate(values[: self.n]) if isinstance(value, torch.Tensor)]
        self.starts = [(view.arg, view.start) for view in self.views]
        self.maps: list[tuple[int, _Maps]] = []
        self.fixed: list[int] = []
        first_map = self.n + len(self.views) + 1
        first_fixed = first_map + sum(len(plan.blocks) for plan in self.plans)
        direct = []
        for plan, places, compiled in zip(self.plans, self.places, self.compiled, strict=True):
            remaining, picked = iter(compiled.metadata.tensordesc_meta or ()), []
            for at, place in enumerate(places):
                if at not in plan.blocks:
                    picked.append(place)
                    continue
                block = plan.blocks[at]
                picked.append(first_map + len(self.maps))
                self.maps.append((place, _Maps(form.encode, next(remaining), block)))
                for number in (*block.shape, *block.strides):
                    picked.append(first_fixed + len(self.fixed))
                    self.fixed.append(number)
            start, head, tail = form.prepare(compiled, len(plan.constants))
            direct.append((start, plan.grid, head, itemgetter(*picked), (*plan.ints, *tail)))
        self.direct = direct


class _Maps:
    """Tensor maps of one descriptor, encoded once per address that it was seen at."""

    def __init__(self, encode: str, meta: dict, block: Block) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        self.encoder = encode
        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        self.before = meta["swizzle"], meta["elem_size"], kind, meta["block_size"]
        self.after = list(block.shape), list(block.strides), 0
        self.known: dict[int, object] = {}

    def encode(self, address: int) -> object:
        """The map of a new address."""
        if len(self.known) >= 1024:
            self.known.clear()
        encode = getattr(triton.runtime.driver.active.utils, self.encoder)
        found = self.known[address] = encode(address, *self.before, *self.after)
        return found


_plans: dict[tuple, Plan] = {}


def plan_for(key: tuple, make: Callable, *args):
    """What is kept under ``key`` (a plan, or several), or else ``make(*args)``, kept from now on."""
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:  # batch sizes that never repeat; the compiled kernels stay in Triton's cache
            _plans.clear()
        plan = _plans[key] = make(*args)
    return plan
