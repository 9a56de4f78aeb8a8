"""How a model keeps its experts, as data: the layout of their weights, the gate, and PEFT's adapter for all of them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

GATES = ("silu", "gpt_oss", "clamped")


@dataclass(frozen=True)
class Gate:
    """What an expert makes of its gate g and its up projection u, both [rows, I]: a [rows, I].

    - ``silu``: ``silu(g) * u`` (Shazeer 2020, arXiv 2002.05202: SwiGLU).
    - ``gpt_oss``: ``g = min(g, limit)``, ``u = min(max(u, -limit), limit)``, ``(u + 1) * g * sigmoid(alpha * g)``
      (transformers' GptOssExperts).
    - ``clamped``: the same clamps, ``silu(g) * u`` (transformers' DeepseekV4Experts).

    Raises:
        ValueError: another kind, or a limit that is not positive, or an alpha that is not finite.
    """

    kind: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(map(repr, GATES))}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha}, expected a finite number")
        if not self.limit > 0:
            raise ValueError(f"limit: got {self.limit}, expected a number > 0")


@dataclass(frozen=True)
class ExpertsForm:
    """How the weights of E experts lie in memory: gate and up projection as one, ``gate_up``, and ``down``.

    Args:
        transposed: ``gate_up`` is [E, H, 2I] and ``down`` [E, I, H], instead of [E, 2I, H] and [E, H, I].
        interleaved: of the 2I outputs of ``gate_up`` the even ones are the gate's and the odd ones up's, instead of the
            first half the gate's.
        gate: what is made of both.
    """

    transposed: bool = False
    interleaved: bool = False
    gate: Gate = Gate()


class Adapter(NamedTuple):
    """LoRA on one weight of all E experts, as PEFT keeps it; in and out are the product's, however the weight lies.

    Expert e has ``A_e = lora_A.reshape(E, r, in)[e]`` and ``B_e = lora_B.reshape(out, r, E)[:, :, e]``, and adds
    ``scaling * B_e A_e`` to its weight [out, in].
    """

    lora_A: torch.Tensor  # [E * r, in], an expert's rows side by side
    lora_B: torch.Tensor  # [out, r * E], the experts fastest
    scaling: float
