"""tools/peft_suite.py on a suite of three tests, one of which tells a patched model from a stock one."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

HELPERS = "_HUB_MODEL_ACCESSES = {}\n"
SUITE = """
import peft, pytest, torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from . import testing_utils

def made():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))

def test_forward():
    assert "any model" in testing_utils._HUB_MODEL_ACCESSES
    assert made()(torch.ones(2, 8)).shape == (2, 8)

def test_looks_at_the_class():
    model = made()
    assert "adopt" not in dir(model.base_model.model[0]), "this one is of lora_fast"

@pytest.mark.parametrize("config", [peft.LoHaConfig, LoraConfig])
def test_of_two_methods(config):
    inject_adapter_in_model(config(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(8, 8)))
"""


def run(*arguments):
    command = [sys.executable, ROOT / "tools" / "peft_suite.py", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_what_differs_is_told(tmp_path):
    suite, out = tmp_path / "peft", tmp_path / "out"
    (suite / "tests").mkdir(parents=True)
    (suite / "tests" / "testing_utils.py").write_text(HELPERS)
    (suite / "tests" / "test_small.py").write_text(SUITE)
    (suite / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--cov=src/peft"]\n')
    before = sorted(suite.rglob("*"))
    done = run(suite, "--out", out, "--", "tests/test_small.py")
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout
    assert "tests/test_small.py: stock 3 passed; 3 tests patched a model, 1 ran a fused layer" in said
    assert "1 of 3 outcomes differ" in said
    [_, differs] = said.split("outcomes differ\n")
    stock, patched = differs.strip().splitlines()[1:]
    assert differs.strip().startswith("tests/test_small.py::test_looks_at_the_class\n")
    assert stock.split() == ["stock", "passed"] and "patched  failed: this one is of lora_fast" in patched
    assert sorted(suite.rglob("*")) == before
    assert {"stock.log", "patched.log", "stock.jsonl", "patched.jsonl", "hub.log"} <= {
        path.name for path in out.iterdir()
    }


def test_wrong_arguments_are_told(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "has no folder tests, expected PEFT's sources" in done.stderr


def test_stand_ins_are_read_as_the_hubs(tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.syspath_prepend(ROOT / "tools")
    import hub_stand_ins

    name, file = "peft-internal-testing/tiny-random-BertModel", tmp_path / "test_it.py"
    file.write_text(f'NAME = "{name}"')
    hub_stand_ins.main(tmp_path / "hub", [file])
    folder = snapshot_download(name, cache_dir=tmp_path / "hub", local_files_only=True)
    assert AutoModel.from_pretrained(folder).config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(folder)("a word")["input_ids"]
    assert [path.name for path in (tmp_path / "hub").iterdir()] == [
        "models--peft-internal-testing--tiny-random-BertModel"
    ]
