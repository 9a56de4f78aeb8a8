"""Which adapter each sample of a batch names: held for a thread, and known again where a checkpoint recomputes.

A checkpoint's second run comes in the backward, when nobody holds names any more, and in another thread. Checkpoints
that transformers' models make are therefore given functions that remember the names; in those that a model makes by
itself a layer takes the names of its last call.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

BASE = "__base__"  # PEFT's name for samples without an adapter
LAST = "_last_names"  # of a layer: the names of its last call in training, and whether those before it were others
CHECKPOINT = "_gradient_checkpointing_func"  # of a module of transformers'


def _nothing_more(module: nn.Module, names: Any) -> AbstractContextManager[Any]:
    return nullcontext()


class _Here(threading.local):
    """Of a thread: the names that hold, and whether they will where it runs again, too."""

    names: Any = None
    again = False


class Names:
    """The names that hold for a model's layers, in each thread by itself. Copies and pickles hold none."""

    def __init__(self) -> None:
        self.here = _Here()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @property
    def now(self) -> Any:
        """Those that hold in this thread, or None."""
        return self.here.names

    @contextmanager
    def holding(self, names: Any, again: bool = False) -> Iterator[None]:
        """Within, these hold in this thread; ``again``: they will where it runs again, too."""
        before = vars(self.here).copy()
        self.here.names, self.here.again = names, again
        try:
            yield
        finally:
            vars(self.here).clear()
            vars(self.here).update(before)

    @contextmanager
    def remembered(
        self, modules: Iterable[nn.Module], names: Any, also: Callable[..., Any] = _nothing_more
    ) -> Iterator[None]:
        """Checkpoints of ``modules`` that are made within, while these names hold, run again with them; and within
        ``also(module, names)``."""
        made = [
            (module, _Remembering(vars(module)[CHECKPOINT], self, names, partial(also, module, names)))
            for module in modules
            if CHECKPOINT in vars(module)
        ]
        for module, remembering in made:
            setattr(module, CHECKPOINT, remembering)
        try:
            yield
        finally:
            for module, remembering in made:
                if vars(module).get(CHECKPOINT) is remembering:  # else another thread's is around it
                    setattr(module, CHECKPOINT, remembering.checkpoint)

    def of(self, layer: nn.Module, given: Any = None) -> Any:
        """The names that a call of a layer has, or None: those it is given or that hold, or in a checkpoint's second
        run those of its first.

        Raises:
            RuntimeError: in such a run, if it is not known which of several calls it repeats.
        """
        names = self.now if given is None else given
        if is_compiling() or self.here.again:
            return names
        last: Any = vars(layer).get(LAST)
        if _recomputes():
            if names is None and last is not None:
                names, others = last
                if others:
                    raise RuntimeError(
                        "adapter_names: a checkpoint recomputes, and the model was called with other names, or with "
                        "none, too, since the last backward: call backward after each forward"
                    )
                vars(layer)[LAST] = names, None
        elif layer.training and not (names is None and last is None) and _may_run_again():
            waits = last is not None and last[1] is not None
            others = waits and (last[1] or last[0] != names)
            if names is None and not waits:
                del vars(layer)[LAST]
            else:
                vars(layer)[LAST] = names, others
        return names


def _may_run_again() -> bool:
    """Whether this may be the first run of a checkpoint, one kind of which has no gradients then, and the other hooks
    for what is saved."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@dataclass(eq=False)
class _Remembering:
    """A module's checkpoint function that lets names hold when it runs again. In a copy of the module it is the bare
    one."""

    checkpoint: Callable[..., Any]
    held: Names
    names: Any
    also: Callable[[], AbstractContextManager[Any]]  # where it recomputes

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mine = self.held.now is self.names  # and not an inner context's, or none in this thread
        return self.checkpoint(partial(self.run, function) if mine else function, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.held.holding(self.names, again=True), self.also() if _recomputes() else nullcontext():
            return function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.checkpoint,)


def _itself(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    return checkpoint


def may_checkpoint(module: nn.Module) -> bool:
    """Whether it is a module of transformers' whose parts may run under checkpoints, now or once they are enabled."""
    own = vars(module)
    return CHECKPOINT in own or "gradient_checkpointing" in own or hasattr(type(module), "gradient_checkpointing")


def _recomputes() -> bool:
    """Whether a backward is going on in this thread."""
    return torch._C._current_graph_task_id() != -1


def numbers_on(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """As a tensor on the device, where all layers find it; the host does not wait for the copy."""
    return torch.tensor(numbers, device=device) if is_compiling() else _known(numbers, device)


@lru_cache(maxsize=4096)
def _known(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        made = torch.tensor(numbers)
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


@dataclass(frozen=True)
class BatchNames:
    """An adapter's name for each sample of a batch."""

    names: tuple[str, ...]
    occur: frozenset[str] = field(init=False, compare=False)
    samples: int = field(init=False, compare=False)
    made: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        vars(self).update(occur=frozenset(self.names), samples=len(self.names))

    def which(self, there: tuple[str, ...], device: torch.device) -> torch.Tensor:
        """Each sample's place among the adapters that a layer has; -1 where it has not the sample's."""
        found = self.made.get(there)
        if found is None or found.device != device:
            place = {name: i for i, name in enumerate(there)}
            found = self.made[there] = numbers_on(tuple(place.get(name, -1) for name in self.names), device)
        return found


class Choice(Names):
    """Which adapter is active in the layers that share this, and the names that hold in its place.

    Attributes:
        changes: of the class: how often layers with a choice came to a model, or went, in all models.
    """

    changes = 0

    def __init__(self, active: str) -> None:
        super().__init__()
        self.active = active

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.active,)
