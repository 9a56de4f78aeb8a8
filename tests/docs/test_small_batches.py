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
    """A mode's row has the medians of its rows in the results, in ms, or says that there are none."""
    with (ROOT / "benchmarks" / "results" / "bench_model_h200.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["size"] == "small" and float(row["p"]) == 0]
    impls = ("frozen", "peft_lora", "lora_fast_lora", "peft_dora", "lora_fast_dora")
    for mode, cells in (
        ("eager", r"eager"),
        ("default", r'`"default"`'),
        ("reduce-overhead", r'`"reduce-overhead"`'),
    ):
        (line,) = re.findall(rf"^\| {cells} \|((?:[^|]*\|){{5}})$", PAGE, re.MULTILINE)
        found = {row["impl"]: f"{int(row['median_us']) / 1000:.1f}" for row in rows if row["mode"] == mode}
        expected = [found[impl] for impl in impls] if found else ["not measured", *[""] * 4]
        assert [cell.strip() for cell in line.split("|")][:5] == expected, mode
