"""The ways in which two processes share a model with a packed base."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_fast.bases.packed import PackedWeight


def by_layers(model: nn.Module, **options: Any) -> Any:
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def whole_bases(model: nn.Module) -> Any:
    return fully_shard(model, ignored_params={p for p in model.parameters() if isinstance(p, PackedWeight)})


MODES: dict[str, tuple[Callable, dict[str, Any]]] = {
    "ddp": (DistributedDataParallel, {}),
    "fsdp2": (fully_shard, {}),
    "fsdp2, by layers": (by_layers, {}),
    "fsdp2, kept": (by_layers, {"reshard_after_forward": False}),
    "fsdp2, on the CPU": (by_layers, {"offload_policy": CPUOffloadPolicy(torch.cuda.is_available())}),
    "fsdp2, whole bases": (whole_bases, {}),
}
