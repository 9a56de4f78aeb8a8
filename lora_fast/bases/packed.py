"""A frozen weight that is kept in other tensors, in fewer bits."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from lora_fast import dispatch

aten = torch.ops.aten


class PackedWeight(torch.Tensor):
    """A frozen weight [N, K] kept in inner tensors: a tensor that acts as what :meth:`dequantise` gives, in the dtype
    it was made from.

    Moves between devices, copies and goes through ``state_dict``; a plain weight copied into it is quantised; another
    dtype changes what it acts as. Operations that would write to it otherwise raise a RuntimeError.

    A subclass is called with its inner tensors and the dtype, says what is said here, and gives the methods that raise
    NotImplementedError here.
    """

    INNER: tuple[str, ...]  # names of the inner tensors, as in the kernels' row for such a base
    BASE: str  # the name of that row
    LABEL: str  # in messages
    ROUNDING: float  # the largest error of an element, as a part of it
    E4M3_PRODUCTS: bool  # whether both products read 8-bit operands
    BASE_COMPUTE: str | None = None  # the ``base_compute`` that asks for this kind, where the same is kept for another
    ROUNDS_NORM: bool  # whether DoRA's norm may be rounded, as PEFT rounds that of the weight which this was made from
    WHOLE = True  # whether it is a weight, not what one of several processes keeps of it
    acts_as: torch.dtype
    traits: tuple[Any, ...]

    @classmethod
    def hold(cls, shape: torch.Size, dtype: torch.dtype, *inner: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inner[0].device)
        for name, t in zip(cls.INNER, inner, strict=True):
            setattr(self, name, t)
        # As self.dtype, and with it all that calls depend on, which take the host longer to read.
        self.acts_as, self.traits = dtype, (cls, dtype, shape, *((t.shape, t.dtype) for t in inner))
        return self

    @classmethod
    def quantise(cls, weight: torch.Tensor) -> Self:
        """From ``weight`` [N, K]; raises as :meth:`check`."""
        raise NotImplementedError

    def quantised_alike(self, weight: torch.Tensor) -> "PackedWeight":
        """``weight`` in inner tensors of these shapes and dtypes."""
        return type(self).quantise(weight)

    @classmethod
    def check(cls, weight: torch.Tensor) -> None:
        """Raise what :meth:`quantise` would."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """The reason why products over it cannot run on a GPU, in words; None where they can, and elsewhere."""
        return dispatch.why_not_fp8(device) if cls.E4M3_PRODUCTS else None

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K], in ``dtype`` or in what this acts as: a plain tensor."""
        raise NotImplementedError

    def multiplied(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What the product of y reads, dense: DoRA's norm is that of its rows."""
        return self.dequantise(dtype)

    @classmethod
    def for_compute(cls, base_compute: str | None) -> "type[PackedWeight]":
        """The kind that keeps the same and has its products made in this dtype, None for the one that it acts as.

        Raises:
            ValueError: there is none.
        """
        raise NotImplementedError

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``F.linear(x, self, bias)`` in plain torch, as the fused kernels make the product."""
        raise NotImplementedError

    def is_made_from(self, weight: torch.Tensor) -> bool:
        """Whether ``weight``, of this shape and dtype and on this device, is quantised to this."""
        raise NotImplementedError

    def sharded(self, func: Any, *args: Any) -> Any:
        """What FSDP2 needs of this operation; None where that is nothing of its own."""
        return None

    def check_original(self, weight: torch.Tensor) -> None:
        """Raise unless this was made from ``weight`` [N, K], or from one that is quantised alike.

        Raises:
            TypeError: not a tensor, or another dtype than this acts as.
            ValueError: another shape; other elements.
        """
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"original: got {type(weight).__name__}, expected a tensor")
        if weight.shape != self.shape:
            raise ValueError(f"original: got shape {tuple(weight.shape)}, expected the base's, {tuple(self.shape)}")
        if weight.dtype != self.dtype or isinstance(weight, PackedWeight):
            raise TypeError(f"original: got {weight.dtype}, expected the base's, {self.dtype}, in which it is merged")
        if not self.is_made_from(weight.detach().to(self.device)):
            raise ValueError(f"original: got another weight, expected that which the {self.LABEL} base was made from")

    def _is(self, weight: torch.Tensor) -> bool:
        if self.is_meta or weight.is_meta or weight.dtype != self.dtype:
            return False
        return torch.equal(weight.to(self.device), self.dequantise())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], dtype: torch.dtype, *_: Any) -> Self:
        return cls(*(inner[name] for name in cls.INNER), dtype)

    def share_memory_(self) -> Self:
        for name in self.INNER:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(getattr(self, name).is_shared() for name in self.INNER)

    def each(self, fn: Any, dtype: torch.dtype | None = None) -> Self:
        """The same of inner tensors that ``fn`` gives for these."""
        return self.like([fn(getattr(self, name)) for name in self.INNER], dtype or self.dtype)

    def like(self, inner: Sequence[torch.Tensor], dtype: torch.dtype) -> Self:
        """One of the same kind and shape that holds these."""
        return type(self)(*inner, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            if isinstance(weight, PackedWeight) and weight.WHOLE and not isinstance(x, PackedWeight):
                return weight.linear(x, bias)
        with torch._C.DisableTorchFunctionSubclass():  # whose results would be wrapped again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if (found := first.sharded(func, *args[1:])) is not None:
                return found
            if func in (aten.detach.default, aten.alias.default):
                return first.each(lambda t: t)
            if func is aten._pin_memory.default:
                return first.each(torch.Tensor.pin_memory)
            if func is aten.is_pinned.default:
                return getattr(first, first.INNER[0]).is_pinned()
            if func is aten.clone.default:
                return first.each(torch.clone)
            if func is aten._to_copy.default:
                dtype, rest = kwargs.get("dtype"), {k: v for k, v in kwargs.items() if k not in ("dtype", "layout")}
                rest.pop("memory_format", None)
                return first.each(lambda t: t.to(**rest) if rest else t.clone(), dtype)
            if func is aten.copy_.default:  # load_state_dict, also of a checkpoint that is not quantised
                return first.take(args[1])
            if func is aten.empty_like.default:
                device = {"device": kwargs["device"]} if kwargs.get("device") is not None else {}
                return first.each(lambda t: torch.empty_like(t, **device), kwargs.get("dtype"))
            if func._schema.is_mutable:
                kind = type(first) if first.WHOLE else type(first).__mro__[1]
                raise RuntimeError(f"{func}: an {kind.__name__} is read-only")
        args, kwargs = tree_map_only(PackedWeight, lambda weight: weight.dequantise(), (args, kwargs))
        return func(*args, **kwargs)

    def take(self, source: torch.Tensor) -> Self:
        """Copy a weight into this, quantised if it is not."""
        if not isinstance(source, PackedWeight) or (source.BASE, source.WHOLE) != (self.BASE, self.WHOLE):
            if self._is(source):  # DDP's broadcast, of what this acts as
                return self
            source = self.quantised_alike(as_plain(source))
        for name in self.INNER:
            inner = getattr(self, name)
            inner.copy_(getattr(source, name))
            increment_version(inner)  # within an operation nobody counts
        return self


def packed_in(weight: Any) -> PackedWeight | None:
    """The packed weight that this is, or that FSDP2 keeps in this tensor of its shards."""
    found = getattr(weight, "_local_tensor", weight)
    return found if isinstance(found, PackedWeight) else None


def is_packed(weight: Any) -> bool:
    return packed_in(weight) is not None


def as_plain(weight: torch.Tensor) -> torch.Tensor:
    """A packed weight, or FSDP2's tensor of its shards, dequantised; another as it is."""
    if isinstance(weight, PackedWeight):
        return weight.dequantise()
    if (shard := packed_in(weight)) is None:
        return weight
    from torch.distributed.tensor import DTensor

    whole: Any = weight
    return DTensor.from_local(
        shard.dequantise(),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def tensors_of(weight: torch.Tensor) -> Callable[[Any], tuple[torch.Tensor, ...]] | None:
    """What gives the inner tensors of such a packed weight, in the host's least time; None for another weight."""
    if not isinstance(weight, PackedWeight):
        return None
    get: Any = attrgetter(*weight.INNER)  # of one name it gives no tuple
    return get if len(weight.INNER) > 1 else lambda packed: (get(packed),)


def first_of(weight: PackedWeight) -> torch.Tensor:
    """The first of its inner tensors."""
    with torch._C.DisableTorchFunctionSubclass():  # by way of PackedWeight it takes six times as long
        return getattr(weight, weight.INNER[0])


def rounds_norm(weight: torch.Tensor) -> bool:
    """Whether DoRA's norm over this weight may be rounded to its dtype, as PEFT does."""
    return weight.ROUNDS_NORM if isinstance(weight, PackedWeight) else True


def is_opaque(weight: torch.Tensor) -> bool:
    """Whether it is a tensor of some other library's that has no memory of its own for kernels to read (torchao's
    quantised ones)."""
    kind = type(weight)
    if kind in (torch.Tensor, nn.Parameter) or isinstance(weight, PackedWeight) or kind.__module__.startswith("torch."):
        return False
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
