"""A frozen weight as fp8 checkpoints hold it: one e4m3 byte an element, a scale for each block of 128 x 128 (DeepSeek's
and Qwen's checkpoints, transformers' FP8Linear) or for each row (compressed-tensors' "channel" strategy).

Names are told by what follows the weight's own: "" float8_e4m3fn [N, K], and "_scale_inv" [N / 128, K / 128], rounded
up, float32 or float8_e8m0fnu (its bytes as uint8, too), or "_scale" [N, 1], float32, bfloat16 or float16. In spite of
its name the one is multiplied by as the other is.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lora_fast.bases.fp8 import E4M3, LARGEST
from lora_fast.bases.written import SHARDS, WithE4m3, WrittenWeight, known

BLOCK = 128
E8M0 = torch.float8_e8m0fnu
BY_BLOCKS, BY_ROWS = "_scale_inv", "_scale"
NAMES = BY_BLOCKS, BY_ROWS
SCALES = torch.float32, torch.bfloat16, torch.float16, torch.uint8  # an e8m0's bytes


class ScaledFp8Weight(WrittenWeight):
    """A frozen weight [N, K], ``stored * scale`` in float32, rounded to the dtype that it acts as.

    Inner tensors: stored [N, K] uint8, the bytes of e4m3 elements, and scale, [N / 128, K / 128] rounded up, or [N, 1];
    in uint8 exponents of powers of two, plus 127.
    """

    INNER: tuple[str, ...] = ("stored", "scale")
    BASE, LABEL, ROUNDING = "scaled_fp8", "scaled fp8", 2**-4
    DIVIDED = "its rows, into parts of whole blocks of 128"  # by the processes of FSDP2
    stored: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def store(cls, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise(weight)

    @property
    def by_rows(self) -> bool:
        """Whether each row has its scale, not each block."""
        return self.scale.shape == (self.shape[0], 1)

    def scales(self) -> torch.Tensor:
        """float32, [N, K] or [N, 1]."""
        return spread(as_float(self.scale), self.shape)

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``stored * scale`` [N, K], in ``dtype`` or in what this acts as: a plain tensor."""
        return (self.stored.view(E4M3).float() * self.scales()).to(dtype or self.dtype)

    def quantised_alike(self, weight: torch.Tensor) -> "WrittenWeight":
        type(self).check(weight)
        stored = quantise(weight.detach().contiguous(), self.by_rows, self.scale.dtype)
        return self.exact()(*stored, shape=weight.shape, dtype=weight.dtype).as_kind(type(self))

    def is_made_from(self, weight: torch.Tensor) -> bool:
        """Whether no element is farther off than e4m3 rounds it: by which rule scales were made, no checkpoint says."""
        given, scales = weight.float(), self.scales()
        near = (given - self.dequantise(torch.float32)).abs() <= 1.02 * (2**-4 * given.abs() + 2**-10 * scales)
        return bool(near.all())

    def divides(self, count: int) -> bool:
        n = self.shape[0]
        return n % count == 0 and (self.by_rows or n // count % BLOCK == 0)

    def parts(self, count: int) -> list[WrittenWeight]:
        n, k = self.shape
        kind: Any = SHARDS[type(self)]
        inner = [
            count * (t,) if name == "col_scale" else t.chunk(count)
            for name in self.INNER
            for t in [getattr(self, name)]
        ]
        return [kind(*parts, shape=(n // count, k), dtype=self.dtype) for parts in zip(*inner, strict=True)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by what follows the weight's name: tensors that share this one's memory."""
        scale = self.scale.view(E8M0) if self.scale.dtype == torch.uint8 else self.scale
        return {"": self.stored.view(E4M3), BY_ROWS if self.by_rows else BY_BLOCKS: scale}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Any], shape: torch.Size | tuple[int, int], dtype: torch.dtype, name: str = "weight"
    ) -> "ScaledFp8Weight":
        """The weight [N, K] of such tensors, whose memory it shares; it acts as ``dtype``. ``name`` is the weight's in
        messages. Either name goes with either scale.

        Raises:
            ValueError: a tensor is missing, or is not what it should be for this shape.
        """
        n, k = shape
        stored, key = tensors.get(""), next((key for key in NAMES if key in tensors), None)
        if not isinstance(stored, torch.Tensor) or stored.dtype != E4M3 or stored.shape != (n, k):
            raise ValueError(f"{name}: got {_told(stored)}, expected {E4M3} of shape {(n, k)} beside its scale")
        if key is None:
            raise ValueError(f"{name}: got {E4M3} without a scale, expected {name}{BY_BLOCKS} or {name}{BY_ROWS}")
        scale = tensors[key]
        if why := why_no_scale(tuple(scale.shape), scale.dtype, (n, k)):
            raise ValueError(f"{name}{key}: {why}")
        if scale.dtype == E8M0:
            scale = scale.view(torch.uint8)
        scale = scale.detach().reshape(n, 1) if scale.dim() == 1 else scale.detach()
        return cls(
            stored.detach().contiguous().view(torch.uint8), scale.contiguous(), shape=torch.Size(shape), dtype=dtype
        )


class ScaledFp8E4m3Weight(WithE4m3, ScaledFp8Weight):
    INNER, BASE = ("row_scale", "stored", "scale", "col_scale"), "scaled_fp8_e4m3"


known({ScaledFp8Weight: ScaledFp8E4m3Weight})


def blocks_of(shape: tuple[int, int] | torch.Size) -> tuple[int, int]:
    """How many blocks there are, those at the edges counted."""
    n, k = shape
    return -(-n // BLOCK), -(-k // BLOCK)


def why_no_scale(found: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """Why a tensor of this shape and dtype is no scale that is known of a weight of that shape, in words."""
    n, _ = shape
    if dtype not in (*SCALES, E8M0):
        return f"got {dtype}, expected float32, bfloat16, float16 or float8_e8m0fnu"
    if found in ((n, 1), (n,), blocks_of(shape)):
        return None
    if found in ((), (1,), (1, 1)):
        return f"got one scale for the whole weight (per-tensor), expected one for each 128 x 128 or row: {REMEDY}"
    return f"got shape {found}, expected {blocks_of(shape)}, one for each 128 x 128, or {(n, 1)}, one for each row"


REMEDY = "load the model dequantised (transformers: FineGrainedFP8Config(dequantize=True))"


def as_float(scale: torch.Tensor) -> torch.Tensor:
    """In float32."""
    if scale.dtype != torch.uint8:
        return scale.float()
    exponents = scale.int()
    bits = torch.where(exponents == 0, 1 << 22, torch.where(exponents == 255, 0x7FC00000, exponents << 23))
    return bits.view(torch.float32)


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks [N / 128, K / 128] for each element [N, K]; those of rows [N, 1] as they are."""
    n, k = shape
    if scale.shape == (n, 1):
        return scale
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def quantise(
    weight: torch.Tensor, by_rows: bool = False, kind: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored, scale) of a weight [N, K], in which the largest element of a block or row becomes e4m3's largest, 448,
    or with powers of two (``kind`` uint8) at most that."""
    (n, k), size = weight.shape, weight.abs()
    if by_rows:
        peak = size.amax(1, keepdim=True)
    else:
        rows, cols = blocks_of(weight.shape)
        padded = torch.nn.functional.pad(size, (0, cols * BLOCK - k, 0, rows * BLOCK - n))
        peak = padded.view(rows, BLOCK, cols, BLOCK).amax((1, 3))
    scale = (peak.float() / LARGEST).clamp_min(2.0**-100)
    if kind == torch.uint8:
        scale = ((scale.view(torch.int32) + 0x7FFFFF) >> 23).to(torch.uint8)
    scale = scale.to(kind)
    values = (weight.float() / spread(as_float(scale), weight.shape)).clamp(-LARGEST, LARGEST)
    return values.to(E4M3).view(torch.uint8), scale


def _told(found: Any) -> str:
    return f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else "no tensor"
