"""PEFT's tuner as ``patch_peft`` makes it: adapters that come later are fused, too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraModel

from lora_fast.peft.batches import naming


class FastLoraModel(LoraModel):
    """PEFT's tuner that also makes the layers of adapters fast that come later, as ``patch_later`` does."""

    patch_later: Callable[[LoraModel], None] | None = None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with naming(self, super()._enable_peft_forward_hooks, args, kwargs):
            yield

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        if self.patch_later is not None:
            self.patch_later(self)


FastLoraModel.__name__ = LoraModel.__name__  # which tools compare; a pickle finds the class by __qualname__
