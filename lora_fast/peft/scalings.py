"""PEFT's record of its adapters' scalings, as compiled graphs can read it."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def is_number(value: Any) -> bool:
    """Whether a scaling is one that operators take: a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Scalings(dict[str, Any]):
    """PEFT's dict {adapter: scaling}, each finite number mirrored into a 0-dim float32 tensor on ``device``, which
    compiled graphs read: there a Python float would be a constant, and a new value a new compilation."""

    def __init__(
        self, values: Mapping[str, Any], device: torch.device, mirrors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.mirrors: dict[str, torch.Tensor] = dict(mirrors or {})
        self.update(values)

    def of(self, name: str, device: torch.device) -> float | torch.Tensor:
        """The scaling of an adapter in the form that is best just now."""
        if torch.compiler.is_compiling() and self.mirrors[name].device == device:
            return self.mirrors[name]
        return self[name]

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if not is_number(value):
            self.mirrors.pop(name, None)
        elif name in self.mirrors and self.mirrors[name].device == self.device:
            self.mirrors[name].fill_(value)
        else:
            with torch.inference_mode(False):
                self.mirrors[name] = torch.tensor(value, dtype=torch.float32, device=self.device)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> "Scalings":  # type: ignore[override, misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), torch.device("cpu"))  # a pickle may be read where there is no such device
