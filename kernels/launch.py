"""How kernels are started: choices made once per problem, and a launch that costs the host microseconds.

Triton's own launch looks the kernel up, re-encodes every tensor descriptor and walks over every constant in Python: 80
to 130 us a kernel on a slow host, more than small problems take on the GPU. A :class:`Program` of :class:`Plan` s
remembers the compiled kernels and their arguments; later launches put addresses among them and call Triton's launchers,
which are C.
"""

import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple, Self

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.kernels.tiles import arch

INTERPRETED = triton.knobs.runtime.interpret
# The Triton whose launcher takes its arguments as written below, checked on a GPU. With others Triton launches.
DIRECT = not INTERPRETED and triton.__version__.startswith("3.6.")


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
        self.options = {**options, "launch_pdl": True} if early else options
        self.device, self.ints = device.index, tuple(ints)
        self.blocks: dict[int, Block] = blocks or {}
        self.alone: Program | None = None

    def __call__(self, *args) -> None:
        if self.alone is None:
            self.alone = Program(len(args), [(self, tuple(range(len(args))))])
        self.alone(*args)

    def launch(self, args: list):
        """Through Triton, which compiles the kernel if it must; returns what it compiled."""
        full = [self._descriptor(a, self.blocks[i]) if i in self.blocks else a for i, a in enumerate(args)]
        return self.kernel[self.grid](*full, *self.ints, **self.constants, **self.options)

    @staticmethod
    def _descriptor(t: torch.Tensor, block: Block) -> TensorDescriptor:
        return TensorDescriptor(t, list(block.shape), list(block.strides), block.tile)


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
        self.direct: list[tuple] | None = None

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
            stream = self.stream(self.device)
            for start, grid, head, pick, tail in launches[first:last]:
                start(*grid, stream, *head, *pick(values), *tail)
            return
        for i in range(len(self.plans))[first:last]:
            self.compiled[i] = self.plans[i].launch([values[place] for place in self.places[i]])
        if DIRECT and None not in self.compiled and self.direct is None:
            self._call_directly(values)

    def _call_directly(self, values: list) -> None:
        """From now on. Values are then the arguments, addresses of views, None, tensor maps, and what never changes."""
        self.stream, self.device = triton.runtime.driver.active.get_current_stream, self.plans[0].device
        self.tensors = [i for i, value in enumerate(values[: self.n]) if isinstance(value, torch.Tensor)]
        self.starts = [(view.arg, view.start) for view in self.views]
        self.maps: list[tuple[int, _Maps]] = []
        self.fixed: list[int] = []
        first_map = self.n + len(self.views) + 1
        first_fixed = first_map + sum(len(plan.blocks) for plan in self.plans)
        direct = []
        for plan, places, compiled in zip(self.plans, self.places, self.compiled, strict=True):
            start, metas = compiled.run.launch, compiled.metadata.tensordesc_meta or ()
            if metas:  # without the wrapper that encodes every descriptor again
                start = inspect.getclosurevars(start).nonlocals["launcher"]
            remaining, picked = iter(metas), []
            for at, place in enumerate(places):
                if at not in plan.blocks:
                    picked.append(place)
                    continue
                block = plan.blocks[at]
                picked.append(first_map + len(self.maps))
                self.maps.append((place, _Maps(next(remaining), block)))
                for number in (*block.shape, *block.strides):
                    picked.append(first_fixed + len(self.fixed))
                    self.fixed.append(number)
            head = (compiled.function, False, compiled.metadata.launch_pdl, None, None, compiled.packed_metadata,
                    None, None, None)  # fmt: skip
            tail = (*plan.ints, *(None for _ in plan.constants))
            direct.append((start, plan.grid, head, itemgetter(*picked), tail))
        self.direct = direct


class _Maps:
    """Tensor maps of one descriptor, encoded once per address that it was seen at."""

    def __init__(self, meta: dict, block: Block) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        self.before = meta["swizzle"], meta["elem_size"], kind, meta["block_size"]
        self.after = list(block.shape), list(block.strides), 0
        self.known: dict[int, object] = {}

    def encode(self, address: int) -> object:
        """The map of a new address."""
        if len(self.known) >= 1024:
            self.known.clear()
        encode = triton.runtime.driver.active.utils.fill_tma_descriptor
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
