"""Models whose linear layers are held in fp8 by transformers' class, or as compressed-tensors does."""

import copy

import pytest
import torch
from base_calls import scaled
from torch import nn

from lora_fast.bases.scaled import ScaledFp8Weight

finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")


class CompressedLinear(nn.Linear):
    """What compressed-tensors' class of this name holds of a weight with a scale for each row."""


def of_transformers(n, k, form="float32", bias=True, **options):
    layer = finegrained.FP8Linear(k, n, block_size=(128, 128), has_bias=bias, **options)
    tensors = scaled(form, n, k).tensors()
    layer.weight.data, layer.weight_scale_inv.data = tensors[""], tensors["_scale_inv"]
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def of_compressed_tensors(n, k, form="rows", kind=CompressedLinear):
    layer = kind(k, n)
    tensors = scaled(form, n, k).tensors()
    layer.weight = nn.Parameter(tensors[""], requires_grad=False)
    layer.weight_scale = nn.Parameter(tensors["_scale"], requires_grad=False)
    return layer


MAKERS = {
    "blocks": lambda n, k: of_transformers(n, k),
    "e8m0": lambda n, k: of_transformers(n, k, "e8m0", scale_fmt="ue8m0"),
    "rows": lambda n, k: of_compressed_tensors(n, k),
    "bf16 rows": lambda n, k: of_compressed_tensors(n, k, "bf16 rows", nn.Linear),
}


class Net(nn.Module):
    def __init__(self, make, n=144, k=160):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = make(n, k), make(k, n), nn.Linear(k, 8)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def dense(model):
    """The same with plain weights in float32."""
    model = copy.deepcopy(model)
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        parts = {"": layer.weight, "_scale_inv": getattr(layer, "weight_scale_inv", None)}
        parts["_scale"] = getattr(layer, "weight_scale", None)
        given = {key: t for key, t in parts.items() if t is not None}
        plain = nn.Linear(layer.in_features, layer.out_features)
        weight = ScaledFp8Weight.from_tensors(given, layer.weight.shape, torch.float32)
        plain.weight, plain.bias = nn.Parameter(weight.dequantise()), nn.Parameter(layer.bias.detach().clone())
        setattr(model, name, plain)
    return model


def step(model, x):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for name, p in model.named_parameters() if "lora_" in name)]


# What makes a layer of transformers' one that is not taken, and a part of the reason.
BAD = {
    "per-tensor": (lambda layer: setattr(layer, "weight_scale_inv", nn.Parameter(torch.ones(()))), "per-tensor"),
    "static": (lambda layer: setattr(layer, "activation_scale", nn.Parameter(torch.ones(()))), "static activation"),
    "input scale": (lambda layer: setattr(layer, "input_scale", nn.Parameter(torch.ones(1))), "input_scale, a static"),
    "blocks": (lambda layer: setattr(layer, "block_size", (64, 64)), r"blocks of \(64, 64\), expected \(128, 128\)"),
    "other": (lambda layer: setattr(layer, "weight_scale_inv", nn.Parameter(torch.ones(3, 3))), r"got shape \(3, 3\)"),
    "none": (lambda layer: setattr(layer, "weight_scale_inv", None), "without weight_scale_inv or weight_scale"),
    "e5m2": (lambda layer: setattr(layer.weight, "data", layer.weight.data.view(torch.float8_e5m2)), "float8_e5m2"),
    "hook": (lambda layer: layer.register_forward_hook(lambda *_: None), "has hooks"),
}
