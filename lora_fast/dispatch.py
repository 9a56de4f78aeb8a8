"""Which path an operator takes: the fused Triton kernels or the plain torch reference.

The choice rests on facts known before anything runs (device, dtype, whether Triton is there), never on a caught
exception, and whoever gets the slow path is told once, with the reason.
"""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

BACKENDS = ("auto", "triton", "reference")
_backend = "auto"
_told: set[str] = set()


class SlowPathWarning(UserWarning):
    """Given once for each reason when something runs slower than it could: an operator in plain torch instead of the
    fused kernels, a patched layer as stock PEFT's, a block layer by layer, a batch's adapters one by one."""


def set_backend(backend: str) -> None:
    """Choose the path of every operator that is called with ``backend="auto"``.

    ``"auto"``: the fused kernels where they can run, else plain torch with a :class:`SlowPathWarning`.
    ``"triton"``: the fused kernels, or a ``RuntimeError`` that says why they cannot run. With ``TRITON_INTERPRET=1`` in
    the environment before Triton is imported, they run on CPU tensors. ``"reference"``: plain torch, silently.

    Raises:
        ValueError: if ``backend`` is none of these.
    """
    global _backend
    _backend = _checked(backend)


def get_backend() -> str:
    """What :func:`set_backend` was last given; ``"auto"`` at the start."""
    return _backend


def _checked(backend: str) -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return backend


_assumed: tuple[int, int] | None = None


@contextmanager
def assume_capability(major: int, minor: int) -> Iterator[None]:
    """Within, the answers of :func:`why_not_triton`, :func:`why_not_fp8` and :func:`why_slow` are those for a GPU of
    this compute capability, wherever the tensors are. For reports: nothing may run meanwhile."""
    global _assumed
    _assumed = major, minor
    try:
        yield
    finally:
        _assumed = None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the fused kernels cannot run on such tensors, in words; None where they can."""
    if _assumed is not None:
        if _assumed < (8, 0):
            return f"{_name_of(device)} is older than compute capability 8.0"
        return _why_not_dtype(dtype)
    if device.type == "cuda" and torch.version.hip is not None:
        return "AMD GPUs (ROCm) have no fused kernels yet"
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}; the fused kernels need an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return _why_not_dtype(dtype)


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"{dtype} has no fused kernel (bfloat16, float16 and float32 have)"


def _name_of(device: torch.device) -> str:
    if _assumed is not None:
        return f"a GPU of compute capability {_assumed[0]}.{_assumed[1]}"
    return torch.cuda.get_device_name(device)


def why_not_fp8(device: torch.device) -> str | None:
    """The reason why products of e4m3 operands cannot run on a GPU, in words; None where they can, and elsewhere."""
    if _assumed is not None:
        return _why_not_fp8(device)
    if device.type != "cuda":
        return None
    if device not in _fp8:
        _fp8[device] = _why_not_fp8(device)
    return _fp8[device]


why_not_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]
_fp8: dict[torch.device, str | None] = {}


def _why_not_fp8(device: torch.device) -> str | None:
    chip, name = _assumed or torch.cuda.get_device_capability(device), _name_of(device)
    if chip < (8, 9):
        return f"{name} has no fp8 matrix units (compute capability 8.9 and later have)"
    if chip[0] == 10:
        return f"{name} has no fp8 product yet: Triton makes no tcgen05 instructions of it (8.9, 9.0 and 12.0 have one)"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose(backend: str, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> str:
    """``"triton"`` or ``"reference"`` for an operator call on ``device`` that computes in ``dtype``, perhaps over
    an fp8 weight.

    Raises:
        ValueError: unknown backend.
        RuntimeError: ``"triton"`` was asked for and cannot run, or a GPU without 8-bit matrix units was given an fp8
            weight and not asked for ``"reference"``; the message says why.
    """
    if _checked(backend) == "auto":
        backend = _backend
    if backend == "reference":
        return backend
    if fp8 and (why := why_not_fp8(device)):
        raise RuntimeError(f'{why}; backend="reference" emulates them, slowly')
    return _decide(backend, device, dtype)


def why_slow(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why operators called with ``backend="auto"`` take plain torch for such tensors, in words; None where they take
    the fused kernels."""
    if _backend == "reference":
        return 'set_backend("reference") is on'
    if _backend == "triton" and device.type == "cpu" and interpreted():
        return None
    return why_not_triton(device, dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast, if it is on, has products computed in on this device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off on this device; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_data(t: torch.Tensor) -> bool:
    """Whether the tensor has elements that one can look at: none on the meta device, none under FakeTensorMode."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # where nobody imported it, nobody uses it
    return not t.is_meta and not (fakes is not None and isinstance(t, fakes.FakeTensor))


def refuse_transforms() -> None:
    """Raise RuntimeError within a transform of torch.func, whose tensors the kernels cannot read."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the fused kernels take no transforms of torch.func (grad, vmap, jvp, ...): set_backend('reference') or "
            "backend='reference' computes in plain torch, which does"
        )


def tell(what: str, reason: str) -> None:
    """Give a :class:`SlowPathWarning`, once for each reason."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"lora_fast {what}: {reason}", SlowPathWarning, _callers_level())


# What torch.compiler.assume_constant_result does, without its import of the whole compiler: done while tracing.
tell._dynamo_marked_constant = True  # type: ignore[attr-defined]


# What stands between a user's line and a layer: the packages whose frames a warning looks past.
BETWEEN = {
    "accelerate",
    "contextlib",
    "lightning",
    "lora_fast",
    "peft",
    "pytorch_lightning",
    "torch",
    "transformers",
    "trl",
}


def _callers_level() -> int:
    """The ``stacklevel`` (for the caller of this function) of the user's line; of the outermost one where all are of
    libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    return level


_decided: dict[tuple[Any, ...], str] = {}


def _decide(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    key = (backend, device, dtype)
    if key not in _decided:
        reason = why_not_triton(device, dtype)
        if reason is None or (backend == "triton" and device.type == "cpu" and interpreted()):
            _decided[key] = "triton"
        elif backend == "triton":
            raise RuntimeError(f"backend='triton': the fused kernels cannot run here: {reason}")
        else:
            _decided[key] = "reference"
            tell("takes the plain torch path", reason)
    return _decided[key]


_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]
