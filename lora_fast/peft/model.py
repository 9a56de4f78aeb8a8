"""PEFT's tuner as ``patch_peft`` makes it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraModel
from torch import nn

from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.stack import PackedStack
from lora_fast.blocks.joining import part
from lora_fast.peft.batches import naming
from lora_fast.peft.merging import mark_ties
from lora_fast.peft.report import is_wrapper


class FastLoraModel(LoraModel):
    """PEFT's tuner that also makes the layers of adapters fast that come later, as ``patch_later`` does; and that
    merges nothing in a model with packed experts, which cannot be merged so."""

    patch_later: Callable[[LoraModel], None] | None = None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with naming(self, super()._enable_peft_forward_hooks, args, kwargs):
            yield

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        if self.patch_later is not None:
            self.patch_later(self)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with bases as they are tied by now (transformers' ``tie_weights``); RuntimeError where an adapter
        is on packed experts, before anything is merged."""
        self._refuse_packed_experts()
        mark_ties(self)
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in PEFT, and as :meth:`merge_adapter`; nothing of ours stays."""
        self._refuse_packed_experts()
        return _parted(super().merge_and_unload(*args, **kwargs))

    def unload(self) -> nn.Module:
        """As in PEFT; of ours bases stay that are in 8 or 4 bits, with a warning."""
        return _parted(super().unload())

    def _refuse_packed_experts(self) -> None:
        wrappers: list[Any] = [module for module in self.modules() if is_wrapper(module)]
        for experts in (wrapper.get_param() for wrapper in wrappers):
            if isinstance(experts, PackedStack):
                raise RuntimeError(experts.why_not_added_to())


def _parted(model: nn.Module) -> nn.Module:
    """The model without adapters, and without blocks and groups."""
    part(model)
    if packed := [name for name, p in model.named_parameters() if isinstance(p, PackedWeight)]:
        warnings.warn(
            f"{len(packed)} weights stay in 8 or 4 bits, {packed[0]} among them, which save_pretrained and safetensors "
            "cannot write; torch.nn.Parameter(layer.weight.dequantise(), requires_grad=False) in its place is plain",
            stacklevel=3,
        )
    return model


FastLoraModel.__name__ = LoraModel.__name__  # which tools compare; a pickle finds the class by __qualname__
