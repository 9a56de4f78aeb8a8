"""What save_adapter and `lora-fast convert` write as target_modules: to PEFT these layers and no other module."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import save_file

from lora_fast import LoRAConfig, LoRALinear, add_lora, load_adapter, save_adapter
from lora_fast.cli import main
from lora_fast.files.format import CONFIG


class Attention(nn.Module):
    """As in diffusers: the output projection and its dropout in a list."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        return x + self.to_out[1](self.to_out[0](torch.tanh(self.to_q(x))))


class Model(nn.Module):
    """Blocks called by numbers as layers are, and other kinds of modules called as linear layers are."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.ModuleDict({"tokens": nn.Embedding(5, 8), "proj": nn.Conv2d(1, 1, 1)})
        self.blocks = nn.ModuleList(Attention() for _ in range(blocks))
        self.proj = nn.Linear(8, 8)
        self.head = nn.ModuleDict({"tokens": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.norm = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))

    def forward(self, ids):
        x = self.embed["proj"](self.embed["tokens"](ids)[None])[0]
        for block in self.blocks:
            x = block(x)
        return self.norm(self.head["norm"](self.head["tokens"](self.proj(x))))


TARGETS = {
    "numbers": ["to_out.0"],
    "one number": ["blocks.1.to_out.0"],
    "a number and names": ["to_q", "norm.1"],
    "a convolution's name": r"proj|blocks\.\d+\.to_q",
    "an embedding's name": ["head.tokens"],
    "all": "all-linear",
}


@pytest.mark.medium
@pytest.mark.parametrize("blocks", [2, 24], ids=lambda n: f"{n} blocks")  # of 20 names or more PEFT cuts off the heads
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_adapts_these_layers_alone(targets, blocks, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, ids = Model(blocks), torch.arange(5)
    model = add_lora(copy.deepcopy(base), LoRAConfig(r=2, target_modules=targets))
    ours = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name in ours:
        nn.init.normal_(model.get_submodule(name).lora_B)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    inside = theirs.base_model.model
    assert {name for name, module in inside.named_modules() if hasattr(module, "lora_A")} == ours
    trained = {name.partition(".lora_")[0] for name, p in inside.named_parameters() if p.requires_grad}
    assert trained == ours
    torch.testing.assert_close(theirs(ids), model(ids))
    assert torch.equal(load_adapter(base, tmp_path)(ids), model(ids))


@pytest.mark.parametrize("to", ["peft", "torchtune"])
def test_convert_writes_full_names(to, tmp_path, capsys):
    """Last parts would be those of other modules, too: here of an nn.Embedding."""
    peft = pytest.importorskip("peft")
    names = ["layers.0.attn.v_proj", "layers.1.attn.v_proj", "output"]
    state = {
        f"{name}.lora_{part}.weight": torch.randn(shape)
        for name in names
        for part, shape in (("a", (2, 8)), ("b", (8, 2)))
    }
    save_file(state, tmp_path / "tune.safetensors")
    command = ["convert", str(tmp_path / "tune.safetensors"), str(tmp_path / "a"), "--to", "peft", "--alpha", "4"]
    assert main(command) == 0
    assert "Converted 3 LoRA layers (lm_head, v_proj)" in capsys.readouterr().out
    if to == "torchtune":
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "torchtune"]) == 0
    folder = tmp_path / ("a" if to == "peft" else "b")
    full = ["lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == full
    model = nn.Module()
    model.prepare_inputs_for_generation = None  # which PEFT asks a causal language model for
    model.lm_head, model.v_proj = nn.Linear(8, 8), nn.Embedding(2, 8)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(
        nn.ModuleDict({"self_attn": nn.ModuleDict({"v_proj": nn.Linear(8, 8)})}) for _ in range(2)
    )
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a").base_model.model
    assert [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")] == full


def test_layers_that_peft_takes_for_experts_are_named(tmp_path):
    """Dense ones beside fused experts: PEFT's conversion of transformers 4's adapters goes by their names."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    assert "gate_proj" in conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]

    def made():
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=24,
            num_experts=2,
            num_experts_per_tok=1,
            mlp_only_layers=[0],
        )
        return transformers.Qwen3MoeForCausalLM(config).eval()

    model = add_lora(made(), LoRAConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match=r"save_adapter: model.layers.0.mlp.gate_proj: .* fused experts"):
        save_adapter(model, tmp_path / "all")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(load_adapter(made(), tmp_path / "all")(ids).logits, model(ids).logits)
    attention = add_lora(made(), LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(attention, tmp_path / "attention")
    stock = peft.PeftModel.from_pretrained(made(), tmp_path / "attention")
    torch.testing.assert_close(stock(ids).logits, attention(ids).logits)
