"""What a layer keeps in evaluation: DoRA's norm, and what else its forward makes of the weights alone.

It holds as long as the tensors that it was made of are there and unchanged, as far as torch counts changes: what is
written into the ``data`` of a tensor is not counted, but on the CPU, where the adapter is compared.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

PLAIN = (torch.Tensor, nn.Parameter)
_steps = 0  # of all optimizers: those that are fused change a tensor without counting its version up


_expired = torch.UntypedStorage._expired


class Mark(NamedTuple):
    """A tensor as it was. While its storage is referred to weakly no other one gets its number, though perhaps its
    memory."""

    tensor: Callable[[], Any]  # None once it is gone
    version: int
    start: int
    number: int
    storage: StorageWeakRef

    @classmethod
    def of(cls, t: torch.Tensor) -> "Mark":
        storage = StorageWeakRef(t.untyped_storage())
        return cls(ref(t), t._version, t.data_ptr(), storage.cdata, storage)


class Sources(NamedTuple):
    """The tensors that something was made of, as they were then."""

    marks: list[Mark]
    steps: int
    adapter: list[tuple[int, torch.Tensor]]  # those of its tensors that are on the CPU, where a look takes no waiting

    @classmethod
    def of(cls, tensors: Sequence[Any], first: int) -> "Sources | None":
        """From the ``first`` on they are the adapter's. None where nobody would know of a change."""
        if torch._C._are_functorch_transforms_active():
            return None
        if any(type(t) not in PLAIN or t.is_inference() or t.is_meta for t in tensors):
            return None
        _count_steps()
        adapter = [(i, t.detach().clone()) for i, t in enumerate(tensors) if i >= first and t.device.type == "cpu"]
        return cls([Mark.of(t) for t in tensors], _steps, adapter)

    def are(self, tensors: Sequence[Any]) -> bool:
        """Whether these are the same tensors, unchanged. The host waits for this in every forward."""
        marks = self.marks
        if self.steps != _steps or len(marks) != len(tensors):
            return False
        for t, (known, version, start, number, _) in zip(tensors, marks, strict=True):
            if t is not known() or t._version != version or t.data_ptr() != start or _expired(number):
                return False
        return not self.adapter or all(torch.equal(value, tensors[i]) for i, value in self.adapter)


class Found(NamedTuple):
    """What is kept."""

    value: torch.Tensor
    sources: Sources
    scaling: float
    how: tuple[Any, ...]  # what else it depends on
    stream: int | None  # on which it was made, and may be read


class Kept:
    """Keeps what is made of a layer's weights from one forward without gradients to the next, as long as it holds.

    It is used on the CUDA stream that it was made on. While a graph is captured it is neither made nor used, for the
    graph's replays would not see the weights change; with ``in_graphs``, for weights that do not, graphs use what is
    there, and its memory then stays for as long as this object does. Copies and pickles start without.
    """

    in_graphs = False

    def __init__(self) -> None:
        self.found: Found | None = None
        self.captured: list[torch.Tensor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def drop(self) -> None:
        self.found = None

    def get(
        self,
        held: Sequence[Any],
        adapter: Sequence[Any],
        scaling: Any,
        how: tuple[Any, ...],
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor | None:
        """What is kept if it was made of these tensors, the base's and the adapter's, as they are, else a new one; None
        where nothing may be kept."""
        tensors = *held, *adapter
        captures = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if (captures and not self.in_graphs) or isinstance(scaling, torch.Tensor):
            return None
        found = self.found  # once: another thread may put another in its place
        if found is not None and found.how == how and found.scaling == scaling and found.sources.are(tensors):
            if captures:
                if all(t is not found.value for t in self.captured):
                    self.captured.append(found.value)
                return found.value
            if found.stream is None or found.stream == _stream(tensors[0]):
                return found.value
        if captures or (sources := Sources.of(tensors, len(held))) is None:
            return None
        self.found = found = Found(make(), sources, scaling, how, _stream(tensors[0]))
        return found.value


def _stream(t: torch.Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(t.get_device()) if t.is_cuda else None


@cache
def _count_steps() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_count)


def _count(*_: Any) -> None:
    global _steps
    _steps += 1
