"""A frozen weight in 4 bits an element, which is written out in the products' dtype, or in e4m3, ahead of each product.

NF4 (Dettmers et al. 2023, arXiv 2305.14314) in bitsandbytes' layout and with its numbers, to the bit, and MXFP4 (OCP
Microscaling Formats 1.0).
"""

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F

from lora_fast.bases.four_bit_tables import E2M1, NESTED_BLOCK, NF4, dynamic_map, middles_of, nearest
from lora_fast.bases.four_bit_weight import FourBitWeight
from lora_fast.bases.written import WithE4m3, known

__all__ = [
    "E2M1",
    "KINDS",
    "NESTED_BLOCK",
    "NF4",
    "BlockE4m3Weight",
    "BlockWeight",
    "FourBitWeight",
    "Mxfp4E4m3Weight",
    "Mxfp4Weight",
    "Nf4E4m3Weight",
    "Nf4Weight",
    "dynamic_map",
]
STORED = ("packed", "absmax", "table")
NESTED = (*STORED, "code2", "absmax2", "offset")


class BlockWeight(FourBitWeight):
    """NF4 or FP4 (as the table says) with a scale in float32 for each block, as bitsandbytes keeps them without
    ``bnb_4bit_use_double_quant``: 4.5 bits an element with blocks of 64."""

    INNER: tuple[str, ...] = STORED
    BASE, LABEL, BLOCK = "four_bits", "4-bit", 64

    @classmethod
    def store(cls, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = torch.tensor(NF4, device=weight.device)
        codes, absmax = nearest(weight.float().view(-1, cls.BLOCK), table)
        codes = codes.view(-1, 2)
        return codes[:, 0] << 4 | codes[:, 1], absmax, table


class Nf4Weight(FourBitWeight):
    """NF4 whose scales are kept in 8 bits: ``code2[absmax] * absmax2 + offset``, absmax2 [blocks / 256] for 256 blocks
    each, in float32, two roundings. 4.13 bits an element."""

    INNER: tuple[str, ...] = NESTED
    BASE, LABEL, BLOCK = "four_bits_nested", "nf4", 64
    code2: torch.Tensor
    absmax2: torch.Tensor
    offset: torch.Tensor
    nested_absmax, nested_quant_map = property(attrgetter("absmax2")), property(attrgetter("code2"))

    @classmethod
    def store(cls, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cls.nested(*BlockWeight.store(weight))

    @staticmethod
    def nested(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inner tensors of a weight whose scales absmax are float32."""
        code2, offset = dynamic_map().to(packed.device, copy=True), absmax.mean()
        rest = absmax - offset
        codes, absmax2 = nearest(F.pad(rest, (0, -len(rest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK), code2)
        return packed, codes.view(-1)[: len(rest)].clone(), table, code2, absmax2, offset.view(1)

    def scales(self) -> torch.Tensor:
        return self.code2[self.absmax.int()] * self.absmax2[self.blocks() // NESTED_BLOCK] + self.offset

    def is_made_from(self, weight: torch.Tensor) -> bool:
        """But for ``offset``, a mean that devices sum in other orders, and what follows from it."""
        made = Nf4Weight(*self.store(weight.contiguous()), shape=self.shape, dtype=self.dtype)
        pairs = {name: (getattr(made, name), getattr(self, name)) for name in NESTED}
        if made.block != self.block or not all(torch.equal(*pairs[name]) for name in ("packed", "table", "code2")):
            return False
        codes, held = pairs["absmax"]
        near = all(torch.allclose(*pairs[name], rtol=1e-4) for name in ("absmax2", "offset"))
        return near and bool(((codes.int() - held.int()).abs() <= 1).all())


class Mxfp4Weight(FourBitWeight):
    """e2m1 over a power of two for each 32 elements, kept as its exponent plus 127: 4.25 bits an element."""

    INNER: tuple[str, ...] = STORED
    BASE, LABEL, BLOCK, LOW_FIRST = "mxfp4", "mxfp4", 32, True

    @classmethod
    def store(cls, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = torch.tensor(E2M1, device=weight.device)
        blocks = weight.float().view(-1, cls.BLOCK)
        exponents = (blocks.abs().amax(1).view(torch.int32) >> 23).clamp_min(
            3
        ) - 2  # of the peak, less e2m1's, plus 127
        scaled = torch.ldexp(blocks, 127 - exponents[:, None])
        # To nearest, of two that are as near that with an even code.
        below, above = (
            torch.bucketize(scaled.abs(), middles_of(table[:8]), out_int32=True, right=right) for right in (False, True)
        )
        codes = torch.where(below % 2 == 0, below, above)
        codes = (codes | (torch.signbit(scaled).int() << 3)).to(torch.uint8).view(-1, 2)
        return codes[:, 1] << 4 | codes[:, 0], exponents.to(torch.uint8), table

    def scales(self) -> torch.Tensor:
        exponents = self.absmax.int()
        bits = torch.where(exponents == 0, 1 << 22, torch.where(exponents == 255, 0x7FC00000, exponents << 23))
        return bits.view(torch.float32)


class BlockE4m3Weight(WithE4m3, BlockWeight):
    INNER, BASE = ("row_scale", *STORED, "col_scale"), "four_bits_e4m3"


class Nf4E4m3Weight(WithE4m3, Nf4Weight):
    INNER, BASE = ("row_scale", *NESTED, "col_scale"), "four_bits_nested_e4m3"


class Mxfp4E4m3Weight(WithE4m3, Mxfp4Weight):
    INNER, BASE = ("row_scale", *STORED, "col_scale"), "mxfp4_e4m3"


PAIRS: dict[Any, Any] = {BlockWeight: BlockE4m3Weight, Nf4Weight: Nf4E4m3Weight, Mxfp4Weight: Mxfp4E4m3Weight}
KINDS: dict[str, type[FourBitWeight]] = {kind.BASE: kind for pair in PAIRS.items() for kind in pair}
known(PAIRS)
