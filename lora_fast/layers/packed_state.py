"""What a layer's state dict holds of a weight in 4 bits: plain tensors by the names that checkpoints have for them."""

from typing import Any

import torch

from lora_fast.bases import packed_as
from lora_fast.bases.four_bit_files import NAMES, describe, from_tensors, to_tensors
from lora_fast.bases.four_bits import FourBitWeight, Mxfp4Weight
from lora_fast.bases.packed import PackedWeight, packed_in
from lora_fast.wrappers.gather import is_sharded


def spread(state_dict: dict[str, Any], key: str) -> None:
    """Put plain tensors into a state dict in the place of the 4-bit weight that it has there, if it is one."""
    weight = state_dict.get(key)
    if isinstance(weight, FourBitWeight) and weight.WHOLE:
        del state_dict[key]
        state_dict.update({key + name: t for name, t in to_tensors(weight).items()})


def collect(state_dict: dict[str, Any], key: str, own: torch.Tensor, shape: tuple[int, int], assign: bool) -> None:
    """The other way round, of a state dict that is about to be loaded over ``own`` [N, K], or put in its place.

    Raises:
        ValueError: the tensors make no such weight, or one that is packed in another way than ``own``.
    """
    given = state_dict.get(key)
    parts = {name: state_dict[key + name] for name in NAMES if key + name in state_dict}
    if not parts and getattr(given, "dtype", None) != torch.uint8:
        return
    found = from_tensors(parts if given is None else {"": given, **parts}, shape, own.dtype, key)
    _check(key, found, own, assign)
    for name in parts:
        del state_dict[key + name]
    state_dict[key] = found.for_e4m3() if isinstance(own, FourBitWeight) and own.E4M3_PRODUCTS else found


def _check(key: str, found: FourBitWeight, own: torch.Tensor, assign: bool) -> None:
    """Whether it may be loaded there: in the place of a weight in bitsandbytes' layout any other in that layout."""
    if is_sharded(own):
        raise ValueError(f"{key}: got {describe(found)}, expected it before fully_shard, whose shards take none")
    if (packed := packed_in(own)) is None:
        return
    if not isinstance(packed, FourBitWeight):
        raise ValueError(f"{key}: got {describe(found)}, expected the {packed.LABEL} base's own form or a plain weight")
    alike = type(found) is packed.exact() and found.block == packed.block
    if not alike and not (assign and isinstance(found, Mxfp4Weight) == isinstance(packed, Mxfp4Weight)):
        hint = "" if assign or packed.LOW_FIRST != found.LOW_FIRST else " (assign=True takes either)"
        raise ValueError(f"{key}: got {describe(found)}, expected {describe(packed)}{hint}")


def pack_given(state_dict: dict[str, Any], key: str, own: torch.Tensor) -> None:
    """Pack a plain weight of a state dict as the one is in whose place it is about to be put, if that one is.

    Raises:
        TypeError, ValueError: it cannot be.
    """
    given = state_dict.get(key)
    if isinstance(own, PackedWeight) and isinstance(given, torch.Tensor) and given.shape == own.shape:
        if not isinstance(given, PackedWeight) and not is_sharded(given):
            try:
                state_dict[key] = packed_as(given, type(own))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{key}: {error}") from None


def part_of(weight: str, name: str) -> property:
    """The attribute of a layer that torch's distributed checkpoints ask for by the key of an MXFP4 weight's part."""

    def get(self: Any) -> torch.Tensor:
        if not isinstance(held := getattr(self, weight), Mxfp4Weight):
            raise AttributeError(f"{type(self).__name__} has no {weight}{name}")
        return to_tensors(held)[name]

    return property(get)
