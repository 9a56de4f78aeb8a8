"""bench_embedding as far as a machine without a GPU can tell: its candidates, that they agree, its summary."""

import importlib.util

import pytest
import torch

from benchmarks import bench_embedding
from benchmarks.bench_lora import Case


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs PEFT")
def test_the_candidates_agree():
    built = bench_embedding.build(Case("fp32", 32, 50, 24, 4, 0), bench_embedding.IMPLS, "cpu")
    assert tuple(built) == bench_embedding.IMPLS
    for kind in ("lora", "dora"):
        found = []
        for name in (f"peft_{kind}", f"lora_fast_{kind}"):
            built[name].step()
            found.append([built[name].forward(), *(leaf.grad for leaf in built[name].leaves)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    built["frozen"].step()


def test_the_summary():
    row = {"dtype": "bf16", "M": 8, "K": 9, "N": 7, "r": 4, "what": "fwd+bwd", "peak_mib": 1}
    rows = [row | {"impl": "peft_lora", "median_us": 9.0}, row | {"impl": "lora_fast_lora", "median_us": 3.0}]
    assert "| lora_fast_lora | 8 x 9 x 7 r=4 bf16 | 3.0 | 9.0 | 1 | 1 |" in bench_embedding.summarise(rows, [])
