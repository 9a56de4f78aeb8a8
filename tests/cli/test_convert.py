"""`lora-fast convert`: names, the order of rows, there and back, PEFT and load_adapter on the result, refusals."""

import json
import os

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from lora_fast import LoRALinear, load_adapter
from lora_fast.cli import main
from lora_fast.files.format import CONFIG, PREFIX, TENSORS
from lora_fast.files.torchtune import PT, Heads, reordered, to_peft, to_torchtune

HEADS, KV_HEADS, SIZE = 4, 2, 6
DIM, FFN, VOCABULARY = HEADS * SIZE, 40, 12
MODULES = {  # torchtune's names: [out, in]
    "attn.q_proj": (DIM, DIM),
    "attn.k_proj": (KV_HEADS * SIZE, DIM),
    "attn.v_proj": (KV_HEADS * SIZE, DIM),
    "attn.output_proj": (DIM, DIM),
    "mlp.w1": (FFN, DIM),
    "mlp.w2": (DIM, FFN),
    "mlp.w3": (FFN, DIM),
}
SHAPES = {f"layers.{i}.{name}": shape for i in (0, 1, 10) for name, shape in MODULES.items()}
SHAPES["output"] = (VOCABULARY, DIM)
ROWS = ["--num-heads", str(HEADS), "--num-kv-heads", str(KV_HEADS)]


def tune_state(dora=False, dtype=torch.float32, r=4):
    torch.manual_seed(0)
    state = {}
    for name, (n, k) in SHAPES.items():
        state[f"{name}.lora_a.weight"] = torch.randn(r, k, dtype=dtype)
        state[f"{name}.lora_b.weight"] = torch.randn(n, r, dtype=dtype)
        if dora:
            state[f"{name}.magnitude"] = torch.rand(n, dtype=dtype) + 0.5
    return state


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def equal(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_there_and_back(dora, dtype, tmp_path, capsys):
    """From torchtune to PEFT, to torchtune, to PEFT: equal bits and settings; each side is as its owner names it."""
    state = tune_state(dora, dtype)
    torch.save(state, tmp_path / "adapter_0.pt")
    assert convert(tmp_path / "adapter_0.pt", tmp_path / "peft", "--to", "peft", "--alpha", 6, *ROWS) == 0
    kind = "DoRA" if dora else "LoRA"
    assert f"Converted 22 {kind} layers (down_proj, gate_proj, k_proj, lm_head, " in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "peft")) == [CONFIG, TENSORS]
    assert convert(tmp_path / "peft", tmp_path / "tune", "--to", "torchtune", *ROWS) == 0
    assert sorted(os.listdir(tmp_path / "tune")) == [CONFIG, PT]
    assert equal(torch.load(tmp_path / "tune" / PT, weights_only=True), state)
    assert convert(tmp_path / "tune", tmp_path / "again", "--to", "peft", *ROWS) == 0  # alpha: from the file beside
    peft, again = (load_file(tmp_path / name / TENSORS) for name in ("peft", "again"))
    assert equal(peft, again)
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("peft", "tune", "again")]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["lora_alpha"] == 6 and configs[0]["r"] == 4 and configs[0]["use_dora"] == dora
    assert len(peft) == len(state)
    for key in ("layers.0.attn.v_proj", "layers.0.mlp.w1", "layers.0.mlp.w2", "output"):
        theirs = {
            "layers.0.attn.v_proj": "model.layers.0.self_attn.v_proj",
            "layers.0.mlp.w1": "model.layers.0.mlp.gate_proj",
            "layers.0.mlp.w2": "model.layers.0.mlp.down_proj",
            "output": "lm_head",
        }[key]
        assert torch.equal(peft[f"{PREFIX}{theirs}.lora_A.weight"], state[f"{key}.lora_a.weight"])
        assert torch.equal(peft[f"{PREFIX}{theirs}.lora_B.weight"], state[f"{key}.lora_b.weight"])
    q, old = peft[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"], state["layers.0.attn.q_proj.lora_b.weight"]
    assert not torch.equal(q, old) and torch.equal(q.sort(0).values, old.sort(0).values)


def turned_by_halves(x, angles):
    """Hugging Face's rotary embedding of x [heads, size]: row j and row j + size / 2 of a head by angle j."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def turned_by_neighbours(x, angles):
    """Meta's and torchtune's: row 2 j and row 2 j + 1 by angle j."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)


def test_rows_give_the_same_attention():
    """Scores of the adapters' q and k under each side's own rotary embedding agree after the reordering alone."""
    torch.manual_seed(0)
    at = "model.layers.0.self_attn"
    hf = {
        f"{at}.{name}_proj.lora_B": torch.randn(heads * SIZE, 3, dtype=torch.float64)
        for name, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    tune = reordered(hf, Heads(HEADS, KV_HEADS), "torchtune")
    low = torch.randn(2, 3, dtype=torch.float64)  # what A made of the inputs at two positions
    angles = torch.rand(2, SIZE // 2, dtype=torch.float64) * 6

    def scores(state, turn):
        q, k = ((state[f"{at}.{name}_proj.lora_B"] @ low[i]).view(-1, SIZE) for i, name in enumerate("qk"))
        return turn(q, angles[0]) @ turn(k, angles[1]).T

    torch.testing.assert_close(scores(tune, turned_by_neighbours), scores(hf, turned_by_halves))
    assert (scores(hf, turned_by_neighbours) - scores(hf, turned_by_halves)).abs().max() > 0.1
    magnitude = {f"{at}.q_proj.lora_magnitude_vector": torch.arange(float(HEADS * SIZE))}
    rows = {f"{at}.q_proj.lora_B": torch.arange(float(HEADS * SIZE))[:, None]}
    heads = Heads(HEADS, KV_HEADS)
    assert torch.equal(*(next(iter(reordered(part, heads, "peft").values())).flatten() for part in (magnitude, rows)))
    assert next(iter(reordered(magnitude, heads, "peft").values()))[:SIZE].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_peft_and_load_adapter_read_it(dora, tmp_path):
    """Into a tiny Llama of transformers', where both give the same output, other than the base's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    config.save_pretrained(tmp_path)
    state = {key: 0.1 * t if "lora" in key else t for key, t in tune_state(dora).items() if "layers.10" not in key}
    save_file(state, tmp_path / "tune.safetensors")
    heads = ["--config", tmp_path / "config.json"]
    assert convert(tmp_path / "tune.safetensors", tmp_path / "a", "--to", "peft", "--alpha", 8, *heads) == 0
    tokens = torch.arange(10).reshape(2, 5)
    before = base(tokens).logits
    ours = load_adapter(transformers.LlamaForCausalLM(config).eval(), tmp_path / "a")
    ours.load_state_dict(base.state_dict(), strict=False)
    if dora:
        load_adapter(ours, tmp_path / "a")  # the magnitudes again, after the weights
    logits = ours(tokens).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    assert sum(isinstance(m, LoRALinear) for m in ours.modules()) == 15
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert (logits - before).abs().max() > 0.1


def test_names_are_a_bijection():
    for key in tune_state(dora=True):
        theirs = to_peft(key)
        assert theirs is not None and to_torchtune(theirs) == key
    for odd in (
        "layers.0.attn.q_proj.weight",
        "layers.0.attn.o_proj.lora_a.weight",
        "output",
        "lora_a.weight",
        "decoder.layers.0.attn.q_proj.lora_a.weight",
        "layers.x.attn.q_proj.lora_a.weight",
        "output.lora_c.weight",
        "layers.0.attn.q_proj",
        "layers.0..lora_a.weight",
    ):
        assert to_peft(odd) is None
    for odd in (
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.weight",
        "layers.0.self_attn.q_proj.lora_A",
        "model.layers.0.self_attn.qkv_proj.lora_A",
        "model.embed_tokens.lora_A",
        "lora_A",
    ):
        assert to_torchtune(odd) is None


def test_rows_that_stay(tmp_path):
    """Without adapters on q and k no heads are asked for; with --no-permute the rows keep their order."""
    state = {key: t for key, t in tune_state().items() if "q_proj" not in key and "k_proj" not in key}
    torch.save(state, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "a", "--to", "peft", "--alpha", 0.5) == 0
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["lora_alpha"] == 0.5
    torch.save(tune_state(), tmp_path / "b.pt")
    assert convert(tmp_path / "b.pt", tmp_path / "b", "--to", "peft", "--alpha", 8, "--no-permute") == 0
    found = load_file(tmp_path / "b" / TENSORS)[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(found, tune_state()["layers.1.attn.q_proj.lora_b.weight"])


class Danger:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


FILES = {
    "unknown": (lambda s: s | {"tok_embeddings.weight": torch.zeros(2, 2)}, "tok_embeddings.weight: not of an adapter"),
    "base weight": (lambda s: s | {"layers.0.attn.q_proj.weight": torch.zeros(2, 2)}, "layers.0.attn.q_proj.weight"),
    "half a pair": (lambda s: {k: t for k, t in s.items() if k != "output.lora_b.weight"}, "lm_head"),
    "stray magnitude": (lambda s: s | {"output.magnitude": torch.ones(VOCABULARY)}, "lora_magnitude_vector"),
    "NaN": (lambda s: s | {"output.lora_a.weight": torch.full((4, DIM), torch.nan)}, "not finite"),
    "other rank": (lambda s: s | {"output.lora_a.weight": torch.zeros(5, DIM)}, "expected [4,"),
    "flat": (lambda s: s | {"output.lora_a.weight": torch.zeros(4)}, "shape [4]"),
    "integers": (lambda s: s | {"output.lora_a.weight": torch.zeros(4, DIM, dtype=torch.int64)}, "dense floating"),
    "expanded": (lambda s: s | {"output.lora_a.weight": torch.zeros(1).expand(4, DIM)}, "dense floating"),
    "no tensor": (lambda s: s | {"output.lora_a.weight": 3}, "dense floating"),
    "odd key": (lambda s: s | {3: torch.zeros(1)}, "dense floating"),
    "a list": (lambda s: [torch.zeros(1)], "holds a list"),
    "code": (lambda s: s | {"output.lora_a.weight": Danger()}, "cannot be read as tensors alone"),
    "nothing": (lambda s: {}, "holds no adapter"),
    "rows": (lambda s: s | {"layers.1.attn.q_proj.lora_b.weight": torch.zeros(25, 4)}, "has 25 rows"),
}


def refused(capsys, tmp_path, *arguments):
    before = sorted(tmp_path.rglob("*"))
    assert convert(*arguments) == 1
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith("lora-fast convert: error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change, message = FILES[case]
    torch.save(change(tune_state()), tmp_path / "a.pt")
    assert message in refused(capsys, tmp_path, "a.pt", "out", "--to", "peft", "--alpha", 8, *ROWS)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--alpha", "8"], "its rows change places by heads"),
        ([*ROWS], "give --alpha"),
        (["--alpha", "nan", *ROWS], "expected a finite number"),
        (["--alpha", "8", "--num-heads", "4"], "not 4 heads of an even size that all share"),  # k has two
        (["--alpha", "8", "--num-heads", "7"], "not 7 heads"),
        (["--alpha", "8", "--num-heads", "8", "--num-kv-heads", "4"], "of an even size"),  # of 3 rows
        (["--alpha", "8", *ROWS, "--dim", "48"], "--dim right?"),
        (["--alpha", "8", "--config", "absent.json"], "No such file"),
        (["--alpha", "8", "--config", "bad.json"], "expected num_attention_heads"),
        (["--alpha", "8", "--config", "broken.json"], "is no JSON"),
    ],
)
def test_settings_that_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"num_attention_heads": "4", "hidden_size": 24}')
    (tmp_path / "broken.json").write_text("{")
    torch.save(tune_state(), tmp_path / "a.pt")
    assert message in refused(capsys, tmp_path, "a.pt", "out", "--to", "peft", *options)
    assert convert("a.pt", "out", "--to", "peft", "--alpha", 8, *ROWS, "--dim", DIM) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_rslora": True}, "with use_rslora false and lora_alpha 12"),
        ({"alpha_pattern": {"lm_head": 3}}, "differ in r or lora_alpha"),
        ({"r": 5}, "expected [5,"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_adapters_of_peft_that_are_refused(change, message, tmp_path, capsys):
    torch.save(tune_state(), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "peft", "--to", "peft", "--alpha", 6, *ROWS) == 0
    save_file(load_file(tmp_path / "peft" / TENSORS), tmp_path / "peft" / TENSORS)  # without our copy of the config
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps({**config, **change}))
    assert message in refused(capsys, tmp_path, tmp_path / "peft", tmp_path / "out", "--to", "torchtune", *ROWS)


def test_modules_that_torchtune_has_not(tmp_path, capsys):
    from lora_fast import LoRAConfig, add_lora, save_adapter

    model = add_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(target_modules=["0"]))
    save_adapter(model, tmp_path / "a")
    error = refused(capsys, tmp_path, tmp_path / "a", tmp_path / "out", "--to", "torchtune")
    assert "no place for 0.lora_A, 0.lora_B" in error


def test_destinations(tmp_path, capsys):
    torch.save(tune_state(), tmp_path / "a.pt")
    to_it = ["--to", "peft", "--alpha", 6, *ROWS]
    assert "is where SRC is" in refused(capsys, tmp_path, tmp_path / "a.pt", tmp_path, *to_it)
    assert "is no directory" in refused(capsys, tmp_path, tmp_path / "a.pt", tmp_path / "b" / "c", *to_it)
    assert "is no file" in refused(capsys, tmp_path, tmp_path / "absent.pt", tmp_path / "out", *to_it)
    assert "No such file" in refused(capsys, tmp_path, tmp_path, tmp_path / "out", *to_it)  # no adapter_model.pt
    assert convert(tmp_path / "a.pt", tmp_path / "out", *to_it) == 0
    assert "--force" in refused(capsys, tmp_path, tmp_path / "a.pt", tmp_path / "out", *to_it)
    assert "says its lora_alpha itself" in refused(
        capsys, tmp_path, tmp_path / "out", tmp_path / "b", "--to", "torchtune", "--alpha", 8, *ROWS
    )
    old = load_file(tmp_path / "out" / TENSORS)
    torch.save(tune_state(r=2), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "out", *to_it, "--force") == 0
    assert not equal(load_file(tmp_path / "out" / TENSORS), old)
    (tmp_path / "b").mkdir()
    assert convert(tmp_path / "out", tmp_path / "b", "--to", "torchtune", *ROWS) == 0
    assert convert(tmp_path / "a.pt", tmp_path / "b", *to_it, "--force") == 0
    assert sorted(os.listdir(tmp_path / "b")) == [CONFIG, TENSORS]


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_failure_leaves_what_was_there(when, tmp_path, capsys, monkeypatch):
    torch.save(tune_state(), tmp_path / "a.pt")
    arguments = [tmp_path / "a.pt", tmp_path / "out", "--to", "peft", "--alpha", 6, *ROWS]
    assert convert(*arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    torch.save(tune_state(r=2), tmp_path / "a.pt")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, when, fail)
    assert "no space left" in refused(capsys, tmp_path, *arguments, "--force")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--help"], 0, ["SRC", "DST", "--num-kv-heads", "--no-permute", "examples:", "Exit codes"]),
        (["a", "b"], 2, ["--to"]),
        (["a", "b", "--to", "nemo"], 2, ["nemo"]),
        (["a", "b", "--to", "peft", "--num-heads", "0"], 2, ["got '0'"]),
        (["a", "b", "--to", "peft", "--num-heads", "2", "--no-permute"], 2, ["not allowed with"]),
    ],
)
def test_command_line(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == code and all(word in captured.out + captured.err for word in words)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_pefts_already(form, tmp_path, capsys):
    torch.save(tune_state(), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "peft", "--to", "peft", "--alpha", 6, *ROWS) == 0
    src = tmp_path / "peft" / (TENSORS if form == "file" else "")
    assert "already: nothing to convert" in refused(capsys, tmp_path, src, tmp_path / "b", "--to", "peft", *ROWS)
