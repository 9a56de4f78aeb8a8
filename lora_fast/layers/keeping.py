"""Layers that keep in evaluation what their forward makes of the weights alone, and when they drop it."""

from typing import Any, Self

import torch
from torch import nn
from torch.compiler import is_compiling

from lora_fast.kept import Kept
from lora_fast.wrappers import zero3

KEPT_NORM = "_kept_norm"  # in a layer's __dict__


class KeepsNorm(nn.Module):
    """A layer whose forward may keep DoRA's norm for the next one: in evaluation mode and without gradients. With it
    goes what else few rows need of the adapters, their copies in the products' dtype; LoRA, which has nothing but
    these, keeps them where ``keep_in_graphs`` says that the weights do not change.

    It is dropped by train() and eval(), to() and its like, merge, and any forward with gradients. The next forward
    makes it anew, too, if one of the tensors that it was made of is another one or was changed (load_state_dict), if
    the scaling was, and after a step of any optimizer.

    Attributes:
        keep_in_graphs: whether CUDA graphs are captured with what is kept, and not with a launch that makes it: for
            weights that do not change as long as the graph is replayed.
    """

    keep_in_graphs: bool = False

    def kept_norm(self, in_graphs: bool = False) -> Kept | None:
        """Where this forward may keep its norm; None where it may not. ``in_graphs``: as ``keep_in_graphs``."""
        if is_compiling() or torch._C._get_tracing_state() is not None:  # torch.jit.trace compares a second run
            return None
        own = vars(self)
        kept: Kept | None = own.get(KEPT_NORM)
        # FSDP and ZeRO-3 write into the tensors that they gather without counting.
        if self.training or torch.is_grad_enabled() or "_is_fsdp_managed_module" in own or zero3.manages(self):
            if kept is not None:
                kept.drop()
            return None
        if kept is None:
            kept = own[KEPT_NORM] = Kept()
        kept.in_graphs = in_graphs or self.keep_in_graphs
        return kept

    def kept_copies(self) -> Kept | None:
        """Where this forward of LoRA may keep the copies of its adapters."""
        return self.kept_norm() if self.keep_in_graphs else None

    def drop_kept_norm(self) -> None:
        """Have the next forward make the norm anew."""
        if (kept := vars(self).get(KEPT_NORM)) is not None:
            kept.drop()

    def train(self, mode: bool = True) -> Self:
        self.drop_kept_norm()
        return super().train(mode)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.drop_kept_norm()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.drop_kept_norm()
        return super()._apply(*args, **kwargs)
