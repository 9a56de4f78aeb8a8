"""The page on small batches: its loop runs, its numbers are the results'."""

import csv
import re

import pytest
import torch
from checkout import ROOT

PAGE = (ROOT / "docs" / "small_batches.md").read_text(encoding="utf-8")


@pytest.mark.medium
def test_its_loop(monkeypatch):
    pytest.importorskip("peft")
    asked, honest = [], torch.compile

    def compiled(model, **given):
        asked.append(given)
        return honest(model, backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    names: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0], names)
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    assert names["loss"].isfinite() and all(p.grad is None for p in names["model"].parameters())


def test_its_table():
    """A row has the medians of its tokens and mode in the results, in ms."""
    with (ROOT / "benchmarks" / "results" / "bench_model_h200.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["size"] == "1b" and float(row["p"]) == 0]
    lines = re.findall(r"^\| (512|2048) \| ([^|]*) \|((?:[^|]*\|){3})$", PAGE, re.MULTILINE)
    assert len(lines) == 6
    for tokens, mode, line in lines:
        found = {r["impl"]: r["median_us"] for r in rows if (r["tokens"], r["mode"]) == (tokens, mode.strip('`"'))}
        expected = [f"{int(found[impl]) / 1000:.1f}" for impl in ("frozen", "peft_lora", "lora_fast_lora")]
        assert [cell.strip() for cell in line.split("|")][:3] == expected, (tokens, mode)
