"""Options that are crossed on a GPU, and by a few cases in the interpreter, which is slow."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from devices import CPU, CUDA


def crossed(few: Iterable[Sequence[Any]], *axes: Iterable[Any]) -> list:
    """Parameters ``device, *values``: interpreted these few, on a GPU all that the axes come to."""
    here = [pytest.param("cpu", *values, marks=CPU.marks) for values in few]
    return here + [pytest.param("cuda", *values, marks=CUDA.marks) for values in product(*axes)]


def named(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")
