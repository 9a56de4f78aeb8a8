"""4-bit weights under FSDP2: each process keeps the bytes of some rows."""

from typing import Any

import torch

from lora_fast.bases.four_bit_weight import FourBitWeight
from lora_fast.bases.four_bits import KINDS
from lora_fast.bases.written import SHARDS
from lora_fast.bases.written_shards import WrittenShard


class FourBitShard(WrittenShard, FourBitWeight):
    """The packed bytes of N/P rows of a 4-bit weight [N, K], from row ``first`` on, and their absmax where the blocks
    divide; the rest, and else absmax, too, is whole in each process."""

    first: torch.Tensor  # [1] int64
    elements: int  # that share a scale

    @staticmethod
    def __new__(cls, *inner, shape, dtype, block):  # type: ignore[no-untyped-def]
        self = cls.hold(torch.Size(shape), dtype, *inner)
        self.elements = block
        return self

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

    def told(self) -> dict[str, Any]:
        return super().told() | {"block": self.block}

    def gathered(self) -> tuple[str, ...]:
        return ("packed", "absmax") if self.has_own_scales else ("packed",)


for _kind in KINDS.values():
    _name = _kind.__name__.replace("Weight", "Shard")
    SHARDS[_kind] = type(_name, (FourBitShard, _kind), {"INNER": ("first", *_kind.INNER)})
