"""add_lora on the experts of transformers' models: PEFT's numbers, names, files and meaning."""

import copy
import json
import pickle
import re

import pytest
import torch
from expert_nets import BOTH, ids, loss_and_gradients, moe_model, moe_peft
from peft_nets import peft, same
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_fast import (
    LoRAConfig,
    add_lora,
    disable_lora,
    load_adapter,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    print_trainable_parameters,
    remove_lora,
    save_adapter,
    set_backend,
    unmerge_lora,
)

KINDS = ["qwen3_moe", "gpt_oss"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def plain():
    set_backend("reference")


def adapted(kind="qwen3_moe", experts=4, parameters=BOTH, **more):
    """Of ours, with adapters that do something."""
    model = add_lora(moe_model(kind, experts), LoRAConfig(r=3, lora_alpha=5, target_parameters=parameters, **more))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_files_mean_the_same_to_peft(tmp_path, kind, parameters):
    """Ours into PEFT and PEFT's into ours: keys, bytes, loss."""
    ours = adapted(kind, parameters=parameters)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(moe_model(kind), tmp_path / "ours")
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    same(load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "ours" / TENSORS), 0)
    again = load_adapter(moe_model(kind), tmp_path / "theirs")
    same(lora_state_dict(again), lora_state_dict(ours), 0)
    same(loss_and_gradients(again), loss_and_gradients(ours), 0)
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["target_parameters"] == sorted(parameters) and config["target_modules"] == []


@pytest.mark.parametrize(("experts", "r"), [(4, 16), (16, 4)])
def test_peft_adapters_with_patterns_and_linear_layers(tmp_path, experts, r):
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"layers.1.mlp.experts.gate_up_proj": 9}}
    stock = moe_peft("qwen3_moe", experts, r, target_modules=["q_proj"], **patterns)
    stock.save_pretrained(tmp_path / "stock")
    ours = load_adapter(moe_model("qwen3_moe", experts), tmp_path / "stock")
    torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    same(load_file(tmp_path / "ours" / TENSORS), load_file(tmp_path / "stock" / TENSORS), 0)
    theirs = peft.PeftModel.from_pretrained(moe_model("qwen3_moe", experts), tmp_path / "ours")
    torch.testing.assert_close(theirs(ids()).logits, stock(ids()).logits, rtol=0, atol=0)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(merge_lora(ours)(ids()).logits, merged(ids()).logits, rtol=1e-5, atol=1e-5)


def test_starts_as_the_base_and_trains_the_adapters_alone(capsys):
    base = moe_model()
    model = add_lora(moe_model(), LoRAConfig(r=2, target_parameters=BOTH, rank_pattern={"experts.down_proj": 5}))
    torch.testing.assert_close(model(ids()).logits, base(ids()).logits, rtol=1e-5, atol=1e-6)
    grown = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grown == set(lora_state_dict(model)) and len(grown) == 8
    shapes = {name.split("experts.")[1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "lora_gate_up_proj.lora_A": (4 * 2, 16),
        "lora_gate_up_proj.lora_B": (48, 2 * 4),
        "lora_down_proj.lora_A": (4 * 5, 24),
        "lora_down_proj.lora_B": (16, 5 * 4),
    }
    print_trainable_parameters(model)
    assert "experts" not in capsys.readouterr().out
    assert base.state_dict().keys() < model.state_dict().keys()  # parameters keep their names


def test_disabled_merged_and_removed():
    base, model = moe_model(), adapted()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    before = model(ids()).logits
    expected = base(ids()).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    with disable_lora(model):
        torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=0)
    merge_lora(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-4)
    with disable_lora(model):
        torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    for name, p in base.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    merged = merge_lora(copy.deepcopy(model), safe_merge=True)
    remove_lora(merged)
    torch.testing.assert_close(merged(ids()).logits, before, rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == base.state_dict().keys()


def test_state_dicts_copies_and_pickles():
    model = adapted("gpt_oss")
    expected = loss_and_gradients(model)
    other = add_lora(moe_model("gpt_oss"), LoRAConfig(r=3, lora_alpha=5, target_parameters=BOTH))
    load_lora_state_dict(other, lora_state_dict(model))
    same(loss_and_gradients(other), expected, 0)
    same(loss_and_gradients(copy.deepcopy(model)), expected, 0)
    experts = model.model.layers[1].mlp.experts
    again = pickle.loads(pickle.dumps(experts))
    assert type(again) is type(experts) and again.lora_down_proj.owner is again
    copied = copy.deepcopy(model).model.layers[0].mlp.experts
    assert copied.lora_down_proj.owner is copied and copied.lora_down_proj.weight is copied.down_proj
    in_double = loss_and_gradients(model.double())
    same({k: v.to(expected[k]) for k, v in in_double.items()}, expected, 1e-4)


def test_checkpointing_and_16_bits():
    model = adapted()
    expected = loss_and_gradients(model)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    same(loss_and_gradients(model), expected, 1e-6)
    half = add_lora(moe_model().bfloat16(), LoRAConfig(r=3, target_parameters=BOTH))
    assert {p.dtype for p in lora_parameters(half)} == {torch.float32}
    assert half(ids()).logits.dtype == torch.bfloat16


def test_experts_are_not_replaced_without_a_word():
    model = adapted()
    with pytest.raises(RuntimeError, match="drop its adapter"):
        model.model.layers[0].mlp.experts = nn.Linear(2, 2)


REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, ValueError, "lora_dropout: got 0.1, expected none with target_parameters"),
    "dora": ({"use_dora": True}, ValueError, "use_dora: got True, expected none with target_parameters"),
    "string": ({"target_parameters": "down_proj"}, TypeError, "target_parameters: got 'down_proj', expected a list"),
    "nothing": (
        {"target_parameters": ["up_proj_x"]},
        ValueError,
        "target_parameters: 'up_proj_x' matches no parameter",
    ),
    "linear": (
        {"target_parameters": ["q_proj.weight"]},
        ValueError,
        "q_proj.weight: it is an nn.Linear's, which target_modules names",
    ),
    "norm": ({"target_parameters": ["input_layernorm.weight"]}, ValueError, "is 1-dimensional, not a matrix"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    settings, error, match = REFUSED[what]
    model = moe_model()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        add_lora(model, LoRAConfig(**{"target_parameters": BOTH, **settings}))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_no_modules_beside_parameters():
    """As PEFT's users write it."""
    model = add_lora(moe_model(), LoRAConfig(target_modules=[], target_parameters=BOTH))
    assert len(lora_state_dict(model)) == 8
    with pytest.raises(ValueError, match="target_modules: got"):
        LoRAConfig(target_modules=[])


def test_unknown_experts_are_refused():
    with pytest.raises(ValueError, match="the activation of Qwen3MoeExperts is GELUActivation, not SiLU"):
        add_lora(moe_model(hidden_act="gelu"), LoRAConfig(target_parameters=BOTH))


def test_quantised_experts_are_refused_and_said_to_stay():
    """As transformers keeps those of fp8 checkpoints."""
    kind = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Experts
    model = moe_model()
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config, block_size=(8, 8))
    with pytest.raises(ValueError, match=r"experts.down_proj: it is quantised \(torch.float8_e4m3fn\)"):
        add_lora(model, LoRAConfig(target_parameters=BOTH))
    with pytest.warns(UserWarning, match=r"get no adapter and stay frozen: .*experts.down_proj \(2\)"):
        add_lora(model, LoRAConfig(target_modules="all-linear"))


def edited(folder, config=None, tensors=None):
    path = folder / CONFIG
    held = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps(held))
    found = load_file(folder / TENSORS)
    save_file(tensors(found) if tensors else found, folder / TENSORS)


BROKEN = {
    "rank": (dict(config={"r": 4}), r"has shape \[12, 16\], expected \[16, 16\]"),
    "columns of B": (
        dict(tensors=lambda t: {k: v[:, :9].contiguous() if "lora_B" in k else v for k, v in t.items()}),
        r"has shape \[\d+, 9\], expected \[\d+, 12\]",
    ),
    "one is missing": (
        dict(tensors=lambda t: {k: v for k, v in t.items() if "base_layer" not in k}),
        "has no adapter for 'model.layers.0.mlp.experts.gate_up_proj', which",
    ),
    "one is not named": (
        dict(config={"target_parameters": BOTH[:1]}),
        r"has an adapter for 'model.layers.\d.mlp.experts.base_layer', but the model has no such module",
    ),
    "none is named": (
        dict(config={"target_parameters": None}),
        r"has an adapter for 'model.layers.\d.mlp.experts\S*', but",
    ),
    "unknown": (dict(config={"target_parameters": ["q_proj.weight"]}), "names no parameter of experts or routers"),
    "no adapter of the router": (
        dict(config={"target_parameters": [*BOTH, "mlp.gate.weight"]}),
        "has no adapter for 'model.layers.0.mlp.gate.weight', which",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_do_not_fit_are_refused(tmp_path, what):
    change, match = BROKEN[what]
    save_adapter(adapted(), tmp_path)
    edited(tmp_path, **change)
    model = moe_model()
    with pytest.raises(ValueError, match=match):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name in model.state_dict())
    assert re.search("Qwen3MoeExperts", str(model))


def test_fsdp2_gathers_experts_for_their_forward(mesh):
    model = adapted()
    expected, state = loss_and_gradients(model), {name: t.clone() for name, t in lora_state_dict(model).items()}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = loss_and_gradients(model)
    same({name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in results.items()}, expected, 1e-6)
    same({name: t.full_tensor() for name, t in lora_state_dict(model).items()}, state, 0)
    with pytest.raises(ValueError, match="gate_up_proj: is sharded, offloaded or without data"):
        merge_lora(model)
    with pytest.raises(ValueError, match=r"has weights that a wrapper keeps: .*lora_gate_up_proj \(by FSDP\)"):
        remove_lora(model)
