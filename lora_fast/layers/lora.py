"""``nn.Linear`` with a low-rank adapter."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast import dispatch
from lora_fast.bases import packed_as
from lora_fast.bases.packed import PackedWeight
from lora_fast.blocks.form import Layer
from lora_fast.blocks.recognise import is_conv1d
from lora_fast.blocks.siblings import SIBLINGS, Joins
from lora_fast.checks import FLOATS
from lora_fast.functional import lora_linear
from lora_fast.kept import PLAIN
from lora_fast.layers.held_linears import is_held, plain_linear
from lora_fast.layers.keeping import KeepsNorm
from lora_fast.layers.merging import MergingLinear
from lora_fast.layers.replacing import cleared, tell_of_freezing
from lora_fast.layers.rules import (
    arguments_of_base,
    check_base_dtype,
    check_hyperparameters,
    check_init,
    check_quantisable,
    features,
    init_adapter,
    kind_asked_for,
    why_not_lora,
)
from lora_fast.wrappers import fsdp1, zero3
from lora_fast.wrappers.gather import whole
from lora_fast.wrappers.placement import offloading


class LoRALinear(KeepsNorm, Joins, MergingLinear):
    """A frozen ``nn.Linear``, or transformers' Conv1D, plus a trainable low-rank update:
    ``y = x W^T + bias + scaling * (drop(x) A^T) B^T``.

    Hu et al. 2021 (arXiv 2106.09685); ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``
    (Kalajdzievski 2023, arXiv 2312.03732). Dropout acts on the low-rank branch alone.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        r: rank, >= 1.
        lora_alpha: the numerator of the scaling.
        lora_dropout: probability in [0, 1).
        use_rslora: rank-stabilised scaling.
        init_lora_weights: True (Kaiming-uniform A, zero B), "gaussian" (A ~ N(0, 1/r^2), zero B), or False (both
            Kaiming-uniform: the layer then differs from its base from the start), as in PEFT.

    Attributes:
        weight [out, in], bias [out] or None: the frozen base. With ``fan_in_fan_out``, of a Conv1D, the weight is
            [in, out], as it was.
        lora_A [r, in], lora_B [out, r]: trainable; float32 on a 16-bit base, else the base's dtype.
        merged, enabled: the layer's state.
        keep_in_graphs: True lets evaluation keep the adapter's copies (:class:`lora_fast.layers.keeping.KeepsNorm`).
        save_x: "x" or "fp8", what the backward of lora_A reads (see :func:`lora_fast.functional.lora_linear`). With
            "fp8" the layer runs by itself, in no block or group.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, before anything is allocated.
    """

    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")  # the parameters that make up the adapter
    keeps_adapter = True  # see lora_fast.layers.replacing
    save_x: str = "x"
    use_dora = False
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        init_lora_weights: bool | str = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected float16, bfloat16, float32 or float64")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, float(lora_dropout), use_rslora
        self.enabled = True
        self._add_adapter(init_lora_weights)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        init_lora_weights: bool | str = True,
        base_dtype: str | None = None,
        base_compute: str | None = None,
    ) -> Self:
        """Wrap ``linear``, or transformers' Conv1D (GPT-2's): its weight and bias are shared (no copy) and frozen; its
        training flag is kept.

        With a ``base_dtype`` the layer's weight is made from ``linear``'s, which stays as it is; a ``linear`` that has
        such a weight shares it. ``"float8_e4m3"``: a :class:`lora_fast.fp8.Fp8Weight`, products of 8-bit operands,
        forward and backward, at twice the rate. ``"nf4"`` or ``"mxfp4"``: 4 bits an element, which are written out
        ahead of each product, in the layer's dtype, or with ``base_compute="float8_e4m3"`` for products of 8-bit
        operands (docs/four_bits.md). A ``linear`` that holds fp8, transformers' FP8Linear or compressed-tensors', has
        its bytes shared, too, as a :class:`lora_fast.bases.ScaledFp8Weight`; over it, and over 4 bits that ``linear``
        has already, ``base_compute`` goes without a ``base_dtype``.

        Raises:
            TypeError: not an ``nn.Linear`` or Conv1D itself, or one with hooks, a replaced forward or a quantised
                weight.
            ValueError: a hyperparameter outside its range; a weight to quantise that is not finite, of a shape that the
                base cannot have, or a Conv1D's.
            RuntimeError: products of 8-bit operands on a GPU that has no units for them (unless
                ``set_backend("reference")`` is on).
        """
        check_base_dtype(base_dtype, base_compute)
        if why := why_not_lora(linear):
            raise TypeError(f"linear: expected a plain nn.Linear, got one that {why}")
        if is_held(linear):
            linear = plain_linear(linear)
        kind, fan_in_fan_out = None, is_conv1d(linear)
        if base_dtype is not None or base_compute is not None:
            kind = kind_asked_for(linear.weight, base_dtype, base_compute, fan_in_fan_out)
        layer = cls(
            *features(linear),
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            bias=linear.bias is not None,
            device="meta",
            init_lora_weights=init_lora_weights,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        if fan_in_fan_out:
            layer.fan_in_fan_out = True
        if kind is not None:
            check_quantisable(linear.weight, kind)
        layer._add_adapter(init_lora_weights)
        if kind is not None:
            layer.quantise_base(base_dtype, base_compute)
        return layer.train(linear.training)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in ``nn.Module``; a warning where a call for this layer by itself ends the training of its adapter."""
        if not requires_grad:
            tell_of_freezing(self, [self._parameters.get(name) for name in self.adapter_names])
        return super().requires_grad_(requires_grad)

    def _add_adapter(self, init_lora_weights: bool | str) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device, dtype = self.weight.device, self.weight.dtype
        if dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, device=device, dtype=dtype))
        self.reset_lora_parameters(init_lora_weights)

    def quantise_base(self, base_dtype: str | None = "float8_e4m3", base_compute: str | None = None) -> None:
        """Put a packed weight (an :class:`lora_fast.fp8.Fp8Weight`, say) in the weight's place, which is freed if
        nothing else holds it. Without a ``base_dtype`` a base that is kept in 4 bits, or as an fp8 checkpoint holds it,
        stays so, and its products are made as ``base_compute`` says.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`from_linear` with a ``base_dtype``; a merged layer.
        """
        check_base_dtype(base_dtype, base_compute)
        if self.merged:
            raise ValueError("quantise_base: the layer is merged; unmerge it first")
        kind = kind_asked_for(self.weight, base_dtype, base_compute, self.fan_in_fan_out)
        check_quantisable(self.weight, kind)
        if (packed := packed_as(self.weight, kind)) is not self.weight:
            self.weight = nn.Parameter(packed, requires_grad=False)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialise lora_A and lora_B anew, as PEFT does (see the class). Raises ValueError on another value."""
        check_init(init_lora_weights)
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)

    @property
    def adapter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of ``adapter_names``."""
        shapes = (self.r, self.in_features), (self.out_features, self.r), (self.out_features,)
        return shapes[: len(self.adapter_names)]

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to y [..., out]; raises as :func:`lora_fast.functional.lora_linear`."""
        if self.enabled and self._buffers["unmerged_weight"] is None:
            y = self.joined(x) if SIBLINGS in vars(self) else None
            return self._adapted(x) if y is None else y
        weight = self.weight if self.enabled else whole(self.base_weight).to(x.device)  # kept in shards, or offloaded
        return F.linear(x, self.turned(weight), self.bias)

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        if not self.enabled or self._buffers["unmerged_weight"] is not None:
            return None
        if zero3.manages(self):  # before anything is read, which would be gathered
            return zero3.APART
        if "_hf_hook" in vars(self) and offloading(self) is not None:
            return "accelerate has its weights there in its own forward alone"
        if self.save_x != "x":
            return f"save_x is {self.save_x!r}"
        weight = self.weight
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        whole = isinstance(weight, PackedWeight) and weight.WHOLE
        tensors = x, self.lora_A, self.lora_B, *(() if whole else (weight,))
        if others := [t for t in tensors if type(t) not in PLAIN]:
            return f"one of its tensors is a {type(others[0]).__name__}"
        if x.dtype != weight.dtype and dispatch.autocast_dtype(x.device) is None:
            return f"the input is {x.dtype} and the base weight {weight.dtype}, without autocast"
        p = self.lora_dropout if self.training else 0.0
        return Layer(self.turned(weight), self.lora_A, self.lora_B, self.scaling, self.bias, p)

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        own: dict[str, Any] = self._parameters
        try:  # as attributes each would take the host half a microsecond
            weight, lora_A, lora_B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        except KeyError:
            weight, lora_A, lora_B, bias = self.weight, self.lora_A, self.lora_B, self.bias
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        return lora_linear(
            x,
            self.turned(weight),
            lora_A,
            lora_B,
            self.scaling,
            bias,
            dropout_p=self.lora_dropout,
            training=self.training,
            save_x=self.save_x,
            kept=self.kept_copies(),
        )

    def enable(self) -> None:
        """Let the adapter act (the default)."""
        self.enabled = True

    def disable(self) -> None:
        """Give the base layer's output, merged or not, until :meth:`enable`."""
        self.enabled = False

    def delta_weight(self) -> torch.Tensor:
        """``scaling * B A`` [out, in], in float32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype))

    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """``W + scaling * B A``, in float32 or better, as the weight is stored: [out, in], or [in, out] with
        ``fan_in_fan_out``. W is the base weight, or ``original`` [out, in]."""
        return self.turned(self._merged(self.turned(self.base_weight) if original is None else original)).contiguous()

    def _merged(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] with the adapter in it."""
        delta = self.delta_weight()
        return weight.detach().to(delta) + delta

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear``, or a Conv1D, that shares this layer's present weight (merged, if it is) and bias, and
        may be put in this layer's place: any other layer that is assigned there, which would drop the adapter, is
        refused."""
        return cleared(self.plain())

    def parts_of_adapter(self) -> tuple[str, ...]:
        """Names in a state dict of what a merge is made with."""
        return self.adapter_names

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        text += arguments_of_base(self.base_weight)
        flags = {
            "use_rslora=True": self.use_rslora,
            "fan_in_fan_out=True": self.fan_in_fan_out,
            "merged": self.merged,
            "disabled": not self.enabled,
        }
        return ", ".join([text, *(name for name, on in flags.items() if on)])
