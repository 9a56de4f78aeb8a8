"""How kernels are started: choices made once per problem, and a launch that costs the host microseconds.

Triton's own launch looks the kernel up, re-encodes every tensor descriptor and walks over every constant in Python: 80
to 130 us a kernel on a slow host, more than small problems take on the GPU. A :class:`Plan` remembers the compiled
kernel and its argument block; a later launch writes a few pointers into it and calls the driver, in 20 to 25 us there.
"""

import ctypes
import threading
from collections.abc import Callable

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.kernels.tiles import arch

INTERPRETED = triton.knobs.runtime.interpret
# Where the order of a compiled kernel's parameters was checked on a GPU. Elsewhere Triton launches.
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
    return None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)


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


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


class _Direct:
    """The argument block of a compiled kernel and the driver call that starts it (``cuLaunchKernelEx``).

    The block lists the arguments that were not compiled in, a descriptor as its 128-byte tensor map followed by its
    shape (int32) and strides (int64), then two scratch pointers.
    """

    KINDS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

    def __init__(self, compiled, plan: Plan, args: tuple) -> None:
        types = list(compiled.src.signature.values())
        metas = iter(compiled.metadata.tensordesc_meta or ())
        slots: list = []
        self.pointers, self.numbers, self.maps = [], [], []
        fixed = len(args) - len(plan.ints)
        for i, (value, kind) in enumerate(zip(args, types, strict=False)):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                slots.append(ctypes.c_uint64(value.data_ptr()))
                self.pointers.append((i, slots[-1]))
            elif kind.startswith("tensordesc"):
                self.maps.append((i, len(slots), _Maps(next(metas), value)))
                slots.append(None)
                slots += [ctypes.c_int32(n) for n in value.shape] + [ctypes.c_int64(n) for n in value.stride()]
            else:
                slots.append(self.KINDS[kind](value))
                if i < fixed:
                    self.numbers.append((i, slots[-1]))
        slots += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
        self.slots = slots
        self.params = (ctypes.c_void_p * len(slots))(*(None if s is None else ctypes.addressof(s) for s in slots))
        self.config = _Config(*plan.grid, 32 * compiled.metadata.num_warps, 1, 1, compiled.metadata.shared)
        if compiled.metadata.launch_pdl:
            self.attribute = _Attribute(self.SERIALIZATION, 0, 1)
            self.config.attributes, self.config.n_attributes = ctypes.pointer(self.attribute), 1
        self.config_ref, self.function = ctypes.byref(self.config), ctypes.c_void_p(compiled.function)
        self.compiled = compiled  # keeps the function loaded
        self.stream, self.device = triton.runtime.driver.active.get_current_stream, plan.device
        self.start = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self.lock = threading.Lock()  # a backward pass launches from a thread of its own

    def __call__(self, args: tuple) -> None:
        with self.lock:
            for i, slot in self.pointers:
                slot.value = args[i].data_ptr()
            for i, slot in self.numbers:
                slot.value = args[i]
            for i, at, maps in self.maps:
                self.params[at] = maps.address(args[i].data_ptr())
            self.config.stream = self.stream(self.device)
            error = self.start(self.config_ref, self.function, self.params, None)
        if error:
            raise RuntimeError(f"CUDA error {error} when launching {self.compiled.name}")


class _Maps:
    """Tensor maps of one descriptor argument, encoded once per address that it was seen at."""

    HEADER = 128  # a tensor map's place in the Python object that Triton's encoder returns

    def __init__(self, meta: dict, t: torch.Tensor) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        self.before = meta["swizzle"], meta["elem_size"], kind, meta["block_size"]
        self.after = list(t.shape), list(t.stride()), 0
        self.known: dict[int, object] = {}

    def address(self, pointer: int) -> int:
        found = self.known.get(pointer)
        if found is None:
            if len(self.known) >= 1024:
                self.known.clear()
            encode = triton.runtime.driver.active.utils.fill_tma_descriptor
            found = self.known[pointer] = encode(pointer, *self.before, *self.after)
        return id(found) + self.HEADER


_plans: dict[tuple, Plan] = {}


def plan_for(key: tuple, make: Callable, *args):
    """What is kept under ``key`` (a plan, or several), or else ``make(*args)``, kept from now on."""
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:  # batch sizes that never repeat; the compiled kernels stay in Triton's cache
            _plans.clear()
        plan = _plans[key] = make(*args)
    return plan
