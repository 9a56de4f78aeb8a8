"""What FSDP2 does to a packed weight: cuts it into shards, keeps one, makes a parameter of what it gathers of all."""

from typing import Any

import torch

aten = torch.ops.aten
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


def _refusal(weight: Any, n: Any) -> str:
    return (
        f"weight: got {weight.LABEL} [{n}, {weight.shape[1]}] to shard, expected a number of processes that divides "
        f"{weight.DIVIDED} (fully_shard(..., ignored_params={{weight}}) leaves it whole in each)"
    )
