"""PEFT's LoRA linear layer with a fused forward: what ``patch_peft`` makes of instances of theirs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn
from torch.compiler import is_compiling

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, as_plain
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.batch.names import LAST
from lora_fast.blocks.form import Layer
from lora_fast.blocks.recognise import is_conv1d
from lora_fast.blocks.siblings import SIBLINGS, Joins
from lora_fast.checks import FLOATS
from lora_fast.functional import dora_linear, lora_linear
from lora_fast.layers.held_linears import make_as_before
from lora_fast.layers.keeping import KEPT_NORM, KeepsNorm
from lora_fast.layers.merged_state import TO_COME
from lora_fast.layers.replacing import tell_of_freezing
from lora_fast.peft import norms as peft_norms
from lora_fast.peft.batches import named_call, names_of, unnamed
from lora_fast.peft.inits import asked_for, base_watched
from lora_fast.peft.merging import NOT_KEPT, KeepingLinear, base_is_lent, for_an_adapters_file, spread_scaled
from lora_fast.peft.rules import (
    BASES,
    active,
    examine,
    hooked,
    is_dora,
    kind_of,
    parameter,
    plainly,
    why_hooked,
    why_not_this_call,
)
from lora_fast.peft.scalings import Scalings
from lora_fast.wrappers import fsdp1, zero3
from lora_fast.wrappers.gather import whole


class FastLinear(KeepsNorm, Joins, KeepingLinear):
    """``peft.tuners.lora.Linear`` that runs plain LoRA and DoRA adapters through :mod:`lora_fast.functional`.

    Not constructed, but put in place of an instance's class (:meth:`adopt`). Parameters are PEFT's own, read in each
    call; where anything is out of the ordinary (:func:`lora_fast.peft.rules.examine`) the call is stock PEFT's, with
    one warning for each reason.
    """

    keeps_adapter = True  # see lora_fast.layers.replacing
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    save: str = "auto"  # for DoRA, as of lora_fast.DoRALinear
    save_x: str = "x"  # as of lora_fast.LoRALinear
    is_embedding: bool = False  # the model's head: PEFT saves its base weight, too, and in files fp8 is plain
    STOCK: type = Linear
    _scalings: Scalings

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Make ``layer``, of which :func:`lora_fast.peft.rules.why_never_fused` finds nothing, one of these."""
        scalings = Scalings(layer.scaling, layer.base_layer.weight.device)  # may fail, so before anything is changed
        del layer.scaling
        layer.__class__ = cls
        layer._scalings = scalings

    def release(self) -> None:
        """Make the layer stock again. While it is merged, the base weight that was kept is lost."""
        self.forget_base()
        scalings = dict(self.scaling)
        del self._scalings
        for name in (
            "save",
            "save_x",
            "is_embedding",
            "base_is_tied",
            TO_COME,
            KEPT_NORM,
            "keep_in_graphs",
            SIBLINGS,
            LAST,
        ):
            vars(self).pop(name, None)
        make_as_before(self.base_layer)
        weight = self.base_layer.weight
        if isinstance(weight, PackedWeight) and not isinstance(weight, ScaledFp8Weight):  # which was there before
            self.base_layer.weight = nn.Parameter(weight.dequantise(), requires_grad=False)
        self.__class__ = self.STOCK
        self.scaling = scalings

    def _get_name(self) -> str:
        return type(self).__name__.replace("Fast", "", 1)  # as stock's, which tools compare

    @property
    def scaling(self) -> Scalings:
        return self._scalings

    @scaling.setter
    def scaling(self, values: Mapping[str, Any]) -> None:
        old = self.scaling
        self._scalings = Scalings(values, old.device, old.mirrors)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] to y [..., N], as stock PEFT's; raises as it does, or as :func:`lora_fast.functional.lora_linear`.

        DoRA's dropout acts on the low-rank branch alone, and several adapters share one mask; stock PEFT, in contrast,
        also drops the input of DoRA's base product, and draws a mask for each adapter.
        """
        if not (args or kwargs or is_compiling()) and unnamed(self) and (plain := plainly(self, x)) is not None:
            if SIBLINGS in vars(self) and (y := self.joined(x)) is not None:
                return y
            weight, a, b, scaling, bias, p = plain
            return lora_linear(x, weight, a, b, scaling, bias, dropout_p=p, save_x=self.save_x, kept=self.kept_copies())
        if (names := names_of(self, kwargs)) is not None and not self.disable_adapters:
            return self.named_call(x, names, *args, **kwargs)
        if SIBLINGS in vars(self) and not args and not kwargs and (y := self.joined(x)) is not None:
            return y
        if not self.disable_adapters and not self.merged and (names := active(self)):
            parts = why_not_this_call(self, x, args, kwargs) or examine(self, names)
            if not isinstance(parts, str):
                return self._fused(x, parts)
            dispatch.tell("leaves a layer to stock PEFT", parts)
            peft_norms.drop_stale_of(self, names)
            self.kept_norm()  # with gradients it is dropped
        elif self.disable_adapters and self.merged and base_is_lent(self):
            # Stock unmerges here, which is lost in a weight that FSDP or ZeRO-3 has gathered.
            weight, bias = (None if kept is None else whole(kept) for kept in self._both_kept().values())
            if weight is None:
                raise ValueError(NOT_KEPT)
            return F.linear(x, self._seen(weight), self.base_layer.bias if bias is None else bias)
        return self.stock_forward(x, *args, **kwargs)

    def named_call(self, x: torch.Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of samples that name an adapter each; in training, too, unlike stock PEFT's."""
        more = {name: value for name, value in kwargs.items() if name != "adapter_names" and value is not None}
        y = "forward was given more than x" if args or more else named_call(self, x, names)
        if isinstance(y, str):
            dispatch.tell("leaves several adapters in one batch to stock PEFT", y)
            return self.stock_forward(x, *args, **{**kwargs, "adapter_names": names})
        return y

    def stock_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(x, *args, **kwargs)

    def why_not_dtype(self, x: torch.Tensor) -> str | None:
        """Why x's dtype needs stock PEFT's forward, in words."""
        base: Any = self._modules["base_layer"]
        dtype = parameter(base, "weight").dtype
        if x.dtype != dtype and dispatch.autocast_dtype(x.device) is None:
            return f"the input is {x.dtype} and the base weight {dtype}, without autocast"
        return None

    def base_weight(self, gathered: bool = False) -> torch.Tensor | str:
        """The base weight that products read, or why it is not fused, in words; see :func:`examine`."""
        base: Any = self._modules["base_layer"]
        if type(base) is not nn.Linear and not is_conv1d(base):
            return f"the base layer is a {kind_of(base)}, not an nn.Linear itself"
        if hooked(base):
            return why_hooked(base)
        weight = parameter(base, "weight")
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, base)
        if type(weight) not in BASES and not gathered:
            return f"the base weight is a {type(weight).__name__}"
        if weight.dtype not in FLOATS:
            return f"the base weight is quantised ({weight.dtype})"
        return "the base weight requires grad" if weight.requires_grad else weight

    def label_of_base(self, packed: PackedWeight) -> str:
        """What a report calls it."""
        return packed.LABEL

    def frozen(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's weight and bias as the products read them."""
        base: Any = self._modules["base_layer"]
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, base)
        return self._seen(weight), bias

    def _seen(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the base layer's as [N, K], as which a Conv1D's is not stored."""
        return weight.t() if self.fan_in_fan_out else weight

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        if self.disable_adapters or self.merged or not (names := active(self)) or names_of(self, {}) is not None:
            return None
        if zero3.manages(self):  # before anything is read, which would be gathered
            return zero3.APART
        parts = why_not_this_call(self, x, (), {}) or examine(self, names)
        if isinstance(parts, str):
            return parts
        if self.save_x != "x":
            return f"save_x is {self.save_x!r}"
        return self._layer(x, parts)

    def _layer(self, x: torch.Tensor, parts: list[tuple[Any, ...]]) -> Layer:
        """What a call computes, of what :func:`examine` found to be plain."""
        scalings = self._scalings
        weight, bias = self.frozen()
        name, a, b, dropout = parts[0]
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        scaling = scalings.of(name, x.device)
        if is_dora(self, name):
            magnitude = self.lora_magnitude_vector[name].weight
            return Layer(weight, a, b, scaling, bias, p, magnitude, True, self.save)
        if len(parts) > 1:  # the sum of the adapters is one adapter, stacked along r
            a = torch.cat([a for _, a, _, _ in parts])
            b = torch.cat([b * scalings.of(name, x.device) for name, _, b, _ in parts], 1)
            scaling = 1.0
        return Layer(weight, a, b, scaling, bias, p)

    def _fused(self, x: torch.Tensor, parts: list[tuple[Any, ...]]) -> torch.Tensor:
        """The forward with what :func:`examine` found to be plain."""
        weight, a, b, scaling, bias, p, magnitude, _, save = self._layer(x, parts)
        if magnitude is None:
            several = len(parts) > 1  # whose A and B are other tensors in each call
            kept = None if several else self.kept_copies()
            return lora_linear(x, weight, a, b, scaling, bias, dropout_p=p, save_x=self.save_x, kept=kept)  # type: ignore[arg-type]
        caching = peft_norms.wanted(self.lora_magnitude_vector[parts[0][0]])
        return dora_linear(
            x,
            weight,
            a,  # type: ignore[arg-type]
            b,  # type: ignore[arg-type]
            magnitude,
            scaling,
            bias,
            dropout_p=p,
            save=save,
            round_norm=True,
            save_x=self.save_x,
            kept=None if self.fan_in_fan_out else self.kept_norm(in_graphs=caching),  # each call's W is another view
        )

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; raises as :func:`lora_fast.peft.inits.base_watched`."""
        with base_watched(self, asked_for(*args, **kwargs)):
            super().update_layer(*args, **kwargs)
        self.drop_kept_norm()  # which does not see what is written into data

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in PEFT, but for the weight of a head, which PEFT's files take along: if it is fp8 it is plain there, and
        in such a file it is what a merge kept."""
        destination = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        if self.merged and for_an_adapters_file():
            kept = {f"{prefix}base_layer.{name}": t for name, t in self._both_kept().items()}
            destination.update({key: t for key, t in kept.items() if t is not None and key in destination})
        if self.is_embedding:
            destination[f"{prefix}base_layer.weight"] = as_plain(destination[f"{prefix}base_layer.weight"])
        spread_scaled(destination, f"{prefix}base_layer.weight")
        return destination

    def requires_grad_(self, requires_grad: bool = True) -> "FastLinear":
        """As in ``nn.Module``; a warning where a call for this layer by itself ends the training of its adapters."""
        if not requires_grad:
            tell_of_freezing(self, [p for name, p in self.named_parameters() if "lora_" in name])
        return super().requires_grad_(requires_grad)

    def _apply(self, *args: Any, **kwargs: Any) -> "FastLinear":
        super()._apply(*args, **kwargs)
        device = self.base_layer.weight.device
        if device != self.scaling.device:
            self._scalings = Scalings(self.scaling, device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scalings = Scalings(self.scaling, self.base_layer.weight.device)
