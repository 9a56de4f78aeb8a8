"""Refusals of adapters that say why and what to do; and that what they say to do works."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from tied import llama, outputs, perturbed

from lora_fast import load_adapter, save_adapter
from lora_fast.cli import main
from lora_fast.files.format import CONFIG

ROWS = 40  # of 32


def resized():
    model = llama(tie_word_embeddings=False)
    torch.manual_seed(1)
    model.resize_token_embeddings(ROWS)
    return model


def merged(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    return main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
    ],
    ids=["saved", "adapted", "DoRA"],
)
def test_a_resized_vocabulary(options, tmp_path, capsys):
    model = peft.get_peft_model(resized(), peft.LoraConfig(r=2, **options))
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"has shape .*was the vocabulary resized.*resize_token_embeddings"):
        load_adapter(llama(tie_word_embeddings=False), tmp_path / "adapter")
    assert merged(tmp_path, llama(tie_word_embeddings=False)) == 1
    assert "was the vocabulary resized" in capsys.readouterr().err
    torch.testing.assert_close(outputs(load_adapter(resized(), tmp_path / "adapter")), outputs(model))
    assert merged(tmp_path, resized()) == 0


def test_embeddings_that_peft_takes_along(tmp_path, capsys):
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(resized(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs(load_adapter(resized(), tmp_path / "adapter")), outputs(model))
    other = resized()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    with pytest.raises(ValueError, match=r"unexpected .*save_embedding_layers=False.*resized base is best"):
        load_adapter(other, tmp_path / "adapter")
    assert merged(tmp_path, resized()) == 1
    assert "a resized base is best saved by itself" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_starts_that_change_the_base(kind, rslora, tmp_path, capsys):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=kind,
        use_rslora=rslora,
        rank_pattern={} if rslora else {"v_proj": 3},
    )
    model = peft.get_peft_model(llama(), config)
    config.init_lora_weights = True  # as PEFT's documentation has it
    model.save_pretrained(tmp_path / "start")
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    right = outputs(model)
    config.init_lora_weights = kind
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"init_lora_weights: got '{kind}', .*path_initial_model_for_weight"):
        load_adapter(llama(), tmp_path / "adapter")
    assert merged(tmp_path, llama()) == 1 and "changes the base's weights too" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["r"] == 4
    found = load_adapter(llama(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), right, rtol=1e-4, atol=1e-5)
    save_adapter(found, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again")
    torch.testing.assert_close(outputs(again), right, rtol=1e-4, atol=1e-5)
    assert merged(tmp_path, llama()) == 0


def test_adapters_of_embeddings(tmp_path):
    """Which load_adapter takes, and lora-fast merge does not: to it every matrix is an nn.Linear's."""
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["0", "1"]))
    theirs.save_pretrained(tmp_path)
    skeleton = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"has lora_embedding_A.*load_adapter into the model and merge_lora") as error:
        load_adapter(skeleton, tmp_path)
    assert "transformers 5" not in str(error.value)
    ids = torch.arange(6)
    torch.testing.assert_close(load_adapter(model, tmp_path)(ids), theirs(ids))


def test_a_start_that_leaves_the_base(tmp_path):
    """MiCA's file is LoRA's: its lora_B, which stays as it starts, is in it."""
    try:
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="mica"))
    except (AttributeError, ValueError):
        pytest.skip("this PEFT has no such start")
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs(load_adapter(llama(), tmp_path / "adapter")), outputs(model))
    assert merged(tmp_path, llama()) == 0
