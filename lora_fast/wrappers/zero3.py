"""DeepSpeed's ZeRO-3: every parameter is split over the processes, and empty but while hooks of DeepSpeed's in its
module, around forward and backward, have it gathered.

What a module's forward reads of other modules' parameters DeepSpeed gathers at that moment, and from then on ahead of
that module's forward and backward, too (its "external parameters"). So a layer of PEFT's may read the parameters of the
modules in it without calling them. Layers cannot share a run: the hooks of each give it an input of its own.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

GATHERED = "gathered by DeepSpeed's ZeRO-3"
PARTITIONED = "is partitioned by DeepSpeed's ZeRO-3"
LEFT = f"its weight {PARTITIONED}"
EMPTY = f"{LEFT}, and not gathered in this call (call the model by way of its engine)"
_LENT = "_ds_z3_gathered_param_context_depth"  # how many GatheredParameters a parameter is in
APART = "DeepSpeed's ZeRO-3 gathers each layer by itself"


def is_split(tensor: Any) -> bool:
    """Whether it is a parameter of ZeRO-3's, gathered or not."""
    return hasattr(tensor, "ds_id")


def splits(module: nn.Module) -> bool:
    """Whether it splits parameters of the module, or of what is in it; perhaps before there is an engine."""
    return any(map(is_split, module.parameters()))


def manages(module: nn.Module) -> bool:
    """Whether hooks of an engine's gather the module's parameters."""
    return "ds_id" in vars(module)


def any_empty(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether one of them is a parameter of ZeRO-3's that is not gathered."""
    return any(is_split(t) and t.numel() != t.ds_numel for t in tensors)  # type: ignore[union-attr]


@contextmanager
def written(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, these parameters are whole, and what is written into them stays. All processes enter together.
    Those that a GatheredParameters around has gathered are its own, which takes no other one for them."""
    own = [p for p in parameters if is_split(p) and not getattr(p, _LENT, 0)]
    if not own:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
        yield


def hooked_by_others(module: nn.Module) -> bool:
    """Whether it has a replaced forward, or hooks that are not DeepSpeed's."""
    if "forward" in vars(module):
        return True
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not _is_deepspeeds(hook) for hooks in kinds for hook in hooks.values())


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(inspect.unwrap(hook), "__module__", "")).startswith("deepspeed.")
