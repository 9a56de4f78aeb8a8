"""Adapters of models that transformers 5 names otherwise in memory than on disk."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping", reason="this transformers renames nothing")
import peft
import transformers
from safetensors.torch import load_file, save_file
from tied import perturbed

from lora_fast import load_adapter
from lora_fast.cli import main
from lora_fast.files.format import CONFIG, PREFIX, TENSORS


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def qwen2_vl():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": rope,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


# {part of a name in memory: the same on disk}
VIT = {
    "vit.layers": "vit.encoder.layer",
    "attention.q_proj": "attention.attention.query",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QWEN = {"model.language_model": "model", "model.visual": "visual"}
CASES = {
    "ViT": (vit, ["q_proj", "o_proj", "fc1", "fc2"], VIT, ["classifier"]),
    "Qwen2-VL": (qwen2_vl, ["q_proj", "down_proj", "qkv", "fc1"], QWEN, None),
}


def adapter_of(build, targets, full, folder, **options):
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=full, bias="lora_only", **options)
    model = peft.get_peft_model(build(), config)
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)
    return model


def named_as_on_disk(folder, names):
    """The adapter as transformers 4 would have saved it."""
    tensors = load_file(folder / TENSORS)
    for new, old in names.items():
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("case", CASES)
def test_merged_by_the_names_in_memory(case, dora, tmp_path, capsys):
    build, targets, _, full = CASES[case]
    build().save_pretrained(tmp_path / "base")
    model = adapter_of(build, targets, full, tmp_path / "adapter", use_dora=dora)
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    found, right = build().from_pretrained(tmp_path / "out"), model.merge_and_unload()
    for name, tensor in right.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), tensor, rtol=1e-5, atol=1e-6)


def test_a_base_in_the_hubs_cache(tmp_path):
    """Its files are links into blobs, where no config.json lies beside the shards."""
    build, targets, _, full = next(iter(CASES.values()))
    build().save_pretrained(tmp_path / "base")
    adapter_of(build, targets, full, tmp_path / "adapter")
    (blobs := tmp_path / "repo/blobs").mkdir(parents=True)
    (snapshot := tmp_path / "repo/snapshots/1234").mkdir(parents=True)
    for i, path in enumerate((tmp_path / "base").iterdir()):
        path.rename(blobs / f"h{i}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"h{i}")
    assert main(["merge", str(snapshot), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("case", CASES)
def test_a_file_with_names_on_disk(case, tmp_path):
    """As transformers 4 saved it: into the checkpoint, and into transformers 5's model."""
    build, targets, names, full = CASES[case]
    model = adapter_of(build, targets, full, tmp_path / "adapter", alpha_pattern={targets[0]: 5})
    right = load_adapter(build(), tmp_path / "adapter")
    named_as_on_disk(tmp_path / "adapter", names)
    path = tmp_path / "adapter" / CONFIG
    last = names.get(f"attention.{targets[0]}", targets[0]).rpartition(".")[2]
    path.write_text(path.read_text().replace(f'"{targets[0]}": 5', f'"{last}": 5'))
    found = load_adapter(build(), tmp_path / "adapter")
    assert {n: m.lora_alpha for n, m in found.named_modules() if hasattr(m, "lora_alpha")} == {
        n: m.lora_alpha for n, m in right.named_modules() if hasattr(m, "lora_alpha")
    }
    assert all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in found.state_dict().items())
    load_adapter(found, tmp_path / "adapter")  # into one that is converted
    assert all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in found.state_dict().items())
    build().save_pretrained(tmp_path / "base")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    merged = build().from_pretrained(tmp_path / "out")
    for name, tensor in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), tensor, rtol=1e-5, atol=1e-6)


def test_without_transformers_the_refusal_says_why(tmp_path, capsys, monkeypatch):
    vit().save_pretrained(tmp_path / "base")
    adapter_of(vit, ["q_proj"], None, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 1
    error = capsys.readouterr().err
    assert (
        "vit.layers.0.attention.q_proj" in error
        and "lora-fast merge the other way where transformers is installed" in error
    )
    assert not (tmp_path / "out").exists()


def test_what_is_fused_is_refused(tmp_path, capsys):
    """An adapter of an expert, which transformers 5 fuses."""
    mixtral().save_pretrained(tmp_path / "base")
    adapter_of(mixtral, ["q_proj"], None, tmp_path / "adapter")
    tensors, expert = load_file(tmp_path / "adapter" / TENSORS), f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1"
    more = {f"{expert}.lora_A.weight": torch.ones(2, 16), f"{expert}.lora_B.weight": torch.ones(24, 2)}
    save_file({**tensors, **more}, tmp_path / "adapter" / TENSORS)
    with pytest.raises(ValueError, match="no such module; .*not so what transformers fuses"):
        load_adapter(mixtral(), tmp_path / "adapter")
    # The files have it as it was trained.
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    old, new = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("base", "out"))
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    torch.testing.assert_close(new[key], old[key] + 4 * 2.0)
