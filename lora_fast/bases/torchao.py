"""torchao's NF4Tensor as a base of ours over the same bytes, known by what it has, without an import of torchao.

Its numbers are its own: a table of four digits and scales ``int8 / factor + mean``, both in the weight's dtype, and a
product that is rounded to it. A float32 product of the two, rounded once, gives the same bits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lora_fast.bases.four_bits import BlockWeight

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # elements that share a scale, as the kernels take them


def is_nf4tensor(weight: Any) -> bool:
    return type(weight).__name__ == "NF4Tensor" and type(weight).__module__.startswith("torchao.")


def why_not_taken(weight: Any) -> str | None:
    """Why :func:`from_nf4tensor` does not take an NF4Tensor, in words; None where it does."""
    if weight.dim() != 2 or weight.stride() != (weight.shape[1], 1) or weight.storage_offset():
        return f"is no whole matrix in rows (shape {tuple(weight.shape)}, strides {weight.stride()})"
    blocks, rest = divmod(weight.numel(), weight.block_size)
    if weight.block_size not in BLOCKS or rest:
        return f"has {weight.numel()} elements in blocks of {weight.block_size}, expected whole ones of {BLOCKS}"
    given = weight.quantized_data.numel(), weight.quantized_scalers.numel(), weight.nf4.numel()
    wanted = weight.numel() // 2, blocks, 16
    if given != wanted or weight.quantized_data.dtype != torch.uint8 or blocks % weight.scaler_block_size:
        return f"has (bytes, scales, table) of {given} elements, expected {wanted}"
    return "does not start at a multiple of 16 bytes" if weight.quantized_data.data_ptr() % 16 else None


@torch.no_grad()
def from_nf4tensor(weight: Any) -> BlockWeight:
    """The same numbers, to the bit, in the weight's dtype, over the same packed bytes; scales become float32."""
    scales = weight.quantized_scalers.view(-1, weight.scaler_block_size) / weight.quantization_factor[:, None]
    absmax = scales.flatten().to(weight.dtype) + weight.scaler_mean
    packed = weight.quantized_data.detach().view(-1)
    return BlockWeight(packed, absmax.float(), weight.nf4.float(), shape=weight.shape, dtype=weight.dtype)


def nf4tensor_again(weight: Any) -> Callable[[BlockWeight], Any]:
    """What makes the NF4Tensor again of the weight that was made from it, wherever that is by now; None where others'
    numbers were loaded into that, or its dtype changed. It holds no packed bytes itself."""
    names, about = weight.__tensor_flatten__()
    small = {name: getattr(weight, name) for name in names if name != "quantized_data"}
    return partial(_again, type(weight), small, about)


def _again(kind: Any, small: dict[str, torch.Tensor], about: dict[str, Any], weight: BlockWeight) -> Any:
    inner = {name: t.to(weight.device) for name, t in small.items()}
    about = {**about, "tensor_meta": replace(about["tensor_meta"], device=weight.device, requires_grad=False)}
    made = kind.__tensor_unflatten__({**inner, "quantized_data": weight.packed}, about, weight.shape, weight.stride())
    before = from_nf4tensor(made)
    same = torch.equal(before.absmax, weight.absmax) and torch.equal(before.table, weight.table)
    return made if same and made.dtype == weight.dtype else None
