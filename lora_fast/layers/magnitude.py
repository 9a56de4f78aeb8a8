"""DoRA's magnitude: made when the weights are there, anew for another base until it is trained."""

from typing import Any, ClassVar, Self

import torch
from torch import nn

from lora_fast.dispatch import has_data
from lora_fast.wrappers.gather import whole
from lora_fast.wrappers.placement import keeper, offloading, present, settle, stored, write

_TO_COME = "_parts_to_come"  # in a layer's __dict__: those that a later part of a state dict will bring


class KeepsMagnitude(nn.Module):
    """A layer that can be merged and has a ``lora_magnitude_vector``, at the start the norms that ``_norm`` gives.

    Attributes:
        norm_parts: the names of the tensors that the norms are made of; none without DoRA.
    """

    NORMED: ClassVar[str] = "rows"  # of the weight
    norm_parts: frozenset[str]
    lora_magnitude_vector: nn.Parameter
    _magnitude_is_set = True

    def _norm(self) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the norms, later if a tensor that they are made of has no data (meta device).

        Raises:
            ValueError: a norm is not finite; the magnitude is then as it was.
        """
        parts = [getattr(self, name) for name in (*self.norm_parts, "lora_magnitude_vector")]
        self._magnitude_is_set = all(map(has_data, parts)) or offloading(self) is not None
        if self._magnitude_is_set:
            settle(self)
            with present(self):
                norm = self._norm()
            if not torch.isfinite(norm).all():
                raise ValueError(
                    f"weight: has {self.NORMED} whose norm is not finite, expected finite ones to start DoRA from"
                )
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

    def need_magnitude(self) -> None:
        """Make the magnitude now if that was put off. RuntimeError where it would be lost."""
        if not (self._magnitude_is_set or self._magnitude_came()):
            if who := keeper(self):
                raise RuntimeError(
                    f"lora_magnitude_vector: is not made yet, and would be lost in the keeping of {who}; call "
                    "reset_magnitude() once the weights are there"
                )
            self.reset_magnitude()

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """As :meth:`lora_fast.LoRALinear.merge`; a magnitude that was put off is made now."""
        if not self._magnitude_is_set:
            settle(self)
            with present(self):
                came = self._magnitude_came()
            if not came:
                self.reset_magnitude()
        super().merge(safe_merge, original)  # type: ignore[misc]

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
        given, brought = self.norm_parts & found, "lora_magnitude_vector" in found
        to_come = vars(self).pop(_TO_COME, frozenset())
        follows = not brought and bool(given) and not given & to_come and self._magnitude_is_norm()
        super()._load_unmerged(state_dict, prefix, *args)  # type: ignore[misc]
        if rest := (self.norm_parts if brought else to_come) - given:
            vars(self)[_TO_COME] = rest
        if brought:
            self._magnitude_is_set = has_data(stored(self, "lora_magnitude_vector"))
        elif follows:
            try:
                self.reset_magnitude()
            except ValueError as error:
                args[-1].append(f"{prefix}{error}")
