"""The target "all-linear" where transformers 5 keeps experts and routers as parameters: PEFT's meaning and numbers."""

import copy
import importlib
import json
import pickle
import warnings

import pytest
import torch
from expert_nets import ids, loss_and_gradients, moe_model
from peft_nets import peft, same
from safetensors.torch import load_file
from torch import nn

from lora_fast import (
    LoRAConfig,
    add_lora,
    disable_lora,
    export_experts,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    set_backend,
    unmerge_lora,
)
from lora_fast.layers.parameters import ParameterLoRA

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
if not hasattr(conversion, "_resolve_string_target_modules"):
    pytest.skip("this PEFT's all-linear means nn.Linear layers alone", allow_module_level=True)


@pytest.fixture(autouse=True)
def plain():
    set_backend("reference")


def adapted(model=None, **more):
    """Of ours, with adapters that do something."""
    model = add_lora(model or moe_model(), LoRAConfig(r=3, lora_alpha=5, target_modules="all-linear", **more))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return model


def by_pefts_names(model):
    """{end of the name, as PEFT has it: shape} of what trains."""
    return {name.partition("base_model.model.")[2]: tuple(t.shape) for name, t in model.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_same_layers_ranks_files_and_numbers_as_pefts(tmp_path, rslora):
    settings = dict(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=rslora)
    stock = peft.get_peft_model(moe_model(), peft.LoraConfig(**settings))
    ours = adapted(use_rslora=rslora)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.get_peft_model_state_dict(stock)
    found = load_file(tmp_path / "ours" / TENSORS)
    assert by_pefts_names(found) == by_pefts_names(theirs)
    assert found["base_model.model.model.layers.1.mlp.gate.lora_A.weight"].shape == (3, 16)
    assert found["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"].shape == (4 * 6, 16)
    peft.set_peft_model_state_dict(stock, found)
    expected, results = loss_and_gradients(stock), loss_and_gradients(ours)
    torch.testing.assert_close(results["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    for name in ("lora_A", "lora_B"):
        own = results[f"model.layers.0.mlp.gate.lora_weight.{name}"]
        other = expected[f"base_model.model.model.layers.0.mlp.gate.{name}.default.weight"]
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)

    stock.save_pretrained(tmp_path / "theirs")
    same(load_file(tmp_path / "theirs" / TENSORS), found, 0)
    again = load_adapter(moe_model(), tmp_path / "theirs")
    same(lora_state_dict(again), lora_state_dict(ours), 0)
    same(loss_and_gradients(again), results, 0)
    read = peft.PeftModel.from_pretrained(moe_model(), tmp_path / "ours")
    torch.testing.assert_close(read(ids()).logits, ours(ids()).logits, rtol=1e-5, atol=3e-5)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(merge_lora(ours)(ids()).logits, merged(ids()).logits, rtol=1e-4, atol=1e-4)


def test_mixtral_too():
    """Whose router PEFT calls so as well."""
    name = "transformers.models.mixtral"
    config = importlib.import_module(f"{name}.configuration_mixtral").MixtralConfig
    kind = importlib.import_module(f"{name}.modeling_mixtral").MixtralForCausalLM
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    small = config(**sizes, num_key_value_heads=1, num_local_experts=4)
    stock = peft.get_peft_model(kind(small), peft.LoraConfig(r=2, target_modules="all-linear"))
    ours = add_lora(kind(small), LoRAConfig(r=2, target_modules="all-linear"))
    shapes = sorted(tuple(p.shape) for p in lora_parameters(ours))
    assert shapes == sorted(tuple(p.shape) for p in stock.parameters() if p.requires_grad)


def test_routers_merge_switch_off_and_go():
    base, model = moe_model(), adapted(exclude_modules=["experts"])
    routers = [m for m in model.modules() if isinstance(m, ParameterLoRA)]
    assert len(routers) == 2
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    before, expected = model(ids()).logits, base(ids()).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    with disable_lora(model):
        torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=0)
    assert "weight" not in vars(model.model.layers[0].mlp.gate)
    assert isinstance(model.model.layers[0].mlp.gate.weight, nn.Parameter)
    merge_lora(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-4)
    with disable_lora(model):
        torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(model)
    for name, p in base.named_parameters():
        if name in dict(model.named_parameters()):
            assert torch.equal(p, model.get_parameter(name)), name
    kept = remove_lora(merge_lora(copy.deepcopy(model)))
    torch.testing.assert_close(kept(ids()).logits, before, rtol=1e-4, atol=1e-4)
    remove_lora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_routers_are_copied_pickled_checkpointed_and_compiled():
    model = adapted(exclude_modules=["experts"])
    expected = loss_and_gradients(model)
    same(loss_and_gradients(copy.deepcopy(model)), expected, 0)
    router = model.model.layers[0].mlp.gate
    again = pickle.loads(pickle.dumps(router))
    assert type(again) is type(router) and again.lora_weight.owner is again
    x = torch.randn(5, 16)
    for own, other in zip(router(x), again(x), strict=True):
        assert torch.equal(own, other)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    for own, other in zip(router(x), compiled(x), strict=True):
        assert torch.equal(own, other)
    assert "weight" not in vars(router)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    same(loss_and_gradients(model), expected, 1e-6)


def test_16_bit_routers_sum_in_float32():
    router = adapted(moe_model().bfloat16()).model.layers[0].mlp.gate
    lora = router.lora_weight
    assert {lora.lora_A.dtype, lora.lora_B.dtype} == {torch.float32}
    exact = router.weight.double() + lora.scaling * lora.lora_B.double() @ lora.lora_A.double()
    seen = lora.effective_weight()
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen.double(), exact, rtol=2**-8, atol=0)


def test_patterns_come_before_the_ranks_that_it_has():
    model = adapted(rank_pattern={"gate_up_proj": 7}, alpha_pattern={"mlp.gate.weight": 2})
    layer = model.model.layers[0].mlp
    assert (layer.experts.lora_gate_up_proj.r, layer.experts.lora_gate_up_proj.lora_alpha) == (7, 10)
    assert (layer.experts.lora_down_proj.r, layer.gate.lora_weight.r, layer.gate.lora_weight.lora_alpha) == (3, 3, 2)


@pytest.mark.parametrize(("name", "value"), [("lora_dropout", 0.1), ("use_dora", True)])
def test_dropout_and_dora_are_refused_as_by_peft(name, value):
    settings = {"r": 2, "target_modules": "all-linear", name: value}
    with pytest.raises(ValueError, match=name):
        peft.get_peft_model(moe_model(), peft.LoraConfig(**settings))
    with pytest.raises(ValueError, match=rf"{name}: got {value}, expected none .*also means .*mlp.gate.weight \(2\)"):
        add_lora(moe_model(), LoRAConfig(**settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = add_lora(moe_model(), LoRAConfig(**settings, exclude_modules=["mlp.experts", "mlp.gate"]))
    assert not any(isinstance(m, ParameterLoRA) for m in model.modules())


def test_servers_read_the_router_as_a_linear_layer(tmp_path):
    """As it was in transformers 4, beside the experts one by one."""
    ours = adapted()
    export_experts(ours, tmp_path)
    found, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    assert {"gate", "gate_proj", "up_proj", "down_proj", "q_proj"} <= set(config["target_modules"])
    router = ours.model.layers[0].mlp.gate.lora_weight
    assert torch.equal(found["base_model.model.model.layers.0.mlp.gate.lora_B.weight"][:, :3], router.lora_B)
    assert found["base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_A.weight"].shape == (6, 16)
    assert config["r"] == 6 and config["rank_pattern"] == {}, "gate_up_proj has twice the rank, and all have it there"
    assert "target_parameters" not in config


def test_target_parameters_names_a_router_alone(tmp_path):
    """PEFT's files of one."""
    settings = dict(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    stock = peft.get_peft_model(moe_model(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for p in stock.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3)
    stock.save_pretrained(tmp_path)
    ours = load_adapter(moe_model(), tmp_path)
    assert len(lora_state_dict(ours)) == 4
    torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=1e-5, atol=1e-5)


def test_pefts_own_config_means_the_same_before_and_after_peft_has_read_it():
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    expected = {name: t.shape for name, t in lora_state_dict(adapted()).items()}
    assert {name: t.shape for name, t in lora_state_dict(add_lora(moe_model(), config)).items()} == expected
    peft.get_peft_model(moe_model(), config)
    assert "gate_up_proj" in config.target_parameters
    model = add_lora(moe_model(), config)
    assert {name: t.shape for name, t in lora_state_dict(model).items()} == expected
    assert {m.scaling for m in model.modules() if isinstance(m, ParameterLoRA)} == {5 / 3}
