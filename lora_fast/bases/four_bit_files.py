"""4-bit weights as the plain tensors that checkpoints hold: NF4 and FP4 by bitsandbytes' names, MXFP4 by gpt-oss'.

Names are told by what follows the weight's own:

- NF4, FP4: "" uint8 [N K / 2, 1], ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4" (or "__fp4"; JSON as
  bytes), and where absmax is kept in 8 bits ".nested_absmax" and ".nested_quant_map".
- MXFP4: "_blocks" uint8 [N, K / 32, 16], the first element in the low half of a byte, and "_scales" uint8 [N, K / 32],
  exponents plus 127. ([N K / 32, 16] and [N K / 32] where 32 does not divide K.)
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from lora_fast.bases.four_bit_tables import E2M1, NESTED_BLOCK, quant_state
from lora_fast.bases.four_bits import BlockWeight, FourBitWeight, Mxfp4Weight, Nf4Weight

STATES = {kind: f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
BLOCKS, SCALES = "_blocks", "_scales"
NAMES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES.values(), BLOCKS, SCALES)
FLOATS = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


def to_tensors(weight: FourBitWeight) -> dict[str, torch.Tensor]:
    """The plain tensors of the weight, which share its memory; row_scale and col_scale are not among them."""
    if isinstance(weight, Mxfp4Weight):
        rows = _mxfp4_rows(weight.shape)
        return {BLOCKS: weight.packed.view(*rows, 16), SCALES: weight.absmax.view(rows)}
    quant_type, state = quant_state(weight)
    found = {"": weight.packed.view(-1, 1), ".absmax": weight.absmax, ".quant_map": weight.table}
    if isinstance(weight, Nf4Weight):
        found |= {".nested_absmax": weight.absmax2, ".nested_quant_map": weight.code2}
    return found | {STATES[quant_type]: state}


def from_tensors(
    tensors: Mapping[str, torch.Tensor], shape: torch.Size | tuple[int, int], dtype: torch.dtype, name: str = "weight"
) -> FourBitWeight:
    """The weight [N, K] of such tensors, whose memory it shares where that can be. It acts as the dtype that they tell,
    those of MXFP4, which do not, as ``dtype``. ``name`` is the weight's in messages.

    Raises:
        ValueError: a tensor is missing, or is not what it should be for this shape; a quant_state that is not
            bitsandbytes'.
    """
    shape = torch.Size(shape)
    if BLOCKS in tensors or SCALES in tensors:
        rows = _mxfp4_rows(shape)
        blocks = _tensor(tensors, BLOCKS, name, torch.uint8, (*rows, 16))
        scales = _tensor(tensors, SCALES, name, torch.uint8, rows)
        table = torch.tensor(E2M1, device=blocks.device)
        return Mxfp4Weight(blocks.reshape(-1), scales.reshape(-1), table, shape=shape, dtype=dtype)
    key = next((key for key in STATES.values() if key in tensors), None)
    if key is None:
        raise ValueError(f"{name}: got 4-bit tensors without {name}{STATES['nf4']} or {name}{STATES['fp4']}")
    state = _read_state(tensors[key], name + key, shape)
    size, block = shape.numel(), state["blocksize"]
    nested = ".nested_absmax" in tensors or "nested_offset" in state
    packed = _bytes(tensors, name, size // 2)
    count = size // block
    kept = [
        packed,
        _tensor(tensors, ".absmax", name, torch.uint8 if nested else torch.float32, (count,)),
        _tensor(tensors, ".quant_map", name, torch.float32, (16,)),
    ]
    if not nested:
        return BlockWeight(*kept, shape=shape, dtype=FLOATS[state["dtype"]])
    kept += [
        _tensor(tensors, ".nested_quant_map", name, torch.float32, (256,)),
        _tensor(tensors, ".nested_absmax", name, torch.float32, (-(-count // NESTED_BLOCK),)),
    ]
    offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=packed.device)
    return Nf4Weight(*kept, offset, shape=shape, dtype=FLOATS[state["dtype"]])


def describe(weight: FourBitWeight) -> str:
    """How it is kept, in words."""
    if isinstance(weight, Mxfp4Weight):
        return "mxfp4"
    absmax = "nested absmax" if isinstance(weight, Nf4Weight) else "float32 absmax"
    return f"nf4 or fp4 with {absmax}, blocksize {weight.block}"


def _mxfp4_rows(shape: torch.Size) -> tuple[int, ...]:
    n, k = shape
    return (n * k // 32,) if k % 32 else (n, k // 32)


def _read_state(written: Any, key: str, shape: torch.Size) -> dict[str, Any]:
    try:
        state = json.loads(bytes(written.tolist()))
        block, dtype = state["blocksize"], state["dtype"]
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError):
        raise ValueError(f"{key}: got no JSON of bitsandbytes', expected its quant_state as uint8") from None
    if state.get("shape") != list(shape):
        raise ValueError(f"{key}: got shape {state.get('shape')}, expected {list(shape)}")
    if dtype not in FLOATS:
        raise ValueError(f"{key}: got dtype {dtype!r}, expected {' or '.join(map(repr, FLOATS))}")
    if not isinstance(block, int) or block < 32 or block & (block - 1) or shape.numel() % block:
        raise ValueError(f"{key}: got blocksize {block}, expected a power of two from 32 on that divides N * K")
    if "nested_offset" in state and (state.get("nested_blocksize"), state.get("nested_dtype")) != (256, "float32"):
        found = state.get("nested_blocksize"), state.get("nested_dtype")
        raise ValueError(f"{key}: got nested_blocksize and nested_dtype {found}, expected (256, 'float32')")
    return state


def _tensor(
    tensors: Mapping[str, Any], key: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """The one of this name, checked."""
    found = tensors.get(key)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name}{key}: is missing, expected {dtype} of shape {shape} beside the weight's other parts")
    if found.dtype != dtype or found.shape != shape:
        raise ValueError(f"{name}{key}: got {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of {shape}")
    return found.detach().contiguous()


def _bytes(tensors: Mapping[str, Any], name: str, size: int) -> torch.Tensor:
    """The packed elements, which bitsandbytes may have stored as another dtype (bnb_4bit_quant_storage)."""
    found = tensors.get("")
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name}: is missing, expected torch.uint8 of shape {(size, 1)} beside its absmax")
    if found.nbytes != size or 1 not in found.shape:
        got = f"{found.dtype} of shape {tuple(found.shape)}"
        raise ValueError(f"{name}: got {got}, expected torch.uint8 of {(size, 1)}, or these bytes as another dtype")
    return found.detach().reshape(-1).view(torch.uint8)
