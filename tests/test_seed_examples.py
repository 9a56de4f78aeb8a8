"""Whole systems in examples/, shortened: Llama-2-7B, GLM-4-9B and the models of PEFT's own documentation."""

import importlib
from pathlib import Path

import pytest
import torch

for package in ("peft", "transformers", "accelerate", "tqdm"):
    pytest.importorskip(package)

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("as_scripts")
ROOT = Path(__file__).parent.parent
NAMES = ["llama2_7b", "glm4", "peft_models"]


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--seed" in said and "--steps" in said


@pytest.mark.parametrize("name", [*NAMES, "lightning_mnist", "encoder"])
def test_the_gallery_shows_it(name):
    assert f"python examples/{name}.py" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_llama2_7b(capsys):
    said = importlib.import_module("llama2_7b").main(["--small", "--steps", "3", "--length", "256", "--lr", "1e-2"])
    assert said["counts"] == (4_194_304, 6_742_609_920)
    assert not said["keys"].unexpected_keys
    assert {key.rsplit(".", 1)[1] for key in said["keys"].missing_keys} == {"lora_A", "lora_B"}
    assert list(said["table"]) == ["q,v, r=8", "q,v, r=64", "all, r=8", "all, r=64"]
    for kinds in said["table"].values():
        assert list(kinds) == ["lora_fast", "PEFT, patched", "PEFT"]
        counts, speeds, peaks, losses = zip(*kinds.values(), strict=True)
        assert len(set(counts)) == 1 and min(speeds) > 0 and peaks[0] < 1.05 * min(peaks)
        assert losses == pytest.approx([losses[0]] * 3, rel=0.02 if GPU else 1e-4)
    peaks = [kinds["lora_fast"][2] for kinds in said["table"].values()]
    assert peaks[0] < peaks[1] < peaks[3] and peaks[0] < peaks[2] < peaks[3]
    straight, resumed = said["resume"]
    assert len(straight) == 3 and straight[0] != straight[1]
    assert resumed == (pytest.approx(straight, rel=0.01) if GPU else straight)
    assert "quantised weight (torch.uint8)" in said["refusal"]
    assert Path("adapter/adapter_model.safetensors").stat().st_size < 100_000  # the adapter alone
    assert "4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in capsys.readouterr().out


def test_packed_documents_do_not_see_each_other():
    """The last document of a packed row gives the logits that it gives alone, and guesses none of its first tokens."""
    llama = importlib.import_module("llama2_7b")
    row = next(r for r in llama.packed(256) if 2 <= (r["position_ids"] == 0).sum() and r["position_ids"][0, -1] > 20)
    start = 256 - 1 - int(row["position_ids"][0, -1])
    assert (row["labels"][row["position_ids"] == 0] == -100).all() and (row["labels"] != -100).sum() > 200
    model = llama.lora(llama.AutoModelForCausalLM.from_config(llama.SMALL).to(llama.DEVICE)).eval()
    with torch.no_grad():
        whole = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[:, start:]
        alone = model(input_ids=row["input_ids"][:, start:], use_cache=False).logits
        unparted = model(input_ids=row["input_ids"], use_cache=False).logits[:, start:]
    torch.testing.assert_close(whole, alone, rtol=0.01 if GPU else 1e-4, atol=0.01 if GPU else 1e-4)
    assert (unparted - alone).abs().max() > 0.1


def test_glm4(capsys):
    said = importlib.import_module("glm4").main(["--steps", "4", "--batch", "2"])
    assert said["fused"] == (21_176_320, 9_421_127_680)
    assert said["split"] == (23_797_760, 9_423_749_120)
    before, after = said["losses"]
    assert after < before - 0.5
    trained, reloaded = said["chat"]
    assert trained == reloaded != ""
    printed = capsys.readouterr().out
    assert "trainable%: 0.2248" in printed and "40 x 2 x 8 x 4096 = 2,621,440" in printed
    assert "{} fused, {} not fused".format(*(8, 0) if GPU else (0, 8)) in printed


def test_glm4_with_one_projection_is_the_same_model():
    glm4 = importlib.import_module("glm4")
    torch.manual_seed(0)
    split = glm4.glm(glm4.SMALL, fused=False).float()
    for layer in split.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    ids = torch.randint(259, (2, 12))
    expected = split(ids).logits
    for layer in split.model.layers:
        layer.self_attn = glm4.FusedAttention(layer.self_attn)
    assert not [name for name, _ in split.named_parameters() if "q_proj" in name]
    torch.testing.assert_close(split(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_peft_models(capsys):
    seen = importlib.import_module("peft_models").main(["--steps", "8", "--batch", "4", "--lr", "1e-2"])
    assert seen["tied"] == (2_359_296, 975_825_920)
    assert seen["untied"] == (2_359_296, 1_231_940_608)
    for name in ("T5", "OPT", "GPT-2", "BLOOM"):
        losses, said = seen[name]
        assert len(losses) == 8 and losses[-1] < losses[0] - 0.1, name
        assert name == "T5" or said.startswith("Return ")
    assert seen["loaded"] == seen["OPT"][1]
    report = seen["GPT-2 report"]
    assert report.fused == 0 and {layer.reason for layer in report.layers} == {
        "the base layer is a Conv1D, not an nn.Linear"
    }
    printed = capsys.readouterr().out
    assert "trainable%: 0.1915" in printed and "trainable%: 0.2418" in printed
    assert "250,112 x 1,024 = 256,114,688" in printed and "it says the same" in printed
    for layers in (12, 14, 2):  # T5, OPT, BLOOM
        assert "{} fused, {} not fused".format(*(layers, 0) if GPU else (0, layers)) in printed
