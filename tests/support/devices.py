"""Where the tests run: on a GPU where there is one, else the kernels in Triton's interpreter."""

import importlib.util
import os
from contextlib import contextmanager

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it is read when a kernel is defined
TRITON = importlib.util.find_spec("triton") is not None
if TRITON and not GPU:
    import interpreter

    interpreter.quicken()

CPU = pytest.param("cpu", marks=pytest.mark.interpreted)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

# (backend, device) of every way that an operator can run, and its marks.
PATHS: list = [
    ("reference", "cpu", ()),
    ("reference", "cuda", pytest.mark.gpu),
    ("triton", "cpu", pytest.mark.interpreted),
    ("triton", "cuda", pytest.mark.gpu),
]


@contextmanager
def saving():
    """The tensors that are saved for a backward within."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yield saved
