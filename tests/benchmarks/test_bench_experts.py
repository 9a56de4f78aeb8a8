"""The benchmark of experts as far as a machine without a GPU can tell: candidates agree, rows have the columns."""

import pytest
import torch

from benchmarks import bench_experts, common, experts
from lora_fast.experts.form import ExpertsForm, Gate

TURNED = ExpertsForm(True, True, Gate("gpt_oss", 1.702, 7.0))


@pytest.mark.parametrize(
    "size", [experts.MODELS["tiny"], experts.Size(32, 48, 4, 2, TURNED, True)], ids=["plain", "gpt-oss"]
)
def test_candidates_compute_the_same(size):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    at = experts.layer(size, 12, 4, 1.0, torch.float32, "cpu")
    found = {}
    candidates = experts.calls(at, bench_experts.IMPLS)
    candidates["frozen_again"] = experts.calls(at, ("frozen",), installed=True)["frozen"]
    for impl, (forward, leaves) in candidates.items():
        bench_experts.step_of(forward, leaves, at.dout)()
        grads = {tuple(leaf.shape): leaf.grad for leaf in leaves}
        found[impl] = [forward().detach(), *(grads[tuple(leaf.shape)] for leaf in at.leaves[: len(leaves)])]
    assert tuple(found) == bench_experts.IMPLS
    for same in (("lora_fast", "eager", "peft"), ("lora_fast_frozen", "frozen", "frozen_again")):
        for other in same[1:]:
            for ours, theirs in zip(found[same[0]], found[other], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(
        bench_experts.timing,
        "measure",
        lambda steps, *_, **__: {impl: [step() or (1.0 if "lora" in impl else 2.0)] for impl, step in steps.items()},
    )
    about = {**common.run_columns("c", "cpu"), "transformers": bench_experts.RESTATED}
    impls = ("frozen", "eager", "lora_fast")
    case = bench_experts.Case("fp32", "tiny", 8, 4, 0.0)
    rows = bench_experts.measured(case, ("eager",), impls, 3, about, "cpu")
    assert [row["impl"] for row in rows] == list(impls) and rows[-1]["ratio_to_frozen"] == 0.5
    common.write_csv(tmp_path / "rows.csv", bench_experts.COLUMNS, rows)
    assert rows[0].keys() == set(bench_experts.COLUMNS)
    assert "| lora_fast | 1.0 | 0.5 |" in bench_experts.summarise(rows)


def test_cases():
    found = bench_experts.cases()
    assert len(found) == len(set(found)) == 3 * 3 + 3 + 2
