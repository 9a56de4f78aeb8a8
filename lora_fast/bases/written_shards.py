"""Weights that are written out for their products, under FSDP2: what each process keeps of one."""

from typing import Any, Self

import torch
from torch import nn

from lora_fast.bases.shards import gathered, to_gather
from lora_fast.bases.written import KINDS, SHARDS, WrittenWeight


class WrittenShard(WrittenWeight):
    """What each of P processes keeps of such a weight [N, K] under ``fully_shard``: what belongs to N/P rows of it, and
    the rest, which is whole in each. It acts as its rows; FSDP2 gathers bytes from it before a layer runs."""

    WHOLE = False

    @classmethod
    def quantise(cls, weight: torch.Tensor) -> Self:
        raise RuntimeError(f"a shard of an {cls.LABEL} weight takes no other weight: load it before fully_shard")

    def quantised_alike(self, weight: torch.Tensor) -> WrittenWeight:
        return type(self).quantise(weight)

    def multiplied(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.dequantise(dtype)

    def gathered(self) -> tuple[str, ...]:
        """The names of what no process has whole."""
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """What it is made with beside the inner tensors."""
        return {"shape": tuple(self.shape), "dtype": self.dtype}

    def like(self, inner: Any, dtype: torch.dtype) -> Self:
        return type(self)(*inner, **(self.told() | {"dtype": dtype}))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), self.told()

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Any], found: Any, *_: Any) -> Self:
        return cls(*(inner[name] for name in cls.INNER), **found)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        inner = [getattr(self, name) for name in self.INNER]
        return unpickled_shard, (self.BASE, inner, self.told(), isinstance(self, nn.Parameter))

    def fsdp_pre_all_gather(self, mesh: Any, size: Any, stride: Any, module: Any, mp_policy: Any) -> tuple[Any, Any]:
        names = self.gathered()
        kept = {name: getattr(self, name) for name in KINDS[self.BASE].INNER if name not in names}
        inner, how = to_gather([getattr(self, name) for name in names], mesh)
        return inner, (names, kept, size, how)

    def fsdp_post_all_gather(
        self, found: tuple[torch.Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        names, kept, size, how = metadata
        if out is not None:  # made of the gathered tensors, to which FSDP2 has given their memory back
            for name, t in kept.items():
                setattr(out, name, t)
            return None
        kind: Any = KINDS[self.BASE]
        parts = kept | dict(zip(names, gathered(found, how), strict=True))
        return kind(*(parts[name] for name in kind.INNER), shape=size, dtype=dtype), found


def unpickled_shard(base: str, inner: list[torch.Tensor], told: dict[str, Any], parameter: bool) -> torch.Tensor:
    kind: Any = SHARDS[KINDS[base]]
    weight = kind(*inner, **told)
    return nn.Parameter(weight, requires_grad=False) if parameter else weight


torch.serialization.add_safe_globals([unpickled_shard])  # for torch.load, which reads weights only
