"""``nn.Embedding`` with a low-rank adapter, LoRA's or DoRA's."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast.bases.packed import is_opaque
from lora_fast.checks import FLOATS
from lora_fast.dispatch import has_data
from lora_fast.embedding import lora_embedding
from lora_fast.layers.magnitude import KeepsMagnitude
from lora_fast.layers.merging import Merging
from lora_fast.layers.replacing import cleared, tell_of_freezing
from lora_fast.layers.rules import HOOKED, check_hyperparameters, check_init, has_hooks
from lora_fast.reference import dora_gain, dora_norm
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.gather import whole

# What an nn.Embedding may do beside looking up rows, and its attribute's value where it does not.
OPTIONS = {"max_norm": None, "sparse": False, "scale_grad_by_freq": False}


def asked_of(embedding: nn.Module) -> dict[str, Any]:
    """Those of ``OPTIONS`` that are set, and to what."""
    return {name: value for name, none in OPTIONS.items() if (value := getattr(embedding, name)) != none}


def why_no_embedding(module: nn.Module) -> str | None:
    """Why a :class:`LoRAEmbedding` could not stand in for the module, in words; None where it can."""
    if type(module) is not nn.Embedding:
        return f"is a {type(module).__name__}, not a plain nn.Embedding"
    if "forward" in vars(module) or has_hooks(module):
        return HOOKED
    if asked := asked_of(module):
        return f"has {', '.join(f'{name}={value}' for name, value in asked.items())}"
    weight = module.weight
    if weight.dtype not in FLOATS or is_opaque(weight):
        return f"has a quantised weight ({weight.dtype}, a {type(weight).__name__})"
    return None


class LoRAEmbedding(KeepsMagnitude, Merging, nn.Embedding):
    """A frozen ``nn.Embedding`` plus a trainable low-rank update of its rows: ``y = E[ids] + scaling * A^T[ids] B^T``,
    or with ``use_dora`` ``magnitude / n`` times that (:func:`lora_fast.lora_embedding` says more).

    Hu et al. 2021 (arXiv 2106.09685), Liu et al. 2024 (arXiv 2402.09353), as PEFT has them: there is no dropout.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in ``nn.Embedding``.
        r, lora_alpha, use_rslora: as in :class:`lora_fast.LoRALinear`.
        use_dora: train the lengths of the embedding's columns apart from their directions.
        init_lora_weights: True or "gaussian" (zero A, B ~ N(0, 1)), or False (both ~ N(0, 1)), as in PEFT.

    Attributes:
        weight [num_embeddings, embedding_dim]: the frozen base.
        lora_embedding_A [r, num_embeddings], lora_embedding_B [embedding_dim, r], with DoRA lora_magnitude_vector
            [embedding_dim]: trainable; float32 on a 16-bit base, else the base's dtype.
        merged, enabled: the layer's state.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, before anything is allocated.
    """

    keeps_adapter = True  # see lora_fast.layers.replacing
    NORMED = "columns"
    lora_dropout = 0.0
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        use_dora: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        init_lora_weights: bool | str = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, 0.0, use_rslora, init_lora_weights)
        if not isinstance(use_dora, bool):
            raise TypeError(f"use_dora: got {use_dora!r}, expected True or False")
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected float16, bfloat16, float32 or float64")
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.register_buffer("unmerged_weight", None)
        self.r, self.lora_alpha, self.use_rslora, self.use_dora = r, lora_alpha, use_rslora, use_dora
        self.enabled = True
        self._add_adapter(init_lora_weights)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        use_dora: bool = False,
        *,
        init_lora_weights: bool | str = True,
    ) -> Self:
        """Wrap ``embedding``: its weight is shared (no copy) and frozen; its training flag is kept.

        Raises:
            TypeError: not an ``nn.Embedding`` itself, or one with hooks, a replaced forward, a quantised weight,
                ``max_norm``, ``sparse`` or ``scale_grad_by_freq``.
            ValueError: a hyperparameter outside its range; DoRA over a weight without data or with columns whose norm
                is not finite.
        """
        if why := why_no_embedding(embedding):
            raise TypeError(f"embedding: expected a plain nn.Embedding, got one that {why}")
        if use_dora is True and not has_data(embedding.weight):
            raise ValueError("embedding: is on the meta device, without data, expected some to start DoRA from")
        sizes = embedding.num_embeddings, embedding.embedding_dim
        options: dict[str, Any] = {
            "padding_idx": embedding.padding_idx,
            "device": "meta",
            "init_lora_weights": init_lora_weights,
        }
        layer = cls(*sizes, r, lora_alpha, use_rslora, use_dora, **options)
        layer.weight = embedding.weight
        layer._add_adapter(init_lora_weights)
        return layer.train(embedding.training)

    def _add_adapter(self, init_lora_weights: bool | str) -> None:
        weight = self.weight.requires_grad_(False)
        dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        for name, shape in zip(self.adapter_names, self.adapter_shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))
        self.reset_lora_parameters(init_lora_weights)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialise the adapter anew, as PEFT does (see the class). Raises ValueError on another value."""
        check_init(init_lora_weights)
        nn.init.normal_(self.lora_embedding_B)
        (nn.init.normal_ if init_lora_weights is False else nn.init.zeros_)(self.lora_embedding_A)
        if self.use_dora:
            self.reset_magnitude()

    def _norm(self) -> torch.Tensor:
        """Of the columns of ``E + scaling * (B A)^T``."""
        return dora_norm(whole(self.base_weight).t(), self.lora_embedding_A, self.lora_embedding_B, self.scaling)

    @property
    def norm_parts(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(("weight", *self.adapter_names[:2])) if self.use_dora else frozenset()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The parameters that make up the adapter."""
        names = "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"
        return names if self.use_dora else names[:2]

    @property
    def adapter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of ``adapter_names``."""
        shapes = (self.r, self.num_embeddings), (self.embedding_dim, self.r), (self.embedding_dim,)
        return shapes[: len(self.adapter_names)]

    @property
    def whole_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to y [..., embedding_dim]; raises as :func:`lora_fast.lora_embedding`."""
        if not self.enabled or self.merged:
            weight = self.weight if self.enabled else whole(self.base_weight).to(ids.device)
            return F.embedding(ids, weight)
        if self.use_dora:
            self.need_magnitude()
        weight = self.weight
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        return lora_embedding(
            ids,
            weight,
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.scaling,
            self.lora_magnitude_vector if self.use_dora else None,
            padding_idx=self.padding_idx,
        )

    def enable(self) -> None:
        """Let the adapter act (the default)."""
        self.enabled = True

    def disable(self) -> None:
        """Give the base's rows, merged or not, until :meth:`enable`."""
        self.enabled = False

    @torch.no_grad()
    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """``E + scaling * (B A)^T`` [num_embeddings, embedding_dim], with DoRA its columns of the magnitude's lengths,
        in float32 or better; E is the base weight, or ``original``."""
        if not (self._magnitude_is_set or self._magnitude_came()):
            self.reset_magnitude()
        base = self.base_weight if original is None else original
        wide = torch.promote_types(torch.promote_types(base.dtype, self.lora_embedding_A.dtype), torch.float32)
        a, b = self.lora_embedding_A.to(wide), self.lora_embedding_B.to(wide)
        v = torch.addmm(base.to(wide), a.t(), b.t(), alpha=self.scaling)
        if not self.use_dora:
            return v
        return v * dora_gain(self.lora_magnitude_vector, torch.linalg.vector_norm(v, dim=0))

    def to_embedding(self) -> nn.Embedding:
        """A plain ``nn.Embedding`` that shares this layer's present weight (merged, if it is), and may be put in this
        layer's place: any other layer that is assigned there, which would drop the adapter, is refused."""
        return cleared(self.plain())

    def plain(self) -> nn.Embedding:
        """As :meth:`to_embedding`, and still refused in this layer's place."""
        self.check_weight()
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = self.weight
        return plain.train(self.training)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in ``nn.Module``; a warning where a call for this layer by itself ends the training of its adapter."""
        if not requires_grad:
            tell_of_freezing(self, [self._parameters.get(name) for name in self.adapter_names])
        return super().requires_grad_(requires_grad)

    def parts_of_adapter(self) -> tuple[str, ...]:
        return self.adapter_names

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        flags = {"use_rslora=True": self.use_rslora, "use_dora=True": self.use_dora}
        flags |= {"merged": self.merged, "disabled": not self.enabled}
        return ", ".join([text, *(name for name, on in flags.items() if on)])
