"""The frozen weights of a module of experts, in 8 or 4 bits: one packed matrix, expert below expert."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Self

import torch
from torch import nn

from lora_fast import dispatch
from lora_fast.bases.four_bits import BlockWeight, Mxfp4Weight, Nf4Weight
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.scaled import BLOCK, ScaledFp8Weight, quantise
from lora_fast.bases.written import KINDS, WrittenWeight

aten = torch.ops.aten
# By what ``base_dtype`` calls them: how experts are kept. In e4m3 they take one byte an element, not two as an
# ``nn.Linear``'s weight does, for their products are those of 16 bits.
STACKED: dict[str, type[WrittenWeight]] = {
    "float8_e4m3": ScaledFp8Weight,
    "nf4": Nf4Weight,
    "mxfp4": Mxfp4Weight,
}


class PackedStack(PackedWeight):
    """The frozen weights of E experts: a tensor that acts as [E, N, K] or, ``turned``, as [E, K, N], N the outputs and
    K the inputs of an expert's product.

    It is kept as the packed matrix [E N, K] of all experts, whatever it acts as, so that blocks of elements lie along
    the contraction (as in gpt-oss' checkpoints): its inner tensors, ``BASE``, ``LABEL`` and ``ROUNDING`` are that
    one's. ``stack[e]`` is the expert's packed matrix [N, K], or, turned, its dense transpose.

    Raises:
        RuntimeError: FSDP2 is to shard it.
    """

    E4M3_PRODUCTS, ROUNDS_NORM = False, True
    kind: type[WrittenWeight]
    turned: bool

    @staticmethod
    def __new__(cls, *inner, kind, shape, dtype, turned):  # type: ignore[no-untyped-def]
        shape = torch.Size(shape)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inner[0].device)
        self.INNER, self.BASE, self.LABEL, self.ROUNDING = kind.INNER, kind.BASE, kind.LABEL, kind.ROUNDING
        for name, t in zip(kind.INNER, inner, strict=True):
            setattr(self, name, t)
        self.kind, self.turned, self.acts_as = kind, turned, dtype
        self.traits = cls, kind, turned, dtype, shape, *((t.shape, t.dtype) for t in inner)
        return self

    @classmethod
    def of(cls, matrix: WrittenWeight, experts: int, turned: bool) -> Self:
        """The stack of a packed matrix [E N, K], whose memory it shares."""
        rows, k = matrix.shape
        n = rows // experts
        if (rows * k) % (experts * getattr(matrix, "block", 1)) or (
            isinstance(matrix, ScaledFp8Weight) and not matrix.by_rows and n % BLOCK
        ):
            raise ValueError(
                f"weight: got {matrix.LABEL} of {experts} experts [{n}, {k}] with blocks that cross experts"
            )
        inner = [getattr(matrix, name) for name in matrix.INNER]
        shape = (experts, k, n) if turned else (experts, n, k)
        return cls(*inner, kind=type(matrix), shape=shape, dtype=matrix.dtype, turned=turned)

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: torch.Tensor, kind: type[WrittenWeight], turned: bool) -> Self:
        """From ``weight`` [E, N, K], ``turned`` [E, K, N], float16, bfloat16 or float32, expert by expert: beside it
        and what it becomes, only one expert's numbers are in memory.

        Raises:
            TypeError, ValueError: as :func:`check_stackable`.
        """
        check_stackable(weight, kind, turned)
        inner: list[torch.Tensor] = []
        for e, own in enumerate(weight.detach()):
            dense = (own.mT if turned else own).contiguous()
            parts = _store(dense, kind)
            if not inner:
                inner = [t.new_empty((len(weight) * len(t), *t.shape[1:])) for t in parts[:2]]
            for whole, part in zip(inner, parts[:2], strict=True):
                whole.unflatten(0, (len(weight), -1))[e].copy_(part)
        stored: tuple[torch.Tensor, ...] = (*inner, *parts[2:])  # a table is the same for all
        if kind is Nf4Weight:
            stored = Nf4Weight.nested(*stored)
        return cls(*stored, kind=kind, shape=weight.shape, dtype=weight.dtype, turned=turned)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """[E, N, K]."""
        experts, n, k = self.shape
        return (experts, k, n) if self.turned else (experts, n, k)

    @property
    def base_dtype(self) -> str:
        """What ``base_dtype`` calls it; the LABEL of one that a checkpoint alone has."""
        return next((name for name, kind in STACKED.items() if kind is self.kind), self.LABEL)

    # What torch's distributed checkpoints ask for by the keys of four_bit_files.
    quant_map = property(attrgetter("table"))
    nested_absmax, nested_quant_map = property(attrgetter("absmax2")), property(attrgetter("code2"))
    quant_state = property(attrgetter("matrix.quant_state"))

    @property
    def matrix(self) -> WrittenWeight:
        """[E N, K], in the same memory."""
        experts, n, k = self.stored_shape
        inner = [getattr(self, name) for name in self.INNER]
        return self.kind(*inner, shape=(experts * n, k), dtype=self.acts_as)

    def experts(self) -> list[WrittenWeight]:
        """The packed matrix [N, K] of each, in the same memory but for NF4's scales, which are written out."""
        (count, n, k), matrix, kind = self.stored_shape, self.matrix, self.kind
        inner = matrix.stored_tensors()
        if kind is Nf4Weight:
            inner, kind = (inner[0], matrix.scales(), inner[2]), BlockWeight  # type: ignore[attr-defined]
        parts = zip(*(t.chunk(count) for t in inner[:2]), strict=True)
        return [kind(*part, *inner[2:], shape=(n, k), dtype=self.acts_as) for part in parts]

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights [E, N, K], or [E, K, N], in ``dtype`` or in what this acts as: a plain tensor."""
        dense = torch.empty(self.stored_shape, dtype=dtype or self.acts_as, device=self.device)
        for own, expert in zip(dense, self.experts(), strict=True):
            own.copy_(expert.dequantise(dtype))
        return dense.mT.contiguous() if self.turned else dense

    def quantised_alike(self, weight: torch.Tensor) -> "PackedStack":
        if weight.shape != self.shape:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {tuple(self.shape)}")
        if self.kind is ScaledFp8Weight:
            dense = (weight.mT if self.turned else weight).reshape(-1, self.stored_shape[2])
            return PackedStack.of(self.matrix.quantised_alike(dense), len(self), self.turned)  # type: ignore[arg-type]
        return PackedStack.pack(weight, self.kind, self.turned)

    def is_made_from(self, weight: torch.Tensor) -> bool:
        dense = weight.mT if self.turned else weight
        return self.matrix.is_made_from(dense.reshape(-1, self.stored_shape[2]))

    def why_not_added_to(self) -> str:
        return (
            f"experts in {self.LABEL} cannot be added to, as PEFT merges: load_adapter what PEFT saved into a model "
            "with such experts, then merge_lora"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first, *rest = args or (None,)
        if isinstance(first, PackedStack):
            if func is aten.select.int and rest[0] in (0, -3):
                return first._expert(rest[1])
            if func is aten.unbind.int and rest in ([], [0], [-3]):
                return [first._expert(e) for e in range(len(first))]
            if func is aten.add_.Tensor:
                raise RuntimeError(first.why_not_added_to())
        return super().__torch_dispatch__(func, types, args, kwargs)

    def sharded(self, func: Any, *args: Any) -> Any:
        if func is aten.split.Tensor:  # as FSDP2 cuts a parameter
            raise RuntimeError(
                f"experts in {self.LABEL} cannot be sharded: fully_shard(..., ignored_params={{parameter}}) leaves "
                "them whole in each process"
            )
        return None

    def _expert(self, e: int) -> torch.Tensor:
        expert = self.experts()[e]
        return expert.dequantise().mT if self.turned else expert

    def like(self, inner: Sequence[torch.Tensor], dtype: torch.dtype) -> Self:
        return type(self)(*inner, kind=self.kind, shape=self.shape, dtype=dtype, turned=self.turned)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), (self.BASE, tuple(self.shape), self.acts_as, self.turned)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], found: Any, *_: Any) -> Self:
        base, shape, dtype, turned = found
        kind = KINDS[base]
        return cls(*(inner[name] for name in kind.INNER), kind=kind, shape=shape, dtype=dtype, turned=turned)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = [getattr(self, name) for name in self.INNER]
        told = self.BASE, inner, tuple(self.shape), self.acts_as, self.turned, isinstance(self, nn.Parameter)
        return unpickled_stack, told


def unpickled_stack(
    base: str, inner: list[torch.Tensor], shape: Any, dtype: torch.dtype, turned: bool, parameter: bool
) -> torch.Tensor:
    stack = PackedStack(*inner, kind=KINDS[base], shape=shape, dtype=dtype, turned=turned)
    return nn.Parameter(stack, requires_grad=False) if parameter else stack


torch.serialization.add_safe_globals([unpickled_stack])  # for torch.load, which reads weights only


def check_stackable(weight: torch.Tensor, kind: type[WrittenWeight], turned: bool) -> None:
    """Raise where the weights [E, N, K], turned [E, K, N], cannot be kept so.

    Raises:
        TypeError: another dtype than float16, bfloat16 and float32; packed already in another way.
        ValueError: another number of dimensions; elements that are not finite; experts whose N * K the kind's blocks do
            not divide.
    """
    if isinstance(weight, PackedStack) and weight.kind is kind:
        return
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32) or isinstance(weight, PackedWeight):
        got = f"experts in {weight.LABEL}" if isinstance(weight, PackedWeight) else str(weight.dtype)
        raise TypeError(f"weight: got {got}, expected float16, bfloat16 or float32 to keep in {kind.LABEL}")
    if weight.dim() != 3 or not weight.numel():
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [E, N, K], not empty")
    block, size = getattr(kind, "BLOCK", 1), weight[0].numel()
    if size % block:
        raise ValueError(
            f"weight: got experts of shape {tuple(weight.shape[1:])}, expected N * K a multiple of {block} for "
            f"{kind.LABEL}"
        )
    if dispatch.has_data(weight):
        for e, own in enumerate(weight.detach()):
            if not torch.isfinite(own).all():
                raise ValueError(
                    f"weight: expert {e} has elements that are not finite, expected finite ones to quantise"
                )


def _store(dense: torch.Tensor, kind: type[WrittenWeight]) -> tuple[torch.Tensor, ...]:
    """The inner tensors of one expert [N, K], of which the first two lie by its rows. NF4's scales are nested later, of
    all experts together; e4m3's are of blocks, or where these would cross experts of rows."""
    if kind is ScaledFp8Weight:
        return quantise(dense, by_rows=len(dense) % BLOCK != 0)
    return (BlockWeight if kind is Nf4Weight else kind).store(dense)
