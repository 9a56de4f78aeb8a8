"""The whole-model benchmark as far as a machine without a GPU can tell: arguments, rows, the tiny run."""

import csv

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import bench_model, common, models
from benchmarks.bench_model import Group
from benchmarks.models import Case

SIZE = models.TINY._replace(hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=50, layers=2, length=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert bench_model.main([]) == 1
    error = capsys.readouterr().err
    assert "NVIDIA GPU" in error and "--tiny" in error


def test_help_says_how_to_run(capsys):
    with pytest.raises(SystemExit) as done:
        bench_model.main(["-h"])
    assert done.value.code == 0 and "python -m benchmarks.bench_model --tiny" in capsys.readouterr().out


def test_arguments_choose_the_cases():
    args, groups = bench_model.parse([])
    assert sum((group.cases for group in groups), []) == models.all_cases()
    assert [(group.size, group.mode) for group in groups] == [(models.LARGE, "eager")] * 2
    _, (group,) = bench_model.parse("--tiny --only checkpointing=1 --only p=0.1 --only impl=peft_lora".split())
    assert group.cases == [Case(1, "frozen", 0), Case(1, "peft_lora", 0.1)]
    _, groups = bench_model.parse(["--only", "p=0.1"])
    assert [len(group.cases) for group in groups] == [2 + 15] * 2 and {c.p for c in groups[0].cases[2:]} == {0.1}
    _, groups = bench_model.parse("--size 8b 1b --mode eager reduce-overhead --only p=0 --only tokens=512,8192".split())
    assert [str(group) for group in groups] == [
        "8b, 1 x 512 tokens, eager",
        "8b, 1 x 512 tokens, reduce-overhead",
        "1b, 1 x 512 tokens, eager",
        "1b, 8 x 1024 tokens, eager",
        "1b, 1 x 512 tokens, reduce-overhead",
        "1b, 8 x 1024 tokens, reduce-overhead",
    ]
    assert all([case.impl for case in group.cases] == list(models.PLAIN) for group in groups)
    _, (group,) = bench_model.parse(["--compiled", "--only", "impl=frozen,peft_lora,lora_fast_lora"])
    assert group == Group(
        "small", models.SMALL, "default", [Case(0, impl, 0) for impl in ("frozen", "peft_lora", "lora_fast_lora")]
    )


def test_sizes_on_two_devices_are_refused(capsys):
    assert bench_model.main(["--size", "tiny", "1b"]) == 1 and capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--only r=16", "KEY=VALUE"),
        ("--only p=much", "expected numbers"),
        ("--only impl=unsloth", "expected impls"),
        ("--size 70b", "invalid choice"),
        ("--mode fast", "invalid choice"),
        ("--only checkpointing=2", "leaves nothing"),
        ("--layers 0", ">= 1"),
        ("--rounds x", ">= 1"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as done:
        bench_model.main(argv.split())
    assert done.value.code == 2 and message in capsys.readouterr().err


def test_rows_and_table(monkeypatch):
    """The timing harness replaced: ratios are to frozen, and ours are told as parts of stock's."""
    cases = [Case(1, "frozen", 0), Case(1, "peft_lora", 0), Case(1, "lora_fast_lora", 0)]
    times = dict(zip(map(str, cases), ([1e5, 2e5, 3e5], [4e5], [3e5]), strict=True))
    peaks = iter([100.04, 300, 150])
    monkeypatch.setattr(bench_model, "build", lambda cases, size, mode: {str(case): str for case in cases})
    monkeypatch.setattr(bench_model, "measure", lambda steps, rounds, device, in_a_row: times)
    monkeypatch.setattr(bench_model.timing, "peak_mib", lambda step: next(peaks))
    about = {"gpu": "g", "torch": "t", "triton": "t", "commit": "c"}
    size = SIZE._replace(device="cuda")
    rows = bench_model.measured(Group("large", size, "eager", cases), 3, about)
    assert all(list(row) == bench_model.COLUMNS for row in rows)
    assert [(row["impl"], row["p"], row["median_us"], row["ratio_to_frozen"], row["peak_mib"]) for row in rows] == [
        ("frozen", 0, 200000, 1, 100),
        ("peft_lora", 0, 400000, 2, 300),
        ("lora_fast_lora", 0, 300000, 1.5, 150),
    ]
    assert bench_model.summarise(rows).splitlines()[2:] == [
        "| large | 16 | eager | frozen | 0 | yes | 200.0 | 1.000 |  | 100.0 |  |  |",
        "| large | 16 | eager | peft_lora | 0 | yes | 400.0 | 2.000 |  | 300 |  |  |",
        "| large | 16 | eager | lora_fast_lora | 0 | yes | 300.0 | 1.500 | 1.02 | 150 | 0.750 | 0.500 |",
    ]
    graphs = bench_model.measured(Group("1b", size, "reduce-overhead", cases), 3, about)
    assert {row["peak_mib"] for row in graphs} == {""}, "graphs share their memory"
    table = bench_model.summarise(rows + graphs).splitlines()
    assert table[-1] == "| 1b | 16 | reduce-overhead | lora_fast_lora | 0 | yes | 300.0 | 1.500 |  |  | 0.750 |  |"


@pytest.mark.medium
def test_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.SIZES, "tiny", [SIZE])
    argv = f"--tiny --rounds 3 --layers 1 --only p=0 --only impl=peft_lora,lora_fast_lora --commit c0 --out {tmp_path}"
    assert bench_model.main(argv.split()) == 0
    with (tmp_path / "bench_model_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench_model.COLUMNS
    assert [(row["checkpointing"], row["impl"]) for row in rows] == [
        (on, impl) for on in "01" for impl in ("frozen", "peft_lora", "lora_fast_lora")
    ]
    assert {(r["gpu"], r["commit"], r["size"], r["mode"], r["layers"], r["tokens"], r["peak_mib"]) for r in rows} == {
        ("cpu", "c0", "tiny", "eager", "1", "16", "")
    }
    assert all(float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert "time of stock's" in capsys.readouterr().out


@pytest.mark.medium
def test_each_in_a_process_of_its_own(tmp_path):
    argv = f"--tiny --apart --rounds 2 --layers 1 --only p=0 --only checkpointing=0 --commit c0 --out {tmp_path}"
    assert bench_model.main([*argv.split(), "--only", "impl=lora_fast_lora"]) == 0
    with (tmp_path / "bench_model_cpu.csv").open() as file:
        rows = {row["impl"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["frozen", "lora_fast_lora"]
    ours, frozen = (float(rows[impl]["median_us"]) for impl in ("lora_fast_lora", "frozen"))
    assert float(rows["lora_fast_lora"]["ratio_to_frozen"]) == pytest.approx(ours / frozen, rel=1e-3)


@pytest.mark.medium
def test_compiled_tiny_run(tmp_path, monkeypatch, compiler):
    """Beside the rows that are there."""
    monkeypatch.setitem(models.SIZES, "tiny", [SIZE])
    argv = f"--tiny --rounds 3 --layers 1 --only p=0 --only impl=peft_lora --only checkpointing=0 --out {tmp_path}"
    for mode in ("eager", "reduce-overhead"):
        assert bench_model.main([*argv.split(), "--mode", mode]) == 0
    with (tmp_path / "bench_model_cpu.csv").open() as file:
        found = [(row["mode"], row["impl"]) for row in csv.DictReader(file)]
    assert found == [(mode, impl) for mode in ("eager", "reduce-overhead") for impl in ("frozen", "peft_lora")]


def test_results_have_the_columns():
    for path in common.RESULTS.glob("bench_model_*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == bench_model.COLUMNS
        for row in rows:
            layers = {size.layers for size in models.SIZES[row["size"]]}
            tokens = {size.batch * size.length for size in models.SIZES[row["size"]]}
            assert row["mode"] in models.MODES and int(row["layers"]) in layers and int(row["tokens"]) in tokens
