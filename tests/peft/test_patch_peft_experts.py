"""patch_peft on the experts of transformers' models: the numbers of stock PEFT, what is fused, and why the rest not."""

import copy
import pickle
import warnings

import pytest
import torch
from expert_nets import BOTH, eagerly, ids, loss_and_gradients, moe_model, moe_peft
from peft_nets import peft, same, stir
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook

from lora_fast import SlowPathWarning, patch_peft, peft_report, set_backend, unpatch_peft
from lora_fast.peft.experts import FastExperts

KINDS = ["qwen3_moe", "gpt_oss"]


def patched(stock, layers=2):
    """A copy whose experts run ours, in plain torch on the CPU."""
    ours = copy.deepcopy(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_peft(ours)
    found = [module for module in ours.modules() if isinstance(module, FastExperts)]
    assert len(found) == layers
    return ours


@pytest.fixture(autouse=True)
def plain():
    """Plain torch, without a word; a stock call then speaks."""
    set_backend("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_numbers_are_stocks(kind, parameters):
    stock = moe_peft(kind, parameters=parameters)
    ours = patched(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    if len(parameters) == 1:
        assert not any("experts.base_layer.lora" in key for key in stock.state_dict())
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_stocks_on_every_path(path, kind):
    backend, device = path
    stock = eagerly(moe_peft(kind)).to(device)
    ours = patched(stock)
    set_backend(backend)
    assert peft_report(ours).fused == (4 if backend == "triton" else 0)
    same(loss_and_gradients(ours, ids(1, 5)), loss_and_gradients(stock, ids(1, 5)), 1e-5)


def exact_and_16_bit(kind, experts=4, r=3, sizes=()):
    """A float32 model of one layer, so that no rounding reroutes a token, and the same in bfloat16 with float32
    adapters."""
    sizes = {"num_hidden_layers": 1, "layer_types": ["full_attention"]} | dict(sizes)
    exact = eagerly(moe_peft(kind, experts, r, sizes=sizes))
    stock = copy.deepcopy(exact)
    for name, p in stock.named_parameters():
        p.data = (p.data if "lora_" in name else p.data.bfloat16()).clone()
    for (name, p), q in zip(exact.named_parameters(), stock.parameters(), strict=True):
        assert (q.dtype == torch.float32) == ("lora_" in name)
        p.data = q.data.float()
    return exact, stock


def as_near(ours, stock, exact, tokens=None):
    """Ours is no farther from float32 than stock PEFT is: its norm of each gradient's error."""
    truth, theirs, results = (loss_and_gradients(model, tokens) for model in (exact, stock, ours))
    assert results.keys() == truth.keys()
    far = {name: [((r[name] - t).norm() / t.norm()).item() for r in (results, theirs)] for name, t in truth.items()}
    assert all(own <= 1.2 * other + 2e-3 for own, other in far.values()), far


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_16_bit_model_on_a_gpu(kind, checkpointing):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 500}
    sizes["intermediate_size" if kind == "gpt_oss" else "moe_intermediate_size"] = 192
    exact, stock = exact_and_16_bit(kind, 16, 16, sizes)
    exact, stock = exact.cuda(), stock.cuda()
    set_backend("auto")
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    assert peft_report(ours).not_fused == 0
    if checkpointing:
        ours.train().enable_input_require_grads()
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(0))
    as_near(ours, stock, exact, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "r"), [(4, 16), (16, 4)])
def test_ranks_and_experts_are_not_mixed_up(kind, experts, r):
    """PEFT's lora_B has the experts fastest: beside the weights that PEFT merges."""
    stock = moe_peft(kind, experts, r)
    ours = patched(stock)
    results = loss_and_gradients(ours)
    same(results, loss_and_gradients(stock), 2e-6)
    merged = copy.deepcopy(stock).merge_and_unload()
    torch.testing.assert_close(ours(ids()).logits, merged(ids()).logits, rtol=1e-5, atol=1e-5)


def test_the_report_names_parameters():
    ours = moe_peft(target_modules=["q_proj"])
    report = str(peft_report(ours))
    assert "experts.gate_up_proj" in report and "not patched" in report and "base_layer" not in report
    report = str(patch_peft(ours))
    assert "base_model.model.model.layers.*.mlp.experts.gate_up_proj  2      not fused\n" in report
    assert "base_model.model.model.layers.*.mlp.experts.down_proj     2      not fused\n" in report
    assert report.count("set_backend") == 1 and "\nnot fused: set_backend" in report
    assert len(peft_report(ours).layers) == 6
    with ours.disable_adapter():
        assert "not fused: nothing to fuse: adapters are disabled" in str(peft_report(ours))


def test_disabled_merged_and_unmerged():
    stock = moe_peft()
    ours = patched(stock)
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=0, atol=0)
    before = ours(ids()).logits
    for model in (ours, stock):
        model.merge_adapter()
    torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=0, atol=0)
    torch.testing.assert_close(ours(ids()).logits, before, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(ids()).logits, before, rtol=1e-5, atol=1e-5)
    stock.unmerge_adapter()
    same(ours.merge_and_unload().state_dict(), stock.merge_and_unload().state_dict(), 0)


def test_files_are_stocks_both_ways(tmp_path):
    stock = moe_peft()
    ours = patched(stock)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "stock")]
    assert files[0] == files[1]
    read = patched(peft.PeftModel.from_pretrained(moe_model(), tmp_path / "ours", is_trainable=True))
    same(loss_and_gradients(read), loss_and_gradients(ours), 0)


def test_adapters_that_come_later_follow():
    stock = moe_peft()
    ours = patched(stock)
    for model in (stock, ours):
        model.add_adapter("more", peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=BOTH))
        stir(model, 7)
        model.set_adapter("more")
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "more"])
    with pytest.warns(SlowPathWarning, match="experts.down_proj and experts.gate_up_proj to .*: several active"):
        same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)


def test_first_adapter_of_experts_comes_later():
    stock = peft.get_peft_model(moe_model(), peft.LoraConfig(target_modules=["q_proj"]))
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    for model in (stock, ours):
        model.add_adapter("experts", peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
        stir(model)
        model.set_adapter("experts")
    assert sum(isinstance(module, FastExperts) for module in ours.modules()) == 2
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)


def test_unpatched_copied_and_pickled():
    stock = moe_peft("gpt_oss")
    ours = patched(stock)
    again = pickle.loads(pickle.dumps(experts_of(ours)))  # of the rest not everything can be pickled
    assert type(again) is FastExperts
    ours.base_model.model.model.layers[1].mlp.experts = again
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)
    with pytest.raises(RuntimeError, match="drop its adapter"):
        ours.base_model.model.model.layers[1].mlp.experts = torch.nn.Linear(2, 2)
    unpatch_peft(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert all(vars(m).keys() == vars(n).keys() for m, n in zip(ours.modules(), stock.modules(), strict=True))


def test_generation():
    stock = moe_peft()
    ours = patched(stock)
    made = [m.generate(input_ids=ids(), max_new_tokens=5, do_sample=False) for m in (ours, stock)]
    assert torch.equal(*made)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    stock = moe_peft()
    for model in (ours := patched(stock), stock):
        model.train().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_adapters_on_a_16_bit_base(kind):
    exact, stock = exact_and_16_bit(kind)
    as_near(patched(stock, 1), stock, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    exact, _ = exact_and_16_bit(kind)
    ours = patched(exact, 1)
    truth = loss_and_gradients(exact)
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = loss_and_gradients(ours), loss_and_gradients(exact)
    for name, t in truth.items():
        assert (results[name] - t).norm() <= 1.2 * (expected[name] - t).norm() + 2e-3 * t.norm(), name


REASONS = {
    "hooks": (lambda m: base_of(m).register_forward_hook(lambda *_: None), "hooks or a replaced forward"),
    "hooks of an adapter": (
        lambda m: experts_of(m).lora_A["default"].register_forward_hook(lambda *_: None),
        "lora_A or lora_B has hooks",
    ),
    "expert parallelism": (lambda m: setattr(base_of(m), "_is_expert_parallel", True), "expert parallelism"),
    "training experts": (lambda m: base_of(m).down_proj.requires_grad_(True), "down_proj requires grad"),
}


def experts_of(model):
    return model.base_model.model.model.layers[1].mlp.experts


def base_of(model):
    return experts_of(model).get_base_layer()


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_out_of_the_ordinary_runs_stock_and_says_so(reason):
    change, match = REASONS[reason]
    stock = moe_peft()
    ours = patched(stock)
    for model in (ours, stock):
        change(model)
    with pytest.warns(SlowPathWarning, match=f"experts.down_proj and experts.gate_up_proj to stock PEFT: .*{match}"):
        results = loss_and_gradients(ours)
    same(results, loss_and_gradients(stock), 1e-6)
    said = {layer.reason for layer in peft_report(ours).layers if "layers.1." in layer.name}
    assert len(said) == 1 and match in said.pop()


def test_hooks_on_all_modules_run():
    """Those of the module of experts, too, which ours does not call."""
    stock = moe_peft()
    ours = patched(stock)

    def doubled(module, _, y):
        return 2 * y if "act_fn" in module._modules and hasattr(module, "num_experts") else None

    with register_module_forward_hook(doubled), pytest.warns(SlowPathWarning, match="hooks on all modules"):
        same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-6)


NEVER = {
    "gate": ("its own gate", "a gate of its own"),
    "activation": ("gelu", "the activation of Qwen3MoeExperts is GELUActivation, not SiLU"),
    "forward": ("its own forward", "has a forward of its own"),
}


@pytest.mark.parametrize("what", NEVER)
def test_unknown_experts_stay_stock_for_good(what):
    _, match = NEVER[what]
    model = moe_model(**({"hidden_act": "gelu"} if what == "activation" else {}))
    kind = type(model.model.layers[0].mlp.experts)
    own = {
        "gate": {"_apply_gate": lambda self, h: kind._apply_gate(self, h) * 2},
        "forward": {"forward": lambda self, *args: kind.forward(self, *args) * 2},
    }
    if what in own:
        for layer in model.model.layers:
            layer.mlp.experts.__class__ = type("OwnExperts", (kind,), own[what])
    stock = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=[], target_parameters=BOTH))
    stir(stock)
    before = loss_and_gradients(stock)
    report = patch_peft(stock)
    assert report.fused == 0 and all(match in layer.reason for layer in report.layers)
    same(loss_and_gradients(stock), before, 0)


def test_peft_refuses_dropout_and_dora_itself():
    for settings in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(ValueError, match="does not work with"):
            moe_peft(**settings)


def test_one_parameter_of_a_bias_stays_stock():
    stock = moe_peft("gpt_oss", parameters=["mlp.experts.gate_up_proj_bias"])
    report = patch_peft(copy.deepcopy(stock))
    assert not report.fused and "an adapter of gate_up_proj_bias" in report.layers[0].reason


def test_fsdp2_gathers_experts_for_their_forward(mesh):
    """The report says of shards what will run; adapters are sharded with their block."""
    stock = moe_peft()
    ours = patched(stock)
    for layer in ours.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    assert {layer.reason for layer in peft_report(ours).layers} == {'set_backend("reference") is on'}
    results = loss_and_gradients(ours)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in results.items()}
    same(whole, loss_and_gradients(stock), 1e-6)


def test_all_linear_adapts_routers_which_stay_pefts():
    """PEFT's meaning of it: experts are fused, the router's matrix is written out as before, and the report says so."""
    stock = stir(peft.get_peft_model(moe_model(), peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")))
    if not any("mlp.gate" in name for name, _ in stock.named_parameters() if "lora_A" in name):
        pytest.skip("this PEFT's all-linear means nn.Linear layers alone")
    ours = patched(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    same(loss_and_gradients(ours), loss_and_gradients(stock), 5e-6)  # q, k and v are a group, whose sums differ
    reasons = {layer.name: layer.reason for layer in peft_report(ours).layers}
    router = reasons["base_model.model.model.layers.0.mlp.gate.weight"]
    assert router.startswith("target_parameters: a matrix of a Qwen3MoeTopKRouter")
    assert "target_parameters" not in reasons["base_model.model.model.layers.0.mlp.experts.gate_up_proj"]
    merged = copy.deepcopy(stock).merge_and_unload()
    torch.testing.assert_close(ours(ids()).logits, merged(ids()).logits, rtol=1e-5, atol=1e-5)
