"""Memory that is not filled, for what a layer gives and leaves."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch._C._dynamo import guards

PLAIN = (torch.Tensor, torch.nn.Parameter)
# What the graphs that torch.compile makes take theirs by: past torch's dispatcher, in a third of new_empty's time.
_on_cuda = getattr(guards, "_empty_strided_cuda", None)
_on_cpu = getattr(guards, "_empty_strided_cpu", None)


@lru_cache(4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def allocator(like: torch.Tensor) -> Callable[..., torch.Tensor]:
    """``like.new_empty``, of sizes one by one, on the device that is the current one."""
    take, kind = _on_cuda if like.is_cuda else _on_cpu if like.is_cpu else None, like.dtype
    if take is None or type(like) not in PLAIN:
        return like.new_empty

    def new(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return take(shape, _strides(shape), dtype)

    return new
