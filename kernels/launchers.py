"""What is known of Triton's launchers, version by version: how to call the C function in each that starts a kernel.

A launcher is known by a digest of the source that stands between a compiled kernel and the CUDA driver, not by a
version's name: so a release that leaves it as it is keeps the direct launch, and one that changes it is seen. To add a
version: run the GPU tests with it, then put its ``digest()`` and its form into ``KNOWN``.
"""

import ast
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

INTERPRETED = triton.knobs.runtime.interpret
# What of Triton's source the digest covers, where it is there: in its files driver.py, and in its driver.c.
PYTHON = {
    "CudaLauncher",
    "make_launcher",
    "annotate_arguments",
    "make_kernel_signature",
    "expand_signature",
    "decompose_descriptor",
    "wrap_handle_tensordesc",
    "wrap_handle_tensordesc_impl",
    "make_tensordesc_arg",
    "TMA_DTYPE_DEVICE_TO_HOST",
}
C = ("launchKernel", "_launch", "extractArgs", "extractPointer", "fillTMADescriptor", "fillTMADescriptorTiled")

Launch = tuple[Any, ...]  # what a form makes of a compiled kernel, see ``Form.prepare``


class Form(NamedTuple):
    """How a launcher takes its arguments.

    ``prepare(compiled kernel, number of its constants)`` gives (function, head, tail): what never changes.
    ``start(launches, values, stream)`` starts kernels, each (function, grid, head, pick, tail): ``pick(values)`` are
    the arguments in their order, a descriptor as a tensor map, its shape and its strides.
    ``encode``: the name of the driver's function that makes a tensor map.
    """

    prepare: Callable[[Any, int], Launch]
    start: Callable[[Sequence[Launch], list[Any], int], None]
    encode: str


def _prepare_flat(kernel: Any, constants: int) -> Launch:
    start, metadata = kernel.run.launch, kernel.metadata
    if metadata.tensordesc_meta:  # without the wrapper that encodes every descriptor again
        start = inspect.getclosurevars(start).nonlocals["launcher"]
    # The function, whether its grid is cooperative, the two scratch memories, metadata, and no hooks.
    head = kernel.function, False, metadata.launch_pdl, None, None, kernel.packed_metadata, None, None, None
    return start, head, (None,) * constants


def _start_flat(launches: Sequence[Launch], values: list[Any], stream: int) -> None:
    for start, grid, head, pick, tail in launches:
        start(*grid, stream, *head, *pick(values), *tail)


def _prepare_packed(kernel: Any, constants: int) -> Launch:
    run = kernel.run
    head = (
        kernel.function,
        False,
        kernel.metadata.launch_pdl,
        kernel.packed_metadata,
        None,
        None,
        None,
        None,
        None,
        run.arg_annotations[: len(run.arg_annotations) - constants],
        run.kernel_signature,
    )
    return triton.runtime.driver.active.utils.launch, head, ()


def _start_packed(launches: Sequence[Launch], values: list[Any], stream: int) -> None:
    for start, grid, head, pick, tail in launches:
        start(*grid, stream, *head, (*pick(values), *tail))


FLAT = Form(_prepare_flat, _start_flat, "fill_tma_descriptor")  # compiled for each signature; takes each argument
PACKED = Form(_prepare_packed, _start_packed, "fill_tma_descriptor_tiled")  # one for all; takes them as one tuple

KNOWN = {
    "67ea2b82a4e5caa4": ("3.6", FLAT),
    "bf1d759ce2d93b1d": ("3.7", PACKED),
    "5a333facce44c250": ("3.8", PACKED),
    "c13596ee97c51e55": ("3.9", PACKED),
}


def digest(backends: Path | None = None) -> str:
    """Of the launcher in Triton's folder ``backends``; the installed one's by default."""
    backends = backends or Path(triton.__file__).parent / "backends"
    found = [part for path in (backends / "driver.py", backends / "nvidia" / "driver.py") for part in _python(path)]
    text = (backends / "nvidia" / "driver.c").read_text(encoding="utf-8")
    for name in C:
        function = re.search(rf"^[\w *]*\b{name}\([^;{{]*\{{.*?^\}}", text, re.MULTILINE | re.DOTALL)
        found.append(function.group() if function else "")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _python(path: Path) -> Iterator[str]:
    """The source of the functions and classes among ``PYTHON``, and of what is assigned to such a name."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = {ast.unparse(target).partition("[")[0] for target in targets} | {getattr(node, "name", "")}
        if names & PYTHON:
            yield ast.get_source_segment(text, node) or ""


@cache
def known() -> Form | None:
    """The form of the installed Triton's launcher; None where it is not known, and in the interpreter."""
    return None if INTERPRETED else KNOWN.get(digest(), (None, None))[1]


def is_plain(kernel: Any) -> bool:
    """Whether a launch of the compiled kernel needs no memory of its own, as one with a sanitizer compiled in does."""
    return not any(getattr(kernel.metadata, name, 0) for name in ("global_scratch_size", "profile_scratch_size"))


def why_not_direct() -> str | None:
    """Why kernels are launched through Triton's own path, in words; None where they are not, and in the interpreter."""
    if INTERPRETED or known() is not None:
        return None
    versions = ", ".join(versions for versions, _ in KNOWN.values())
    return (
        f"the launcher of Triton {triton.__version__} is not known (those of {versions} are), so a launch goes through "
        "Triton's own: about three times the host's time"
    )
