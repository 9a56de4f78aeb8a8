"""torchao's NF4Tensor where it is installed, and what stands in for it where it is not: the same fields, values and
arithmetic."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from lora_fast.bases.four_bit_tables import NF4

SCALES = 256  # blocks that share a factor


@dataclass
class Meta:
    original_shape: torch.Size
    original_strides: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


INNER = ["quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4"]


class NF4Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, about, inner):
        meta = about["tensor_meta"]
        kind = {"dtype": meta.dtype, "device": meta.device, "requires_grad": meta.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, meta.original_shape, meta.original_strides, **kind)

    def __init__(self, about, inner):
        self.block_size, self.scaler_block_size = about["block_size"], about["scaler_block_size"]
        for name, t in inner.items():
            setattr(self, name, t)

    def __tensor_flatten__(self):
        meta = Meta(self.shape, self.stride(), 0, self.dtype, self.quantized_data.device, self.requires_grad)
        sizes = {"block_size": self.block_size, "scaler_block_size": self.scaler_block_size}
        return INNER, {**sizes, "tensor_meta": meta}

    @classmethod
    def __tensor_unflatten__(cls, inner, about, size, stride):
        return cls(about, inner)

    def get_original_weight(self):
        scales = self.quantized_scalers.view(-1, self.scaler_block_size) / self.quantization_factor[:, None]
        scales = scales.flatten().to(self.dtype) + self.scaler_mean
        codes = torch.stack([self.quantized_data >> 4, self.quantized_data & 15], 1)
        return (self.nf4[codes.long().view(-1, self.block_size)] * scales[:, None]).view(self.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].get_original_weight(), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        names, about = args[0].__tensor_flatten__()
        about["tensor_meta"].requires_grad = False
        same = cls(about, {name: getattr(args[0], name) for name in names})
        return return_and_correct_aliasing(func, args, kwargs or {}, same)


NF4Tensor.__module__ = "torchao.stand_in"


def stand_in(weight, block=64):
    """As torchao quantises, but for its way of rounding scales."""
    blocks = weight.float().view(-1, block)
    absmax = blocks.abs().amax(1)
    mean = absmax.mean()
    factor = 128 / (absmax - mean).view(-1, SCALES).abs().amax(1)
    scales = ((absmax - mean).view(-1, SCALES) * factor[:, None]).round().clamp(-128, 127).to(torch.int8).flatten()
    table = torch.tensor([round(value, 4) for value in NF4], dtype=weight.dtype)
    codes = (blocks / absmax[:, None])[..., None].sub(table.float()).abs().argmin(-1).to(torch.uint8).view(-1, 2)
    parts = codes[:, 0] << 4 | codes[:, 1], mean.to(weight.dtype), factor.to(weight.dtype), scales, table
    meta = Meta(weight.shape, weight.stride(), 0, weight.dtype, weight.device, False)
    about = {"block_size": block, "scaler_block_size": SCALES, "tensor_meta": meta}
    return NF4Tensor(about, dict(zip(INNER, parts, strict=True)))


def of_torchao(weight, block=64):
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(weight, block, SCALES)


absent = importlib.util.find_spec("torchao") is None
MAKERS = [stand_in, pytest.param(of_torchao, marks=pytest.mark.skipif(absent, reason="torchao is not installed"))]
