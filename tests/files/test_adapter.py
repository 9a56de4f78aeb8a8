"""Adapters on disk: both ways with PEFT, whole after a cut-off save, and nothing that a hostile file can do."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT, environment
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from lora_fast import LoRAConfig, LoRALinear, add_lora, load_adapter, lora_state_dict, save_adapter
from lora_fast.files.adapter import target_modules
from lora_fast.files.format import CONFIG, PREFIX, TENSORS


class Model(nn.Module):
    """Names that are the last parts of others, and layers left alone."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.block(self.fc1(x))))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Model()


def converted(base, **options):
    """A converted copy whose trained tensors are no longer as at the start."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["fc1", "block.0"], **options}
    model = add_lora(copy.deepcopy(base), LoRAConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


KINDS = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"block.0": 2}, "alpha_pattern": {"fc1": 2.5}},
    {"bias": "lora_only", "modules_to_save": ["head"]},
    {"bias": "all", "use_dora": True, "modules_to_save": ["norm"]},
]
kinds = pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(options) or "plain")


@kinds
def test_round_trip(base, options, tmp_path):
    """Into a plain model, which is converted alike, and into a converted one, which takes the scaling over."""
    model, x = converted(base, **options), torch.randn(5, 8)
    save_adapter(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [CONFIG, TENSORS]
    ways = {key: value for key, value in options.items() if key != "alpha_pattern"}
    other = add_lora(copy.deepcopy(base), LoRAConfig(r=4, target_modules=["fc1", "block.0"], **ways))
    for fresh in (copy.deepcopy(base), other):
        assert load_adapter(fresh, tmp_path / "a") is fresh
        assert torch.equal(fresh(x), model(x)) and not torch.equal(fresh(x), base(x))
        found, wanted = lora_state_dict(fresh), lora_state_dict(model)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        flags = {name: p.requires_grad for name, p in fresh.named_parameters()}
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


@kinds
def test_both_ways_with_peft(base, options, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = converted(base, **options), torch.randn(5, 8)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [["fc1"], ["block.0"], ["0"], ["0", "block.0"], ["fc1", "0", "block.0"]])
def test_targets_mean_these_layers_alone(names):
    """As PEFT reads them: a list of names or last parts, or a regex for the full name."""
    import re

    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "block": nn.Sequential(nn.Linear(2, 2)), "0": nn.Linear(2, 2)})
    targets = target_modules(model, set(names))
    linears = ["fc1", "block.0", "0"]
    if isinstance(targets, str):
        assert {n for n in linears if re.fullmatch(targets, n)} == set(names)
    else:
        assert {n for n in linears if any(n == t or n.endswith(f".{t}") for t in targets)} == set(names)


def test_a_name_may_end_another(tmp_path):
    """Ranks and alphas of "0" and "block.0" keep apart."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    config = LoRAConfig(target_modules="all-linear", rank_pattern={"1.0": 3, "^0": 2}, alpha_pattern={"1.0": 5})
    model = add_lora(copy.deepcopy(base), config)
    for layer in (model[0], model[1][0], model[1][1]):
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    fresh, x = load_adapter(copy.deepcopy(base), tmp_path), torch.randn(3, 4)
    assert (fresh[0].r, fresh[1][0].r, fresh[1][1].r) == (2, 3, 8)
    assert torch.equal(fresh(x), model(x))


def test_wrappers_leave_no_trace(base, tmp_path):
    save_adapter(torch.compile(converted(base)), tmp_path)
    assert all(key.startswith((f"{PREFIX}fc1.", f"{PREFIX}block.0.")) for key in load_file(tmp_path / TENSORS))


def test_what_a_save_refuses(base, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(base, tmp_path / "a")
    mixed = converted(base)
    mixed.head = LoRALinear.from_linear(mixed.head, use_rslora=True)
    with pytest.raises(ValueError, match="differ in use_dora or use_rslora"):
        save_adapter(mixed, tmp_path / "a")
    for layer in (LoRALinear(2, 2), torch.compile(LoRALinear(2, 2), backend="eager")):
        with pytest.raises(ValueError, match="is itself a LoRA layer"):
            save_adapter(layer, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_save_that_fails_leaves_the_old_adapter(base, when, tmp_path, monkeypatch):
    model = converted(base)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.fc1.lora_A.zero_()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync" if when == "writing" else "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.medium
def test_a_save_that_is_killed_leaves_the_old_adapter(base, tmp_path):
    model = converted(base)
    save_adapter(model, tmp_path / "a")
    torch.save(base, tmp_path / "base.pt")
    code = f"""
import os, torch
from lora_fast import load_adapter, save_adapter
model = load_adapter(torch.load({str(tmp_path / "base.pt")!r}, weights_only=False), {str(tmp_path / "a")!r})
os.fsync = lambda fd: os._exit(9)
save_adapter(model, {str(tmp_path / "a")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment())
    assert done.returncode == 9
    x = torch.randn(5, 8)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "a")(x), model(x))


def edit(folder, tensors=(), config=(), without=()):
    """Change an adapter as an attacker would: without our copy of the config in the tensors' file."""
    found = {**load_file(folder / TENSORS), **dict(tensors)}
    save_file({key: t for key, t in found.items() if key not in without}, folder / TENSORS, {"format": "pt"})
    settings = {**json.loads((folder / CONFIG).read_text()), **dict(config)}
    (folder / CONFIG).write_text(json.dumps(settings))


def rewrite(folder, old, new):
    """Change the text of the config alone."""
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace(old, new))


A, B = f"{PREFIX}fc1.lora_A.weight", f"{PREFIX}fc1.lora_B.weight"
M = f"{PREFIX}fc1.lora_magnitude_vector"
HEADER_BOMB = struct.pack("<Q", 2**60) + b"{}"
ATTACKS = {
    "base weight": (lambda d: edit(d, {f"{PREFIX}fc1.base_layer.weight": torch.zeros(6, 8)}), "save_embedding_layers"),
    "other weight": (lambda d: edit(d, {f"{PREFIX}head.weight": torch.zeros(3, 6)}), "unexpected"),
    "bias that does not train": (lambda d: edit(d, {f"{PREFIX}fc1.base_layer.bias": torch.zeros(6)}), "unexpected"),
    "no prefix": (lambda d: edit(d, {"fc1.lora_A": torch.zeros(4, 8)}), "begin with"),
    "unknown module": (
        lambda d: edit(
            d, {f"{PREFIX}fc9.lora_A.weight": torch.zeros(4, 8), f"{PREFIX}fc9.lora_B.weight": torch.zeros(6, 4)}
        ),
        "no such module",
    ),
    "no linear layer": (
        lambda d: edit(
            d, {f"{PREFIX}norm.lora_A.weight": torch.zeros(4, 8), f"{PREFIX}norm.lora_B.weight": torch.zeros(6, 4)}
        ),
        "is a LayerNorm",
    ),
    "half a pair": (lambda d: edit(d, without=[B]), "has lora_A, expected lora_A, lora_B"),
    "stray magnitude": (lambda d: edit(d, {M: torch.ones(6)}), "lora_magnitude_vector"),
    "no magnitude": (lambda d: edit(d, config={"use_dora": True}), "expected lora_A, lora_B, lora_magnitude_vector"),
    "twice": (lambda d: edit(d, {M: torch.ones(6), f"{M}.weight": torch.ones(6)}, {"use_dora": True}), "twice"),
    "wrong shape": (lambda d: edit(d, {A: torch.zeros(4, 7)}), r"shape \[4, 7\], expected \[4, 8\]"),
    "transposed": (lambda d: edit(d, {A: torch.zeros(8, 4)}), r"expected \[4, 8\]"),
    "integers": (lambda d: edit(d, {A: torch.zeros(4, 8, dtype=torch.int64)}), "dtype"),
    "NaN": (lambda d: edit(d, {A: torch.full((4, 8), torch.nan)}), "not finite"),
    "infinity": (lambda d: edit(d, {B: torch.full((6, 4), torch.inf)}), "not finite"),
    "another rank": (lambda d: edit(d, config={"r": 5}), r"expected \[5, [68]\]"),
    "huge rank": (lambda d: edit(d, config={"r": 10**6}), "expected a rank from 1 to"),
    "rank zero": (lambda d: edit(d, config={"r": 0}), "expected a rank"),
    "rank of another type": (lambda d: edit(d, config={"r": "4"}), "expected an integer"),
    "rank true": (lambda d: edit(d, config={"r": True}), "expected an integer"),
    "regex in a pattern": (lambda d: edit(d, config={"rank_pattern": {"(a+)+$": 4}}), "regexes are refused"),
    "path in a pattern": (lambda d: edit(d, config={"alpha_pattern": {"../x": 4}}), "regexes are refused"),
    "rank in a pattern": (lambda d: edit(d, config={"rank_pattern": {"fc1": 10**9}}), "expected a rank"),
    "alpha in a pattern": (lambda d: edit(d, config={"alpha_pattern": {"fc1": "1"}}), "expected a finite number"),
    "alpha not finite": (lambda d: edit(d, config={"lora_alpha": float("nan")}), "expected a finite number"),
    "alpha too large": (lambda d: rewrite(d, ": 6", ": 1e999"), "expected a finite number"),
    "dropout of one": (lambda d: edit(d, config={"lora_dropout": 1.0}), "probability"),
    "other bias": (lambda d: edit(d, config={"bias": "some"}), "bias: got"),
    "not LoRA": (lambda d: edit(d, config={"peft_type": "IA3"}), "peft_type"),
    "another base": (lambda d: edit(d, config={"init_lora_weights": "pissa"}), "not supported"),
    "expert parameters": (lambda d: edit(d, config={"target_parameters": ["x"]}), "names no parameter of experts"),
    "no JSON": (lambda d: (d / CONFIG).write_text("{"), "no JSON"),
    "deep JSON": (lambda d: (d / CONFIG).write_text("[" * 10**5), "no JSON"),
    "a list": (lambda d: (d / CONFIG).write_text("[]"), "expected an object"),
    "huge config": (lambda d: (d / CONFIG).write_text(" " * (2**20 + 1)), "expected at most"),
    "no text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\xff"), "UTF-8"),
    "pickle": (lambda d: torch.save({A: torch.zeros(4, 8)}, d / TENSORS), "no safetensors file"),
    "cut off": (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-8]), "no safetensors file"),
    "header bomb": (lambda d: (d / TENSORS).write_bytes(HEADER_BOMB), "no safetensors file"),
    "nothing": (lambda d: save_file({}, d / TENSORS), "holds no adapter"),
    "two saves": (lambda d: rewrite(d, ": 6", ": 7"), "another one"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_and_change_nothing(base, attack, tmp_path):
    """On a plain model and on a converted one."""
    save_adapter(converted(base), tmp_path)
    change, message = ATTACKS[attack]
    change(tmp_path)
    for model in (copy.deepcopy(base), converted(base)):
        refused(model, tmp_path, message)


def refused(model, folder, message):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kinds = [(name, type(m), m) for name, m in model.named_modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    scalings = [m.scaling for m in model.modules() if isinstance(m, LoRALinear)]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert [(name, type(m), m) for name, m in model.named_modules()] == kinds
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert scalings == [m.scaling for m in model.modules() if isinstance(m, LoRALinear)]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_pattern_for_modules_is_never_run(base, tmp_path):
    """Which layers: from the tensors' names. This regex would take until the end of time on them."""
    save_adapter(converted(base), tmp_path)
    edit(tmp_path, config={"target_modules": "(([a-z.0-9])+.)+[A-Z]([a-z])+$", "layers_pattern": "(x+x+)+y"})
    assert isinstance(load_adapter(copy.deepcopy(base), tmp_path).fc1, LoRALinear)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_links_that_leave_the_directory(base, name, tmp_path):
    save_adapter(converted(base), tmp_path / "elsewhere")
    save_adapter(converted(base), tmp_path / "snapshots" / "a")
    link = tmp_path / "snapshots" / "a" / name
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(ValueError, match="is a link to .* outside"):
        load_adapter(copy.deepcopy(base), tmp_path / "snapshots" / "a")
    (tmp_path / "blobs").mkdir()  # as Hugging Face's cache has it
    (tmp_path / "elsewhere" / name).rename(tmp_path / "blobs" / "0123")
    link.unlink()
    link.symlink_to(Path("..") / ".." / "blobs" / "0123")
    load_adapter(copy.deepcopy(base), tmp_path / "snapshots" / "a")
    link.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(copy.deepcopy(base), tmp_path / "snapshots" / "a")


@pytest.mark.parametrize("inside", [".", "checkpoint-500", "unet/adapters/a", "snapshots/b"])
def test_folders_of_the_hubs_cache(base, inside, tmp_path):
    """At any depth links lead to the repository's own blobs, and nowhere else."""
    hub, x = tmp_path / "snapshots" / "hub", torch.randn(5, 8)
    repository, other = hub / "models--org--name", hub / "models--org--other"
    folder = repository / "snapshots" / "0a1b" / inside
    model = converted(base)
    save_adapter(model, folder)
    for blobs in (repository / "blobs", other / "blobs", hub / "blobs", repository / "snapshots" / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "0123").write_bytes((folder / TENSORS).read_bytes())

    def link(target):
        (folder / TENSORS).unlink()
        (folder / TENSORS).symlink_to(os.path.relpath(target, folder))

    link(repository / "blobs" / "0123")
    assert torch.equal(load_adapter(copy.deepcopy(base), folder)(x), model(x))
    (tmp_path / "short").symlink_to(folder)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "short")(x), model(x))
    elsewhere = [other / "blobs" / "0123", hub / "blobs" / "0123", repository / "snapshots" / "blobs" / "0123"]
    (repository / "blobs" / "deeper").mkdir()
    (repository / "blobs" / "deeper" / "0123").write_bytes((other / "blobs" / "0123").read_bytes())
    for target in (*elsewhere, repository / "blobs" / "deeper" / "0123"):
        link(target)
        with pytest.raises(ValueError, match="is a link to .* outside"):
            load_adapter(copy.deepcopy(base), folder)


def test_a_converted_model_must_fit(base, tmp_path):
    save_adapter(converted(base), tmp_path)
    for options, message in [
        ({"r": 3}, "r = 4, but the model's has 3"),
        ({"target_modules": ["fc1"]}, "block.0: either"),
        ({"use_dora": True}, "is a LoRA adapter, but fc1 is a DoRA layer"),
        ({"bias": "all"}, "missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter(converted(base, **options), tmp_path)


def test_bias_all_means_what_peft_means(tmp_path):
    """Parameters called bias: not in_proj_bias of an nn.MultiheadAttention, bias_ih_l0 of an nn.LSTM, and the like."""
    peft = pytest.importorskip("peft")

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention, self.memory = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)

        def forward(self, x):
            return self.memory(self.attention(self.fc(x), x, x)[0])[0]

    torch.manual_seed(0)
    base = Mixed()
    ours = add_lora(copy.deepcopy(base), LoRAConfig(r=2, target_modules=["fc"], bias="all", init_lora_weights=False))
    stock = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["fc"], bias="all"))
    trained = {
        name.removeprefix("base_model.model.").replace("base_layer.", "")
        for name, p in stock.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    assert {name for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name} == trained
    save_adapter(ours, tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    x = torch.randn(3, 8)
    for folder, model in ("ours", ours), ("stock", stock):
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / folder)(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")(x), ours(x))
