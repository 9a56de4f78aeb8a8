"""FSDP1 (``FullyShardedDataParallel``): what it makes of a unit's parameters, and which modules are in its units.

With ``use_orig_params=True`` the forward of a unit finds views of one flat parameter in its parameters' places. The
flat one asks for a gradient if any of them does, and so do all views: that a base weight is frozen, the flat
parameter's own record tells.
"""

import sys
from collections.abc import Iterator

import torch
from torch import nn

NO_FP8 = (
    "FSDP1 makes a plain weight of an fp8 one, or one in 4 bits (FSDP2, fully_shard, does not; or leave base_dtype out)"
)


def as_asked(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """``module.weight``, detached if it is a view of FSDP1's flat parameter and stands for a frozen one.

    Raises:
        TypeError: it stands for an fp8 weight, or one in 4 bits.
    """
    flat = weight._base
    for infos, originals in (("_param_infos", "_params"), ("_shared_param_infos", "_shared_params")):
        for info, parameter in zip(getattr(flat, infos, ()), getattr(flat, originals, None) or (), strict=False):
            if info.module is module and info.param_name == "weight":
                if type(parameter) is not nn.Parameter:
                    raise TypeError(f"weight: {NO_FP8}")
                return weight if parameter.requires_grad else weight.detach()
    return weight


def holds(model: nn.Module) -> bool:
    """Whether parameters of the model are FSDP1's already, from outside of its units or from within one."""
    return any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()) or any(True for _ in wrapped(model))


def wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the model that are in units of FSDP1's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody uses it
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            yield from module.modules()
