"""Own layers under transformers' Trainer: checkpoints without the base, resumed from, and the best one loaded."""

import copy
import math

import pytest
import torch
from torch import nn

from lora_fast import (
    LoRAConfig,
    add_lora,
    checkpoint_adapters_only,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    remove_lora,
    set_adapter,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, initializer_range=0.1, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


def own():
    config = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", modules_to_save=["norm"])
    model = add_lora(base(), config)
    checkpoint_adapters_only(model)
    return model


def trainer(model, path, **kwargs):
    ids = torch.arange(1, 13)
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", **kwargs}
    args = transformers.TrainingArguments(
        output_dir=str(path),
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        seed=3,
        **settings,
    )
    rows = [{"input_ids": ids + i, "labels": ids + i} for i in range(8)]
    return transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows[:2])


def same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.medium
def test_checkpoints_hold_the_adapter_alone(tmp_path):
    """Resumed from the middle, a run ends at the bits of one that went through."""
    model = own()
    trainer(model, tmp_path / "a").train()
    for step in (2, 4):
        folder = tmp_path / "a" / f"checkpoint-{step}"
        files = {path.name for path in folder.iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
        } <= files and "config.json" not in files
        assert load_file(folder / "model.safetensors").keys() == lora_state_dict(model).keys()
    again = own()
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    same(lora_state_dict(again), lora_state_dict(model))
    ids = torch.arange(1, 9)[None]
    loaded = load_adapter(base(), tmp_path / "a" / "checkpoint-4").eval()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    same(remove_lora(model).model.layers.state_dict(), base().model.layers.state_dict())


@pytest.mark.medium
def test_the_best_one_is_loaded(tmp_path):
    """Of a run that was better in between than at its end, as its metric has it."""
    model = own()
    kinds = {"load_best_model_at_end": True, "metric_for_best_model": "worse", "greater_is_better": True}
    best = trainer(model, tmp_path, **kinds)
    scores = iter([1.0, 0.5])
    evaluate = best.evaluate

    def worse(*args, **kwargs):
        metrics = evaluate(*args, **kwargs) | {"eval_worse": next(scores)}
        return metrics

    best.evaluate = worse
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    same(lora_state_dict(model), load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert any(
        not math.isclose(a.norm().item(), b.norm().item())
        for a, b in zip(
            lora_state_dict(model).values(),
            load_file(tmp_path / "checkpoint-4" / "model.safetensors").values(),
            strict=True,
        )
    )


def test_save_pretrained_of_copies_and_refusals(tmp_path):
    model = own()
    nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    other = copy.deepcopy(model)
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.lora_B)
    other.save_pretrained(tmp_path / "copy")
    same(load_file(tmp_path / "copy" / "model.safetensors"), lora_state_dict(other))
    with pytest.raises(ValueError, match="no LoRA layers"):
        checkpoint_adapters_only(base())
    with pytest.raises(TypeError, match="expected a transformers model"):
        checkpoint_adapters_only(add_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(target_modules=["0"])))


@pytest.mark.parametrize("active", ["default", "b"])
def test_all_adapters_with_names_come_back(tmp_path, active):
    """In what Trainer resumes from; PEFT's files are the active one's."""

    def several():
        model = add_lora(base(), LoRAConfig(r=4, target_modules="all-linear"))
        return add_lora(model, LoRAConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True), name="b")

    model, again = several(), several()
    for p in lora_parameters(model):
        nn.init.normal_(p)
    set_adapter(model, active)
    checkpoint_adapters_only(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {key for key in model.state_dict() if "lora_" in key}
    assert again.load_state_dict(saved, strict=False).unexpected_keys == []
    for name in ("default", "b"):
        same(lora_state_dict(again, name), lora_state_dict(model, name))
    same(lora_state_dict(load_adapter(base(), tmp_path)), lora_state_dict(model, active))
