"""LoRA and DoRA in weight space: modules for ``torch.nn.utils.parametrize``, which compute a layer's weight from it."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast import dispatch, reference
from lora_fast.checks import FLOATS
from lora_fast.functional import dora_norm
from lora_fast.layers.rules import check_hyperparameters, init_adapter

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)
SPARSE = "has sparse=True, whose sparse gradient goes through no computed weight (set its sparse to False)"


class LoRAParametrization(nn.Module):
    """``W -> W + scaling * B A`` (Hu et al. 2021, arXiv 2106.09685) on a weight [N, ...], read as a matrix [N, K].

    The idea is minLoRA's (https://github.com/cccntu/minLoRA): the layer stays what it is and only its weight is
    computed, in every forward anew. The sum is made in float32 and rounded once to W's dtype, in which a small update
    of a 16-bit weight can vanish: :class:`lora_fast.LoRALinear` has no such rounding and never forms ``B A``.

    Args:
        weight: [N, ...], two dimensions or more: what the adapter is made for. Only its shape, dtype and device count.
        r, lora_alpha, use_rslora, init_lora_weights: as in :class:`lora_fast.LoRALinear`.
        lora_dropout: probability that a column of A (a feature of the layer's input; of an Embedding's output) is
            dropped for a whole forward, in training: minLoRA's.
        name: what the adapter is called among those on one weight.

    Attributes:
        lora_A [r, K], lora_B [N, r]: trainable; float32 on a 16-bit weight, else the weight's dtype. Of an Embedding
            N is the number of tokens, so a head tied to it has the same shapes (minLoRA swaps A and B there).
        enabled: False leaves W as it is.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, before anything is allocated.
    """

    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")
    keeps_adapter = True  # see lora_fast.layers.replacing

    def __init__(
        self,
        weight: torch.Tensor,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        init_lora_weights: bool | str = True,
        name: str = "default",
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        check_name(name)
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weight: got {type(weight).__name__}, expected a tensor")
        if weight.dtype not in FLOATS:
            raise TypeError(f"weight: got dtype {weight.dtype}, expected float16, bfloat16, float32 or float64")
        if weight.dim() < 2:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected two dimensions or more")
        super().__init__()
        self.name, self.r, self.lora_alpha, self.lora_dropout = name, r, lora_alpha, float(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.enabled = True
        n, k = weight.shape[0], weight.shape[1:].numel()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, k, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(n, r, device=weight.device, dtype=dtype))
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)

    @classmethod
    def from_layer(cls, layer: nn.Module, *args: Any, **kwargs: Any) -> Self:
        """For the weight that an ``nn.Linear``, ``nn.Conv2d`` or ``nn.Embedding`` has now; further arguments as of the
        class. To be registered by ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", ...)``, which
        freezes nothing, or by :func:`lora_fast.parametrize.add_lora`.

        Raises:
            TypeError: another kind of layer.
            ValueError: an Embedding with sparse=True.
        """
        if not isinstance(layer, LAYERS):
            raise TypeError(f"layer: got {type(layer).__name__}, expected an nn.Linear, nn.Conv2d or nn.Embedding")
        if has_sparse_gradient(layer):
            raise ValueError(f"layer: {SPARSE}")
        return cls(layer.weight, *args, **kwargs)

    from_linear = from_conv2d = from_embedding = from_layer

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, ...] to one of the same shape and dtype; ValueError for a shape that the adapter does not fit."""
        return self.adapted(weight, self.lora_dropout if self.training else 0.0) if self.enabled else weight

    def adapted(self, weight: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
        """What :meth:`forward` gives with this dropout, enabled or not."""
        n, k = self.lora_B.shape[0], self.lora_A.shape[1]
        if weight.shape[:1] != (n,) or weight.shape[1:].numel() != k:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [{n}, ...] with {k} elements in a row")
        a: torch.Tensor = self.lora_A
        if dropout_p > 0:
            a = a * F.dropout(a.new_ones(k), dropout_p)
        magnitude = getattr(self, "lora_magnitude_vector", None)
        if dispatch.choose("auto", weight.device, weight.dtype) == "triton":
            from lora_fast.ops import weight as weight_ops  # needs Triton

            return weight_ops.lora_weight(weight, a, self.lora_B, self.scaling, magnitude)
        return reference.lora_weight(weight, a, self.lora_B, self.scaling, magnitude)

    def extra_repr(self) -> str:
        text = f"{self.name!r}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return text if self.enabled else f"{text}, disabled"


class DoRAParametrization(LoRAParametrization):
    """``W -> m * V / |V|`` with ``V = W + scaling * B A``, norms by row and constant in the backward (Liu et al. 2024,
    arXiv 2402.09353, section 4.3); a row of zero norm stays zero. A row is an output feature of a Linear, an output
    channel of a Conv2d, a token of an Embedding. With dropout the norm is that of the V at hand.

    Arguments, attributes and errors as of :class:`LoRAParametrization`, and

    Attributes:
        lora_magnitude_vector [N]: m, trainable, float32 (float64 for such a weight); at the start the norms of V.

    Raises:
        ValueError: also a weight on the meta device, or with rows whose norm is not finite.
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        if weight.is_meta:
            raise ValueError("weight: is on the meta device, expected one with values to start DoRA from")
        with torch.no_grad():
            norm = dora_norm(weight.detach().flatten(1), self.lora_A.detach(), self.lora_B.detach(), self.scaling)
        if dispatch.has_data(norm) and not torch.isfinite(norm).all():
            raise ValueError("weight: has rows whose norm is not finite, expected finite ones to start DoRA from")
        self.lora_magnitude_vector = nn.Parameter(norm)


def has_sparse_gradient(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) and layer.sparse


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise (ValueError if name == "" else TypeError)(f"name: got {name!r}, expected a string, not empty")
