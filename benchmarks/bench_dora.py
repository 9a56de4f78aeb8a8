"""DoRA layers against the frozen ``nn.Linear``: time and peak memory, measured as bench_lora does, with its columns.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_dora

frozen          nn.Linear whose weight asks for no gradient; frozen_again is the same once more, to show the noise
lora_fast_lora  LoRALinear with the same adapters: what DoRA costs beyond LoRA
eager           lora_fast.reference: plain torch (addmm; the norm from blocks of W + s B A)
eager_compiled  torch.compile of the same
peft            PEFT's DoRA layer, where PEFT is installed; adapters in x's dtype (autocast_adapter_dtype=False)
lora_fast_dora  DoRALinear
eager_fp8       stock parts over an fp8 base, as in bench_lora
lora_fast_fp8_dora  DoRALinear over the same base (base_dtype="float8_e4m3")
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import bench_lora, common, fp8
from benchmarks.bench_lora import Case, Suite
from benchmarks.summary import means
from lora_fast import DoRALinear, LoRALinear, reference
from lora_fast.timing import Candidate

IMPLS = (
    "frozen",
    "frozen_again",
    "lora_fast_lora",
    "eager",
    "eager_compiled",
    "peft",
    "eager_fp8",
    "lora_fast_fp8_dora",
    "lora_fast_dora",
)


def build(case: Case, impls: tuple[str, ...], device: str) -> dict[str, Candidate]:
    """The candidates by name; peft is left out where it is not installed."""
    lora = ("frozen", "lora_fast_lora")
    base = bench_lora.build(case, (*lora, "frozen_again"), device)
    plain, x, dy = base["lora_fast_lora"].layer, base["frozen"].x, base["frozen"].dy
    assert isinstance(plain, LoRALinear)
    ours = DoRALinear.from_linear(plain.to_linear(), case.r, 2 * case.r, case.p)
    ours.load_state_dict({"lora_A": plain.lora_A, "lora_B": plain.lora_B}, strict=False)
    ours.reset_magnitude()
    leaves: list[Tensor] = [x, ours.lora_A, ours.lora_B, ours.lora_magnitude_vector]

    def eager(
        linear: Callable[..., Tensor], weight: Tensor = ours.weight, adapter: Sequence[Tensor] = leaves[1:]
    ) -> Candidate:
        return Candidate(lambda x: linear(x, weight, *adapter, ours.scaling, None, case.p), x, dy, [x, *adapter])

    made = {impl: base[impl] for impl in impls if impl in base}
    if "eager" in impls:
        made["eager"] = eager(reference.dora_linear)
    if "eager_compiled" in impls:
        made["eager_compiled"] = eager(torch.compile(reference.dora_linear, fullgraph=True, dynamic=False))
    if "peft" in impls and importlib.util.find_spec("peft"):
        layer = bench_lora.peft_layer(ours)
        made["peft"] = Candidate(layer, x, dy, [x, *(p for p in layer.parameters() if p.requires_grad)])
    for impl in {"eager_fp8", "lora_fast_fp8_dora"}.intersection(impls if case.dtype != "fp32" else ()):
        layer = bench_lora.over(ours, "float8_e4m3")
        adapter = [getattr(layer, name) for name in layer.adapter_names]
        made[impl] = Candidate(layer, x, dy, [x, *adapter])
        if impl == "eager_fp8":
            made[impl] = eager(fp8.dora_linear, layer.weight, adapter)
    if "lora_fast_dora" in impls:
        made["lora_fast_dora"] = Candidate(ours, x, dy, leaves)
    return {impl: made[impl] for impl in impls if impl in made}


def summarise(rows: list[common.Row], graph_rows: list[common.Row]) -> str:
    """The geometric means of every impl at r = 16, and of ours at the other ranks."""
    parts = [means(rows, r) for r in (16, 8, 64, 256, 384) if any(row["r"] == r for row in rows)]
    if graph_rows:
        found = [
            (row["p"], row["ratio_to_frozen"])
            for row in graph_rows
            if row["impl"] == "lora_fast_dora" and row["what"] == "fwd+bwd"
        ]
        parts.append("M=1024 in a CUDA graph: " + ", ".join(f"p={p}: {ratio:.3f}" for p, ratio in found))
    return "\n\n".join(parts)


DORA = Suite("bench_dora", __doc__ or "", bench_lora.all_cases((16, 8, 64, 256, 384)), IMPLS, build, summarise)


def main(argv: list[str] | None = None) -> int:
    return bench_lora.run(argv, DORA)


if __name__ == "__main__":
    sys.exit(main())
