"""FSDP1 (``FullyShardedDataParallel``): what it makes of a unit's parameters, and whether a model has such units.

With ``use_orig_params=True`` the forward of a unit finds views of one flat parameter in its parameters' places. The
flat one asks for a gradient if any of them does, and so do all views: that a base weight is frozen, the flat
parameter's own record tells.
"""

import sys

import torch
from torch import nn


def as_asked(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """``module.weight``, detached if it is a view of FSDP1's flat parameter and stands for a frozen one."""
    if not weight.requires_grad:
        return weight
    flat = weight._base
    for infos, originals in (("_param_infos", "_params"), ("_shared_param_infos", "_shared_params")):
        for info, parameter in zip(getattr(flat, infos, ()), getattr(flat, originals, None) or (), strict=False):
            if info.module is module and info.param_name == "weight":
                return weight if parameter.requires_grad else weight.detach()
    return weight


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is a unit of FSDP1's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody uses it
    return fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())
