"""Merging an adapter into its layer's weight and taking it out, bit for bit; what a state dict holds of that."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lora_fast.bases import LABELS
from lora_fast.bases.four_bit_files import BLOCKS, SCALES
from lora_fast.bases.packed import PackedWeight, is_opaque, is_packed, packed_in
from lora_fast.bases.scaled import BY_BLOCKS, BY_ROWS
from lora_fast.layers.merged_state import KEPT, add_kept, read_base
from lora_fast.layers.packed_state import collect, pack_given, part_of, spread
from lora_fast.wrappers.gather import is_sharded
from lora_fast.wrappers.placement import kind_of, offloading, place_of_weight, present, write
from lora_fast.wrappers.zero3 import written


class Merging(nn.Module):
    """A layer whose adapter, a subclass's, can be merged into its weight, and which keeps the base until then. It has a
    buffer ``unmerged_weight``, None at first, which is not persistent while it is there (accelerate moves those).

    Attributes:
        merged: whether it is.
    """

    base_is_tied = False  # as add_lora saw it: other modules have the base weight, too
    weight: torch.Tensor
    unmerged_weight: torch.Tensor | None

    @property
    def whole_shape(self) -> tuple[int, int]:
        """The weight's, of which a shard has a part."""
        raise NotImplementedError

    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """The base weight, or ``original``, with the adapter in it, in float32 or better."""
        raise NotImplementedError

    def parts_of_adapter(self) -> tuple[str, ...]:
        """Names in a state dict of what a merge is made with."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``.

        Raises:
            TypeError: a weight that the layer could not compute with (torchao's).
            ValueError: another weight while the layer is merged, which would end the merge without a word.
        """
        if name == "weight" and self._buffers.get("unmerged_weight") is not None:
            held = self._parameters.get(name)  # not there while FSDP1 changes it
            if held is not None and held is not param:
                raise ValueError(
                    "weight: the layer is merged; unmerge_lora first, then assign a weight, or tie it (tie_weights and "
                    "resize_token_embeddings of transformers do), expected no other one until then"
                )
        if name == "weight" and param is not None and is_opaque(param):
            raise TypeError(
                f"weight: got a {type(param).__name__}, which a {type(self).__name__} cannot compute with; quantise "
                f"all but the LoRA layers, or remove_lora first (add_lora's base_dtype keeps bases in 8 bits)"
            )
        super().register_parameter(name, param)

    def check_weight(self) -> None:
        """Raise ValueError where another one cannot take the weight's place, for torch would not leave it there."""
        if "weight" not in self._parameters:
            raise ValueError(
                "weight: is computed in each forward (by torch's prune, weight_norm, spectral_norm, or a "
                "parametrization), expected a parameter; prune.remove, remove_spectral_norm, remove_parametrizations "
                "and the like make it one"
            )

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @property
    def base_weight(self) -> torch.Tensor:
        """The frozen weight without the adapter, whether merged or not."""
        return self.weight if self.unmerged_weight is None else self.unmerged_weight

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """Put :meth:`merged_weight`, summed in float32 and rounded once, in W's place; nothing if merged already.

        The base weight is kept for :meth:`unmerge`, so a merged layer holds two weights; layers that share the base
        weight with this one do not change. Moving or casting the model while merged can part them (the values stay
        right). A weight that FSDP2 shards, or accelerate keeps on the CPU, is changed in place, in all layers that
        share it; under FSDP2 all processes merge together.

        A state dict of a merged layer holds the merged ``weight``, and the base as ``lora_unmerged_weight``; loaded
        into any such layer, merged or not, it makes that the base again.

        ``original`` [out, in], in the base's dtype, is the weight that an fp8 base was made from: W is then this one,
        without the base's rounding, and so is it in DoRA's norm. Unmerging gives the fp8 base back. A state dict that
        is loaded while the layer is merged has it merged anew, into the base.

        Raises:
            TypeError, ValueError: an ``original`` of another dtype or shape, or that an fp8 base was not made from; a
                base that is not fp8; with ``safe_merge``, a merged weight that is not finite; a weight that cannot be
                written to (fp8 in shards or offloaded, on disk, FSDP1's outside summon_full_params, computed in each
                forward). The layer is then as it was.
        """
        if self.merged:
            return
        if original is not None:
            if not isinstance(self.weight, PackedWeight):
                raise ValueError(
                    f"original: got a tensor, expected None over a base that is not {LABELS} ({self.weight.dtype})"
                )
            self.weight.check_original(original)
        place = place_of_weight(self)
        if place is None:
            self.check_weight()
        with kind_of(self.weight), written(self.parameters()):
            with present(self):
                merged = self.merged_weight(original).to(self.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError("safe_merge: the merged weight has NaN or infinite elements; the layer stays unmerged")
            if place is None:
                base, self.weight = self.weight, nn.Parameter(merged, requires_grad=False)
                self.register_buffer("unmerged_weight", base, persistent=False)
            else:
                base = place.detach().clone()
                write(place, merged)
                self.register_buffer("unmerged_weight", base, persistent=False)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit; nothing if not merged. Raises ValueError as :meth:`merge` does of a
        weight that cannot be written to; the layer stays merged then."""
        if (base := self.unmerged_weight) is None:
            return
        place = place_of_weight(self)
        with kind_of(self.weight), written(self.parameters()):
            self._put_back(base, place)

    def _put_back(self, base: torch.Tensor, place: torch.Tensor | None) -> None:
        # By FSDP2, if it is there.
        ignored = is_packed(base) and not is_sharded(self.weight) and offloading(self) is None
        if place is None or ignored:
            self.register_buffer("unmerged_weight", None)
            self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
            return
        if (packed := packed_in(base)) is not None:
            raise ValueError(
                f"weight: is sharded or offloaded, expected it as it was merged to put the {packed.LABEL} base back"
            )
        write(place, base)
        self.register_buffer("unmerged_weight", None)

    def live_values(self) -> Iterator[dict[str, torch.Tensor]]:
        """Of an unmerged layer: what its weight may be once it is merged, whole."""
        if getattr(self, "_magnitude_is_set", True):
            with present(self):
                yield {"weight": self.merged_weight()}

    @property
    def lora_unmerged_weight(self) -> torch.Tensor | None:
        """What a merge kept, by its name in a state dict, by which torch's distributed checkpoints ask for it."""
        return self.unmerged_weight

    weight_blocks, weight_scales = part_of("weight", BLOCKS), part_of("weight", SCALES)
    weight_scale_inv, weight_scale = part_of("weight", BY_BLOCKS), part_of("weight", BY_ROWS)
    lora_unmerged_weight_blocks = part_of("unmerged_weight", BLOCKS)
    lora_unmerged_weight_scales = part_of("unmerged_weight", SCALES)
    lora_unmerged_weight_scale_inv = part_of("unmerged_weight", BY_BLOCKS)
    lora_unmerged_weight_scale = part_of("unmerged_weight", BY_ROWS)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        kept = self.unmerged_weight
        if kept is not None and self.base_is_tied and not keep_vars:
            kept = kept.clone()  # safetensors and transformers take no two names for one memory
        add_kept({"weight": kept}, destination, prefix, keep_vars)
        for name in ("weight", KEPT["weight"]):
            spread(destination, prefix + name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        merged, live = self.merged, {"weight": self.weight}
        own = {key: t for key, t in state_dict.items() if key.startswith(prefix)}
        shape, assign = self.whole_shape, args[0].get("assign_to_params_buffers", False)
        try:
            for name in ("weight", KEPT["weight"]):
                collect(own, prefix + name, self.base_weight, shape, assign)
        except ValueError as error:
            args[-1].append(str(error))
            return
        self.unmerge()
        read_base(self, self, live if merged else {}, own, prefix, prefix)
        self._load_unmerged(own, prefix, *args)
        if merged:
            self.merge()

    def _load_unmerged(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if args[0].get("assign_to_params_buffers", False):
            try:
                pack_given(state_dict, prefix + "weight", self.weight)
            except (TypeError, ValueError) as error:
                args[-1].append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


class MergingLinear(Merging, nn.Linear):
    """An ``nn.Linear`` whose adapter can be merged, or transformers' Conv1D.

    Attributes:
        fan_in_fan_out: whether the weight is stored as [in, out], as Conv1D's is.
    """

    fan_in_fan_out: bool = False

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("unmerged_weight", None)

    def plain(self) -> nn.Linear:
        """An ``nn.Linear``, or a Conv1D, that shares the present weight and bias; it is still refused in this layer's
        place. Raises ValueError as :meth:`check_weight`."""
        self.check_weight()
        linear: Any
        if self.fan_in_fan_out:
            with torch.device("meta"):
                linear = import_module("transformers.pytorch_utils").Conv1D(self.out_features, self.in_features)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] of a weight as the layer stores it, and the other way round."""
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def whole_shape(self) -> tuple[int, int]:
        n, k = self.out_features, self.in_features
        return (k, n) if self.fan_in_fan_out else (n, k)
