"""PEFT's LoRA layer on bitsandbytes' 4-bit linear with a fused forward. bitsandbytes' own tensors are read, none is
copied; its classes are known by what they have, without an import of it."""

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from lora_fast import dispatch
from lora_fast.bases.four_bits import NESTED_BLOCK, BlockWeight, FourBitWeight, Nf4Weight
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.written import WrittenWeight, why_not_e4m3
from lora_fast.blocks.form import Layer
from lora_fast.blocks.gated import hooked
from lora_fast.peft.layers import FastLinear
from lora_fast.peft.rules import kind_of, parameter, why_hooked
from lora_fast.wrappers import zero3

try:
    from peft.tuners.lora.bnb import Linear4bit
except ImportError:  # without bitsandbytes PEFT has no such class

    class Linear4bit(nn.Module):  # type: ignore[no-redef]
        """Nothing is one of these."""


BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SET_COMPUTE = (
    "the base computes in float32: give BitsAndBytesConfig bnb_4bit_compute_dtype=torch.bfloat16 to have it fused"
)


NOT_SEEN = "torch.compile sees a 4-bit layer whose weight changed: call it once before"


class View:
    """bitsandbytes' weight as one of ours, over the same memory. Copies of a layer make their own."""

    def __init__(self) -> None:
        self.made_from: tuple[Any, ...] | None = None
        self.weight: WrittenWeight | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return View, ()

    def of(self, base: Any, e4m3: bool) -> WrittenWeight | str:
        """The weight of this layer of bitsandbytes' as it is now, or in words why that cannot be fused. The host waits
        for this in every call, but for compiled ones, which take what is there."""
        if torch.compiler.is_compiling():
            return NOT_SEEN if self.weight is None else self.weight
        weight = parameter(base, "weight")
        state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        if state is None:
            return "the base weight has no quant_state: bitsandbytes makes it when the layer moves to its device"
        if getattr(state, "packing_format_for_cpu", False):
            return "the base weight is packed for bitsandbytes' code for CPUs, as it does in evaluation"
        # ``to`` puts new tensors into the same state; of e4m3 the scales follow what is stored.
        now = weight.data_ptr(), state.absmax.data_ptr(), base.compute_dtype, e4m3, weight._version if e4m3 else 0
        if self.weight is None or now != self.made_from:
            found = view(base, weight, state)
            if isinstance(found, str):
                return found
            if e4m3 and (why := why_not_e4m3(found.shape)):
                return why
            with torch.inference_mode(False), torch.no_grad():
                self.made_from, self.weight = now, found.for_e4m3() if e4m3 else found
        return self.weight


def view(base: Any, weight: Any, state: Any) -> FourBitWeight | str:
    """bitsandbytes' tensors as a weight of ours that acts in the layer's compute dtype; or why not, in words."""
    kind, shape = base.compute_dtype or state.dtype, tuple(state.shape or ())
    if kind not in (torch.float16, torch.bfloat16):
        return SET_COMPUTE
    if state.quant_type not in ("nf4", "fp4") or state.code.numel() != 16:
        return f"the base weight is {state.quant_type}: nf4 and fp4 are fused"
    if shape != (base.out_features, base.in_features):
        return f"quant_state says that the base weight is {shape}, the layer {(base.out_features, base.in_features)}"
    numel, nested = base.out_features * base.in_features, state.state2
    packed = weight.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)
    if state.blocksize not in BLOCKS or numel % state.blocksize or packed.numel() * 2 != numel:
        return f"the base weight {shape} is no whole number of blocks of {state.blocksize}"
    if packed.data_ptr() % 16:
        return "the base weight does not start at a multiple of 16 bytes"
    stored = packed, state.absmax.reshape(-1), state.code.float()
    if nested is None:
        return BlockWeight(stored[0], stored[1].float(), stored[2], shape=shape, dtype=kind)
    if nested.blocksize != NESTED_BLOCK or nested.code.numel() != 256 or state.absmax.dtype != torch.uint8:
        return f"the scales of the base weight are quantised in blocks of {nested.blocksize}, {NESTED_BLOCK} are fused"
    offset = state.offset.float().reshape(1)
    return Nf4Weight(*stored, nested.code.float(), nested.absmax.float(), offset, shape=shape, dtype=kind)


class FastLinear4bit(FastLinear, Linear4bit):
    """``peft.tuners.lora.bnb.Linear4bit``, fused as :class:`FastLinear` is.

    As bitsandbytes does, x is cast to the base's compute dtype and y back. A merge puts an ``nn.Linear`` in the base's
    place, its weight in that dtype, and never quantises again; an unmerge puts the base back.

    Attributes:
        e4m3: whether the products are made from 8-bit operands.
    """

    STOCK = Linear4bit
    casts_back = True
    e4m3: bool = False
    _view: View

    @classmethod
    def adopt(cls, layer: Any) -> None:
        super().adopt(layer)
        layer._view = View()

    def release(self) -> None:
        """Make the layer stock again, unmerged."""
        self.unmerge_base()
        for name in ("_view", "e4m3", "_quantised_base"):
            vars(self).pop(name, None)
        super().release()

    def stock_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if vars(self).get("_quantised_base") is None:
            return Linear4bit.forward(self, x, *args, **kwargs)
        if self.disable_adapters:  # which ends the merge
            self.unmerge()
            return Linear4bit.forward(self, x, *args, **kwargs)
        return self.base_layer(x.to(self.base_layer.weight.dtype), *args, **kwargs).to(x.dtype)

    def why_not_dtype(self, x: torch.Tensor) -> str | None:
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:  # by the first x, as in bitsandbytes
            base.set_compute_type(x)
            base.compute_type_is_set = True
        asked = dispatch.autocast_dtype(x.device)
        if asked is not None and asked != base.compute_dtype:
            return f"autocast is to {asked}, the base computes in {base.compute_dtype}"
        return None if x.is_floating_point() else f"the input is {x.dtype}"

    def base_weight(self, gathered: bool = False) -> torch.Tensor | str:
        base: Any = self._modules["base_layer"]
        if type(base).__name__ != "Linear4bit":
            return f"the base layer is a {kind_of(base)}, not bitsandbytes' Linear4bit itself"
        if (kind := type(parameter(base, "weight")).__name__) != "Params4bit":
            return f"the base weight is a {kind}, not bitsandbytes' Params4bit"
        if hooked(base):
            return why_hooked(base)
        if zero3.is_split(parameter(base, "weight")):
            return zero3.LEFT
        return self._view.of(base, self.e4m3)

    def label_of_base(self, packed: PackedWeight) -> str:
        weight: Any = parameter(self.base_layer, "weight")
        return weight.quant_type

    def frozen(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        base: Any = self._modules["base_layer"]
        weight, bias = self._view.weight, parameter(base, "bias")
        assert weight is not None  # ``base_weight`` was asked before
        return weight, None if bias is None else bias.to(weight.acts_as)

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        made = super().as_layer(x)
        if isinstance(made, Layer) and x.dtype != made.weight.dtype and dispatch.autocast_dtype(x.device) is None:
            return f"the input is {x.dtype}, the base computes in {made.weight.dtype}"
        return made

    def _fused(self, x: torch.Tensor, parts: list[tuple[Any, ...]]) -> torch.Tensor:
        weight = self._view.weight
        assert weight is not None
        return super()._fused(x.to(weight.acts_as), parts).to(x.dtype)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        original: torch.Tensor | None = None,
    ) -> None:
        """As in PEFT, but into 16 bits: the sum with the dequantised weight, or with ``original`` [N, K] from which it
        was quantised, is made in float32 and rounded once to the base's compute dtype.

        Raises:
            TypeError, ValueError: an ``original`` of another dtype or shape, or that the base was not made from; a
                base that cannot be read; with ``safe_merge`` a sum that is not finite. The layer is then as it was.
        """
        if not check_adapters_to_merge(self, adapter_names):
            return
        if first := vars(self).get("_quantised_base") is None:
            weight = self.base_weight()
            if isinstance(weight, str):
                raise ValueError(f"merge: {weight}")
            assert isinstance(weight, WrittenWeight)
            if original is not None:
                weight.check_original(original)
            base, kind = self.base_layer, weight.dtype
            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            dense = weight.dequantise(torch.float32) if original is None else original.to(weight.device, torch.float32)
            plain.weight = nn.Parameter(dense, requires_grad=False)
            if base.bias is not None:
                plain.bias = nn.Parameter(base.bias.detach().clone().float(), requires_grad=False)
            vars(self)["_quantised_base"], self.base_layer = base, plain.train(base.training)
        elif original is not None:
            raise ValueError("original: got a tensor, expected None for a merged layer")
        try:
            Linear.merge(self, safe_merge, adapter_names)
        finally:
            if not self.merged:
                self.unmerge_base()
            elif first:
                self.base_layer.to(kind)

    def unmerge(self) -> None:
        """Put bitsandbytes' layer back, as it was."""
        if self.merged:
            self.merged_adapters.clear()
        self.unmerge_base()

    def unmerge_base(self) -> None:
        if (base := vars(self).pop("_quantised_base", None)) is not None:
            self.base_layer = base

    def _apply(self, fn: Any, recurse: bool = True) -> "FastLinear4bit":
        super()._apply(fn, recurse)
        self._view = View()
        if (base := vars(self).get("_quantised_base")) is not None:
            base._apply(fn, recurse)
        else:
            self.base_weight()
        return self
