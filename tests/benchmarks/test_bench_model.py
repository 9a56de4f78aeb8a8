"""The whole-model benchmark as far as a machine without a GPU can tell: arguments, candidates, rows, the tiny run."""

import csv
import subprocess
import sys

import pytest
import torch
from checkout import ROOT

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import bench_model
from benchmarks.bench_model import Case
from lora_fast.peft.layers import FastLinear

SIZE = bench_model.TINY._replace(hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=50, layers=2, length=8)
PAIRS = [(f"peft_{kind}", f"lora_fast_{kind}") for kind in ("lora", "dora")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert bench_model.main([]) == 1
    error = capsys.readouterr().err
    assert "NVIDIA GPU" in error and "--tiny" in error


@pytest.mark.medium
def test_help_says_how_to_run():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_model", "-h"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "python -m benchmarks.bench_model --tiny" in done.stdout


def test_all_cases():
    cases = bench_model.all_cases()
    assert len(cases) == len(set(map(str, cases))) == 2 * (2 + 7 * 2)
    assert {case.p for case in cases if case.impl in bench_model.FROZEN} == {0}


def test_arguments_choose_the_cases():
    args, cases = bench_model.parse([])
    assert (args.rounds, cases) == (8, bench_model.all_cases())
    args, cases = bench_model.parse("--tiny --only checkpointing=1 --only p=0.1 --only impl=peft_lora".split())
    assert (args.rounds, cases) == (60, [Case(1, "frozen", 0), Case(1, "peft_lora", 0.1)])
    _, cases = bench_model.parse(["--only", "p=0.1"])
    assert len(cases) == 2 * (2 + 7) and {case.p for case in cases[2:6]} == {0.1}


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--only r=16", "KEY=VALUE"),
        ("--only p=much", "expected numbers"),
        ("--only impl=unsloth", "expected impls"),
        ("--only checkpointing=2", "leaves nothing"),
        ("--layers 0", ">= 1"),
        ("--rounds x", ">= 1"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as done:
        bench_model.main(argv.split())
    assert done.value.code == 2 and message in capsys.readouterr().err


def losses(cases: list[Case], size=SIZE) -> dict[tuple, float]:
    return {case: step().item() for case, step in zip(cases, bench_model.build(cases, size).values(), strict=True)}


@pytest.mark.medium
def test_candidates_compute_the_same():
    """Without dropout stock and patched agree in the loss, with and without checkpointing, and differ from frozen."""
    cases = [case for case in bench_model.all_cases() if case.p == 0]
    found = losses(cases)
    for case, loss in found.items():
        assert loss == pytest.approx(found[case._replace(checkpointing=0)], rel=1e-6)
        stock = case._replace(impl=bench_model.stock_of(case.impl))
        assert loss == pytest.approx(found[stock], rel=0.02 if "fp8" in case.impl else 1e-6)
        assert "fp8" not in case.impl or loss != found[stock]
        assert (loss == found[Case(case.checkpointing, "frozen", 0)]) == (case.impl in bench_model.FROZEN)


@pytest.mark.parametrize("impl", [impl for pair in PAIRS for impl in pair])
def test_dropout_drops(impl):
    case = Case(0, impl, 0.5)
    (step,) = bench_model.build([case], SIZE).values()
    assert step().item() != step().item()


def test_models_share_the_base():
    """One set of base weights; adapters of their own, equal in value and in the base's dtype; ours alone patched."""
    base = bench_model.base_model(SIZE._replace(dtype="bf16"))
    stock, ours = (bench_model.model_of(Case(1, impl, 0.1), base) for impl in PAIRS[1])
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (stock, ours)]
    for model, adapters in zip((stock, ours), trained, strict=True):
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == shared
        assert len(adapters) == 7 * SIZE.layers * 3 and {p.dtype for p in adapters.values()} == {torch.bfloat16}
        assert model.training and model.is_gradient_checkpointing
    assert all(a is not b and torch.equal(a, b) for a, b in zip(*(t.values() for t in trained), strict=True))
    patched = [sum(isinstance(m, FastLinear) for m in model.modules()) for model in (base, stock, ours)]
    assert patched == [0, 0, 7 * SIZE.layers]


@pytest.mark.parametrize("impl", ["frozen", "lora_fast_lora"])
def test_a_step_makes_every_gradient(impl):
    """The input of the first layer gets a gradient too, so that every dX is computed; a step drops the last one's."""
    model = bench_model.model_of(Case(0, impl, 0), bench_model.base_model(SIZE))
    seen = []

    def watch(module, args, out):
        out.register_hook(seen.append)

    model.get_input_embeddings().register_forward_hook(watch)
    step = bench_model.step_of(model, torch.arange(16).reshape(2, 8))
    grads = []
    for _ in range(2):
        step()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(seen) == 2 and seen[0].any() and torch.equal(*seen)
    assert len(grads[0]) == (0 if impl == "frozen" else 7 * SIZE.layers * 2)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_and_table(monkeypatch):
    """The timing harness replaced: ratios are to frozen, and ours are told as parts of stock's."""
    cases = [Case(1, "frozen", 0), Case(1, "peft_lora", 0.1), Case(1, "lora_fast_lora", 0.1)]
    times = dict(zip(map(str, cases), ([1e5, 2e5, 3e5], [4e5], [3e5]), strict=True))
    peaks = iter([100.04, 300, 150])
    monkeypatch.setattr(bench_model, "build", lambda cases, size, compiled: {str(case): str for case in cases})
    monkeypatch.setattr(bench_model, "measure", lambda steps, rounds, device: times)
    monkeypatch.setattr(bench_model.timing, "peak_mib", lambda step: next(peaks))
    about = {"gpu": "g", "torch": "t", "triton": "t", "commit": "c"}
    rows = bench_model.measured(cases, SIZE._replace(device="cuda"), 3, about)
    assert all(list(row) == bench_model.COLUMNS for row in rows)
    assert [(row["impl"], row["p"], row["median_us"], row["ratio_to_frozen"], row["peak_mib"]) for row in rows] == [
        ("frozen", 0, 200000, 1, 100),
        ("peft_lora", 0.1, 400000, 2, 300),
        ("lora_fast_lora", 0.1, 300000, 1.5, 150),
    ]
    assert bench_model.summarise(rows).splitlines()[2:] == [
        "| frozen | 0 | yes | 200.0 | 1.000 |  | 100.0 |  |  |",
        "| peft_lora | 0.1 | yes | 400.0 | 2.000 |  | 300 |  |  |",
        "| lora_fast_lora | 0.1 | yes | 300.0 | 1.500 | 0.03 more than p=0 | 150 | 0.750 | 0.500 |",
    ]


def test_compiled_models(monkeypatch):
    """Each candidate is compiled, and only those without dropout and checkpointing are."""
    _, cases = bench_model.parse(["--compiled", "--only", "impl=frozen,peft_lora,lora_fast_lora"])
    assert cases == [Case(0, impl, 0) for impl in ("frozen", "peft_lora", "lora_fast_lora")]
    compiled = []
    monkeypatch.setattr(bench_model.torch, "compile", lambda model: compiled.append(model) or model)
    assert list(bench_model.build(cases[:1], SIZE, True)) == [str(cases[0])] and len(compiled) == 1


class Event:
    """A CUDA event that notes how many steps had run."""

    steps = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.steps

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_timed_step_follows_one_of_its_own(device, monkeypatch):
    ran = []

    def step(name):
        def run():
            ran.append(name)
            Event.steps += 1

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("end"))
    monkeypatch.setattr(bench_model.time, "process_time", lambda: Event.steps)
    times = bench_model.measure({name: step(name) for name in "abc"}, 6, device)
    assert times == {name: [1e6 if device == "cpu" else 1000] * 6 for name in "abc"}  # a step is a second, or a ms
    each = 6 if device == "cpu" else 7
    rounds = [ran[i : i + each] for i in range(0, len(ran), each)]
    assert len(rounds) == 6 and len({tuple(r) for r in rounds}) > 1
    assert all(r[0:5:2] == r[1:6:2] and sorted(r[0:5:2]) == list("abc") and r[6:] in ([], ["end"]) for r in rounds)


def test_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_model, "TINY", SIZE)
    argv = f"--tiny --rounds 3 --layers 1 --only p=0 --only impl=peft_lora,lora_fast_lora --commit c0 --out {tmp_path}"
    assert bench_model.main(argv.split()) == 0
    with (tmp_path / "bench_model_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench_model.COLUMNS
    assert [(row["checkpointing"], row["impl"]) for row in rows] == [
        (on, impl) for on in "01" for impl in ("frozen", "peft_lora", "lora_fast_lora")
    ]
    assert {(r["gpu"], r["commit"], r["layers"], r["tokens"], r["peak_mib"]) for r in rows} == {
        ("cpu", "c0", "1", "16", "")
    }
    assert all(float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert "time of stock's" in capsys.readouterr().out
