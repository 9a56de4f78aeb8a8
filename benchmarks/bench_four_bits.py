"""Layers over 4-bit bases against the frozen 16-bit ``nn.Linear``, measured as bench_lora does, with its columns.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_four_bits

Rows of M=2048 under CUDA graphs are in a file of their own.

frozen, frozen_again                 nn.Linear whose weight asks for no gradient, in bf16
peft_bnb_lora, peft_bnb_dora         PEFT's layer over bitsandbytes' NF4, nested, where both are installed
lora_fast_lora, lora_fast_dora       LoRALinear and DoRALinear over the bf16 weight
lora_fast_fp8_lora, _dora            over an fp8 base
lora_fast_nf4_lora, _dora            over NF4, written out in bf16 ahead of each product
lora_fast_nf4_fp8_lora, _dora        over NF4, with products of 8-bit operands (base_compute="float8_e4m3")
lora_fast_mxfp4_lora, _dora          over MXFP4, written out in bf16
lora_fast_fp8_blocks_lora, _dora     over e4m3 with a scale for each 128 x 128, as fp8 checkpoints have it, likewise
lora_fast_fp8_blocks_fp8_lora, _dora over the same, with products of 8-bit operands
"""

import importlib.util
import statistics
import sys
from typing import Any

from torch import nn

from benchmarks import bench_dora, bench_lora, common
from benchmarks.bench_lora import FROZEN, Case, Suite
from lora_fast import LoRALinear
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.timing import Candidate

SHAPES = [(m, *shape) for m in (8192, 2048) for shape in ((4096, 4096), (4096, 14336), (14336, 4096))]
BASES: dict[str, tuple[str | None, str | None]] = {  # base_dtype, base_compute
    "fp8": ("float8_e4m3", None),
    "nf4": ("nf4", None),
    "nf4_fp8": ("nf4", "float8_e4m3"),
    "mxfp4": ("mxfp4", None),
    "fp8_blocks": (None, None),  # which the weight is in already
    "fp8_blocks_fp8": (None, "float8_e4m3"),
}
KINDS = "lora", "dora"
IMPLS = (
    *FROZEN,
    *(f"peft_bnb_{kind}" for kind in KINDS),
    *(f"lora_fast_{kind}" for kind in KINDS),
    *(f"lora_fast_{base}_{kind}" for base in BASES for kind in KINDS),
)


def build(case: Case, impls: tuple[str, ...], device: str) -> dict[str, Candidate]:
    """The candidates by name; PEFT's are left out where it or bitsandbytes is not installed."""
    made = bench_lora.build(case, (*FROZEN, "lora_fast_lora"), device)
    made |= bench_dora.build(case, ("lora_fast_dora",), device)
    x, dy = made["frozen"].x, made["frozen"].dy
    for kind in KINDS:
        ours: Any = made[f"lora_fast_{kind}"].layer
        for base, options in BASES.items():
            if (name := f"lora_fast_{base}_{kind}") in impls:
                linear = ours.to_linear()
                if options[0] is None:
                    linear.weight = nn.Parameter(ScaledFp8Weight.quantise(linear.weight), requires_grad=False)
                layer = bench_lora.over(ours, *options, linear)
                made[name] = Candidate(layer, x, dy, [x, *(getattr(layer, part) for part in layer.adapter_names)])
        if (name := f"peft_bnb_{kind}") in impls and all(map(importlib.util.find_spec, ("peft", "bitsandbytes"))):
            stock = bench_lora.peft_layer(ours, four_bit_linear(ours))
            made[name] = Candidate(stock, x, dy, [x, *(p for p in stock.parameters() if p.requires_grad)])
    return {impl: made[impl] for impl in impls if impl in made}


def four_bit_linear(ours: LoRALinear) -> nn.Module:
    """bitsandbytes' layer, nested NF4, of the same weight."""
    import bitsandbytes

    n, k = ours.weight.shape
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layer: nn.Module = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=ours.weight.dtype, **options)
    weight = bitsandbytes.nn.Params4bit(ours.weight.detach().cpu(), requires_grad=False, **options)
    layer.weight = weight
    return layer.to(ours.weight.device)


def summarise(rows: list[common.Row], graph_rows: list[common.Row]) -> str:
    """Geometric means over the three shapes, forward and backward, and the largest peak memory over frozen's."""
    tables = []
    for title, found in (("eager", rows), ("CUDA graphs", graph_rows)):
        for m in sorted({row["M"] for row in found}, reverse=True):
            lines = []
            for impl in IMPLS:
                cells = []
                for p in common.PS:
                    ratios = [
                        row["ratio_to_frozen"]
                        for row in found
                        if (row["M"], row["impl"], row["p"], row["what"]) == (m, impl, p, "fwd+bwd")
                    ]
                    cells.append(f"{statistics.geometric_mean(ratios):.3f}" if ratios else "")
                if any(cells):
                    lines.append((impl, *cells))
            if lines:
                tables.append(common.markdown((f"M={m}, {title}", *(f"p={p}" for p in common.PS)), lines))
    return "\n\n".join(tables)


FOUR_BITS = Suite(
    "bench_four_bits", __doc__ or "", bench_lora.cases_of(SHAPES, (16,)), IMPLS, build, summarise, graphed=2048
)


def main(argv: list[str] | None = None) -> int:
    return bench_lora.run(argv, FOUR_BITS)


if __name__ == "__main__":
    sys.exit(main())
