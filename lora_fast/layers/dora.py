"""DoRA: a low-rank adapter whose output rows have a length of their own."""

from typing import Any, Self

import torch
from torch import nn

from lora_fast.blocks.form import Layer
from lora_fast.dispatch import has_data
from lora_fast.functional import dora_linear, dora_norm
from lora_fast.layers.keeping import KeepsNorm
from lora_fast.layers.lora import LoRALinear
from lora_fast.reference import dora_gain
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.gather import whole
from lora_fast.wrappers.placement import keeper, offloading, present, settle, stored, write

PARTS = frozenset(("weight", "lora_A", "lora_B"))  # what the norm is made of
_TO_COME = "_parts_to_come"  # in a layer's __dict__: those that a later part of a state dict will bring


class DoRALinear(KeepsNorm, LoRALinear):
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
    lora_magnitude_vector: nn.Parameter
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
        return dora_norm(whole(self.base_weight), self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the row norms of ``W + scaling * B A``, later if one of them has no data (meta device).

        Raises:
            ValueError: a norm is not finite; the magnitude is then as it was.
        """
        parts = [getattr(self, name) for name in (*PARTS, "lora_magnitude_vector")]
        self._magnitude_is_set = all(map(has_data, parts)) or offloading(self) is not None
        if self._magnitude_is_set:
            settle(self)
            with present(self):
                norm = self._norm()
            if not torch.isfinite(norm).all():
                raise ValueError("weight: has rows whose norm is not finite, expected finite ones to start DoRA from")
            write(stored(self, "lora_magnitude_vector"), norm)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        m = self._parameters.get("lora_magnitude_vector")  # None in FSDP1
        was_meta = m is not None and m.is_meta
        super()._apply(fn, recurse)
        m = self._parameters.get("lora_magnitude_vector")
        if was_meta and m is not None and has_data(m):  # it holds what happened to be in the memory
            self._magnitude_is_set = False
            m.detach().fill_(torch.nan)
        return self

    def _magnitude_came(self) -> bool:
        """Whether something has put a magnitude into a layer that was made without data. The parameter is present."""
        m = self.lora_magnitude_vector.detach()
        self._magnitude_is_set = has_data(m) and not bool(whole(m).isnan().all())
        return self._magnitude_is_set

    @torch.no_grad()
    def _magnitude_is_norm(self) -> bool:
        """Whether it is what :meth:`reset_magnitude` made it, but for roundings, or not there yet."""
        if not (self._magnitude_is_set or has_data(stored(self, "lora_magnitude_vector"))):
            return True
        with present(self):
            if not (self._magnitude_is_set or self._magnitude_came()):
                return True
            m, norm = self.lora_magnitude_vector, self._norm()
            if not (has_data(m) and has_data(norm)):
                return not has_data(m)
            rtol = {torch.float64: 1e-10, torch.float32: 1e-5}.get(m.dtype, torch.finfo(m.dtype).eps)
            return torch.allclose(m.to(norm.dtype), norm, rtol=rtol, atol=0)

    def as_layer(self, x: torch.Tensor) -> Layer | str | None:
        if not (self._magnitude_is_set or self._magnitude_came()):
            return "its magnitude is not made yet"
        made = super().as_layer(x)
        if not isinstance(made, Layer):
            return made
        return made._replace(lora_magnitude_vector=self.lora_magnitude_vector, save=self.save)

    def need_magnitude(self) -> None:
        """Make the magnitude now if that was put off. RuntimeError where it would be lost."""
        if not (self._magnitude_is_set or self._magnitude_came()):
            if who := keeper(self):
                raise RuntimeError(
                    f"lora_magnitude_vector: is not made yet, and would be lost in the keeping of {who}; call "
                    "reset_magnitude() once the weights are there"
                )
            self.reset_magnitude()

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
            weight,
            lora_A,
            lora_B,
            magnitude,
            self.scaling,
            bias,
            dropout_p=self.lora_dropout,
            training=self.training,
            save=self.save,
            save_x=self.save_x,
            kept=self.kept_norm(),
        )

    def merged_weight(self, original: torch.Tensor | None = None) -> torch.Tensor:
        """``(m / n) * (W + scaling * B A)`` [out, in], in float32 or better; W, also in n, is the base weight, or
        ``original`` [out, in]."""
        if not (self._magnitude_is_set or self._magnitude_came()):
            self.reset_magnitude()
        v = super().merged_weight(original)
        return v * dora_gain(self.lora_magnitude_vector.detach(), torch.linalg.vector_norm(v, dim=1))[:, None]

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """As :meth:`lora_fast.LoRALinear.merge`."""
        if not self._magnitude_is_set:
            settle(self)
            with present(self):
                came = self._magnitude_came()
            if not came:
                self.reset_magnitude()
        super().merge(safe_merge, original)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        m = state_dict.get(prefix + "lora_magnitude_vector")
        is_own = m is self._parameters.get("lora_magnitude_vector")  # as torch fills a dict up, see _load_unmerged
        if isinstance(m, torch.Tensor) and has_data(m) and not is_own and not torch.isfinite(whole(m)).all():
            args[-1].append(f"{prefix}lora_magnitude_vector: has elements that are not finite")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_unmerged(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self._parameters  # with which torch's set_model_state_dict fills what a dict lacks
        found = {name for name in own if state_dict.get(prefix + name) is not own[name] and prefix + name in state_dict}
        given, brought = PARTS & found, "lora_magnitude_vector" in found
        to_come = vars(self).pop(_TO_COME, frozenset())
        follows = not brought and bool(given) and not given & to_come and self._magnitude_is_norm()
        super()._load_unmerged(state_dict, prefix, *args)
        if rest := (PARTS if brought else to_come) - given:
            vars(self)[_TO_COME] = rest
        if brought:
            self._magnitude_is_set = has_data(stored(self, "lora_magnitude_vector"))
        elif follows:
            try:
                self.reset_magnitude()
            except ValueError as error:
                args[-1].append(f"{prefix}{error}")
