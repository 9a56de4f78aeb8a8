"""`lora-fast merge`: against merge_lora and PEFT, what it leaves alone, what it refuses."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_fast import LoRAConfig, add_lora, lora_state_dict, merge_lora, remove_lora, save_adapter
from lora_fast.cli import main
from lora_fast.files.checkpoint import INDEX
from lora_fast.files.format import CONFIG, PREFIX, TENSORS


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.fc1 = nn.Linear(8, 6, dtype=dtype)
        self.block = nn.Sequential(nn.Linear(6, 6, bias=False, dtype=dtype), nn.ReLU())
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.head = nn.Linear(6, 3, dtype=dtype)


def adapted(base, **options):
    config = LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["fc1", "block.0"], **options})
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(base), config)
    with torch.no_grad():
        for tensor in lora_state_dict(model).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def write(base, folder, sharded=False):
    """A checkpoint as a hub has it: with a config, a tokenizer and a second copy of the weights."""
    folder.mkdir()
    tensors = base.state_dict()
    (folder / "config.json").write_text('{"vocab_size": 3}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    if not sharded:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: t for key, t in tensors.items() if where[key] == name}, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


def tensors_in(folder):
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


@pytest.fixture
def files(tmp_path):
    """(model, BASE, ADAPTER, OUT)"""
    torch.manual_seed(0)
    base = Model()
    save_adapter(adapted(base), tmp_path / "adapter")
    return base, write(base, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"


def merged_by(*paths):
    return main(["merge", *map(str, paths)])


def refused(capsys, tmp_path, *arguments, bar=False):
    """The error of a run that must leave everything as it was."""
    before = sorted(tmp_path.rglob("*"))
    contents = [path.read_bytes() for path in before if path.is_file()]
    assert merged_by(*arguments) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert [path.read_bytes() for path in before if path.is_file()] == contents
    captured = capsys.readouterr()
    error = captured.err
    assert error.startswith("lora-fast merge: error: ") and error.count("\n") == 1
    assert bar or not captured.out.strip()  # all is checked before the bar shows
    return error


@pytest.mark.medium
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"block.0": 2}, "alpha_pattern": {"fc1": 2.5}},
        {"bias": "lora_only", "modules_to_save": ["head", "norm"]},
        {"bias": "all", "use_dora": True, "modules_to_save": ["norm"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gives_what_merge_lora_gives(options, dtype, sharded, tmp_path, capsys):
    torch.manual_seed(0)
    base = Model(dtype)
    model = adapted(base, **options)
    save_adapter(model, tmp_path / "adapter")
    folder, out = write(base, tmp_path / "base", sharded), tmp_path / "out"
    assert merged_by(folder, tmp_path / "adapter", out) == 0
    wanted, found = remove_lora(merge_lora(model)).state_dict(), tensors_in(out)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert not torch.equal(found["fc1.weight"], base.fc1.weight)
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as old, safe_open(out / name, "pt") as new:
                assert old.metadata() == new.metadata() and list(old.keys()) == list(new.keys())
        else:
            assert (out / name).read_bytes() == (folder / name).read_bytes()
    said = capsys.readouterr().out
    assert f"Merged 2 {'DoRA' if 'use_dora' in options else 'LoRA'} layers" in said
    assert "left out: pytorch_model.bin" in said and "tokenizer.json" in said
    assert ("head.weight" in said) == ("head" in options.get("modules_to_save", []))


FOLDERS = {
    "1_Pooling/config.json": b"{}",
    "2_Dense/model.safetensors": b"a module's own",
    "2_Dense/config.json": b"{}",
    "2_Dense/deeper/vocab.txt": b"a",
    "assets/plot.png": b"",
    "checkpoint-500/pytorch_model.bin": b"old",
    "checkpoint-500/config.json": b"{}",
    "onnx/model.onnx": b"old",
    "original/deep/consolidated.00.pth": b"old",
    ".cache/x.metadata": b"",
}


def test_subfolders(files, capsys):
    _, folder, adapter, out = files
    modules = [{"idx": i, "path": path} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, content in FOLDERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "linked").symlink_to(folder / "assets")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert merged_by(folder, adapter, out) == 0
    said = capsys.readouterr().out
    left = ["pytorch_model.bin", ".cache/", "checkpoint-500/", "linked/", "onnx/", "original/"]
    assert f"left out: {', '.join(left)}" in said
    went = {name for name in FOLDERS if f"{name.partition('/')[0]}/" not in left}
    assert all((out / name).read_bytes() == FOLDERS[name] and name in said for name in went) and len(went) == 5
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"1_Pooling", "2_Dense", "assets"}
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    merged = load_file(out / "model.safetensors")
    assert merged_by(folder, adapter, out, "--force") == 0 and (out / "2_Dense/deeper/vocab.txt").exists()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_in(out).items())


def test_weights_of_other_kinds_are_left_out(files, capsys):
    """Beside the merged ones they would be the unmerged ones."""
    _, folder, adapter, out = files
    others = ["rust_model.ot", "MODEL.GGUF", "model.ckpt.data-00000-of-00001", "tf_model.h5"]
    for name in (*others, "mlx/weights.npz", "vocab.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"w")
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets/inner").symlink_to(folder / "mlx")
    assert merged_by(folder, adapter, out) == 0
    said = capsys.readouterr().out.partition("left out: ")[2]
    assert all(name in said for name in (*others, "mlx/", "assets/")) and "vocab.txt" not in said
    assert not any((out / name).exists() for name in (*others, "mlx", "assets")) and (out / "vocab.txt").exists()


def test_subfolders_of_the_hubs_cache(files, tmp_path):
    """Links into the blobs of the same repository."""
    _, folder, adapter, out = files
    (blobs := tmp_path / "repo/blobs").mkdir(parents=True)
    snapshot = tmp_path / "repo/snapshots/1234"
    (snapshot / "1_Pooling").mkdir(parents=True)
    for name in (path.name for path in folder.iterdir()):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    (blobs / "pooling").write_bytes(b"{}")
    (snapshot / "1_Pooling/config.json").symlink_to("../../../blobs/pooling")
    assert merged_by(snapshot, adapter, out) == 0
    copied = out / "1_Pooling/config.json"
    assert copied.read_bytes() == b"{}" and not copied.is_symlink()


def test_a_file(files, capsys):
    base, folder, adapter, out = files
    out = out.with_suffix(".safetensors")
    assert merged_by(folder / "model.safetensors", adapter, out) == 0
    wanted = remove_lora(merge_lora(adapted(base))).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_file(out).items())
    save_adapter(adapted(base, lora_alpha=60), adapter)
    assert merged_by(folder / "model.safetensors", adapter, out, "--force") == 0
    assert not torch.equal(load_file(out)["fc1.weight"], wanted["fc1.weight"])


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_as_peft_merges(dora, tmp_path):
    """A tiny Llama, saved by transformers in shards, its adapter trained and saved by PEFT."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert (tmp_path / "base" / INDEX).exists()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"], use_dora=dora)
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert merged_by(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    tokens = torch.arange(10).reshape(2, 5)
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")(tokens).logits
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    theirs = model.merge_and_unload()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert (ours(tokens).logits - before).abs().max() > 0.01


def rewrite(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def put(adapter, **tensors):
    save_file({**load_file(adapter / TENSORS), **{PREFIX + k: t for k, t in tensors.items()}}, adapter / TENSORS)


def without_fc1(folder, adapter):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if not k.startswith("fc1")}, folder / "model.safetensors")


def as_integers(folder, adapter):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "fc1.weight": tensors["fc1.weight"].to(torch.int8)}, folder / "model.safetensors")


def impossible(folder, adapter):
    header = b'{"x":{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


PAIR = {"fc9.lora_A.weight": torch.zeros(4, 8), "fc9.lora_B.weight": torch.zeros(6, 4)}
BREAKS = {
    "no such module": (without_fc1, "'fc1', but the model has no such module"),
    "adapter of another layer": (lambda f, a: put(a, **PAIR), "'fc9', but the model has no such module"),
    "base weight in the adapter": (lambda f, a: put(a, **{"head.weight": torch.zeros(3, 6)}), "unexpected"),
    "other shape": (lambda f, a: put(a, **{"fc1.lora_A.weight": torch.zeros(4, 9)}), "expected [4, 8]"),
    "NaN": (lambda f, a: put(a, **{"fc1.lora_A.weight": torch.full((4, 8), torch.nan)}), "not finite"),
    "integers": (as_integers, "fc1.weight: has dtype I8"),
    "no adapter": (lambda f, a: (a / TENSORS).unlink(), "No such file"),
    "no config": (lambda f, a: (a / CONFIG).write_text("{"), "no JSON"),
    "no base": (lambda f, a: (f / "model.safetensors").unlink(), "no safetensors file"),
    "cut off": (lambda f, a: os.truncate(f / "model.safetensors", 500), "model.safetensors: is no safetensors file"),
    "bad index": (lambda f, a: (f / INDEX).write_text('{"weight_map": {"x": "../y"}}'), "weight_map"),
    "index of nothing": (lambda f, a: (f / INDEX).write_text("{"), "weight_map"),
    "index that lies": (lambda f, a: (f / INDEX).write_text('{"weight_map": {"x": "model.safetensors"}}'), "has 'x'"),
    "absent shard": (lambda f, a: (f / INDEX).write_text('{"weight_map": {"x": "absent.safetensors"}}'), "absent"),
    "several": (
        lambda f, a: [
            (f / "model.safetensors").rename(f / "a.safetensors"),
            save_file({"x": torch.zeros(1)}, f / "b.safetensors"),
        ],
        "a.safetensors, b.safetensors",
    ),
    "odd name": (lambda f, a: save_file({"a..weight": torch.zeros(2, 2)}, f / "model.safetensors"), "no name of a"),
    "deep name": (lambda f, a: save_file({"a." * 99 + "b": torch.zeros(2)}, f / "model.safetensors"), "no name of a"),
    "impossible shape": (impossible, "is no shape of a tensor"),
    "modules.json no list": (lambda f, a: (f / "modules.json").write_text('{"path": 1}'), "modules.json: expected"),
    "link in a folder": (
        lambda f, a: [(f / "1_Pooling").mkdir(), (f / "1_Pooling/x").symlink_to(a / CONFIG)],
        "is a link to",
    ),
    "config no JSON": (lambda f, a: (f / "config.json").write_text("{"), "config.json: is no JSON"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_refuses(case, files, tmp_path, capsys):
    _, folder, adapter, out = files
    change, message = BREAKS[case]
    change(folder, adapter)
    assert message in refused(capsys, tmp_path, folder, adapter, out)


def test_progress(files, capsys):
    _, folder, adapter, out = files
    assert merged_by(folder, adapter, out) == 0
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"target_modules": ["head"]}, {"modules_to_save": ["head"]}], ids=str)
def test_tied_embeddings(options, files, tmp_path, capsys):
    base, folder, adapter, out = files
    save_adapter(adapted(base, **options), adapter)
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 3, "tie_word_embeddings": true}}')
    assert "ties the embeddings" in refused(capsys, tmp_path, folder, adapter, out)
    (folder / "config.json").write_text('{"vocab_size": 3, "tie_word_embeddings": false}')
    assert merged_by(folder, adapter, out) == 0


def test_an_overflow_is_refused_unless_it_is_wanted(tmp_path, capsys):
    torch.manual_seed(0)
    base = Model(torch.float16)
    with torch.no_grad():
        base.fc1.weight[0, 0] = 65504
    model = adapted(base)
    with torch.no_grad():
        model.fc1.lora_A.fill_(100), model.fc1.lora_B.fill_(100)
    save_adapter(model, tmp_path / "adapter")
    folder, out = write(base, tmp_path / "base"), tmp_path / "out"
    assert "fc1.weight: the merged weight has NaN" in refused(
        capsys, tmp_path, folder, tmp_path / "adapter", out, bar=True
    )
    assert merged_by(folder, tmp_path / "adapter", out, "--no-safe") == 0
    assert tensors_in(out)["fc1.weight"].isinf().any()


def test_out(files, tmp_path, capsys):
    """What is there is replaced only when told to, and never what is read or no checkpoint."""
    _, folder, adapter, out = files
    for place, message in [
        (tmp_path / "absent" / "out", "is no directory"),
        (folder, "which is read"),
        (adapter, "which is read"),
        (tmp_path, "which is read"),
    ]:
        assert message in refused(capsys, tmp_path, folder, adapter, place, "--force")
    assert "ends in .safetensors" in refused(capsys, tmp_path, folder / "model.safetensors", adapter, out)
    assert "does not exist" in refused(capsys, tmp_path, tmp_path / "absent", adapter, out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "exists already" in refused(capsys, tmp_path, folder, adapter, out)
    assert "holds no checkpoint" in refused(capsys, tmp_path, folder, adapter, out, "--force")
    (out / "thesis.txt").rename(out / "model.safetensors")
    assert merged_by(folder, adapter, out, "--force") == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("when", ["fsync", "rename"])
def test_a_failure_leaves_the_old_one(when, files, tmp_path, capsys, monkeypatch):
    _, folder, adapter, out = files
    assert merged_by(folder, adapter, out) == 0
    real = getattr(os, when)

    def fail(*args):
        if when == "rename" and str(args[0]).endswith(".old"):
            return real(*args)
        if when == "rename" and not str(args[0]).endswith(".part"):
            return real(*args)
        raise OSError("no space left")

    monkeypatch.setattr(os, when, fail)
    assert "no space left" in refused(capsys, tmp_path, folder, adapter, out, "--force", bar=True)


@pytest.mark.medium
def test_a_killed_run_leaves_no_out(files):
    _, folder, adapter, out = files
    code = f"""
import os
from lora_fast.cli import main
os.fsync = lambda fd: os._exit(9)
main(["merge", {str(folder)!r}, {str(adapter)!r}, {str(out)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 9 and not out.exists()
    assert merged_by(folder, adapter, out) == 0


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--help"], 0, ["BASE", "ADAPTER", "OUT", "--no-safe", "examples:", "Exit codes"]),
        (["a", "b"], 2, ["OUT"]),
        (["a", "b", "c", "--dance"], 2, ["--dance"]),
    ],
)
def test_command_line(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == code and all(word in captured.out + captured.err for word in words)


@pytest.mark.medium
def test_help_without_safetensors():
    """It says how to call the command; calling it says what is missing."""
    code = """
import sys
sys.modules["safetensors"] = None
from lora_fast.cli import main
try:
    main(["merge", "--help"])
except SystemExit as stop:
    assert stop.code == 0
sys.exit(main(["merge", "a", "b", "c"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "BASE" in done.stdout and "pip install safetensors" in done.stderr, done.stderr
