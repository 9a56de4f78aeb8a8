"""What a block is given of each of its layers."""

from typing import Any, NamedTuple

import torch

MaybeTensor = torch.Tensor | None


class Layer(NamedTuple):
    """A linear layer of a block: ``y = x W^T + scaling * (drop(x) A^T) B^T + bias``, with a magnitude DoRA's (see
    :func:`lora_fast.functional.dora_linear`), without adapters ``x W^T + bias``.

    weight [N, K]; lora_A [R, K] and lora_B [N, R], both or neither; scaling a number or a 0-dim tensor; bias [N];
    lora_magnitude_vector [N], which takes adapters; ``round_norm`` and ``save`` as ``dora_linear`` takes them.
    """

    weight: torch.Tensor
    lora_A: MaybeTensor = None
    lora_B: MaybeTensor = None
    scaling: float | torch.Tensor = 1.0
    bias: MaybeTensor = None
    dropout_p: float = 0.0
    lora_magnitude_vector: MaybeTensor = None
    round_norm: bool = False
    save: str = "auto"

    @property
    def adapted(self) -> bool:
        return self.lora_A is not None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All that a call may ask gradients of, and the weight: None where there is none."""
        return self.weight, self.lora_A, self.lora_B, self.bias, self.lora_magnitude_vector
