"""Models of two layers with adapters, ours and patched ones of PEFT's, merged and unmerged alike."""

import pytest
import torch
from peft_nets import Net, patched, peft, stir, stock_model

from lora_fast import LoRAConfig, add_lora, merge_lora, unmerge_lora

OWN, PATCHED = ["lora", "dora"], ["peft", "peft dora"]
KIND = pytest.mark.parametrize("kind", OWN + PATCHED)
CASTS = pytest.mark.filterwarnings("ignore:Already unmerged")


def made(kind, seed=1, dtype=torch.float32, **more):
    """A model of two layers with adapters that are not zero, on the same bases for every seed."""
    if kind in PATCHED:
        return patched(stir(stock_model(dtype=dtype, use_dora=kind == "peft dora", **more), seed))
    torch.manual_seed(0)
    config = LoRAConfig(r=3, target_modules=["up", "down"], use_dora=kind == "dora", **more)
    return stir(add_lora(Net().to(dtype), config), seed)


def merge(model):
    return model.merge_adapter() if isinstance(model, peft.PeftModel) else merge_lora(model)


def unmerge(model):
    return model.unmerge_adapter() if isinstance(model, peft.PeftModel) else unmerge_lora(model)


def weights(model):
    """Of the base layers, as they are just now."""
    return [layer.weight.detach().clone() for layer in base_layers(model)]


def base_layers(model):
    net = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return [getattr(layer, "base_layer", layer) for layer in (net.up, net.down)]
