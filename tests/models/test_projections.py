"""Fused experts and other projections that are no ``nn.Linear``: nobody is left to believe that they train."""

import warnings

import pytest
import torch
from torch import nn

from lora_fast import LoRAConfig, LoRALinear, add_lora, print_trainable_parameters
from lora_fast.models.projections import projections

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
EXPERTS = ["model.layers.*.mlp.experts.down_proj (2)", "model.layers.*.mlp.experts.gate_up_proj (2)"]
MODELS = {  # what add_lora(target_modules="all-linear") must name
    "Mixtral": [],
    "Qwen3Moe": [],
    "GptOss": [*EXPERTS, "model.layers.*.mlp.router.weight (2)"],
    "Llama": [],
}


def model_of(name):
    transformers = pytest.importorskip("transformers")
    config, kind = (getattr(transformers, f"{name}{what}", None) for what in ("Config", "ForCausalLM"))
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        return kind(config(**SIZES))


def heard(model, **config):
    """What add_lora warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        add_lora(model, LoRAConfig(r=2, **config))
    return [str(warning.message) for warning in said if "add_lora" in str(warning.message)]


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_names_what_it_does_not_reach(name, capsys):
    model = model_of(name)
    said = heard(model, target_modules="all-linear")
    assert all(
        isinstance(layer, LoRALinear)
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer is not model.lm_head
    )
    if not MODELS[name]:
        assert not said and not projections(model)
        return
    assert len(said) == 1 and "get no adapter and stay frozen" in said[0]
    assert sorted(said[0].partition("frozen: ")[2].split(", ")) == MODELS[name]
    trainable, total = print_trainable_parameters(model)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"trainable params: {trainable:,d} || all params: {total:,d}")
    assert second.startswith("without an adapter, for they are no nn.Linear's: ")
    assert all(pattern in second for pattern in MODELS[name])
    assert second.endswith(f": {sum(p.numel() for p in projections(model).values()):,d} params")


def test_other_targets_speak_of_what_they_name():
    assert not heard(model_of("Mixtral"), target_modules=["q_proj", "v_proj"])
    [said] = heard(model_of("Mixtral"), target_modules=r".*(q_proj|down_proj)")
    assert said.endswith("frozen: model.layers.*.mlp.experts.down_proj (2)")
    with pytest.raises(ValueError, match="'down_proj' matches nothing"):
        heard(model_of("Mixtral"), target_modules=["q_proj", "down_proj"])


def test_what_trains_in_full_is_not_named():
    assert not heard(model_of("Mixtral"), target_modules="all-linear", modules_to_save=["mlp"])


def test_nothing_left_to_convert_says_why():
    model = nn.Sequential(OwnProjection(), OwnProjection())
    with pytest.raises(ValueError, match=r"leaves no layer to convert \(.*no nn.Linear: \*\.weight \(2\)"):
        add_lora(model, LoRAConfig(r=2, target_modules="all-linear"))


class OwnProjection(nn.Module):
    """As routers are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class OwnConv(nn.Conv1d):
    """As of Mamba's, say."""


def test_torchs_own_modules_are_known():
    """Convolutions, norms, embeddings, recurrent layers; and what is there once the model has run."""
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 4, 3),
            "norm": nn.LayerNorm([4, 4]),
            "embed": nn.Embedding(4, 4),
            "lstm": nn.LSTM(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "positions": nn.ParameterList([torch.zeros(1, 4, 4)]),
            "lazy": nn.LazyLinear(4),
            "own conv": OwnConv(4, 4, 3),
        }
    )
    assert not projections(model)
