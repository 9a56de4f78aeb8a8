"""What FSDP2 does to a packed weight: cuts it into shards, keeps one, makes a parameter of what it gathers of all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten
ALIGNED = 16  # bytes
SHARDING = {getattr(aten, name).default for name in ("new_empty", "new_zeros", "as_strided", "view")}
SHARDING |= {aten.split.Tensor, aten.slice.Tensor}


def sharding(func: Any, weight: Any, *args: Any) -> Any:
    """What FSDP2 needs of ``SHARDING`` over a packed weight or a shard of one; None of the rest, which gives plain
    tensors. The weight says which numbers of processes it can be cut for (``divides``), and is (``parts``).

    Raises:
        ValueError: another number of processes.
    """
    if func not in SHARDING:
        return None
    (n, k), shard = weight.shape, not weight.WHOLE
    if func is aten.split.Tensor and not shard and args[1:] in ((), (0,)):
        if n % args[0] or not weight.divides(n // args[0]):
            raise ValueError(_refusal(weight, n))
        return weight.parts(n // args[0])
    if func is aten.new_empty.default and shard:  # for a process without rows
        raise ValueError(_refusal(weight, "N"))
    if func is aten.new_zeros.default and not shard and len(size := args[0]) == 2 and size[1] == k and size[0]:
        if n % size[0] == 0 and weight.divides(n // size[0]):
            return weight.parts(n // size[0])[0].each(torch.zeros_like)
    if (
        (func is aten.slice.Tensor and args[:2] == (0, 0) and args[2] >= n and args[3:] in ((), (1,)))
        or (func is aten.as_strided.default and args[:2] == ([n, k], [k, 1]) and args[2:] in ((), (0,)))
        or (func is aten.view.default and args[0] == [n, k])
        or (func is aten.view.default and shard and args[0] == [-1])  # which FSDP2 keeps, and does not read
    ):
        return weight.each(lambda t: t)
    return None


class Joined(NamedTuple):
    """Tensors whose bytes lie in one: FSDP2 of a single process, which gathers nothing, copies the first alone."""

    places: list[tuple[int, torch.dtype, torch.Size]]

    def apart(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors, as views."""
        return tuple(
            whole[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape) for at, dtype, shape in self.places
        )


def joined(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Joined]:
    """(the bytes of all tensors in one, how they are told apart)."""
    parts, places, at = [], [], 0
    for t in tensors:
        there = t.contiguous().view(-1).view(torch.uint8)
        padding = -len(there) % ALIGNED
        places.append((at, t.dtype, t.shape))
        parts += [there, there.new_zeros(padding)]
        at += len(there) + padding
    return torch.cat(parts), Joined(places)


def to_gather(tensors: Sequence[torch.Tensor], mesh: Any) -> tuple[tuple[torch.Tensor, ...], Joined | None]:
    """(what FSDP2 is to gather, how :func:`gathered` tells it apart); the last dimension of a mesh has the shards."""
    if mesh.size(mesh.ndim - 1) > 1 or len(tensors) == 1:
        return tuple(tensors), None
    whole, how = joined(tensors)
    return (whole,), how


def gathered(found: tuple[torch.Tensor, ...], how: Joined | None) -> tuple[torch.Tensor, ...]:
    return found if how is None else how.apart(found[0])


def _refusal(weight: Any, n: Any) -> str:
    return (
        f"weight: got {weight.LABEL} [{n}, {weight.shape[1]}] to shard, expected a number of processes that divides "
        f"{weight.DIVIDED} (fully_shard(..., ignored_params={{weight}}) leaves it whole in each)"
    )
