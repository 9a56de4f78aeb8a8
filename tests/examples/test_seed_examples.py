"""Whole systems in examples/, shortened: Llama-2-7B, GLM-4-9B and the models of PEFT's own documentation."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkout import ROOT
from pairs import as_torchrun
from torch import nn

for package in ("peft", "transformers", "accelerate", "tqdm"):
    pytest.importorskip(package)

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("as_scripts")
NAMES = ["llama2_7b", "llama3_70b", "experts", "glm4", "peft_models"]


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--seed" in said and "--steps" in said


@pytest.mark.parametrize("name", [*NAMES, "in_blocks", "lightning_mnist", "encoder"])
def test_the_gallery_shows_it(name):
    assert f"python examples/{name}.py" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


@pytest.mark.medium
def test_blocks(capsys):
    found = importlib.import_module("in_blocks").main(["--only", "GPT2", "ViT", "--rank", "4"])
    assert [(len(report.blocks), len(report.groups)) for report in found.values()] == [(12, 0), (12, 12)]
    printed = capsys.readouterr().out
    assert "24 of 48 layers in 12 blocks, 0 in 0 groups" in printed and "fc1, fc2 in one step (gelu)" in printed


@pytest.mark.medium
def test_llama3_70b(capsys):
    found = importlib.import_module("llama3_70b").main(["--small", "--steps", "1"])
    printed = capsys.readouterr().out
    assert printed.count(" s a step, ") == len(found) >= 2 and "2 layers of 64" in printed
    first = [loss for _, _, loss in found.values()]
    exact = [loss for name, loss in zip(found, first, strict=True) if "8-bit" not in name]
    assert max(exact) - min(exact) < 2e-3 and max(first) - min(first) < 2e-2


@pytest.mark.medium
def test_experts(capsys):
    """The losses of every step are stock PEFT's: on a CPU to rounding in float32, on a GPU no farther from a float32
    run than stock's in bfloat16, or nearly."""
    experts = pytest.importorskip("experts", exc_type=ImportError)  # of transformers 5 and PEFT 0.17
    found = experts.main(["--steps", "3", "--batch", "2", "--length", "32"])
    assert list(found) == ["Qwen3-MoE", "gpt-oss"]
    printed = capsys.readouterr().out
    for results in found.values():
        ours, stock, *exact = results
        assert experts.table(results, experts.HEADER) in printed and len(exact) == GPU
        assert ours.parameters == stock.parameters == 2 * (8 * 8 * (64 + 64 + 32 + 64) + 8 * (128 + 96 + 96 + 128))
        assert len(ours.losses) == len(stock.losses) == 3 and ours.losses[-1] < ours.losses[0]
        assert ours.off <= (2 * stock.off + 0.02 if exact else 1e-4)
    assert f"{12 if GPU else 0} fused" in printed


@pytest.mark.medium
def test_experts_in_four_bits(capsys):
    experts = pytest.importorskip("experts", exc_type=ImportError)
    found = experts.main(["--steps", "2", "--batch", "1", "--length", "16", "--no-stock", "--experts", "nf4"])
    assert "lora_fast, experts in nf4, r=8" in capsys.readouterr().out
    for packed, plain in found.values():
        assert 0 < packed.off < 0.2 and packed.parameters == plain.parameters


def test_parts_of_experts():
    experts = pytest.importorskip("experts", exc_type=ImportError)
    config = experts.SIZES["30b"]["Qwen3-30B-A3B"]
    with torch.device("meta"):
        model = experts.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 30_532_122_624  # as the checkpoint's
    args = experts.parse(["--size", "30b"])
    assert (args.batch, args.length, args.checkpointing) == (1, 4096, True)
    short = experts.Result("stock PEFT", 7, [], 0.0, 0.0, 4096, 0.0)
    assert "out of memory" in experts.table([short], experts.HEADER)


@pytest.mark.slow
def test_llama2_7b(capsys):
    argv = ["--small", "--steps", "2", "--length", "64", "--lr", "1e-2", "--csv", "new/folder"]
    said = importlib.import_module("llama2_7b").main(argv)
    assert said["counts"] == (4_194_304, 6_742_609_920)
    assert not said["keys"].unexpected_keys
    assert {key.rsplit(".", 1)[1] for key in said["keys"].missing_keys} == {"lora_A", "lora_B"}
    assert list(said["table"]) == [("q,v", 8), ("q,v", 64), ("all", 8), ("all", 64)]
    for (targets, _), kinds in said["table"].items():
        assert list(kinds) == ["lora_fast", "PEFT, patched", "PEFT"]
        counts, layers, speeds, peaks, losses = zip(*kinds.values(), strict=True)
        n = 4 if targets == "q,v" else 14
        assert layers == (*[f"{n if GPU else 0} of {n}"] * 2, f"0 of {n}")
        assert len(set(counts)) == 1 and min(speeds) > 0 and peaks[0] < 1.05 * min(peaks)
        assert losses == pytest.approx([losses[0]] * 3, rel=0.02 if GPU else 1e-4)
    peaks = [kinds["lora_fast"].peak for kinds in said["table"].values()]
    assert peaks[0] < peaks[1] < peaks[3] and peaks[0] < peaks[2] < peaks[3]
    straight, resumed = said["resume"]
    assert len(straight) == 2 and straight[0] != straight[1]
    assert resumed == (pytest.approx(straight, rel=0.01) if GPU else straight)
    assert "quantised weight (torch.uint8)" in said["refusal"]
    assert Path("adapter/adapter_model.safetensors").stat().st_size < 100_000  # the adapter alone
    printed = capsys.readouterr().out
    assert "4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in printed
    with open("new/folder/llama2_7b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(kind, row) for kinds in said["table"].values() for kind, row in kinds.items()]
    assert len(rows) == len(found) == 12
    for line, (kind, row) in zip(rows, found, strict=True):
        assert (line["impl"], line["fused"], int(line["trainable"])) == (kind, row.fused, row.trainable)
        assert float(line["tokens_per_s"]) == pytest.approx(row.tokens_per_s, abs=0.1)
        assert float(line["peak_mib"]) == pytest.approx(row.peak / 2**20, abs=0.1)
        assert line["length"] == "64" and f"{kind:16}{row}" in printed


class FourBits(nn.Linear):
    """Stands for a library's: two weights a byte, which its forward unpacks."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        self.size = linear.weight.abs().max() / 7
        q = (linear.weight / self.size).round().to(torch.int8) + 8
        self.weight = nn.Parameter((q[:, ::2] * 16 + q[:, 1::2]).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        q = torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1)
        return F.linear(x, ((q.to(x.dtype) - 8) * self.size).to(x.dtype))


@pytest.mark.medium
def test_llama2_7b_over_four_bits(monkeypatch, capsys):
    """What a library quantised runs, as stock PEFT's, and is told; one that fails ends nothing else, but is told."""
    import four_bits

    llama = importlib.import_module("llama2_7b")
    monkeypatch.setattr(four_bits, "LIBRARIES", {"good": FourBits, "bad": lambda linear: 1 / 0, "absent": FourBits})
    monkeypatch.setattr(four_bits, "missing", lambda library: library == "absent")
    monkeypatch.setattr(llama, "TARGETS", {"q,v": llama.TARGETS["q,v"], "none": ["no_such_layer"]})
    with pytest.raises(SystemExit) as stop:
        llama.main(["--small", "--steps", "1", "--length", "32"])
    printed = capsys.readouterr().out
    what = "0 fused, 14 stock PEFT's (the base layer is a FourBits, not an nn.Linear itself): "
    assert f"over one of good: {what}" in printed and " tokens/s, peak " in printed
    assert "over one of bad: failed" in printed and "over one of absent: not installed" in printed
    assert printed.count("q,v, r=") == 6 and "none, r=" not in printed and "1 steps resumed" in printed
    failed = str(stop.value).splitlines()
    assert [line.partition(":")[0] for line in failed[1:]] == ["none, r=8", "none, r=64", "bad"]
    assert failed[-1] == "bad: ZeroDivisionError: division by zero"


def test_llama2_7b_with_checkpoints():
    """They change nothing but the memory."""
    llama = importlib.import_module("llama2_7b")
    torch.manual_seed(0)
    base, row = llama.AutoModelForCausalLM.from_config(llama.SMALL).to(llama.DEVICE), llama.packed(256)[0]
    gradients, forwards = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = llama.lora(base, checkpointing=checkpointing)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
        model(**row, use_cache=False).loss.backward()
        gradients.append([p.grad for p in llama.trainable(model)])
    assert len(forwards) == 3 and any(g.any() for g in gradients[0])
    torch.testing.assert_close(*gradients)


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


@pytest.mark.slow
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


@pytest.mark.medium
def test_peft_models(capsys):
    seen = importlib.import_module("peft_models").main(["--steps", "8", "--batch", "4", "--lr", "1e-2"])
    assert seen["tied"] == (2_359_296, 975_825_920)
    assert seen["untied"] == (2_359_296, 1_231_940_608)
    for name in ("T5", "OPT", "GPT-2", "BLOOM"):
        losses, said = seen[name]
        assert len(losses) == 8 and losses[-1] < losses[0] - 0.1, name
        assert name == "T5" or said.startswith("Return ")
    assert seen["loaded"] == seen["OPT"][1]
    printed = capsys.readouterr().out
    assert "trainable%: 0.1915" in printed and "trainable%: 0.2418" in printed
    assert "250,112 x 1,024 = 256,114,688" in printed and "it says the same" in printed
    for layers in (12, 14, 2):  # T5, OPT, GPT-2 and BLOOM
        assert "{} fused, {} not fused".format(*(layers, 0) if GPU else (0, layers)) in printed
    assert seen["alike"] == (True, 1) and not torch.distributed.is_initialized()


@pytest.mark.slow
def test_bloom_in_two_processes(tmp_path):
    if GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, or none")
    said = as_torchrun(ROOT / "examples" / "peft_models.py", ["--steps", "2", "--batch", "4", "--only", "BLOOM"])
    assert said.count("BLOOM: loss ") == 1 and "DDP: 2; adapters the same in all" in said


def test_others_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        importlib.import_module("peft_models").main(["--steps", "2"])
    assert "only BLOOM trains in several processes" in capsys.readouterr().err


def test_gradients_are_exchanged_after_the_last_part(monkeypatch):
    """Accumulation under DDP: 15 of 16 backwards stay in the process."""
    models = importlib.import_module("peft_models")
    seen, no_sync = [], models.DistributedDataParallel.no_sync
    monkeypatch.setattr(models.DistributedDataParallel, "no_sync", lambda ddp: seen.append(1) or no_sync(ddp))
    said = models.main(["--steps", "2", "--batch", "2", "--only", "BLOOM"])
    assert list(said) == ["BLOOM", "alike"] and len(seen) == 2 * 15
