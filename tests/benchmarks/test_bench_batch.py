"""The benchmark of batches as far as a machine without a GPU can tell: candidates agree, rows have the columns."""

import pytest
import torch

from benchmarks import bench_batch, common

CASE = bench_batch.Case("fp32", 12, 16, 8, 4, 0.0, 3)


def test_candidates_compute_the_same():
    pytest.importorskip("peft")
    calls = bench_batch.steps(CASE, bench_batch.IMPLS, "cpu")
    assert {impl for _, impl in calls} == {*bench_batch.IMPLS}
    same = [calls["fwd", impl]() for impl in ("separate", "peft", "lora_fast_lora")]
    for y in same[1:]:
        torch.testing.assert_close(y, same[0], rtol=1e-4, atol=1e-4)
    for (what, _), call in calls.items():
        if what != "fwd":
            call()


def test_rows(monkeypatch, tmp_path):
    about, impls = common.run_columns("c", "cpu"), ("frozen", "lora_fast_lora")
    monkeypatch.setattr(bench_batch.timing, "measure", lambda steps, *_, **__: {name: [2.0] for name in steps})
    rows = bench_batch.measured(CASE, impls, 3, False, about, "cpu")
    assert [(row["what"], row["impl"]) for row in rows] == [(w, i) for i in impls for w in ("fwd", "fwd+bwd")]
    assert all(list(row) == bench_batch.COLUMNS and row["ratio_to_frozen"] == 1.0 for row in rows)
    common.write_csv(tmp_path / "rows.csv", bench_batch.COLUMNS, rows)
    shaped = [row | dict(zip("MKN", common.TARGETS[0], strict=True)) for row in rows]
    assert "| 3 | lora_fast_lora | 1 | 1.000 |" in bench_batch.summarise(shaped)
