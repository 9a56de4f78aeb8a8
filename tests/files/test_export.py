"""export_experts: each expert's matrices apart, by the names that servers and transformers 4 have."""

import json

import pytest
import torch
from expert_nets import BOTH, ids, moe_model, peft, transformers
from safetensors.torch import load_file

from lora_fast import LoRAConfig, add_lora, export_experts, load_adapter, lora_parameters, save_adapter, set_backend
from lora_fast.files.format import CONFIG, TENSORS


@pytest.fixture(autouse=True)
def plain():
    set_backend("reference")


def mixtral():
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        intermediate_size=24,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(settings).eval()


MODELS = {"qwen3_moe": moe_model, "mixtral": mixtral, "gpt_oss": lambda: moe_model("gpt_oss")}
NAMES = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "gpt_oss": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


MORE: list[dict] = [
    {},
    {"target_parameters": BOTH[:1]},
    {"target_parameters": BOTH[1:]},
    {"rank_pattern": {"down_proj": 2}},
    {"rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 2}},
    {"use_rslora": True},
    {"alpha_pattern": {"down_proj": 7}},
]


def adapted(kind, **more):
    model = add_lora(MODELS[kind](), LoRAConfig(**{"r": 3, "lora_alpha": 5, "target_parameters": BOTH, **more}))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return model


def read(folder):
    return load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("more", MORE, ids=str)
def test_every_expert_has_its_own(tmp_path, kind, more):
    """Keys, ranks, and the products of what is in them: those of the model."""
    model = adapted(kind, **more)
    export_experts(model, tmp_path)
    tensors, config = read(tmp_path)
    place, gate, up, down = NAMES[kind]
    targets = {"gate_up_proj": {gate, up}, "down_proj": {down}}
    own = [name for entry in more.get("target_parameters", BOTH) for name in targets[entry.rpartition(".")[2]]]
    assert config["target_modules"] == sorted(own) and "target_parameters" not in config
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == 3
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for at, layer in enumerate(model.model.layers):
        for lora in layer.mlp.experts.adapters():
            a, b, s = lora.adapter
            delta = s * torch.einsum("ore,eri->eoi", b.reshape(len(b), lora.r, 4), a.reshape(4, lora.r, -1))
            for i, expected in enumerate(delta):
                prefix = f"base_model.model.model.layers.{at}.{place}.{i}."
                parts = [(down, expected)]
                if lora.parameter == "gate_up_proj":
                    halves = (expected[::2], expected[1::2]) if kind == "gpt_oss" else expected.chunk(2)
                    parts = list(zip((gate, up), halves, strict=True))
                for name, part in parts:
                    own = [tensors.pop(f"{prefix}{name}.lora_{x}.weight") for x in "AB"]
                    assert own[0].shape[0] == own[1].shape[1] == 3
                    torch.testing.assert_close(scaling * own[1] @ own[0], part)
    assert not tensors


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_peft_reads_it_as_an_adapter_of_transformers_4(tmp_path, kind):
    """Which it fuses again, with twice the rank for gate and up."""
    model = adapted(kind, target_modules=["q_proj"])
    export_experts(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path)
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "fused")
    fused = load_adapter(MODELS[kind](), tmp_path / "fused")
    assert {lora.r for lora in fused.model.layers[0].mlp.experts.adapters()} == {3, 6}
    torch.testing.assert_close(fused(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_other_layers_stay_as_they_are(tmp_path):
    model = adapted("qwen3_moe", target_modules=["q_proj", "v_proj"], bias="lora_only")
    save_adapter(model, tmp_path / "saved")
    export_experts(model, tmp_path / "exported")
    (saved, _), (exported, config) = read(tmp_path / "saved"), read(tmp_path / "exported")
    others = {key for key in saved if "experts" not in key}
    assert others == {key for key in exported if "experts" not in key} and others
    assert all(torch.equal(saved[key], exported[key]) for key in others)
    assert {"q_proj", "v_proj", "gate_proj"} < set(config["target_modules"])


def test_one_rank_and_scaling_is_all_that_a_server_reads(tmp_path):
    """Of linear layers, too: servers do not read patterns."""
    more = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 9}, "target_modules": ["q_proj", "v_proj"]}
    model = adapted("qwen3_moe", **more)
    export_experts(model, tmp_path)
    tensors, config = read(tmp_path)
    assert config["r"] == 6 and not config["rank_pattern"] and not config["alpha_pattern"]
    scaling = config["lora_alpha"] / config["r"]
    for name in ("q_proj", "v_proj"):
        a, b = (tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_{x}.weight"] for x in "AB")
        assert a.shape[0] == b.shape[1] == 6
        expected = model.model.layers[0].self_attn.get_submodule(name).delta_weight()
        torch.testing.assert_close(scaling * b @ a, expected)
    theirs = peft.PeftModel.from_pretrained(moe_model(), tmp_path)
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_scaling_of_zero_beside_another(tmp_path):
    zero = {"lora_alpha": 0, "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "v_proj"]}
    model = adapted("qwen3_moe", **zero)
    export_experts(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe_model(), tmp_path)
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_model_without_adapters_of_experts(tmp_path):
    model = add_lora(moe_model(), LoRAConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model: has no adapters of experts; save_adapter writes the others"):
        export_experts(model, tmp_path)
    assert not list(tmp_path.iterdir())
