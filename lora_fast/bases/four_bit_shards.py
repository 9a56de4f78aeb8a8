"""4-bit weights under FSDP2: each process keeps the bytes of some rows."""

from typing import Any, Self

import torch
from torch import nn

from lora_fast.bases.four_bit_weight import SHARDS, FourBitWeight
from lora_fast.bases.four_bits import KINDS


class FourBitShard(FourBitWeight):
    """What each of P processes keeps of a 4-bit weight [N, K] under ``fully_shard``: the packed bytes of N/P rows, from
    row ``first`` on, and their absmax where the blocks divide; the rest, and else absmax, too, is whole in each. It
    acts as its rows; FSDP2 gathers the bytes from it before a layer runs."""

    WHOLE = False
    first: torch.Tensor  # [1] int64
    elements: int  # that share a scale

    @staticmethod
    def __new__(cls, *inner, shape, dtype, block):  # type: ignore[no-untyped-def]
        self = cls.hold(torch.Size(shape), dtype, *inner)
        self.elements = block
        return self

    @classmethod
    def quantise(cls, weight: torch.Tensor) -> Self:
        raise RuntimeError(f"a shard of an {cls.LABEL} weight takes no other weight: load it before fully_shard")

    @property
    def block(self) -> int:
        return self.elements

    @property
    def has_own_scales(self) -> bool:
        """Whether absmax is that of these rows alone."""
        return self.absmax.numel() * self.block == self.numel()

    def blocks(self) -> torch.Tensor:
        start = self.first * self.shape[1] // self.block if self.has_own_scales else 0
        return super().blocks() + start

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        if self.has_own_scales:
            return super().scaled(values)
        elements = self.first * self.shape[1] + torch.arange(self.numel(), device=self.device)
        return values * self.scales()[elements // self.block]

    def multiplied(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.dequantise(dtype)

    def like(self, inner: Any, dtype: torch.dtype) -> Self:
        return type(self)(*inner, shape=self.shape, dtype=dtype, block=self.block)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), (tuple(self.shape), self.dtype, self.block)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], found: Any, *_: Any) -> Self:
        shape, dtype, block = found
        return cls(*(inner[name] for name in cls.INNER), shape=shape, dtype=dtype, block=block)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = [getattr(self, name) for name in self.INNER]
        told = tuple(self.shape), self.dtype, self.block
        return unpickled_shard, (self.BASE, inner, *told, isinstance(self, nn.Parameter))

    def gathered(self) -> tuple[str, ...]:
        """The names of what no process has whole."""
        return ("packed", "absmax") if self.has_own_scales else ("packed",)

    def fsdp_pre_all_gather(self, mesh: Any, size: Any, stride: Any, module: Any, mp_policy: Any) -> tuple[Any, Any]:
        names = self.gathered()
        kept = {name: getattr(self, name) for name in self.INNER if name not in ("first", *names)}
        return tuple(getattr(self, name) for name in names), (names, kept, size)

    def fsdp_post_all_gather(
        self, gathered: tuple[torch.Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        names, kept, size = metadata
        if out is not None:  # made of the gathered tensors, to which FSDP2 has given their memory back
            for name, t in kept.items():
                setattr(out, name, t)
            return None
        kind: Any = KINDS[self.BASE]
        parts = kept | dict(zip(names, gathered, strict=True))
        return kind(*(parts[name] for name in kind.INNER), shape=size, dtype=dtype), gathered


def unpickled_shard(
    base: str, inner: list[torch.Tensor], shape: Any, dtype: torch.dtype, block: int, parameter: bool
) -> torch.Tensor:
    kind: Any = SHARDS[KINDS[base]]
    weight = kind(*inner, shape=shape, dtype=dtype, block=block)
    return nn.Parameter(weight, requires_grad=False) if parameter else weight


torch.serialization.add_safe_globals([unpickled_shard])  # for torch.load, which reads weights only
for _kind in KINDS.values():
    _name = _kind.__name__.replace("Weight", "Shard")
    SHARDS[_kind] = type(_name, (FourBitShard, _kind), {"INNER": ("first", *_kind.INNER)})
