"""How much of a model trains, and what no adapter reaches."""

from torch import nn

from lora_fast.models.adapters import lora_layers
from lora_fast.models.projections import patterns, projections


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Print how many parameters train, in PEFT's format, and which projections no adapter reaches (fused experts), if
    there are any; return (trainable, all). ValueError without LoRA layers."""
    lora_layers(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / total
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
    if others := {name: p for name, p in projections(model).items() if not p.requires_grad}:
        count = sum(p.numel() for p in others.values())
        print(f"without an adapter, for they are no nn.Linear's: {', '.join(patterns(others))}: {count:,d} params")
    return trainable, total
