"""What all weights in 4 bits have in common: they are written out in the products' dtype, or in e4m3, ahead of each
product. The kinds are in four_bits.py."""

from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_fast import dispatch
from lora_fast.bases.four_bit_tables import quant_state
from lora_fast.bases.fp8 import Fp8Weight, quantise_rows
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.shards import sharding


class FourBitWeight(PackedWeight):
    """A frozen weight [N, K], ``table[code] * scale`` in float32, rounded to the dtype that it acts as.

    Inner tensors: packed [N K / 2] uint8, two elements of a row a byte, absmax [N K / block], from which the scale of
    each block of consecutive elements follows, and table [16] float32.
    """

    LOW_FIRST: ClassVar[bool] = False  # which half of a byte is the first of its two elements
    BLOCK: ClassVar[int]  # of :meth:`quantise`
    ROUNDING, E4M3_PRODUCTS, ROUNDS_NORM = 2**-3, False, True
    DIVIDED = "its rows, into parts of an even number of elements"  # by the processes of FSDP2
    packed: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def __new__(cls, *inner, shape, dtype):  # type: ignore[no-untyped-def]
        return cls.hold(torch.Size(shape), dtype, *inner)

    @classmethod
    @torch.no_grad()
    def quantise(cls, weight: torch.Tensor) -> Self:
        """From ``weight`` [N, K], float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
            ValueError: not two-dimensional, no whole number of blocks, or with elements that are not finite.
        """
        cls.check(weight)
        stored = cls.store(weight.detach().contiguous())
        made = cls.exact()(*stored, shape=weight.shape, dtype=weight.dtype)
        return made.for_e4m3() if cls.E4M3_PRODUCTS else made  # type: ignore[return-value]

    @classmethod
    def store(cls, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inner tensors of an exact one."""
        raise NotImplementedError

    @classmethod
    def check(cls, weight: torch.Tensor) -> None:
        """Raise what :meth:`quantise` would."""
        if isinstance(weight, PackedWeight):
            raise TypeError(f"weight: got an {type(weight).__name__}, expected a plain one to quantise")
        Fp8Weight.check(weight)
        if weight.numel() % cls.BLOCK:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected N * K a multiple of {cls.BLOCK}")
        if cls.E4M3_PRODUCTS:
            check_for_e4m3(weight.shape)

    @classmethod
    def exact(cls) -> "type[FourBitWeight]":
        """The same storage with products in the dtype that it acts as."""
        return next(kind for kind in cls.__mro__ if kind in WITH_E4M3)

    @classmethod
    def for_compute(cls, base_compute: str | None) -> type[PackedWeight]:
        return cls.exact() if base_compute is None else WITH_E4M3[cls.exact()]

    def for_e4m3(self) -> "FourBitWeight":
        """The same tensors, and powers of two for rows and columns, over which the weight is written in e4m3.

        Raises:
            ValueError: N or K is no multiple of 16.
        """
        check_for_e4m3(self.shape)
        dense = self.dequantise()
        rows, columns = quantise_rows(dense)[1], quantise_rows(dense.t())[1]
        kind = WITH_E4M3[type(self)]
        return kind(rows, *self.stored(), columns, shape=self.shape, dtype=self.dtype)

    def as_kind(self, kind: "type[FourBitWeight]") -> "FourBitWeight":
        """The same storage, for other products."""
        exact = self.exact()(*self.stored(), shape=self.shape, dtype=self.dtype)
        return exact.for_e4m3() if kind.E4M3_PRODUCTS else exact

    def stored(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.exact().INNER)

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

    def parts(self, count: int) -> "list[FourBitWeight]":
        """Shards of as many rows, of which FSDP2 keeps one in each process."""
        n, k = self.shape
        kind: Any = SHARDS[type(self)]
        cut = ("packed", "absmax") if n // count * k % self.block == 0 else ("packed",)
        inner = [t.chunk(count) if name in cut else count * (t,) for name in self.INNER for t in [getattr(self, name)]]
        firsts = torch.arange(0, n, n // count, device=self.packed.device).split(1)
        told = {"shape": (n // count, k), "dtype": self.dtype, "block": self.block}
        return [kind(first, *parts, **told) for first, *parts in zip(firsts, *inner, strict=True)]

    def sharded(self, func: Any, *args: Any) -> Any:
        return sharding(func, self, *args)

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``table[code] * scale`` [N, K], in ``dtype`` or in what this acts as: a plain tensor."""
        low, high = self.packed & 15, self.packed >> 4
        codes = torch.stack((low, high) if self.LOW_FIRST else (high, low), -1).view(-1)
        return self.scaled(self.table[codes.int()]).to(dtype or self.dtype).view(self.shape)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = dispatch.autocast_dtype(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x = x.to(dtype)
        with dispatch.no_autocast(x.device):
            y = _Product.apply(x, self, *(getattr(self, name) for name in self.INNER))
            return y if bias is None else y + bias.to(y.dtype)

    def like(self, inner: Any, dtype: torch.dtype) -> Self:
        return type(self)(*inner, shape=self.shape, dtype=dtype)

    # What torch's distributed checkpoints ask for by the keys of four_bit_files.
    quant_map = property(attrgetter("table"))

    @property
    def quant_state(self) -> SimpleNamespace:
        quant_type, written = quant_state(self)
        return SimpleNamespace(**{f"bitsandbytes__{quant_type}": written})

    def is_made_from(self, weight: torch.Tensor) -> bool:
        return all(map(torch.equal, self.exact().store(weight.contiguous()), self.stored()))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), (tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], found: Any, *_: Any) -> Self:
        shape, dtype = found
        return cls(*(inner[name] for name in cls.INNER), shape=shape, dtype=dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = [getattr(self, name) for name in self.INNER]
        return unpickled, (self.BASE, inner, tuple(self.shape), self.dtype, isinstance(self, nn.Parameter))


# Filled by four_bits.py: those with products of e4m3, by the kind with exact ones; all kinds, by BASE. By
# four_bit_shards.py: what FSDP2 keeps of each kind.
WITH_E4M3: dict[type[FourBitWeight], type[FourBitWeight]] = {}
KINDS: dict[str, type[FourBitWeight]] = {}
SHARDS: dict[type[FourBitWeight], type[FourBitWeight]] = {}


def why_not_e4m3(shape: torch.Size) -> str | None:
    """Why a weight of this shape cannot be written in e4m3, in words; None where it can."""
    if not (shape[0] % 16 or shape[1] % 16):
        return None
    return f"base_compute: got float8_e4m3 for {tuple(shape)}, expected N and K to be multiples of 16"


def check_for_e4m3(shape: torch.Size) -> None:
    if why := why_not_e4m3(shape):
        raise ValueError(why)


def unpickled(base: str, inner: list[torch.Tensor], shape: Any, dtype: torch.dtype, parameter: bool) -> torch.Tensor:
    weight = KINDS[base](*inner, shape=shape, dtype=dtype)
    return nn.Parameter(weight, requires_grad=False) if parameter else weight


torch.serialization.add_safe_globals([unpickled])  # for torch.load, which reads weights only


class _Product(torch.autograd.Function):
    """x W^T and dY W, the dense W made anew for each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FourBitWeight, *inner: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inner)
        ctx.weight = type(weight), weight.shape, weight.dtype
        return F.linear(x, weight.dequantise(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kind, shape, dtype = ctx.weight
        inner = ctx.saved_tensors
        return dy @ kind(*inner, shape=shape, dtype=dtype).dequantise(dy.dtype), None, *(None for _ in inner)
