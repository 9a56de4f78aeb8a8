"""What tile choices and launches must know of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from lora_fast.kernels.program import forget_programs

# Bytes a program may use, by capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Chip:
    """A GPU: ``Chip.of(device)``, or ``Chip(90, 132)`` to compile for an H100 where there is none (see ``assume``)."""

    capability: int  # 10 * major + minor
    processors: int

    @staticmethod
    def of(device: torch.device) -> "Chip":
        """The chip that a device is. A CPU, where the interpreter runs, counts as a Hopper chip of four processors."""
        return _assumed or _chip_of(device)

    @property
    def small(self) -> bool:
        """Whether its programs share about 100 KB of memory, and its matrix unit is a warp's."""
        return self.capability in (86, 89) or self.capability >= 120

    @property
    def has_tma(self) -> bool:
        """Whether it reads and writes through tensor descriptors, and knows programmatic dependent launch."""
        return self.capability >= 90

    @property
    def hopper(self) -> bool:
        return self.capability // 10 == 9

    @property
    def newer(self) -> bool:
        """Than Hopper."""
        return self.capability >= 100

    @property
    def shared_memory(self) -> int:
        """Bytes a program may use; of a chip that is not in the table, those of the next older one that is."""
        return SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= self.capability)]


_assumed: Chip | None = None


@cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(90, 4)
    major, minor = torch.cuda.get_device_capability(device)
    return Chip(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Within, every device counts as this chip, to compile for one that is not there: in all threads, and with no
    program that was made for another, before or after."""
    global _assumed
    before, _assumed = _assumed, chip
    forget_programs()
    try:
        yield
    finally:
        _assumed = before
        forget_programs()
