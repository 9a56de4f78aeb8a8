"""PEFT's tuner as ``patch_peft`` makes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraModel
from torch import nn

from lora_fast.bases.stack import PackedStack
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
        """As in PEFT, and as :meth:`merge_adapter`."""
        self._refuse_packed_experts()
        return super().merge_and_unload(*args, **kwargs)

    def _refuse_packed_experts(self) -> None:
        wrappers: list[Any] = [module for module in self.modules() if is_wrapper(module)]
        for experts in (wrapper.get_param() for wrapper in wrappers):
            if isinstance(experts, PackedStack):
                raise RuntimeError(experts.why_not_added_to())


FastLoraModel.__name__ = LoraModel.__name__  # which tools compare; a pickle finds the class by __qualname__
