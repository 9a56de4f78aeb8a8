"""What a layer's state dict holds of a weight in 4 bits, or of one as fp8 checkpoints hold it: plain tensors by the
names that checkpoints have for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_fast.bases import four_bit_files, packed_as, scaled
from lora_fast.bases.four_bits import FourBitWeight, Mxfp4Weight
from lora_fast.bases.fp8 import E4M3
from lora_fast.bases.packed import PackedWeight, packed_in
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.bases.stack import PackedStack
from lora_fast.bases.written import WrittenWeight
from lora_fast.wrappers.gather import is_sharded


class Form(NamedTuple):
    """How a checkpoint holds a weight."""

    names: tuple[str, ...]  # what follows the weight's own
    dtype: torch.dtype  # of what has that name itself
    make: Callable[..., WrittenWeight]  # the weight of these


STACKED_NAMES = {four_bit_files.BLOCKS, four_bit_files.SCALES, *scaled.NAMES}
FORMS = (
    Form(four_bit_files.NAMES, torch.uint8, four_bit_files.from_tensors),
    Form(scaled.NAMES, E4M3, ScaledFp8Weight.from_tensors),
)


def _by_experts(name: str, t: torch.Tensor) -> bool:
    """Whether the first dimension of this part of a stack is the experts'."""
    return name in STACKED_NAMES or t.dtype == E4M3


def tensors_of(weight: Any) -> dict[str, torch.Tensor]:
    """The plain tensors of such a weight, by what follows its name; none of another one. Those of experts are their
    matrix's, with a dimension of experts ahead, but for NF4's, which bitsandbytes has flat."""
    if isinstance(weight, PackedStack):
        found, experts = tensors_of(weight.matrix), len(weight)
        return {name: t.unflatten(0, (experts, -1)) if _by_experts(name, t) else t for name, t in found.items()}
    if isinstance(weight, PackedWeight) and weight.WHOLE:
        if isinstance(weight, ScaledFp8Weight):
            return weight.tensors()
        if isinstance(weight, FourBitWeight):
            return four_bit_files.to_tensors(weight)
    return {}


def spread(state_dict: dict[str, Any], key: str) -> None:
    """Put plain tensors into a state dict in the place of such a weight that it has there."""
    if tensors := tensors_of(state_dict.get(key)):
        del state_dict[key]
        state_dict.update({key + name: t for name, t in tensors.items()})


class Stack(NamedTuple):
    """What makes a weight of experts of their matrix."""

    experts: int
    turned: bool

    def rows(self, key: str, name: str, t: Any) -> Any:
        """A tensor of their state dict, as the matrix has it.

        Raises:
            ValueError: it is that of another number of experts.
        """
        if not (isinstance(t, torch.Tensor) and _by_experts(name, t) and t.dim() > 1):
            return t
        if len(t) != self.experts:
            raise ValueError(f"{key}{name}: got shape {tuple(t.shape)}, expected {self.experts} experts first")
        return t.flatten(0, 1)


def collect(
    state_dict: dict[str, Any],
    key: str,
    own: torch.Tensor,
    shape: tuple[int, int],
    assign: bool,
    stack: Stack | None = None,
) -> None:
    """The other way round, of a state dict that is about to be loaded over ``own`` [N, K], or put in its place; of a
    ``stack`` of experts [E, N, K] ``shape`` is their matrix's.

    Raises:
        ValueError: the tensors make no such weight, or one that is packed in another way than ``own``.
    """
    given: Any = state_dict.get(key)
    for form in FORMS:
        parts = {name: state_dict[key + name] for name in form.names if key + name in state_dict}
        if parts or getattr(given, "dtype", None) == form.dtype:
            break
    else:
        return
    parts = parts if given is None else {"": given, **parts}
    if stack is not None:
        parts = {name: stack.rows(key, name, t) for name, t in parts.items()}
    found: Any = form.make(parts, shape, own.dtype, key)
    _check(key, found, own.matrix if isinstance(own, PackedStack) else own, assign)
    for name in parts:
        del state_dict[key + name]
    if stack is not None:
        found = PackedStack.of(found, *stack)
    state_dict[key] = found.for_e4m3() if isinstance(own, WrittenWeight) and own.E4M3_PRODUCTS else found


def describe(weight: WrittenWeight) -> str:
    """How it is kept, in words."""
    if isinstance(weight, ScaledFp8Weight):
        return f"fp8 with {weight.scale.dtype} scales of shape {tuple(weight.scale.shape)}"
    assert isinstance(weight, FourBitWeight)
    return four_bit_files.describe(weight)


def _check(key: str, found: WrittenWeight, own: torch.Tensor, assign: bool) -> None:
    """Whether it may be loaded there: in the place of a weight in bitsandbytes' layout any other in that layout, of one
    in fp8 any with other scales."""
    if is_sharded(own):
        raise ValueError(f"{key}: got {describe(found)}, expected it before fully_shard, whose shards take none")
    if (packed := packed_in(own)) is None:
        return
    if not isinstance(packed, WrittenWeight):
        raise ValueError(f"{key}: got {describe(found)}, expected the {packed.LABEL} base's own form or a plain weight")
    related = _layout(found) == _layout(packed)
    if not (related and assign) and describe(found) != describe(packed):
        hint = " (assign=True takes either)" if related and not assign else ""
        raise ValueError(f"{key}: got {describe(found)}, expected {describe(packed)}{hint}")


def _layout(weight: WrittenWeight) -> type:
    kinds = (ScaledFp8Weight, Mxfp4Weight, FourBitWeight)
    return next(kind for kind in kinds if isinstance(weight, kind))


def pack_given(state_dict: dict[str, Any], key: str, own: torch.Tensor) -> None:
    """Pack a plain weight of a state dict as the one is in whose place it is about to be put, if that one is.

    Raises:
        TypeError, ValueError: it cannot be.
    """
    given = state_dict.get(key)
    if isinstance(own, PackedWeight) and isinstance(given, torch.Tensor) and given.shape == own.shape:
        if not isinstance(given, PackedWeight) and not is_sharded(given):
            try:
                alike = own.quantised_alike(given) if isinstance(own, PackedStack) else packed_as(given, type(own))
                state_dict[key] = alike
            except (TypeError, ValueError) as error:
                raise type(error)(f"{key}: {error}") from None


def part_of(weight: str, name: str) -> property:
    """The attribute of a layer that torch's distributed checkpoints ask for by the key of a part of its weight."""

    def get(self: Any) -> torch.Tensor:
        if (found := tensors_of(getattr(self, weight)).get(name)) is None:
            raise AttributeError(f"{type(self).__name__} has no {weight}{name}")
        return found

    return property(get)
