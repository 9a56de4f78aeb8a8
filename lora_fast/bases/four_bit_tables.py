"""Numbers of 4-bit weights that are the same for all of them, and bitsandbytes' words for one."""

import json
from functools import cache
from typing import Any

import torch

from lora_fast.dispatch import has_data

# The values of the sixteen codes: 8 quantiles of a normal distribution on either side of zero, scaled to 1; e2m1.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NESTED_BLOCK = 256  # scales that share one of their own


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the 8-bit code for scales (Dettmers 2015, arXiv 1511.04561): of each of seven powers of ten the
    middles of 1, 2, 4, ... 64 equal parts of (0.1, 1), with both signs; 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        parts = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*parts, *(-part for part in parts)]
    return torch.tensor(sorted(values), dtype=torch.float32)


def middles_of(table: torch.Tensor) -> torch.Tensor:
    """Between its neighbours, which ascend."""
    return (table[:-1] + table[1:]) / 2


def nearest(blocks: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [blocks, elements] of the nearest values of an ascending table, absmax [blocks], over which the
    elements are taken)."""
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp_min(1e-38))[:, None]
    return torch.bucketize(scaled, middles_of(table), out_int32=True).to(torch.uint8), absmax


def quant_state(weight: Any) -> tuple[str, torch.Tensor]:
    """(quant_type, what is no tensor of an NF4 or FP4 weight as bitsandbytes' QuantState.as_dict(packed=True) writes
    it: JSON, as bytes)."""
    there = has_data(weight.table)
    quant_type = "nf4" if not there or weight.table.tolist() == torch.tensor(NF4).tolist() else "fp4"
    state: dict[str, Any] = {"quant_type": quant_type, "blocksize": weight.block, "dtype": str(weight.dtype)[6:]}
    state["shape"] = list(weight.shape)
    if hasattr(weight, "offset"):
        offset = weight.offset.item() if there else 0.0
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return quant_type, written if there else written.to(weight.table.device)
