"""`lora-fast bench` and the timing under it."""

import re
import time

import pytest
import torch

pytest.importorskip("rich")

import lora_fast
from lora_fast import timing
from lora_fast.cli import bench, main

GPU = torch.cuda.is_available()
SLOW = ["--rounds", "2", "--dtype", "fp32"]


def table(said):
    """{(shape, layer): cells} of the printed table."""
    rows, shape = {}, ""
    for line in said.splitlines():
        if line.startswith("│"):
            first, layer, *cells = (cell.strip() for cell in line.strip()[1:-1].split("│"))
            shape = first or shape
            rows[shape, layer] = cells
    return rows


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_on_a_cpu(dora, capsys):
    arguments = ["--shape", "8,16,24", "--shape", "12", "4,8,8", "--rank", "2", "--dropout", "0.1"]
    before = lora_fast.get_backend()
    assert main(["bench", *arguments, *SLOW, *(["--dora"] if dora else [])]) == 0
    said = capsys.readouterr().out
    assert lora_fast.get_backend() == before
    assert said.startswith("CPU, ") and "CPU numbers of the plain torch path" in said and "need an NVIDIA GPU" in said
    assert "fp32, r = 2, dropout 0.1; medians of 2 rounds" in said
    rows = table(said)
    names = ["frozen", "frozen again", "eager LoRA", "LoRALinear", *(["eager DoRA", "DoRALinear"] if dora else [])]
    assert list(rows) == [(shape, name) for shape in ("8,16,24", "12,12,12", "4,8,8") for name in names]
    for (shape, _), (median, spread, ratio, peak) in rows.items():
        low, high = map(float, spread.split("-"))
        frozen = float(rows[shape, "frozen"][0])
        assert 0 < low <= float(median) <= high and peak == "-"
        assert float(ratio) == pytest.approx(float(median) / frozen, rel=0.05, abs=0.01)


def test_numbers_are_those_measured(monkeypatch, capsys):
    """The clock replaced: medians, percentiles and ratios of what it gave."""
    times = {"frozen": [2.0, 4.0, 6.0], "frozen again": [4.0], "eager LoRA": [8.0], "LoRALinear": [5.0, 5.0, 50.0]}

    def measure(steps, rounds, device, each_round):
        assert rounds == 7 and list(steps) == list(times)
        return times

    monkeypatch.setattr(timing, "measure", measure)
    assert main(["bench", "--shape", "8", "--rounds", "7"]) == 0
    cells = {name: row[:3] for (_, name), row in table(capsys.readouterr().out).items()}
    assert cells == {
        "frozen": ["4.0", "2.0-6.0", "1.000"],
        "frozen again": ["4.0", "4.0-4.0", "1.000"],
        "eager LoRA": ["8.0", "8.0-8.0", "2.000"],
        "LoRALinear": ["5.0", "5.0-50.0", "1.250"],
    }


@pytest.mark.parametrize("on", ["GPU", "CPU", "neither"])
def test_too_large(on, monkeypatch, capsys):
    """A shape that does not fit is told, the others are measured; any other error is none of these."""
    real = bench.build

    def build(shape, *rest):
        if shape.M == 99 and on == "GPU":
            raise torch.OutOfMemoryError
        if shape.M == 99 and on == "CPU":
            torch.empty(2**60)
        if on == "neither":
            raise RuntimeError("broken")
        return real(shape, *rest)

    monkeypatch.setattr(bench, "build", build)
    if on == "neither":
        with pytest.raises(RuntimeError, match="broken"):
            main(["bench", "--shape", "99", *SLOW])
        return
    assert main(["bench", "--shape", "99", "8", *SLOW]) == 1
    rows = table(capsys.readouterr().out)
    assert list(rows)[:2] == [("99,99,99", "does not fit into memory"), ("8,8,8", "frozen")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_compute_the_same(dtype):
    made = bench.build(bench.Shape(6, 16, 12), 4, dtype, 0.0, True, "cpu")
    found = {}
    for name, candidate in made.items():
        candidate.step()
        candidate.step()  # gradients are dropped, not added up
        found[name] = [candidate.forward().detach().double(), *(leaf.grad.double() for leaf in candidate.leaves)]
        assert len(candidate.leaves) == (1 if "frozen" in name else 4 if "DoRA" in name else 3)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for eager, ours in (("eager LoRA", "LoRALinear"), ("eager DoRA", "DoRALinear"), ("frozen", "frozen again")):
        for a, b in zip(found[eager], found[ours], strict=True):
            assert (a - b).norm() <= tolerance * b.norm()
    lora, frozen, dora = (found[name][0] for name in ("LoRALinear", "frozen", "DoRALinear"))
    assert (lora - frozen).norm() > 0.1 * frozen.norm()
    assert (lora - dora).norm() <= tolerance * lora.norm()  # the magnitude is the norm


def test_dropout_is_on():
    made = bench.build(bench.Shape(6, 16, 12), 4, torch.float32, 0.5, True, "cpu")
    for name, candidate in made.items():
        assert torch.equal(candidate.forward(), candidate.forward()) == name.startswith("frozen")


def test_measure_on_the_cpu():
    """Every candidate once a round, in orders that vary; the times are those of the calls."""
    order = []

    def candidate(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    seconds = {"a": 0.001, "b": 0.003, "c": 0.001}
    found = timing.measure({name: candidate(name, s) for name, s in seconds.items()}, 6, target_ms=0.1, device="cpu")
    for name, times in found.items():
        assert len(times) == 6 and 1e6 * seconds[name] <= min(times) < 1e6 * seconds[name] + 50_000
    calls = re.findall(r"(.)\1{4}", "".join(order).partition("a" * 6 + "b" * 6 + "c" * 6)[2])  # 2 to warm up, 3 timed
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len({tuple(each) for each in rounds}) > 1 and len("".join(order)) == 3 * 6 + 6 * 3 * 5


@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True])
def test_a_whole_model(dora, tmp_path, capsys):
    """Of a configuration: stock and patched, with checkpointing and without; all fused where the kernels can run."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(vocab_size=32, **sizes).save_pretrained(tmp_path)
    config = str(tmp_path / "config.json")
    extra = ["--dora"] if dora else []
    assert main(["bench", "--model", config, "--tokens", "2x8", "--rank", "2", "--rounds", "2", *extra]) == 0
    rows = table(capsys.readouterr().out)
    kinds = ["frozen", "PEFT LoRA", "patched LoRA", *(["PEFT DoRA", "patched DoRA"] if dora else [])]
    assert list(rows) == [("2x8", kind + more) for more in ("", ", checkpointing") for kind in kinds]
    assert all(float(row[0]) > 0 and float(row[2]) > 0 for row in rows.values())
    assert rows["2x8", "frozen"][2] == rows["2x8", "frozen, checkpointing"][2] == "1.000"
    from lora_fast.cli import bench_model

    base, ids = bench_model.base_model(config, torch.float32, "cpu"), torch.arange(8)[None]
    losses = {name: step().item() for name, step in bench_model.build(base, ids, 2, 0.0, dora).items()}
    for name in losses:
        assert losses[name] == pytest.approx(losses[name.replace("patched", "PEFT")], rel=1e-5)


def test_a_model_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["bench", "--model", str(tmp_path / "none" / "config.json")]) == 1
    assert capsys.readouterr().err.startswith(f"lora-fast bench: error: --model {tmp_path}")


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert main(["bench", "--shape", "512", "--dora", "--rounds", "3", "--dropout", "0.1"]) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name() in said and "on the fused kernels" in said
    assert all(float(row[3]) > 0 for row in table(said).values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "1,2"], "--shape: got '1,2', expected M,K,N or one size"),
        (["--shape", "0"], "--shape: got '0'"),
        (["--shape", "a,b,c"], "--shape: got 'a,b,c'"),
        (["--shape"], "--shape"),
        (["--rank", "0"], "--rank: got '0'"),
        (["--rounds", "x"], "--rounds: got 'x'"),
        (["--dropout", "1"], "--dropout: got '1'"),
        (["--dropout", "nan"], "--dropout: got 'nan'"),
        (["--dtype", "fp8"], "--dtype"),
        (["--tokens", "8"], "--tokens: got '8', expected rows x tokens"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    said = capsys.readouterr().out
    words = ("--shape", "8192x4096x14336", "--dora", "examples:", "Exit codes", "default: 16")
    assert stop.value.code == 0 and all(word in said for word in words)
