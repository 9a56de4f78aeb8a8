"""Kernels that are started together: choices made once per problem, and a launch that costs the host microseconds.

Triton's own launch looks the kernel up, re-encodes every tensor descriptor and walks over every constant in Python: 40
to 130 us a kernel, more than small problems take on the GPU. A :class:`Program` of :class:`Launch` es, which
``operands.py`` makes, remembers the compiled kernels and their arguments; later runs put addresses among them and call
Triton's C function (``launchers.py``), or where that is not known the compiled kernel, which still need not be looked
up.
"""

import copy
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import lora_fast.kernels.launchers as launchers
from lora_fast.kernels.memo import forget_all
from lora_fast.kernels.memory import allocator

OWN = -1  # stands for the argument of a program that is memory for its launches alone


def starts(args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Where the tensors among these start if not all do at multiples of 16 bytes: launches depend on that."""
    found = tuple(arg.data_ptr() % 16 for arg in args if isinstance(arg, torch.Tensor))
    return found if any(found) else None


class View(NamedTuple):
    """``size`` bytes in the memory of a program's argument, which is contiguous, as numbers of this dtype."""

    arg: int
    start: int  # in bytes
    size: int
    dtype: torch.dtype

    def of(self, args: tuple[Any, ...]) -> torch.Tensor:
        return args[self.arg].view(-1).view(torch.uint8)[self.start : self.start + self.size].view(self.dtype)


class Block(NamedTuple):
    """A matrix that a kernel reads or writes through a tensor descriptor, in tiles."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    tile: list[int]


@dataclass(eq=False)
class Launch:
    """One launch in a program: a kernel, its grid, and all its arguments."""

    kernel: Any
    grid: tuple[int, ...]  # of three
    args: tuple[int | View | None, ...]  # its tensors and numbers: which of the program's they are
    blocks: dict[int, Block]  # which of them, by position, it takes as descriptors
    ints: tuple[int, ...]  # follow in its signature, and never change
    constants: dict[str, Any]  # follow these
    options: dict[str, Any]  # for the compiler
    device: int | None
    late: bool = False  # makes nothing that the backward reads
    descriptors: dict[int, TensorDescriptor] = field(default_factory=dict)

    def start(self, args: list[Any]) -> Any:
        """Through Triton, which compiles the kernel if it must; returns what it compiled."""
        return self.kernel[self.grid](
            *map(self._given, range(len(args)), args), *self.ints, **self.constants, **self.options
        )

    def start_again(self, compiled: Any, args: list[Any]) -> None:
        """What :meth:`start` returned, past the look-up of the kernel; constants keep the others' places alone."""
        compiled[self.grid](*map(self._given, range(len(args)), args), *self.ints, *self.constants.values())

    def _given(self, at: int, arg: Any) -> Any:
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


class Bound(NamedTuple):
    """A program's arguments as its launches take them."""

    launches: list[tuple[Any, ...]] | None  # None: Triton launches, and the values are tensors and numbers
    values: list[Any]
    held: tuple[Any, ...]  # what addresses among the values are of: launches that wait need it as it is


class Program:
    """Launches in their order over the same ``n`` arguments, tensors and numbers. What a launch takes are places among
    them, or views into the memory of one; None stays None.

    Once Triton has launched each kernel, what is left is to take every tensor's address once and to call Triton's C
    launchers.

    ``aligned``: its launches hold for tensors that all start at multiples of 16 bytes, and for no others. Views into
    ``OWN`` lie in memory that each run makes anew, and that no caller gives.
    """

    stale = False  # to be made anew, for what its launches rest on has changed

    def __init__(self, n: int, launches: list[Launch], aligned: bool = False) -> None:
        _programs.add(self)
        self.launches, self.aligned = launches, aligned
        early = [i for i, launch in enumerate(launches, 1) if not launch.late]
        self.late = len(launches) - max(early, default=0)  # how many of them, at the end, can wait
        views = dict.fromkeys(arg for launch in launches for arg in launch.args if isinstance(arg, View))
        self.own = max((view.start + view.size for view in views if view.arg == OWN), default=None)  # bytes
        self.n = n if self.own is None else n + 1
        self.views = [view._replace(arg=n) if view.arg == OWN else view for view in views]
        place: dict[View | None, int] = {view: self.n + i for i, view in enumerate(views)}
        place[None] = self.n + len(views)
        self.places = [[arg if isinstance(arg, int) else place[arg] for arg in launch.args] for launch in launches]
        self.compiled: list[Any] = [None] * len(launches)
        self.direct: list[launchers.Launch] | None = None

    def __call__(self, *args: Any) -> None:
        bound = Program.bind(self, *args)  # stale or not: whoever holds it wants it
        assert bound is not None
        self.run(bound)

    def bind(self, *args: Any) -> Bound | None:
        """The arguments, of which the first is a tensor, as the launches take them; None where the launches do not
        hold for where they start."""
        if self.own is not None:
            own = allocator(args[0])(self.own, dtype=torch.uint8)
            args = *args, own
        values = list(args)
        if self.direct is None:
            if self.aligned and starts(args) is not None:
                return None
            return Bound(None, [*values, *(view.of(args) for view in self.views), None], args)
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
        return Bound(self.direct, values, args)

    def run(self, bound: Bound, first: int = 0, last: int | None = None) -> None:
        """Launch these of the steps, all but the last for ``last=-1``, on the device's current stream."""
        launches, values, _ = bound
        if launches is not None:
            self.start(launches[first:last], values, self.stream(self.device))
            return
        for i in range(len(self.launches))[first:last]:
            launch, args = self.launches[i], [values[place] for place in self.places[i]]
            if self.compiled[i] is None:
                self.compiled[i] = launch.start(args)
            else:
                launch.start_again(self.compiled[i], args)
        if self.direct is None and None not in self.compiled and (form := launchers.known()) is not None:
            if all(map(launchers.is_plain, self.compiled)):
                self._call_directly(form, values)

    def _call_directly(self, form: launchers.Form, values: list[Any]) -> None:
        """From now on. Values are then the arguments, addresses of views, None, tensor maps, and what never changes."""
        self.start, self.stream = form.start, triton.runtime.driver.active.get_current_stream
        self.device = self.launches[0].device
        self.tensors = [i for i, value in enumerate(values[: self.n]) if isinstance(value, torch.Tensor)]
        self.starts = [(view.arg, view.start) for view in self.views]
        self.maps: list[tuple[int, _Maps]] = []
        self.fixed: list[int] = []
        first_map = self.n + len(self.views) + 1
        first_fixed = first_map + sum(len(launch.blocks) for launch in self.launches)
        direct = []
        for launch, places, compiled in zip(self.launches, self.places, self.compiled, strict=True):
            remaining, picked = iter(compiled.metadata.tensordesc_meta or ()), []
            for at, place in enumerate(places):
                if at not in launch.blocks:
                    picked.append(place)
                    continue
                block = launch.blocks[at]
                picked.append(first_map + len(self.maps))
                self.maps.append((place, _Maps(form.encode, next(remaining), block)))
                for number in (*block.shape, *block.strides):
                    picked.append(first_fixed + len(self.fixed))
                    self.fixed.append(number)
            start, head, tail = form.prepare(compiled, len(launch.constants))
            direct.append((start, launch.grid, head, itemgetter(*picked), (*launch.ints, *tail)))
        self.direct = direct


_programs: WeakSet[Program] = WeakSet()  # all that there are


def forget_programs() -> None:
    """Something that launches rest on without having it in their keys has changed: no layer binds a program again that
    is there now."""
    forget_all()
    for program in list(_programs):
        program.stale = True
        program.bind = lambda *args: None  # type: ignore[method-assign]  # costs a step nothing


class _Maps:
    """Tensor maps of one descriptor, encoded once per address that it was seen at."""

    def __init__(self, encode: str, meta: dict[str, Any], block: Block) -> None:
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
