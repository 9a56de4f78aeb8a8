"""bench_generate on a tiny model: its candidates, that they agree, what it writes."""

import csv
import importlib.util

import pytest
import torch

if not importlib.util.find_spec("peft") or not importlib.util.find_spec("transformers"):
    pytest.skip("needs PEFT and transformers", allow_module_level=True)

from benchmarks import bench_generate

SIZE = bench_generate.size_of(2, tiny=True, new=3)._replace(layers=1)


@pytest.mark.medium
def test_the_candidates_agree():
    """With a cache that grows and with one that does not, token by token."""
    calls = {}
    for mode in bench_generate.MODES:
        torch.manual_seed(0)
        calls |= {
            (mode, impl): call for impl, call in bench_generate.build(bench_generate.IMPLS, SIZE, mode, 3).items()
        }
    found = {name: call() for name, call in calls.items()}
    assert all(ids.shape == (2, bench_generate.PROMPT + 3) for ids in found.values())
    for kind in ("lora", "dora"):
        stock = found["eager", f"peft_{kind}"]
        assert all(torch.equal(ids, stock) for (_, impl), ids in found.items() if impl.endswith(kind))
    assert not torch.equal(found["eager", "frozen"], found["eager", "peft_lora"])


@pytest.mark.medium
def test_a_run(tmp_path, capsys):
    """Rows that a run does not measure stay."""
    args = ["--tiny", "--new", "2", "--rounds", "1", "--mode", "eager", "--batch", "1", "--out", str(tmp_path)]
    for impls in ("peft_lora,lora_fast_lora", "frozen,lora_fast_lora"):
        assert bench_generate.main([*args, "--only", f"impl={impls}"]) == 0
    with (tmp_path / "bench_generate_cpu.csv").open(newline="") as file:
        rows = {row["impl"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["peft_lora", "frozen", "lora_fast_lora"]
    assert all(float(row["median_us"]) > 0 and (row["batch"], row["new"]) == ("1", "2") for row in rows.values())
    assert rows["frozen"]["ratio_to_frozen"] == "1.0" and rows["peft_lora"]["ratio_to_frozen"] == ""
    assert "| 1 | eager | lora_fast_lora |" in capsys.readouterr().out


def test_the_summary():
    row = {"batch": 1, "mode": "static", "ratio_to_frozen": 1.5}
    rows = [row | {"impl": "peft_dora", "median_us": 9.0}, row | {"impl": "lora_fast_dora", "median_us": 3.0}]
    assert "| 1 | static | lora_fast_dora | 3.0 | 1.5 | 0.333 |" in bench_generate.summarise(rows)
