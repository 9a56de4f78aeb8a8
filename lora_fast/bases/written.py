"""What all weights have in common that no product reads: they are written out in the products' dtype, or in e4m3, ahead
of each product. The kinds are in four_bits.py and scaled.py."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_fast import dispatch
from lora_fast.bases.fp8 import E4M3, Fp8Weight, quantise_rows
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.shards import sharding


class WrittenWeight(PackedWeight):
    """A frozen weight [N, K] whose elements are computed from its inner tensors in float32, and rounded to the dtype
    that it acts as. Its products are made in that dtype, or, of the kind that ``WITH_E4M3`` has, of 8-bit operands."""

    E4M3_PRODUCTS, ROUNDS_NORM = False, True

    @staticmethod
    def __new__(cls, *inner, shape, dtype):  # type: ignore[no-untyped-def]
        return cls.hold(torch.Size(shape), dtype, *inner)

    @classmethod
    @torch.no_grad()
    def quantise(cls, weight: torch.Tensor) -> Self:
        """From ``weight`` [N, K], float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
            ValueError: not two-dimensional, of a shape that the kind does not take, or with elements that are not
                finite.
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
            raise TypeError(f"weight: got one in {weight.LABEL}, expected a plain one to quantise")
        Fp8Weight.check(weight)
        if cls.E4M3_PRODUCTS:
            check_for_e4m3(weight.shape)

    @classmethod
    def exact(cls) -> "type[WrittenWeight]":
        """The same storage with products in the dtype that it acts as."""
        return next(kind for kind in cls.__mro__ if kind in WITH_E4M3)

    @classmethod
    def for_compute(cls, base_compute: str | None) -> "type[WrittenWeight]":
        return cls.exact() if base_compute is None else WITH_E4M3[cls.exact()]

    def for_e4m3(self) -> "WrittenWeight":
        """The same tensors, and powers of two for rows and columns, over which the weight is written in e4m3.

        Raises:
            ValueError: N or K is no multiple of 16; elements that are not finite.
        """
        check_for_e4m3(self.shape)
        dense = self.dequantise()
        if dispatch.has_data(dense) and not torch.isfinite(dense).all():
            raise ValueError("weight: has elements that are not finite, expected finite ones for 8-bit products")
        rows, columns = quantise_rows(dense)[1], quantise_rows(dense.t())[1]
        kind = WITH_E4M3[type(self)]
        return kind(rows, *self.stored_tensors(), columns, shape=self.shape, dtype=self.dtype)

    def as_kind(self, kind: type[PackedWeight]) -> "WrittenWeight":
        """The same storage, for other products."""
        exact = self.exact()(*self.stored_tensors(), shape=self.shape, dtype=self.dtype)
        return exact.for_e4m3() if kind.E4M3_PRODUCTS else exact

    def stored_tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.exact().INNER)

    def divides(self, count: int) -> bool:
        """Whether each of so many processes could keep as many rows."""
        raise NotImplementedError

    def parts(self, count: int) -> "list[WrittenWeight]":
        """Shards of as many rows, of which FSDP2 keeps one in each process."""
        raise NotImplementedError

    def sharded(self, func: Any, *args: Any) -> Any:
        return sharding(func, self, *args)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = dispatch.autocast_dtype(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x = x.to(dtype)
        with dispatch.no_autocast(x.device):
            y = _Product.apply(x, self, *(getattr(self, name) for name in self.INNER))
            return y if bias is None else y + bias.to(y.dtype)

    def like(self, inner: Any, dtype: torch.dtype) -> Self:
        return type(self)(*inner, shape=self.shape, dtype=dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), (tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], found: Any, *_: Any) -> Self:
        shape, dtype = found
        return cls(*(inner[name] for name in cls.INNER), shape=shape, dtype=dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = [getattr(self, name) for name in self.INNER]
        return unpickled, (self.BASE, inner, tuple(self.shape), self.dtype, isinstance(self, nn.Parameter))


class WithE4m3(WrittenWeight):
    """With both products of e4m3 operands: :meth:`dequantise` gives what is stored, the products read it rounded to
    e4m3 over row_scale [N] for y, over col_scale [K] for dX."""

    E4M3_PRODUCTS, ROUNDS_NORM, BASE_COMPUTE = True, False, "float8_e4m3"
    row_scale: torch.Tensor
    col_scale: torch.Tensor

    def multiplied(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.as_fp8().dequantise(dtype)

    def as_fp8(self) -> Fp8Weight:
        dense = self.dequantise()
        rows, columns = ((t / s[:, None]).to(E4M3) for t, s in ((dense, self.row_scale), (dense.t(), self.col_scale)))
        inner = rows, self.row_scale, columns.contiguous(), self.col_scale
        return Fp8Weight(*inner, self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.as_fp8().linear(x, bias)


# Filled where the kinds are: those with products of e4m3, by the kind with exact ones; all kinds, by BASE.
WITH_E4M3: dict[type[WrittenWeight], type[WrittenWeight]] = {}
KINDS: dict[str, type[WrittenWeight]] = {}
# By four_bit_shards.py and scaled_shards.py: what FSDP2 keeps of each kind.
SHARDS: dict[type[WrittenWeight], type[WrittenWeight]] = {}


def known(pairs: dict[Any, Any]) -> None:
    """Enter kinds, those with products of e4m3 by those with exact ones."""
    WITH_E4M3.update(pairs)
    KINDS.update({kind.BASE: kind for pair in pairs.items() for kind in pair})


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
    def forward(ctx: Any, x: torch.Tensor, weight: WrittenWeight, *inner: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inner)
        ctx.weight = type(weight), weight.shape, weight.dtype
        return F.linear(x, weight.dequantise(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kind, shape, dtype = ctx.weight
        inner = ctx.saved_tensors
        return dy @ kind(*inner, shape=shape, dtype=dtype).dequantise(dy.dtype), None, *(None for _ in inner)
