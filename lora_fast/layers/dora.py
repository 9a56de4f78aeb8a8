"""DoRA: a low-rank adapter whose output rows have a length of their own."""

from typing import Any

import torch
from torch import nn

from lora_fast.blocks.form import Layer
from lora_fast.functional import dora_linear, dora_norm
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.magnitude import KeepsMagnitude
from lora_fast.reference import dora_gain
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.gather import whole


class DoRALinear(KeepsMagnitude, LoRALinear):
    """:class:`LoRALinear` whose output rows have a length of their own: ``y = (m / n) * z + bias`` with
    ``z = x W^T + scaling * (drop(x) A^T) B^T`` and ``n = |W + scaling * B A|`` per row, a constant in the backward
    and kept in evaluation (:class:`lora_fast.layers.keeping.KeepsNorm`).

    Liu et al. 2024 (arXiv 2402.09353). Arguments, attributes and errors as of LoRALinear, and

    Attributes:
        lora_magnitude_vector [out]: m, trainable, in float32 (float64 on such a base), the row norms of
            ``W + scaling * B A`` at the start: the layer then equals the one that it stands for. Made from the weights
            when they are there: on the meta device only by the first forward or merge after it, if nothing has brought
            one by then (``to_empty`` fills it with NaN, and so one can see that). A state dict without a
            magnitude has it made anew if it was that norm until then; one that was trained, or that an earlier part of
            the dict brought, stays.
        save: "auto" or "z", what the backward of the magnitude reads (see :func:`lora_fast.functional.dora_linear`).

    Raises:
        ValueError: also at the start, if a row's norm is not finite.
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    use_dora = True
    norm_parts = frozenset(("weight", "lora_A", "lora_B"))
    save: str = "auto"

    def _add_adapter(self, init_lora_weights: bool | str) -> None:
        super()._add_adapter(init_lora_weights)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        m = torch.empty(self.out_features, device=self.weight.device, dtype=dtype)
        self.lora_magnitude_vector = nn.Parameter(m)
        self.reset_magnitude()

    def quantise_base(self, base_dtype: str | None = "float8_e4m3", base_compute: str | None = None) -> None:
        """As LoRALinear's; a magnitude that is still the start's is made anew, so that the layer equals its base."""
        fresh = self._magnitude_is_set and torch.equal(self._norm(), self.lora_magnitude_vector.detach())
        super().quantise_base(base_dtype, base_compute)
        if fresh:
            self.reset_magnitude()

    def _norm(self) -> torch.Tensor:
        return dora_norm(self.turned(whole(self.base_weight)), self.lora_A, self.lora_B, self.scaling)

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        if not (self._magnitude_is_set or self._magnitude_came()):
            return "its magnitude is not made yet"
        made = super().as_layer(x)
        if not isinstance(made, Layer):
            return made
        return made._replace(lora_magnitude_vector=self.lora_magnitude_vector, save=self.save)

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        self.need_magnitude()
        own: dict[str, Any] = self._parameters
        try:
            weight, lora_A, lora_B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
            magnitude = own["lora_magnitude_vector"]
        except KeyError:
            weight, lora_A, lora_B, bias = self.weight, self.lora_A, self.lora_B, self.bias
            magnitude = self.lora_magnitude_vector
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        return dora_linear(
            x,
            self.turned(weight),
            lora_A,
            lora_B,
            magnitude,
            self.scaling,
            bias,
            dropout_p=self.lora_dropout,
            training=self.training,
            save=self.save,
            save_x=self.save_x,
            kept=None if self.fan_in_fan_out else self.kept_norm(),  # each call's W is another view
        )

    def _merged(self, weight: torch.Tensor) -> torch.Tensor:
        """``(m / n) * (W + scaling * B A)``, W also in n."""
        if not (self._magnitude_is_set or self._magnitude_came()):
            self.reset_magnitude()
        v = super()._merged(weight)
        return v * dora_gain(self.lora_magnitude_vector.detach(), torch.linalg.vector_norm(v, dim=1))[:, None]
