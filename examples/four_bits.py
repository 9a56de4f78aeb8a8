"""Bases of four bits a weight, as QLoRA has them, by the libraries that make them: for llama2_7b.py."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lora_fast


def bitsandbytes(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    shape, weight = (linear.in_features, linear.out_features), linear.weight.data
    four = Linear4bit(*shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    four.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    return four.to(weight.device)  # this quantises


def torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4  # type: ignore[import-not-found]

    if linear.weight.numel() % 2**14 == 0:  # 256 blocks of 64
        linear.weight = nn.Parameter(to_nf4(linear.weight.data), requires_grad=False)
    return linear


LIBRARIES: dict[str, Callable[[Any], nn.Module]] = {"bitsandbytes": bitsandbytes, "torchao": torchao}


def missing(library: str) -> bool:
    return importlib.util.find_spec(library) is None


def quantise_linears(root: nn.Module, library: str) -> None:
    """The linear layers within, in place: their weights themselves stay as they are."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, LIBRARIES[library](child))


def quantise(model: Any, library: str) -> None:
    """The linear layers of all blocks of transformers' Llama."""
    quantise_linears(model.model.layers, library)
    model.is_loaded_in_4bit = library == "bitsandbytes"  # how PEFT knows


def refusal() -> str:
    """What a layer of lora_fast's says to a base of two weights a byte."""
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    try:
        lora_fast.LoRALinear.from_linear(linear)
    except TypeError as error:
        return str(error)
    raise AssertionError("a quantised base was taken")
