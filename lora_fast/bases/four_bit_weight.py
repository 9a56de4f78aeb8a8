"""What all weights in 4 bits have in common. The kinds are in four_bits.py."""

from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from lora_fast.bases.four_bit_tables import quant_state
from lora_fast.bases.written import SHARDS, WrittenWeight


class FourBitWeight(WrittenWeight):
    """A frozen weight [N, K], ``table[code] * scale`` in float32, rounded to the dtype that it acts as.

    Inner tensors: packed [N K / 2] uint8, two elements of a row a byte, absmax [N K / block], from which the scale of
    each block of consecutive elements follows, and table [16] float32.
    """

    LOW_FIRST: ClassVar[bool] = False  # which half of a byte is the first of its two elements
    BLOCK: ClassVar[int]  # of :meth:`quantise`
    ROUNDING = 2**-3
    DIVIDED = "its rows, into parts of an even number of elements"  # by the processes of FSDP2
    packed: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor

    @classmethod
    def check(cls, weight: torch.Tensor) -> None:
        super().check(weight)
        if weight.numel() % cls.BLOCK:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected N * K a multiple of {cls.BLOCK}")

    def scales(self) -> torch.Tensor:
        """Of the blocks, float32."""
        return self.absmax

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return 2 * self.packed.numel() // self.absmax.numel()

    def blocks(self) -> torch.Tensor:
        """The numbers of the blocks that absmax is of."""
        return torch.arange(self.absmax.numel(), device=self.absmax.device)

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all elements times their scales."""
        return values.view(-1, self.block) * self.scales()[:, None]

    def divides(self, count: int) -> bool:
        """Whether each of so many processes could keep whole bytes of as many rows."""
        n, k = self.shape
        return n % count == 0 and n // count * k % 2 == 0

    def parts(self, count: int) -> "list[WrittenWeight]":
        n, k = self.shape
        kind: Any = SHARDS[type(self)]
        cut = ("packed", "absmax") if n // count * k % self.block == 0 else ("packed",)
        inner = [t.chunk(count) if name in cut else count * (t,) for name in self.INNER for t in [getattr(self, name)]]
        firsts = torch.arange(0, n, n // count, device=self.packed.device).split(1)
        told = {"shape": (n // count, k), "dtype": self.dtype, "block": self.block}
        return [kind(first, *parts, **told) for first, *parts in zip(firsts, *inner, strict=True)]

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``table[code] * scale`` [N, K], in ``dtype`` or in what this acts as: a plain tensor."""
        low, high = self.packed & 15, self.packed >> 4
        codes = torch.stack((low, high) if self.LOW_FIRST else (high, low), -1).view(-1)
        return self.scaled(self.table[codes.int()]).to(dtype or self.dtype).view(self.shape)

    # What torch's distributed checkpoints ask for by the keys of four_bit_files.
    quant_map = property(attrgetter("table"))

    @property
    def quant_state(self) -> SimpleNamespace:
        quant_type, written = quant_state(self)
        return SimpleNamespace(**{f"bitsandbytes__{quant_type}": written})

    def is_made_from(self, weight: torch.Tensor) -> bool:
        return all(map(torch.equal, self.exact().store(weight.contiguous()), self.stored_tensors()))
