"""A frozen weight in e4m3, twice: by rows for the forward product, by columns for the backward's."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.shards import gathered, sharding, to_gather

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST = 2.0**-60  # rows whose largest element is smaller are scaled as if it were this


def quantise_rows(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``t [..., K]`` as ``(q [..., K], scale [...])``: ``t ~ scale * q`` with q in e4m3 and scale, float32, the least
    power of two that brings the row's largest element into e4m3's range. So ``scale * q`` is exact in bfloat16, too."""
    peak = t.abs().amax(-1).float().clamp_min(LEAST) / torch.full((), LARGEST, device=t.device)
    scale = ((peak.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (t / scale.unsqueeze(-1)).to(E4M3), scale


def dequantise_rows(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (q.to(torch.float32) * scale.unsqueeze(-1)).to(dtype)


class Fp8Weight(PackedWeight):
    """A frozen weight [N, K] kept in e4m3: a tensor that acts as ``row_scale * rows``, in the dtype it was made from.

    Inner tensors: rows [N, K] and columns [K, N] in e4m3, row_scale [N] and col_scale [K] in float32, together the
    bytes of a 16-bit weight. ``columns`` holds the same weight quantised by its columns, for ``dX = dY W``: the matrix
    units take 8-bit operands along the contraction alone. The two round differently; all but dX reads ``rows``.

    Moves between devices, copies, pickles and goes through ``state_dict``; a plain weight copied into it is quantised;
    another dtype changes what it acts as. Operations that would write to it otherwise raise a RuntimeError.
    ``fully_shard`` makes an :class:`Fp8Shard` of it.
    """

    INNER, BASE, LABEL = ("rows", "row_scale", "columns", "col_scale"), "e4m3", "fp8"
    ROUNDING, E4M3_PRODUCTS, ROUNDS_NORM = 2**-4, True, False
    DIVIDED = "both"  # by the processes of FSDP2
    rows: torch.Tensor
    row_scale: torch.Tensor
    columns: torch.Tensor
    col_scale: torch.Tensor

    @staticmethod
    def __new__(cls, rows, row_scale, columns, col_scale, dtype):  # type: ignore[no-untyped-def]
        return cls.hold(rows.shape, dtype, rows, row_scale, columns, col_scale)

    @classmethod
    @torch.no_grad()
    def quantise(cls, weight: torch.Tensor) -> Self:
        """From ``weight`` [N, K], float16, bfloat16 or float32.

        Raises:
            TypeError: another dtype.
            ValueError: not two-dimensional, or with elements that are not finite.
        """
        cls.check(weight)
        weight = weight.detach()
        by_columns = quantise_rows(weight.t().contiguous())
        return cls(*quantise_rows(weight), *by_columns, weight.dtype)

    @classmethod
    def check(cls, weight: torch.Tensor) -> None:
        """Raise what :meth:`quantise` would."""
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32) or isinstance(weight, PackedWeight):
            got = f"one in {weight.LABEL}" if isinstance(weight, PackedWeight) else weight.dtype
            raise TypeError(f"weight: got {got}, expected float16, bfloat16 or float32 to quantise")
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [N, K], not empty")
        if dispatch.has_data(weight) and not torch.isfinite(weight.detach()).all():
            raise ValueError("weight: has elements that are not finite, expected finite ones to quantise")

    @classmethod
    def for_compute(cls, base_compute: str | None) -> type[PackedWeight]:
        return cls  # which has no other products

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``row_scale * rows`` [N, K], in ``dtype`` or in what this acts as: a plain tensor."""
        return dequantise_rows(self.rows, self.row_scale, dtype or self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return fp8_linear(x, self, bias)

    def is_made_from(self, weight: torch.Tensor) -> bool:
        rows, scale = quantise_rows(weight)
        return torch.equal(rows.float(), self.rows.float()) and torch.equal(scale, self.row_scale)

    def sharded(self, func: Any, *args: Any) -> Any:
        return sharding(func, self, *args)

    def divides(self, count: int) -> bool:
        """Whether so many processes could each keep as many rows, and columns."""
        return not any(size % count for size in self.shape)

    def parts(self, count: int) -> "list[Fp8Shard]":
        """Shards of as many rows and columns, of which FSDP2 keeps one in each process."""
        cut = zip(*(getattr(self, name).chunk(count) for name in self.INNER), strict=True)
        return [Fp8Shard(*inner, self.dtype) for inner in cut]  # type: ignore[call-arg]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As bytes: pickle, outside torch.save, does not know 8-bit floats.
        inner = (getattr(self, name) for name in self.INNER)
        stored = (t.view(torch.uint8) if t.dtype == E4M3 else t for t in inner)
        return unpickled, (*stored, self.dtype, isinstance(self, nn.Parameter), isinstance(self, Fp8Shard))


class Fp8Shard(Fp8Weight):
    """What each of P processes keeps of an :class:`Fp8Weight` [N, K] under ``fully_shard``: rows [N/P, K] and columns
    [K/P, N] with their scales. It acts as its rows; FSDP2 gathers the whole weight from it before a layer runs."""

    WHOLE = False

    @classmethod
    def quantise(cls, weight: torch.Tensor) -> Self:
        raise RuntimeError("a shard of an fp8 weight takes no other weight: load it before fully_shard")

    def fsdp_pre_all_gather(self, mesh: Any, size: Any, stride: Any, module: Any, mp_policy: Any) -> tuple[Any, ...]:
        inner = self.rows.view(torch.uint8), self.row_scale, self.columns.view(torch.uint8), self.col_scale
        return to_gather(inner, mesh)

    def fsdp_post_all_gather(
        self, found: tuple[torch.Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        if out is None:
            rows, row_scale, columns, col_scale = gathered(found, metadata)
            return Fp8Weight(rows.view(E4M3), row_scale, columns.view(E4M3), col_scale, dtype), found
        # else ``out`` is made of these tensors, to which FSDP2 has given their memory back


def unpickled(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    columns: torch.Tensor,
    col_scale: torch.Tensor,
    dtype: torch.dtype,
    parameter: bool,
    shard: bool = False,
) -> torch.Tensor:
    kind = Fp8Shard if shard else Fp8Weight
    weight = kind(rows.view(E4M3), row_scale, columns.view(E4M3), col_scale, dtype)
    return nn.Parameter(weight, requires_grad=False) if parameter else weight


unpickled.__module__, unpickled.__qualname__ = "lora_fast.fp8", "_unpickled"  # as files name it
unpickled.__name__ = unpickled.__qualname__
torch.serialization.add_safe_globals([unpickled])  # for torch.load, which reads weights only


def fp8_linear(
    x: torch.Tensor,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    product: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """``F.linear(x, weight, bias)`` over an fp8 weight in plain torch, which emulates the fused kernels' quantisation:
    x by rows in the forward, dY by rows in the backward. ``product`` makes both products in another way: called with x
    and a weight [N, K] in e4m3 and the scales of its rows."""
    dtype = dispatch.autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    with dispatch.no_autocast(x.device):
        inner = weight.rows, weight.row_scale, weight.columns, weight.col_scale
        y = _Fp8Product.apply(product or emulated_product, x, *inner)
        return y if bias is None else y + bias.to(y.dtype)


class _Fp8Product(torch.autograd.Function):
    """x W^T, and dY W for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, product: Any, x: Any, rows: Any, row_scale: Any, columns: Any, col_scale: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(columns, col_scale)
        ctx.product = product
        return product(x, rows, row_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, ctx.product(dy, *ctx.saved_tensors), None, None, None, None


def emulated_product(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x W^T with x rounded to e4m3, multiplied in x's dtype (float16 in float32, whose range the scales may need)."""
    kind = torch.float32 if x.dtype == torch.float16 else x.dtype
    return F.linear(dequantise_rows(*quantise_rows(x), kind), dequantise_rows(rows, scale, kind)).to(x.dtype)
