"""Linear layers whose weights others hold in a packed form, known by what they have: transformers' FP8Linear
(``weight`` in e4m3 and ``weight_scale_inv``, one for each 128 x 128), those of compressed-tensors (``weight_scale``,
one for each row), and an ``nn.Linear`` whose weight is torchao's NF4Tensor (torchtune's)."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from lora_fast.bases import torchao
from lora_fast.bases.scaled import BLOCK, NAMES, REMEDY, ScaledFp8Weight, why_no_scale

E4M3 = torch.float8_e4m3fn
KINDS = ("Linear", "FP8Linear", "CompressedLinear")  # names of classes that multiply by the weight and add the bias
HALVES = torch.float16, torch.bfloat16
FLOATS = *HALVES, torch.float32
BEFORE = "_before_plain"  # in a layer's __dict__: its class, scales, own forward and weight before make_plain


def is_held(module: Any) -> bool:
    """Whether it is a linear layer whose weight is in 8-bit floats of any kind, or an NF4Tensor."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and (torchao.is_nf4tensor(weight) or str(weight.dtype).startswith("torch.float8"))


def why_not_held(module: Any) -> str | None:
    """Why :func:`plain_linear` does not take such a layer, in words; None where it does."""
    name, weight = type(module).__name__, module.weight
    if torchao.is_nf4tensor(weight):
        why = torchao.why_not_taken(weight)
        if type(module) is not nn.Linear:
            return f"is a {name} with torchao's NF4Tensor, not a plain nn.Linear"
        return why and f"has an NF4Tensor of torchao's that {why}"
    if name not in KINDS:
        return f"is a {name} with an fp8 weight ({', '.join(KINDS)} are known)"
    if weight.dtype != E4M3 or weight.dim() != 2:
        return f"has a quantised weight ({weight.dtype} of shape {tuple(weight.shape)}; float8_e4m3fn [N, K] is read)"
    for static in ("activation_scale", "input_scale"):
        if getattr(module, static, None) is not None:
            return f"quantises its input over a fixed scale ({static}, a static activation scheme): {REMEDY}"
    key = next((key for key in NAMES if getattr(module, f"weight{key}", None) is not None), None)
    if key is None:
        return f"has a quantised weight ({weight.dtype}) without weight_scale_inv or weight_scale"
    scale, block = getattr(module, f"weight{key}"), getattr(module, "block_size", None)
    if why := why_no_scale(tuple(scale.shape), scale.dtype, tuple(weight.shape)):
        return f"has an fp8 weight whose weight{key} is of another form: {why}"
    if block is not None and tuple(block) != (BLOCK, BLOCK):
        return f"has fp8 scales for blocks of {tuple(block)}, expected ({BLOCK}, {BLOCK}): {REMEDY}"
    return None


def plain_linear(module: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """An ``nn.Linear`` over the same bytes, whose weight acts as ``dtype``; by itself as the bias, or as scales in 16
    bits are, else as bfloat16. An NF4Tensor keeps its own."""
    shape, bias = tuple(module.weight.shape), module.bias
    linear = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta").train(module.training)
    linear.bias = bias
    if torchao.is_nf4tensor(module.weight):
        linear.weight = nn.Parameter(torchao.from_nf4tensor(module.weight), requires_grad=False)
        return linear
    tensors = {"": module.weight} | {
        key: t for key in NAMES if (t := getattr(module, f"weight{key}", None)) is not None
    }
    if dtype is None:
        told = [t.dtype for t in (bias, *list(tensors.values())[1:]) if t is not None and t.dtype in HALVES]
        told += [bias.dtype] if bias is not None else []
        dtype = told[0] if told else torch.bfloat16
    linear.weight = nn.Parameter(ScaledFp8Weight.from_tensors(tensors, shape, dtype), requires_grad=False)
    return linear


def make_plain(module: Any, dtype: torch.dtype | None = None) -> None:
    """Make an ``nn.Linear`` of the layer itself, as :meth:`plain_linear` makes another; :func:`make_as_before` undoes
    it."""
    weight = plain_linear(module, dtype).weight
    scales = {name: module._parameters.pop(name) for key in NAMES if (name := f"weight{key}") in module._parameters}
    again = torchao.nf4tensor_again(module.weight) if torchao.is_nf4tensor(module.weight) else _fp8_again
    vars(module)[BEFORE] = type(module), scales, vars(module).pop("forward", None), (type(weight.data), again)
    module.__class__, module.weight = nn.Linear, weight


def _fp8_again(weight: ScaledFp8Weight) -> torch.Tensor:
    return weight.stored.view(E4M3)


def make_as_before(module: Any) -> None:
    """Make the layer again what :func:`make_plain` found, if it was that, over the same bytes; not where its weight is
    another one by now."""
    *_, (kind, again) = vars(module).get(BEFORE, ((torch.Tensor, None),))
    weight = module.weight
    if again is None or not isinstance(weight, kind) or (before := again(weight)) is None:
        return
    module.__class__, scales, forward, _ = vars(module).pop(BEFORE)
    module.weight = nn.Parameter(before, requires_grad=False)
    for name, scale in scales.items():  # as it is now
        _, now = weight.tensors().values()
        module.register_parameter(name, nn.Parameter(now.detach().reshape(scale.shape), requires_grad=False))
    if forward is not None:
        module.forward = forward


def dtype_beside(model: nn.Module) -> torch.dtype | None:
    """That of most elements of the model's parameters but for fp8 weights and scales; None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for name, p in model.named_parameters():
        if p.dtype in FLOATS and "_scale" not in name.rpartition(".")[2]:
            counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else None
