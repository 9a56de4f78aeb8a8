"""LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): lora_B learns faster than lora_A."""

import math
from typing import Any

import torch
from torch import nn

from lora_fast.models.adapters import lora_parameters

NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: what trains of ``model``, of our layers or of PEFT's, as PEFT's
    ``create_loraplus_optimizer`` groups it.

    ``lr`` is the learning rate of lora_A and of matrices without an adapter; that of lora_B and of vectors (biases,
    DoRA's magnitudes) is ``lr * ratio``; that of adapters on embeddings ``embedding_lr``. The paper's
    ratio is about 16, with an ``lr`` that is smaller than LoRA's. Biases and the weights of norms do not decay. With a
    ``name`` it is the adapter of this name alone, of several in layers of ours.

        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-4, ratio=16))
        Trainer(model, ..., optimizers=(optimizer, None))

    Raises:
        TypeError: not a module. ValueError: no adapter of this name; a rate, ratio or decay that is no number above
            zero (the decay may be zero), or nothing in the model trains.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    for argument, value in (
        ("lr", lr),
        ("ratio", ratio),
        ("embedding_lr", embedding_lr),
        ("weight_decay", weight_decay),
    ):
        least = 0 if argument == "weight_decay" else math.ulp(0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise ValueError(f"{argument}: got {value!r}, expected a finite number {'>=' if least == 0 else '>'} 0")
    norms = {
        p for module in model.modules() if type(module).__name__.endswith(NORMS) for p in module._parameters.values()
    }
    wanted = None if name is None else set(lora_parameters(model, name))
    found: dict[tuple[float, float], list[torch.Tensor]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and (wanted is None or parameter in wanted):
            embedding, faster = "lora_embedding_" in key, "lora_B" in key or parameter.ndim == 1
            rate = embedding_lr if embedding else lr * ratio if faster else lr
            decay = 0.0 if faster and ("bias" in key or parameter in norms) else weight_decay
            found.setdefault((rate, decay), []).append(parameter)
    if not found:
        raise ValueError("model: none of its parameters trains")
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in found.items()]
