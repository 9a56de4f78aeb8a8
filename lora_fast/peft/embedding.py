"""PEFT's LoRA embedding with a fused forward: what ``patch_peft`` makes of instances of it."""

from typing import Any

import torch
from peft.tuners.lora import Embedding
from torch.nn.modules import module as torch_module

from lora_fast import dispatch
from lora_fast.blocks.gated import hooked
from lora_fast.checks import FLOATS
from lora_fast.embedding import lora_embedding
from lora_fast.kept import PLAIN
from lora_fast.peft.merging import NOT_KEPT, base_is_lent, speaks_of_merged
from lora_fast.peft.rules import HOOKS_ON_ALL, NO_VARIANT, is_scaled, parameter, why_embedding_never_fused, why_hooked
from lora_fast.peft.scalings import is_number
from lora_fast.wrappers import fsdp1, zero3
from lora_fast.wrappers.placement import settle

DoraEmbeddingVariant: Any
try:
    from peft.tuners.lora.dora import DoraEmbeddingLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant
except ImportError:  # before PEFT had variants, DoRA was the only one
    from peft.tuners.lora.dora import DoraEmbeddingLayer

    DoraEmbeddingVariant = None
MiCAEmbeddingVariant: Any
try:
    from peft.tuners.lora.variants import MiCAEmbeddingVariant
except ImportError:
    MiCAEmbeddingVariant = None

FUSED_VARIANTS = type(None), DoraEmbeddingVariant, MiCAEmbeddingVariant
Part = tuple[str, torch.Tensor, torch.Tensor]  # an adapter's name, A [R, V] and B [N, R]


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_embedding_A]


def is_dora(layer: Any, name: str) -> bool:
    if DoraEmbeddingVariant is None:
        return bool(layer.use_dora.get(name, False))
    return type(layer.lora_variant.get(name)) is DoraEmbeddingVariant


def examine(layer: Any, names: list[str], gathered: bool = False) -> str | list[Part]:
    """Why the layer, in its present state and with these active adapters, runs stock PEFT's forward, in words; or, if
    it need not, what each of them is made of. ``gathered``: FSDP will have gathered the parameters."""
    base = layer.base_layer
    if why := why_embedding_never_fused(layer):  # the base may have been exchanged
        return why
    if hooked(base):
        return why_hooked(base)
    weight = base_weight(base)
    if zero3.is_split(weight):
        return zero3.LEFT
    if not gathered and type(weight) not in PLAIN:
        return f"the base weight is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"the base weight is quantised ({weight.dtype})"
    if weight.requires_grad:
        return "the base weight requires grad"
    parts: list[Part] = []
    for name in names:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        if not gathered and (type(a) not in PLAIN or type(b) not in PLAIN):
            return f"an adapter's weight is a {type(b if type(a) in PLAIN else a).__name__}"
        if DoraEmbeddingVariant is not None:
            variant = type(layer.lora_variant.get(name))
            if variant not in FUSED_VARIANTS:
                return f"{variant.__name__}: {NO_VARIANT}"
        if not is_number(layer.scaling[name]):
            return f"the scaling is {layer.scaling[name]!r}, not a finite number"
        if is_dora(layer, name):
            if len(names) > 1:
                return "several active adapters, one of them DoRA"
            magnitude = layer.lora_magnitude_vector[name]
            if type(magnitude) is not DoraEmbeddingLayer or hooked(magnitude):
                return "the magnitude has hooks or a replaced forward"
        parts.append((name, a, b))
    return parts


def base_weight(base: Any) -> torch.Tensor:
    """The base's weight, as FSDP1 or whoever else holds it."""
    weight: torch.Tensor = parameter(base, "weight")
    return fsdp1.as_asked(weight, base) if type(weight) is torch.Tensor else weight


class FastEmbedding(Embedding):
    """``peft.tuners.lora.Embedding`` that runs plain LoRA and DoRA adapters through :mod:`lora_fast.embedding`.

    Not constructed, but put in place of an instance's class (:meth:`adopt`). Parameters are PEFT's own, read in each
    call; where anything is out of the ordinary (:func:`examine`) the call is stock PEFT's, with one warning for each
    reason. Merging, and all else, is stock PEFT's.
    """

    STOCK: type = Embedding
    base_layer: Any
    base_is_tied: bool = False  # as mark_ties saw it

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Make ``layer``, of which :func:`why_embedding_never_fused` finds nothing, one of these."""
        layer.__class__ = cls

    def release(self) -> None:
        """Make the layer stock again."""
        vars(self).pop("base_is_tied", None)
        self.__class__ = self.STOCK

    def _get_name(self) -> str:
        return Embedding.__name__  # as stock's, which tools compare

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [...], ids, to y [..., N], as stock PEFT's; raises as it does, or as
        :func:`lora_fast.embedding.lora_embedding`."""
        if not self.disable_adapters and not self.merged and (names := active(self)):
            parts = self._why_not_this_call(x, args, kwargs) or examine(self, names)
            if not isinstance(parts, str):
                return self._fused(x, parts)
            dispatch.tell("leaves a layer to stock PEFT", parts)
        elif self.disable_adapters and self.merged and base_is_lent(self):  # stock unmerges here
            raise ValueError(NOT_KEPT)
        return super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; under FSDP2 in the shards, also where a forward has left the weight gathered."""
        settle(self)
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """As in PEFT, where :meth:`merge` is."""
        settle(self)
        super().unmerge()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Unmerged first where the dict has something of what is merged, as linear layers are."""
        if self.merged and not self.base_is_tied and speaks_of_merged(self, state_dict, prefix):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _why_not_this_call(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if kwargs.get("adapter_names") is not None:
            return "several adapters in one batch (adapter_names) of an embedding"
        if args or any(value is not None for value in kwargs.values()):
            return f"forward was given more than x: {', '.join(kwargs) or 'positional arguments'}"
        if type(x) not in PLAIN or x.dtype not in (torch.int32, torch.int64):
            return f"the input is a {type(x).__name__} of {getattr(x, 'dtype', None)}, not of ids"
        return HOOKS_ON_ALL if torch_module._has_any_global_hook() else None

    def _fused(self, x: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        base, (name, a, b) = self.base_layer, parts[0]
        scaling: float | torch.Tensor = float(self.scaling[name])
        vectors: Any = self.lora_magnitude_vector
        magnitude = vectors[name].weight if is_dora(self, name) else None
        if len(parts) > 1:  # the sum of the adapters is one adapter, stacked along r
            a = torch.cat([a for _, a, _ in parts])
            b = torch.cat([b * self.scaling[name] for name, _, b in parts], 1)
            scaling = 1.0
        return lora_embedding(
            x,
            base_weight(base),
            a,
            b,
            scaling,
            magnitude,
            embed_scale=base.embed_scale if is_scaled(base) else None,
            padding_idx=base.padding_idx,
            round_norm=True,
        )
