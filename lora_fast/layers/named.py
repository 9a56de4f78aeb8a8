"""An ``nn.Linear`` with adapters under names: one of them is active, or each sample of a batch names its own."""

from collections.abc import Container
from typing import Any, Self

import torch
import torch.nn.functional as F

from lora_fast.batch.form import Adapter
from lora_fast.batch.functional import dora_linear_batch, lora_linear_batch
from lora_fast.batch.names import LAST, BatchNames, Choice
from lora_fast.blocks.form import Layer
from lora_fast.blocks.siblings import SIBLINGS, Joins
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.merging import MergingLinear
from lora_fast.layers.replacing import tell_of_freezing
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.gather import whole

CHILD = "adapter_"  # and an adapter's name: what a layer calls it


class NamedLinear(Joins, MergingLinear):
    """A frozen ``nn.Linear`` and adapters under names, which :func:`lora_fast.add_lora` with a ``name`` makes.

    The adapter "a" is its child ``adapter_a``: a :class:`lora_fast.LoRALinear` or :class:`lora_fast.DoRALinear` that
    has no base of its own, but this layer's. What is merged is the active adapter.

    Attributes:
        weight [out, in], bias [out] or None: the frozen base.
        choice: shared by the layers of a model.
        merged, enabled: the layer's state.
    """

    keeps_adapter = True  # see lora_fast.layers.replacing

    def __init__(self, linear: MergingLinear, choice: Choice) -> None:
        """Over the weight and bias of ``linear``, which are shared."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.base_is_tied, self.choice, self.enabled = linear.base_is_tied, choice, True
        self.fan_in_fan_out = linear.fan_in_fan_out
        self.train(linear.training)

    def adopt(self, layer: LoRALinear, name: str) -> None:
        """Take the adapter of a layer over the same base, which from now on has this one's."""
        for own in ("weight", "bias"):
            del layer._parameters[own]
        for own in ("enabled", "base_is_tied", "fan_in_fan_out", SIBLINGS, LAST):
            vars(layer).pop(own, None)
        layer.__class__ = NamedDoRA if isinstance(layer, DoRALinear) else NamedLoRA
        vars(layer).update(name=name, _home=(self,))  # in a tuple, where nn.Module does not take it for a child
        self.add_module(CHILD + name, layer)

    @property
    def adapters(self) -> dict[str, Any]:
        """The layer's adapters, by name."""
        children: Any = self._modules.values()
        return {one.name: one for one in children}

    @property
    def active(self) -> Any:
        """The active adapter, or None where this layer has it not."""
        return self._modules.get(CHILD + self.choice.active)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to y [..., out].

        Raises:
            ValueError: another number of samples, x's first dimension, than of names that hold.
            TypeError, ValueError: as :func:`lora_fast.functional.lora_linear`.
        """
        if self.enabled:
            if (names := self.choice.of(self)) is not None:
                return self._each_its_own(x, names)
            one = self.active
            if one is not None and self._buffers["unmerged_weight"] is None:
                y = self.joined(x) if SIBLINGS in vars(self) else None
                return one(x) if y is None else y
        return self._plain(x)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.enabled else whole(self.base_weight).to(x.device)
        return F.linear(x, self.turned(weight), self.bias)

    def _each_its_own(self, x: torch.Tensor, names: BatchNames) -> torch.Tensor:
        if x.dim() < 2 or len(x) != names.samples:
            raise ValueError(
                f"names: got {names.samples}, expected one for each of the samples: x has shape {tuple(x.shape)}"
            )
        there = self.named_in(names.occur)
        if not there:
            return self._plain(x)
        which = names.which(tuple(one.name for one in there), x.device)
        weight = self.weight
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        given = x, self.turned(weight), [one.as_adapter() for one in there], which, self.bias, self.training
        if isinstance(there[0], DoRALinear):
            return dora_linear_batch(*given, save="z" if any(one.save == "z" for one in there) else "auto")
        return lora_linear_batch(*given)

    def named_in(self, names: Container[str]) -> list[Any]:
        """The layer's adapters that occur there."""
        children: Any = self._modules.values()
        return [one for one in children if one.name in names]

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        one = self.active
        if one is None or not self.enabled or self.merged or self.choice.of(self) is not None:
            return None
        found: Layer | str | None = one.as_layer(x)
        return found

    def enable(self) -> None:
        """Let the adapters act (the default)."""
        self.enabled = True

    def disable(self) -> None:
        """Give the base layer's output, merged or not, until :meth:`enable`."""
        self.enabled = False

    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """With the active adapter in it, as its own class has it."""
        if (one := self.active) is None:
            raise ValueError(f"merge: the layer has no adapter {self.choice.active!r}, which is the active one")
        found: torch.Tensor = one.merged_weight(original)
        return found

    def parts_of_adapter(self) -> tuple[str, ...]:
        one, prefix = self.active, CHILD + self.choice.active
        return () if one is None else tuple(f"{prefix}.{part}" for part in one.adapter_names)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in ``nn.Module``; a warning where a call for this layer by itself ends the training of its adapters."""
        if not requires_grad:
            tell_of_freezing(self, [p for one in self._modules.values() for p in one.parameters()])  # type: ignore[union-attr]
        return super().requires_grad_(requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Magnitudes that are the base's norms are another base's afterwards, as in a DoRALinear."""
        fresh = {}
        if prefix + "weight" in state_dict:
            doras = {name: one for name, one in self.adapters.items() if isinstance(one, DoRALinear)}
            keys = {name: f"{prefix}{CHILD}{name}.lora_magnitude_vector" for name in doras}
            fresh = {
                name: one for name, one in doras.items() if keys[name] not in state_dict and one._magnitude_is_norm()
            }
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, one in fresh.items():
            try:
                one.reset_magnitude()
            except ValueError as error:
                args[-1].append(f"{prefix}{CHILD}{name}.{error}")

    def extra_repr(self) -> str:
        flags = {"merged": self.merged, "disabled": not self.enabled}
        text = f"{super().extra_repr()}, active={self.choice.active!r}"
        return ", ".join([text, *(name for name, on in flags.items() if on)])


class InNamedLinear(LoRALinear):
    """An adapter of a :class:`NamedLinear`, which has what is not its own. Made by :meth:`NamedLinear.adopt`."""

    name: str

    @property
    def home(self) -> NamedLinear:
        """The layer whose adapter it is."""
        found: NamedLinear = vars(self)["_home"][0]
        return found

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.home.weight

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.home.bias

    @property
    def fan_in_fan_out(self) -> bool:  # type: ignore[override]
        return self.home.fan_in_fan_out

    @property
    def base_weight(self) -> torch.Tensor:
        return self.home.base_weight

    @property
    def merged(self) -> bool:
        return self.home.merged and self.home.active is self

    @property
    def enabled(self) -> bool:  # type: ignore[override]
        return self.home.enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y with this adapter alone, whichever is active."""
        return self._adapted(x)

    def enable(self) -> None:
        """Let the adapters of the whole layer act (the default)."""
        self.home.enable()

    def disable(self) -> None:
        """Have the whole layer give its base's output, until :meth:`enable`."""
        self.home.disable()

    def as_adapter(self) -> Adapter:
        """What :func:`lora_fast.lora_linear_batch` takes."""
        return Adapter(self.lora_A, self.lora_B, self.scaling, self.lora_dropout)

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """As :meth:`lora_fast.LoRALinear.merge`. ValueError if another adapter is active."""
        if self.home.active is not self:
            raise ValueError(
                f"merge: {self.name!r} is not active, but {self.home.choice.active!r}; lora_fast.set_adapter first"
            )
        self.home.merge(safe_merge, original)

    def unmerge(self) -> None:
        """Put the base weight back; nothing if this adapter is not merged."""
        if self.merged:
            self.home.unmerge()

    def quantise_base(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("quantise_base: the base is shared with other adapters; the first add_lora decides of it")


class NamedLoRA(InNamedLinear):
    """A LoRA adapter of a :class:`NamedLinear`."""


class NamedDoRA(InNamedLinear, DoRALinear):
    """A DoRA adapter of a :class:`NamedLinear`."""

    def as_adapter(self) -> Adapter:
        self.need_magnitude()
        return super().as_adapter()._replace(lora_magnitude_vector=self.lora_magnitude_vector)
