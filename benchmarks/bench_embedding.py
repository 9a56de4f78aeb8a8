"""LoRA and DoRA on an embedding against the frozen ``nn.Embedding``: time and peak memory, measured as bench_lora does,
with its columns: M ids, a vocabulary of K, N columns.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_embedding

The ids are drawn as skewed as words are in text: most of them are few. Adapters are float32 over 16 bits, as PEFT makes
them. A frozen embedding has no backward: its step is its forward.

frozen          nn.Embedding; frozen_again is the same once more, to show the noise
peft_lora       PEFT's layer, where PEFT is installed
peft_dora       the same with use_dora
lora_fast_lora  lora_fast.embedding.lora_embedding
lora_fast_dora  the same with a magnitude
"""

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bench_lora, common
from benchmarks.bench_lora import FROZEN, Case, Suite
from benchmarks.common import markdown
from lora_fast.embedding import lora_embedding
from lora_fast.timing import Candidate

IMPLS = (*FROZEN, "peft_lora", "peft_dora", "lora_fast_lora", "lora_fast_dora")
SHAPES = [
    (8192, 128256, 2048),  # Llama 3.2 1B
    (8192, 128256, 4096),  # Llama 3 8B
    (8192, 262144, 1152),  # Gemma 3 1B
    (8192, 50257, 768),  # GPT-2
    (1024, 128256, 2048),
]
CASES = [
    *(Case("bf16", *shape, 16, 0) for shape in SHAPES),
    *(Case("bf16", *SHAPES[0], r, 0) for r in (8, 64)),
    *(Case(dtype, *SHAPES[0], 16, 0) for dtype in ("fp16", "fp32")),
]


class Frozen(Candidate):
    """The frozen embedding, which has nothing to go back through."""

    def step(self) -> None:
        self.forward()


def build(case: Case, impls: tuple[str, ...], device: str) -> dict[str, Candidate]:
    """The candidates by name; PEFT's are left out where it is not installed."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": common.DTYPES[case.dtype]}
    ids = (torch.rand(case.M, device=device) ** 4 * case.K).long().clamp(max=case.K - 1)
    dy = torch.randn(case.M, case.N, **kind)
    base = nn.Embedding(case.K, case.N, **kind).requires_grad_(False)
    a = torch.randn(case.r, case.K, device=device).requires_grad_()
    b = (0.02 * torch.randn(case.N, case.r, device=device)).requires_grad_()
    m = base.weight.float().norm(dim=0).requires_grad_()

    def ours(magnitude: Tensor | None) -> Candidate:
        leaves = [a, b] if magnitude is None else [a, b, magnitude]
        return Candidate(lambda ids: lora_embedding(ids, base.weight, a, b, 2.0, magnitude), ids, dy, leaves)

    made: dict[str, Candidate] = {name: Frozen(base, ids, dy, []) for name in FROZEN}
    made |= {"lora_fast_lora": ours(None), "lora_fast_dora": ours(m)}
    for name in {"peft_lora", "peft_dora"}.intersection(impls if importlib.util.find_spec("peft") else ()):
        layer = peft_layer(base, case.r, [a, b, m], dora=name == "peft_dora")
        made[name] = Candidate(layer, ids, dy, [p for p in layer.parameters() if p.requires_grad])
    return {impl: made[impl] for impl in impls if impl in made}


def peft_layer(base: nn.Embedding, r: int, adapter: list[Tensor], dora: bool) -> nn.Module:
    """PEFT's layer on the same base weight with equal adapters, which share their memory."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], use_dora=dora)
    model: Any = get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_embedding_A["default"].data, layer.lora_embedding_B["default"].data = (t.detach() for t in adapter[:2])
    if dora:
        layer.lora_magnitude_vector["default"].weight.data = adapter[2].detach()
    return layer


def summarise(rows: list[common.Row], graph_rows: list[common.Row]) -> str:
    """A step's time and memory beside PEFT's."""
    found = []
    for row in rows:
        if row["what"] == "fwd+bwd" and row["impl"].startswith("lora_fast"):
            same = [r for r in rows if all(r[key] == row[key] for key in ("dtype", "M", "K", "N", "r", "what"))]
            stock = next((r for r in same if r["impl"] == row["impl"].replace("lora_fast", "peft")), None)
            shape = f"{row['M']} x {row['K']} x {row['N']} r={row['r']} {row['dtype']}"
            beside = ("", "") if stock is None else (stock["median_us"], stock["peak_mib"])
            found.append((row["impl"], shape, row["median_us"], beside[0], row["peak_mib"], beside[1]))
    return markdown(("impl", "case", "us", "PEFT's us", "MiB", "PEFT's MiB"), found)


EMBEDDING = Suite("bench_embedding", __doc__ or "", CASES, IMPLS, build, summarise)


def main(argv: list[str] | None = None) -> int:
    return bench_lora.run(argv, EMBEDDING)


if __name__ == "__main__":
    sys.exit(main())
