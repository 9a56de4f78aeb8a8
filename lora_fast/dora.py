"""DoRA: a low-rank adapter whose output rows have a length of their own."""

from typing import Any

import torch
from torch import nn

from lora_fast import fsdp1
from lora_fast.dispatch import has_data
from lora_fast.functional import dora_linear, dora_norm
from lora_fast.layers import LoRALinear
from lora_fast.reference import dora_gain


class DoRALinear(LoRALinear):
    """:class:`LoRALinear` whose output rows have a length of their own: ``y = (m / n) * z + bias`` with
    ``z = x W^T + scaling * (drop(x) A^T) B^T`` and ``n = |W + scaling * B A|`` per row, a constant in the backward.

    Liu et al. 2024 (arXiv 2402.09353). Arguments, attributes and errors as of LoRALinear, and

    Attributes:
        lora_magnitude_vector [out]: m, trainable, in float32 (float64 on such a base), the row norms of
            ``W + scaling * B A`` at the start: the layer then equals the one that it stands for. Made from the weights
            when they are there: on the meta device only by the first forward after it, and anew where a state dict
            brings a weight and no magnitude.
        save: "auto" or "z", what the backward of the magnitude reads (see :func:`lora_fast.functional.dora_linear`).

    Raises:
        ValueError: also at the start, if a row's norm is not finite.
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    lora_magnitude_vector: nn.Parameter
    save: str = "auto"

    def _add_adapter(self, init_lora_weights: bool | str) -> None:
        super()._add_adapter(init_lora_weights)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        m = torch.empty(self.out_features, device=self.weight.device, dtype=dtype)
        self.lora_magnitude_vector = nn.Parameter(m)
        self.reset_magnitude()

    def quantise_base(self) -> None:
        """As LoRALinear's; a magnitude that is still the start's is made anew, so that the layer equals its base."""
        fresh = self._magnitude_is_set and torch.equal(self._norm(), self.lora_magnitude_vector.detach())
        super().quantise_base()
        if fresh:
            self.reset_magnitude()

    def _norm(self) -> torch.Tensor:
        return dora_norm(self.base_weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the row norms of ``W + scaling * B A``, later if the weight has no data (meta device).

        Raises:
            ValueError: a norm is not finite; the magnitude is then as it was.
        """
        self._magnitude_is_set = has_data(self.weight)
        if self._magnitude_is_set:
            norm = self._norm()
            if not torch.isfinite(norm).all():
                raise ValueError("weight: has rows whose norm is not finite, expected finite ones to start DoRA from")
            self.lora_magnitude_vector.copy_(norm)

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        if not self._magnitude_is_set:
            self.reset_magnitude()
        own: dict[str, Any] = self._parameters
        try:
            weight, lora_A, lora_B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
            magnitude = own["lora_magnitude_vector"]
        except KeyError:
            weight, lora_A, lora_B, bias = self.weight, self.lora_A, self.lora_B, self.bias
            magnitude = self.lora_magnitude_vector
        if type(weight) is torch.Tensor:
            weight = fsdp1.as_asked(weight, self)
        return dora_linear(x, weight, lora_A, lora_B, magnitude, self.scaling, bias, self.lora_dropout, self.training,
                           save=self.save, save_x=self.save_x)  # fmt: skip

    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """``(m / n) * (W + scaling * B A)`` [out, in], in float32 or better; W, also in n, is the base weight, or
        ``original`` [out, in]."""
        if not self._magnitude_is_set:
            self.reset_magnitude()
        v = super().merged_weight(original)
        return v * dora_gain(self.lora_magnitude_vector.detach(), torch.linalg.vector_norm(v, dim=1))[:, None]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        error_msgs, merged = args[-1], self.merged
        magnitude = state_dict.get(prefix + "lora_magnitude_vector")
        if isinstance(magnitude, torch.Tensor) and has_data(magnitude) and not torch.isfinite(magnitude).all():
            error_msgs.append(f"{prefix}lora_magnitude_vector: has elements that are not finite")
            return
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if magnitude is not None:
            self._magnitude_is_set = has_data(self.lora_magnitude_vector)
        elif prefix + "weight" in state_dict:
            try:
                self.reset_magnitude()
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
        if merged:
            self.merge()
