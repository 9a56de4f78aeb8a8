"""Each script in examples/, shortened: the loss falls, and stock PEFT reads the adapter that it leaves."""

import importlib
import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from pairs import as_torchrun

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("as_scripts")
GPU = torch.cuda.is_available()
NEEDS = {
    "trl_sft": "trl",
    "trl_dpo": "trl",
    "trl_grpo": "trl",
    "lightning_loop": "lightning",
    "lightning_mnist": "lightning",
}
SHORT = ["--steps", "5", "--batch", "4", "--length", "64"]
GALLERY = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^\.venv/bin/.*examples/.*\.py.*$", GALLERY, re.MULTILINE)]


def check(name, argv, said, losses):
    """The loss fell to what stock PEFT finds with the adapter, from what it finds without."""
    import common
    from peft import PeftModel

    args = common.options(None, argv)
    dtype = torch.bfloat16 if GPU and name not in ("accelerate_loop", "fsdp2") else torch.float32
    stock = PeftModel.from_pretrained(common.base_model(args, dtype), "adapter").to(args.device)
    held_out = common.rows(args, common.load_tokenizer(args))[1]
    with stock.disable_adapter():
        assert common.loss_on(stock, held_out) == pytest.approx(losses[0], abs=0.05 if GPU else 2e-3)
    assert common.loss_on(stock, held_out) == pytest.approx(losses[1], abs=0.05 if GPU else 2e-3)
    assert losses[1] < losses[0] - 0.2
    assert "{} fused, {} not fused".format(*(14, 0) if GPU else (0, 14)) in said
    assert f"{losses[0]:.3f} at the start, {losses[1]:.3f} at the end" in said


RUNS = ["plain_loop", "plain_loop --dora", "trainer", "trl_sft --dora", "lightning_loop", "accelerate_loop --dora"]


@pytest.mark.medium
@pytest.mark.parametrize("run", RUNS)
def test_example(run, capsys):
    name, *more = run.split()
    if find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    losses = importlib.import_module(name).main([*SHORT, *more])
    check(name, [*SHORT, *more], capsys.readouterr().out, losses)


OF_TRL = ["trl_dpo", "trl_grpo --dora"]  # whose losses are others


@pytest.mark.medium
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize("run", OF_TRL)
def test_two_steps_of_trl(run, capsys):
    """They are logged, and stock PEFT reads what is left."""
    import common
    from peft import PeftModel

    name, *more = run.split()
    argv = [*SHORT, "--steps", "2", *more]
    logged = importlib.import_module(name).main(argv)
    said = capsys.readouterr().out
    assert len(logged) == 2 and all(map(math.isfinite, logged)) and f"{logged[1]:.3f} at the end" in said
    assert "{} fused, {} not fused".format(*(14, 0) if GPU else (0, 14)) in said
    model = PeftModel.from_pretrained(common.base_model(common.options(None, argv), torch.float32), "adapter")
    moved = [p for key, p in model.named_parameters() if "lora_B" in key and p.count_nonzero()]
    assert len(moved) == 14


@pytest.mark.slow
def test_fsdp2():
    if GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, or none")
    said = as_torchrun(ROOT / "examples" / "fsdp2.py", SHORT)
    losses = re.search(r"text: (\S+) at the start, (\S+) at the end", said).groups()
    check("fsdp2", SHORT, said, tuple(map(float, losses)))


def test_the_gallery_lists_them_all():
    named = {Path(word).stem for command in COMMANDS for word in command if word.startswith("examples/")}
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py") if "common.options" in path.read_text()}
    assert {run.split()[0] for run in (*RUNS, *OF_TRL)} | {"fsdp2"} == scripts <= named


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_help(command, capsys):
    """It tells the options that the gallery's command has."""
    at = next(i for i, word in enumerate(command) if word.startswith("examples/"))
    name = Path(command[at]).stem
    if find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in said for word in command[at + 1 :] if word.startswith("--"))
