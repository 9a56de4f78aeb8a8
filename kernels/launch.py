"""How kernels are started: choices made once per problem, and a launch that costs the host microseconds.

Triton's own launch looks the kernel up, re-encodes every tensor descriptor and walks over every constant in Python: 80
to 130 us a kernel on a slow host, more than small problems take on the GPU. A :class:`Plan` remembers the compiled
kernel and its arguments; a later launch puts a few pointers among them and calls Triton's launcher, which is C.
"""

import inspect
from collections.abc import Callable

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


def as_scaling(scaling: float | torch.Tensor) -> float | torch.Tensor:
    """A tensor as it is, a number as a float: Triton compiles some integers in."""
    return scaling if isinstance(scaling, torch.Tensor) else float(scaling)


def scaling_kind(scaling: float | torch.Tensor) -> tuple | None:
    """What of a scaling a plan depends on: not the number."""
    return (scaling.dtype, scaling.data_ptr() % 16) if isinstance(scaling, torch.Tensor) else None


class Plan:
    """A launch of ``kernel`` on ``grid`` with these constants (by name, in the kernel's order, which ends with PDL) and
    compile options, on the device of the matrix ``like``, whose rows say how long it takes.

    Called with the tensors and numbers that come first in the kernel's signature; ``ints``, which never change under
    one plan, follow them. ``blocks`` names the arguments that the kernel reads through tensor descriptors, by position,
    with the shape of their tiles. A plan must be kept under a key that holds all that it depends on (``plan_for``).
    """

    def __init__(self, kernel, grid, constants: dict, options: dict, like: torch.Tensor, ints=(), blocks=None):
        device, early = like.device, pdl(like.device, like.shape[0])
        self.kernel, self.grid, self.constants = kernel, (*grid, 1, 1)[:3], {**constants, "PDL": early}
        self.options = {**options, "launch_pdl": True} if early else options
        self.device, self.ints, self.blocks = device.index, ints, blocks or {}
        self.direct: _Direct | None = None

    def __call__(self, *args) -> None:
        if self.direct is not None:
            self.direct(args)
            return
        full = [_descriptor(a, self.blocks[i]) if i in self.blocks else a for i, a in enumerate(args)]
        compiled = self.kernel[self.grid](*full, *self.ints, **self.constants, **self.options)
        if DIRECT:
            self.direct = _Direct(compiled, self, (*args, *self.ints))


def _descriptor(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


class _Direct:
    """A compiled kernel's launcher, which Triton makes in C, without Triton's Python around it.

    It takes the launch's description, then every argument in the kernel's order, a descriptor as its tensor map
    followed by its shape and strides.
    """

    def __init__(self, compiled, plan: Plan, args: tuple) -> None:
        start = compiled.run.launch
        metas = compiled.metadata.tensordesc_meta or ()
        if metas:  # without the wrapper that encodes every descriptor again
            start = inspect.getclosurevars(start).nonlocals["launcher"]
        self.start, self.stream, self.device = start, triton.runtime.driver.active.get_current_stream, plan.device
        launch = [*plan.grid, None, compiled.function, False, compiled.metadata.launch_pdl, None, None,
                  compiled.packed_metadata, None, None, None]  # fmt: skip
        self.pointers: list[tuple[int, int]] = []  # (which argument, where in the template)
        self.numbers: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int, _Maps]] = []
        remaining = iter(metas)
        for i, value in enumerate(args):
            at = len(launch)
            launch.append(value)
            if i in plan.blocks:
                self.maps.append((i, at, _Maps(next(remaining), value)))
                launch += [*value.shape, *value.stride()]
            elif isinstance(value, torch.Tensor):
                self.pointers.append((i, at))
            elif value is not None and i < len(args) - len(plan.ints):
                self.numbers.append((i, at))
        self.template = launch + [None] * len(plan.constants)
        for _, at in (*self.pointers, *((i, at) for i, at, _ in self.maps)):
            self.template[at] = None  # keeps no tensor alive

    def __call__(self, args: tuple) -> None:
        launch = self.template.copy()
        for i, at in self.pointers:
            launch[at] = args[i].data_ptr()
        for i, at in self.numbers:
            launch[at] = args[i]
        for i, at, maps in self.maps:
            pointer = args[i].data_ptr()
            launch[at] = maps.known.get(pointer) or maps.at(pointer)
        launch[3] = self.stream(self.device)
        self.start(*launch)


class _Maps:
    """Tensor maps of one descriptor argument, encoded once per address that it was seen at."""

    def __init__(self, meta: dict, t: torch.Tensor) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        self.before = meta["swizzle"], meta["elem_size"], kind, meta["block_size"]
        self.after = list(t.shape), list(t.stride()), 0
        self.known: dict[int, object] = {}

    def at(self, pointer: int) -> object:
        """A new one."""
        if len(self.known) >= 1024:
            self.known.clear()
        encode = triton.runtime.driver.active.utils.fill_tma_descriptor
        found = self.known[pointer] = encode(pointer, *self.before, *self.after)
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
