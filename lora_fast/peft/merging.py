"""Merging of PEFT's LoRA linear layer that keeps the base: exact to undo, in shards too, and told in state dicts."""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from lora_fast.bases import LABELS
from lora_fast.bases.packed import PackedWeight, as_plain
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.kept import PLAIN
from lora_fast.layers.merged_state import KEPT, add_kept, read_base
from lora_fast.layers.packed_state import collect, spread
from lora_fast.wrappers import zero3
from lora_fast.wrappers.gather import is_sharded, whole
from lora_fast.wrappers.placement import (
    AWAY,
    gathered,
    in_its_memory,
    kind_of,
    offloading,
    place_of_weight,
    settle,
    write,
)

NOT_KEPT = "disable_adapter: got a sharded layer that is merged, its base not kept; expected it after unmerge_adapter()"


class KeepingLinear(Linear):
    """``peft.tuners.lora.Linear`` on an ``nn.Linear``, whose base weight and bias are kept at a merge, so that
    :meth:`unmerge` gives them back bit for bit.

    A state dict of a merged layer holds the merged ones, as stock PEFT's, and beside them the base as
    ``lora_unmerged_weight`` and ``lora_unmerged_offset``; loading one unmerges the layer, and gives it that base.

    A base that another of PEFT's layers has, too, is not kept: that one merges into it in place, at any time between,
    and what was kept would undo its merge, or bring it back. There all of this is as in stock PEFT, by subtraction.
    """

    base_layer: Any
    base_is_tied: bool = False  # as mark_ties saw it: another of PEFT's layers has the base weight or bias, too

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        original: torch.Tensor | None = None,
    ) -> None:
        """As in PEFT; the base weight and bias are kept for :meth:`unmerge`, and so is their dtype (DoRA in PEFT 0.13
        loses it).

        ``original`` [N, K], in the base's dtype, is what an fp8 base was made from: it is merged into instead, summed
        in float32 and rounded once.

        Raises:
            TypeError, ValueError: an ``original`` of another dtype or shape, or that the base was not made from; a
                layer that is merged or whose base is not fp8; an fp8 base in FSDP2's shards, FSDP1 outside
                summon_full_params. The layer is then as it was.
        """
        weight = self.base_layer.weight
        if original is not None:
            if self.merged or not isinstance(weight, PackedWeight):
                what = "a merged layer" if self.merged else f"a base that is not {LABELS} ({weight.dtype})"
                raise ValueError(f"original: got a tensor, expected None for {what}")
            weight.check_original(original)
        with self._at_hand():
            dtypes = {name: tensor.dtype for name, tensor in self._base().items()}
            if not self.merged and not self._is_common():
                self._keep_base(original)
            try:
                with gathered(self, changed=self.base_layer):
                    super().merge(safe_merge, adapter_names)
                    for name, tensor in self._base().items():
                        tensor.data = tensor.data.to(dtypes[name])
            finally:
                if not self.merged:
                    self._put_back()

    def unmerge(self) -> None:
        """As in PEFT, but bit for bit: what was there before the merge is put back (not into a tied base)."""
        with self._at_hand():
            common = self._is_common()
            with gathered(self, changed=self.base_layer if common else None):
                super().unmerge()
            if common:
                self.forget_base()  # from before it was tied
            else:
                self._put_back()

    def _is_common(self) -> bool:
        """Whether others change the base weight. One in 8 bits they cannot: a merge makes another parameter of it."""
        weights = self.base_layer.weight, self._buffers.get("unmerged_weight")
        return self.base_is_tied and not any(isinstance(weight, PackedWeight) for weight in weights)

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Within, the base weight is there and may change. Raises ValueError where it cannot (fp8 in shards, FSDP1)."""
        settle(self)
        with kind_of(self.base_layer.weight), zero3.written(self.parameters()), self._at_its_place():
            yield

    @contextmanager
    def _at_its_place(self) -> Iterator[None]:
        base = self.base_layer
        if (hook := offloading(base)) is None:
            if base.weight.is_meta and not _has_no_data_anywhere():
                raise ValueError(AWAY)
            if place_of_weight(base) is None:
                yield
            else:
                with in_its_memory(base):
                    yield
        elif not base.weight.is_meta:
            yield
        elif vars(base)["_hf_hook"] is not hook:
            raise ValueError(
                "weight: is offloaded by one of several hooks of accelerate, where PEFT does not find it; "
                "merge before dispatching the model"
            )
        else:
            with onload_layer(self):
                yield

    def _keep_base(self, original: torch.Tensor | None) -> None:
        weight, changes = self.base_layer.weight, self._base()
        if not any(getattr(self, "lora_bias", {}).values()):  # no merge touches the bias, which may train meanwhile
            changes.pop("bias", None)
        for name, tensor in changes.items():
            kept = tensor.detach().clone()
            self.register_buffer(
                f"unmerged_{name}", kept if offloading(self.base_layer) is None else kept.cpu(), persistent=False
            )
        if isinstance(weight, PackedWeight):
            plain = weight.dequantise() if original is None else original.to(weight.device, torch.float32, copy=True)
            self.base_layer.weight = nn.Parameter(plain, requires_grad=False)

    def _put_back(self) -> None:
        for kept, tensor in self._kept():
            if isinstance(kept, PackedWeight):
                self.base_layer.weight = nn.Parameter(kept.to(tensor.device), requires_grad=False)
            elif is_sharded(tensor):
                write(tensor, kept)
            elif _agree(kept, tensor):
                tensor.data.copy_(kept)  # where others see it, too: in shared memory, in views of one buffer
            else:
                tensor.data = whole(kept).to(tensor.device)
        self.forget_base()

    def _base(self) -> dict[str, torch.Tensor]:
        base = self.base_layer
        return {"weight": base.weight} | ({} if base.bias is None else {"bias": base.bias})

    def _kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What was kept at the merge, each beside what it was before."""
        pairs = [(self._buffers.get(f"unmerged_{name}"), tensor) for name, tensor in self._base().items()]
        return [(kept, tensor) for kept, tensor in pairs if kept is not None]

    def forget_base(self) -> None:
        """Have an unmerge be stock PEFT's."""
        for name in ("unmerged_weight", "unmerged_bias"):
            if name in self._buffers:
                delattr(self, name)
                self._non_persistent_buffers_set.discard(name)

    @property
    def lora_unmerged_weight(self) -> torch.Tensor | None:
        """What a merge kept, by its name in a state dict, by which torch's distributed checkpoints ask for it."""
        return self._buffers.get("unmerged_weight")

    @property
    def lora_unmerged_offset(self) -> torch.Tensor | None:
        """Likewise, of the bias."""
        return self._buffers.get("unmerged_bias")

    def parts_of_adapter(self) -> list[str]:
        """Names in a state dict of what a merge of the active adapters is made with."""
        names = [name for name, _ in self.named_parameters() if name.startswith("lora_")]
        return [name for name in names if name.split(".")[1] in self.active_adapters]

    def live_values(self) -> Iterator[dict[str, torch.Tensor]]:
        """Of an unmerged layer: what its weight and bias may be once some of its adapters are merged, whole. Of more
        than four adapters not every choice is tried."""
        base, held = self.base_layer, dict(self.base_layer._parameters)
        names = list(self.lora_A)
        counts = range(1, len(names) + 1) if len(names) <= 4 else (1, len(names))
        some = [n for n in self.active_adapters if n in names]
        for chosen in (some, *itertools.chain.from_iterable(itertools.combinations(names, n) for n in counts)):
            with gathered(self):
                for name, t in self._base().items():
                    base._parameters[name] = nn.Parameter(as_plain(t.detach()).clone(), requires_grad=False)
                try:
                    super().merge(adapter_names=list(chosen))
                    values = {name: t.detach().clone() for name, t in self._base().items()}
                    if self.merged:
                        super().unmerge()
                finally:
                    base._parameters.update(held)
            yield values

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and not for_an_adapters_file():
            add_kept(self._both_kept(), destination, prefix, keep_vars)
            spread_scaled(destination, prefix + KEPT["weight"])

    def _both_kept(self) -> dict[str, torch.Tensor | None]:
        return {"weight": self.lora_unmerged_weight, "bias": self.lora_unmerged_offset}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What is not spoken of stays as it is; a base in common stays merged, as stock's, by all or none.
        unmerges = self.merged and not self._is_common() and speaks_of_merged(self, state_dict, prefix)
        live = self._base() if unmerges else {}
        if unmerges:
            self.unmerge()
        base = self.base_layer
        if isinstance(base.weight, ScaledFp8Weight):
            shape, assign = (base.out_features, base.in_features), args[0].get("assign_to_params_buffers", False)
            try:
                for key in (f"{prefix}base_layer.weight", prefix + KEPT["weight"]):
                    collect(state_dict, key, base.weight, shape, assign)
            except ValueError as error:
                args[-1].append(str(error))
        read_base(self, base, live, state_dict, prefix, prefix + "base_layer.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def speaks_of_merged(layer: Any, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict has something of the layer's base, or of an adapter that is merged into it."""
    merged = {*layer.merged_adapters}
    parts = (key[len(prefix) :].split(".") for key in state_dict if key.startswith(prefix))
    return any(at == "base_layer" or at in KEPT.values() or merged & {*rest} for at, *rest in parts)


def mark_ties(model: nn.Module) -> None:
    """Tell the layers of ours in the model which of them have a base in common with another of PEFT's layers, as one
    parameter or in one memory, by now or when they were told before: what wraps a model may keep a tied parameter
    twice."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    bases = {layer: layer.get_base_layer() for layer in layers}
    held = Counter(_place_of(p) for base in bases.values() for p in base.parameters(recurse=False))
    for layer, base in bases.items():
        if hasattr(layer, "base_is_tied"):
            layer.base_is_tied |= any(held[_place_of(p)] > 1 for p in base.parameters(recurse=False))


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether these are plain tensors of one shape, dtype and device."""
    plain = type(one) in PLAIN and type(other) in PLAIN
    return plain and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _place_of(p: torch.Tensor) -> object:
    """What tensors have in common that are one, or that begin in one place, whatever their shapes."""
    return (p.device, p.data_ptr()) if type(p) in PLAIN and p.data_ptr() else id(p)


def base_is_lent(layer: Any) -> bool:
    """Whether FSDP or ZeRO-3 gathers the base weight for a forward: what is written to it there is lost."""
    return getattr(layer.base_layer, "_is_fsdp_managed_module", False) or zero3.manages(layer)


def spread_scaled(state_dict: dict[str, Any], key: str) -> None:
    """Put the checkpoint's tensors in the place of a weight that was loaded in fp8."""
    if isinstance(state_dict.get(key), ScaledFp8Weight):
        spread(state_dict, key)


def for_an_adapters_file() -> bool:
    """Whether PEFT itself takes the state dict, to pick an adapter from it by ``lora_`` in the keys."""
    return _caller(lambda frame: frame.f_code.co_name == "get_peft_model_state_dict") is not None


def _has_no_data_anywhere() -> bool:
    """Whether PEFT's tuner merges a model in which no hook of accelerate is, to bring data: a layer by itself cannot
    tell whether one brings its own for a module around."""
    frame = _caller(lambda frame: isinstance(frame.f_locals.get("self"), BaseTuner))
    return frame is not None and not any("_hf_hook" in vars(m) for m in frame.f_locals["self"].modules())


def _caller(is_it: Callable[[Any], bool]) -> Any:
    """The frame of the nearest call under way for which this holds, or None."""
    frame: Any = sys._getframe()
    while frame is not None and not is_it(frame):
        frame = frame.f_back
    return frame
