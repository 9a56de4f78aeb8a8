"""What a batch is given of each of its adapters, and which rows take which."""

from typing import Any, NamedTuple

import torch

MaybeTensor = torch.Tensor | None


class Adapter(NamedTuple):
    """An adapter of a linear layer, for those rows of a batch that name it.

    lora_A [R, K] and lora_B [N, R]; scaling a number or a 0-dim tensor; with lora_magnitude_vector [N] it is DoRA's.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float | torch.Tensor = 1.0
    dropout_p: float = 0.0
    lora_magnitude_vector: MaybeTensor = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that a call may ask gradients of; None where there is none."""
        return self.lora_A, self.lora_B, self.lora_magnitude_vector


def rows_each(x: torch.Tensor, which: torch.Tensor) -> int:
    """For how many rows of x [*lead, K] an element of ``which`` speaks, whose shape is that of the first leads."""
    return x.shape[which.dim() : -1].numel()


def of_rows(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """``which`` for each row: int64 [*lead, 1]."""
    lead = x.shape[:-1]
    return which.long().reshape(*which.shape, *(1,) * (len(lead) - which.dim())).expand(lead).unsqueeze(-1)
