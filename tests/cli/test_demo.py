"""The MNIST experiment and the command line around it, on real digits."""

import csv
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from checkout import ROOT

import lora_fast
from lora_fast.cli import COMMANDS, demo, main

pytestmark = pytest.mark.filterwarnings("ignore::lora_fast.SlowPathWarning")

PARAMETERS = {1: 1045, 2: 2090, 4: 4180, 8: 8360, 16: 16720, 32: 33440, 64: 66880}
FULL = 54725
needs_examples = pytest.mark.skipif(
    not all(importlib.util.find_spec(name.partition(".")[0]) for name in COMMANDS["demo"].imports),
    reason="needs the extra `examples`",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo of one seed as a user runs it, from a checkout that is not installed: (output, folder)."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-m", "lora_fast", "demo", "--seeds", "1", "--ranks", "4,1", "--out", str(out)]
    env = os.environ | {"COLUMNS": "100", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout, out


@pytest.fixture(scope="module")
def rows(finished):
    with open(finished[1] / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits():
    importlib.import_module("mnist")  # of tests/support
    return demo.load_digits(torch.device("cpu"))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameter_counts():
    base = demo.network()
    assert trainable(base) == FULL
    assert {r: trainable(demo.adapted(base, r)) for r in PARAMETERS} == PARAMETERS
    assert trainable(base) == FULL  # the base itself is left alone


@pytest.mark.medium
@needs_examples
def test_split_is_fixed_and_apart(digits):
    images = []
    for half, same in zip(digits, demo.load_digits(torch.device("cpu")), strict=True):
        for part, count in demo.SPLIT.items():
            assert torch.equal(half[part][0], same[part][0])
            assert torch.bincount(half[part][1]).tolist() == [count] * 5
            images.append(half[part][0])
    everything = torch.cat(images)
    assert everything.shape == (5000, 784) and everything.dtype == torch.float32
    assert len(everything.unique(dim=0)) == 5000


@pytest.mark.medium
@needs_examples
def test_results(rows):
    assert [row["rank"] for row in rows] == ["1", "4", "full"]
    assert [int(row["trainable_parameters"]) for row in rows] == [1045, 4180, FULL]
    assert [float(row["share_of_full_model"]) for row in rows] == [1045 / FULL, 4180 / FULL, 1]
    assert {row["seed"] for row in rows} == {"0"}
    for row, least in zip(rows, (0.78, 0.87, 0.90), strict=True):  # the means over five seeds reach 0.80, 0.89, 0.91
        assert float(row["test_accuracy"]) >= least
        assert float(row["validation_accuracy"]) >= least
        assert 1 <= int(row["epochs"]) <= demo.MAX_EPOCHS and float(row["seconds"]) > 0


@pytest.mark.medium
@needs_examples
def test_output(finished, rows):
    output, out = finished
    assert "LoRA layers take the reference path: the tensors are on 'cpu'" in output
    before, after = re.search(r"test accuracy (0\.\d+) on 0-4, but (0\.\d+) on 5-9", output).groups()
    assert float(before) >= 0.93 and float(after) <= 0.45
    for row in rows:
        share = f"{float(row['share_of_full_model']):.1%}"
        cells = [row["rank"], row["trainable_parameters"], share, f"{float(row['test_accuracy']):.3f}", "-"]
        assert re.search(r" +│ +".join(map(re.escape, cells)), output), (cells, output)
    assert all(name in output and (out / name).stat().st_size for name in demo.FILES)


@pytest.mark.medium
@needs_examples
def test_saved_adapter_gives_the_same_accuracy(finished, rows, digits):
    output, out = finished
    best = max((row for row in rows if row["rank"] != "full"), key=lambda row: float(row["validation_accuracy"]))
    said = re.search(r"of rank (\d+), seed 0 .*accuracy (\S+); saved, and loaded into a fresh model: (\S+)", output)
    assert said.groups() == (best["rank"], *[f"{float(best['test_accuracy']):.4f}"] * 2)

    from safetensors.torch import load_file

    torch.manual_seed(123)  # another base and adapter than the file's, so what is right afterwards was loaded
    model = demo.adapted(demo.network(), int(best["rank"]))
    images, labels = digits[1]["test"]
    assert demo.accuracy(model, images, labels) < 0.5
    layers = load_file(out / "base.safetensors")
    assert not model.load_state_dict(layers, strict=False).unexpected_keys
    lora_fast.load_lora_state_dict(model, load_file(out / "adapter.safetensors"))
    assert demo.accuracy(model, images, labels) == pytest.approx(float(best["test_accuracy"]), abs=0.0021)  # one image


@pytest.mark.medium
@needs_examples
def test_plot_is_a_picture(finished):
    from matplotlib.image import imread

    picture = imread(finished[1] / "accuracy.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 700
    assert picture[..., :3].reshape(-1, 3).std(0).min() > 0.01  # not blank


def test_early_stopping_keeps_the_best_epoch(one_thread):
    """With random labels nothing is learnt, so training ends early, at the weights that were best on validation."""
    torch.manual_seed(0)
    digits = {part: (torch.randn(count, 784), torch.randint(5, (count,))) for part, count in demo.SPLIT.items()}
    model, notes = demo.network(), {}
    epochs = demo.train(model, digits, 1e-2, notes.__setitem__)
    assert list(notes) == list(range(1, epochs + 1)) and demo.PATIENCE < epochs < demo.MAX_EPOCHS
    assert notes[epochs] == f"validation {demo.accuracy(model, *digits['validation']):.3f}"


@pytest.mark.medium
@needs_examples
def test_same_seed_same_result_and_only_the_adapter_trains(digits, one_thread):
    few = {part: (images[::10], labels[::10]) for part, (images, labels) in digits[1].items()}
    torch.manual_seed(0)
    base = demo.network()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapters = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = demo.adapted(base, 2)
        demo.train(model, few, demo.LORA_LR, lambda epoch, note: None)
        adapters.append(lora_fast.lora_state_dict(model))
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    same = [all(torch.equal(adapters[0][name], other[name]) for name in adapters[0]) for other in adapters[1:]]
    assert same == [True, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "0"], "--ranks: got '0'"),
        (["--ranks", "a"], "--ranks: got 'a'"),
        (["--ranks", "1,,2"], "--ranks: got '1,,2'"),
        (["--ranks", "4,2,4"], "--ranks: got '4,2,4', expected different"),
        (["--ranks", ""], "--ranks: got ''"),
        (["--seeds", "0"], "--seeds: got '0'"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1.5"], "--seeds: got '1.5'"),
        (["--device", "abacus"], "--device: got 'abacus'"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--device", "meta"], "--device: got 'meta'"),
        (["--dancing"], "--dancing"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_examples
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_folder_that_cannot_be_written(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(demo, "load_digits", lambda device: pytest.fail("started all the same"))
    assert main(["demo", "--out", str(tmp_path / name)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lora-fast demo: error: --out {tmp_path / name} cannot be written to")
    assert not captured.out and (tmp_path / "file").read_text() == "kept"


def test_interrupted_during_imports(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fast.cli.importlib.import_module", interrupted)
    assert main(["demo", "--seeds", "1"]) == 130
    assert capsys.readouterr().err == "lora-fast demo: interrupted\n"


@pytest.mark.parametrize("argv", [["-m", "lora_fast", "doctor"], ["-c", "import lora_fast"]])
def test_interrupted_while_torch_is_imported(argv, tmp_path):
    """The command says so; a program gets its exception."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)
    if argv[0] == "-m":
        assert (done.returncode, done.stderr) == (130, "lora-fast: interrupted\n")
    else:
        assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("name", COMMANDS["demo"].imports)
def test_missing_extra(name, tmp_path, capsys, monkeypatch):
    needed = COMMANDS["demo"].imports
    for before in needed[: needed.index(name)]:
        monkeypatch.setitem(sys.modules, before, sys)  # there, whether it is or not
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    package = name.partition(".")[0]
    assert f"{package} cannot be imported" in error and f"pip install {package}, or" in error
    assert 'pip install ".[examples]"' in error
    assert not (tmp_path / "out").exists()


def test_interrupted(monkeypatch, capsys, tmp_path):
    for name in COMMANDS["demo"].imports:
        monkeypatch.setitem(sys.modules, name, sys)

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "lora-fast demo: interrupted\n"


@needs_examples
def test_a_rank_that_diverges_is_named(monkeypatch, tmp_path, capsys):
    digits = {part: (torch.zeros(5, 784), torch.arange(5)) for part in demo.SPLIT}
    monkeypatch.setattr(demo, "load_digits", lambda device: (digits, digits))
    monkeypatch.setattr(demo, "train", lambda *args: 1)
    after = iter([0.5, 0.5] + 2 * [0.2] + 2 * [0.9] + 2 * [0.95])  # pretrained, ranks 1 and 2, in full
    monkeypatch.setattr(demo, "accuracy", lambda *args: next(after, 0.9))
    main(["demo", "--seeds", "1", "--ranks", "1,2", "--out", str(tmp_path / "out")])
    assert "\nRank 1 diverged: worse than before the fine-tune (0.500)." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--version"], 0, [f"lora-fast {lora_fast.__version__}"]),
        (["--help"], 0, ["demo", "--version"]),
        (["demo", "--help"], 0, ["--seeds", "--ranks", "--device", "--out", "1,2,4,8,16,32,64", "default: 5"]),
        ([], 2, ["COMMAND"]),
        (["dance"], 2, ["dance", "demo"]),
    ],
)
def test_command_line(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == code
    assert all(word in captured.out + captured.err for word in words)
    assert bool(captured.out) == (code == 0)


@needs_examples
def test_threads_are_given_back(monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr(demo, "_experiment", lambda *args: used.append(torch.get_num_threads()) or 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert main(["demo", "--out", str(tmp_path)]) == 0
        assert used == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
