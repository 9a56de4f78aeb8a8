"""Models whose experts are in 8 or 4 bits: packed stack by stack, trained, saved, merged, frozen."""

import copy
import weakref

import pytest
import torch
from allocations import allocated
from expert_nets import BOTH, ids, loss_and_gradients, moe_model, transformers
from peft_nets import peft, same, stir
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.checkpoint import checkpoint

from lora_fast import (
    LoRAConfig,
    add_lora,
    disable_lora,
    load_adapter,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    pack_experts,
    patch_peft,
    register_experts,
    remove_lora,
    save_adapter,
    set_backend,
    unmerge_lora,
)
from lora_fast.bases.stack import STACKED, PackedStack
from lora_fast.cli.doctor_layers import examine

SIZES = {"hidden_size": 32}
KINDS = pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
DTYPES = pytest.mark.parametrize("base_dtype", list(STACKED))


@pytest.fixture(autouse=True)
def plain():
    set_backend("reference")
    yield
    set_backend("auto")


def adapted(kind, base_dtype, **more):
    config = LoRAConfig(r=3, lora_alpha=5, **{"target_parameters": BOTH, "base_dtype": base_dtype, **more})
    return stirred(add_lora(moe_model(kind, **SIZES), config))


def stirred(model):
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    return model


def stacks(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, PackedStack)}


def written_out(model):
    """A stock model with what the packed weights of this one are."""
    dense = moe_model("gpt_oss" if "Oss" in type(model).__name__ else "qwen3_moe", **SIZES)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            held = model.get_parameter(name)
            p.copy_(held.dequantise() if isinstance(held, PackedStack) else held)
    return dense


@KINDS
@DTYPES
def test_trains_as_over_what_is_written_out(tmp_path, kind, base_dtype):
    model = adapted(kind, base_dtype)
    assert len(stacks(model)) == 4 and all(p.base_dtype == base_dtype for p in stacks(model).values())
    dense = add_lora(written_out(model), LoRAConfig(r=3, lora_alpha=5, target_parameters=BOTH))
    save_adapter(model, tmp_path)
    load_lora_state_dict(dense, lora_state_dict(model))
    ours, expected = loss_and_gradients(model), loss_and_gradients(dense)
    same(ours, expected, 1e-5)
    assert sum("lora_" in name for name in ours) == 8
    packed = load_adapter(pack_experts(moe_model(kind, **SIZES), base_dtype), tmp_path)
    same(loss_and_gradients(packed), ours, 0)
    with disable_lora(model):
        torch.testing.assert_close(model(ids()).logits, written_out(model)(ids()).logits, rtol=1e-5, atol=1e-5)


def test_all_linear_packs_linear_layers_and_experts_but_not_what_is_excluded():
    def model(**more):
        return add_lora(moe_model(**SIZES), LoRAConfig(r=2, target_modules="all-linear", base_dtype="nf4", **more))

    with pytest.warns(UserWarning, match=r"stay as they are: .*TopKRouter\.weight"):
        found = model()
    assert len(stacks(found)) == 4 and type(found.model.layers[0].self_attn.q_proj.weight).__name__ == "Nf4Weight"
    with pytest.warns(UserWarning, match="Router"):
        some = model(base_dtype_exclude=["experts.down_proj"])
    assert {name.rpartition(".")[2] for name in stacks(some)} == {"gate_up_proj"}
    with pytest.warns(UserWarning, match="Router"):
        assert not stacks(model(base_dtype_exclude=["mlp.experts"]))


def test_what_cannot_be_is_an_error_and_leaves_the_model():
    model = moe_model(**SIZES)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}

    def refused(error, said, build=None, **config):
        with pytest.raises(error, match=said):
            add_lora(build or model, LoRAConfig(r=2, target_parameters=BOTH, **config))

    refused(
        ValueError,
        "base_compute.*products are of 16 bits.*base_dtype_exclude",
        base_dtype="nf4",
        base_compute="float8_e4m3",
    )
    refused(ValueError, "DoRA|use_dora", base_dtype="nf4", use_dora=True)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    odd = moe_model(hidden_size=20, moe_intermediate_size=6)
    refused(ValueError, "multiple of 64", odd, base_dtype="nf4")
    spoilt = moe_model(**SIZES)
    with torch.no_grad():
        spoilt.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.inf
    refused(ValueError, "expert 2 has elements that are not finite", spoilt, base_dtype="mxfp4")
    assert not stacks(spoilt)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: weight: expert 2"):
        pack_experts(spoilt, "nf4")
    assert not stacks(spoilt)
    with pytest.raises(ValueError, match="base_dtype: got 'int8', expected 'float8_e4m3' or 'nf4' or 'mxfp4'"):
        pack_experts(model, "int8")
    with pytest.raises(ValueError, match="without modules of transformers' experts"):
        pack_experts(torch.nn.Linear(3, 3), "nf4")
    with pytest.raises(TypeError, match="expected an nn.Module"):
        pack_experts(3, "nf4")
    packed = adapted("qwen3_moe", "nf4")
    layer = packed.model.layers[0].mlp.experts.lora_down_proj
    with pytest.raises(TypeError, match="experts in nf4"):
        layer.quantise_base("mxfp4")
    merge_lora(packed)
    with pytest.raises(ValueError, match="merged"):
        layer.quantise_base("nf4")
    with pytest.raises(ValueError, match=r"cannot pack .*layers.0.mlp.experts.gate_up_proj: has an adapter merged"):
        pack_experts(packed, "nf4")
    frozen = pack_experts(moe_model(**SIZES), "nf4")
    with pytest.raises(ValueError, match="modules_to_save: would train .*experts.gate_up_proj.* 8 or 4 bits"):
        add_lora(frozen, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.experts"]))
    assert all(p.requires_grad != isinstance(p, PackedStack) for p in frozen.parameters())


@pytest.mark.parametrize("base_dtype", ["mxfp4", "float8_e4m3"])
def test_tensors_of_another_number_of_experts_are_refused(base_dtype):
    model = pack_experts(moe_model(**SIZES), base_dtype)
    state = model.state_dict()
    for key in [key for key in state if "experts." in key]:
        t = state[key]
        state[key] = t.reshape(2, 2 * t.shape[1], *t.shape[2:])
    with pytest.raises(RuntimeError, match=r"got shape \(2, 96, .*, expected 4 experts first"):
        model.load_state_dict(state)


@pytest.mark.medium
@KINDS
@DTYPES
def test_state_dicts_hold_plain_tensors(tmp_path, kind, base_dtype):
    model = adapted(kind, base_dtype)
    state = model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    keys = {key.split("layers.0.mlp.experts.")[1] for key in state if "layers.0.mlp.experts.gate_up_proj" in key}
    expected = {
        "mxfp4": {"gate_up_proj_blocks", "gate_up_proj_scales"},
        "float8_e4m3": {"gate_up_proj", "gate_up_proj_scale"},
    }
    assert keys - {"gate_up_proj_bias"} == expected.get(base_dtype, keys - {"gate_up_proj_bias"})
    if base_dtype == "mxfp4":  # as gpt-oss' checkpoints have them
        assert state["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 48, 1, 16)
        assert state["model.layers.0.mlp.experts.gate_up_proj_scales"].shape == (4, 48, 1)
    save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    logits = model(ids()).logits
    for assign in (False, True):
        other = adapted(kind, base_dtype)
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(torch.ones(p.shape)) if isinstance(p, PackedStack) else p.zero_()
        assert not torch.equal(other(ids()).logits, logits)
        assert not other.load_state_dict(dict(state), assign=assign).missing_keys
        assert torch.equal(other(ids()).logits, logits) and len(stacks(other)) == 4
    dense = written_out(model).state_dict()  # a plain checkpoint into packed weights
    for assign in (False, True):
        other = pack_experts(moe_model(kind, **SIZES), base_dtype)
        other.load_state_dict(dense, assign=assign)
        assert len(stacks(other)) == 4
    wrong = "nf4" if base_dtype != "nf4" else "mxfp4"
    with pytest.raises(RuntimeError, match="gate_up_proj: got"):
        adapted(kind, wrong).load_state_dict(dict(state))
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        cut = {key: t[:2] if "experts.gate_up_proj" in key and t.dim() > 2 else t for key, t in state.items()}
        cut = cut if base_dtype != "nf4" else {key: t for key, t in state.items() if not key.endswith(".absmax")}
        adapted(kind, base_dtype).load_state_dict(cut)


@KINDS
@DTYPES
def test_what_save_pretrained_would_scatter_is_an_error(tmp_path, kind, base_dtype):
    model = pack_experts(moe_model(kind, **SIZES), base_dtype)
    logits = model(ids()).logits
    for made in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"save_pretrained: has packed experts .*from_pretrained would not read"):
            made.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

    def check(folder):
        again = pack_experts(moe_model(kind, **SIZES), base_dtype)
        state = {key: t for key, t in load_file(folder / "model.safetensors").items() if "lora_" not in key}
        again.load_state_dict(state, strict=kind == "gpt_oss")  # a tied head is written once
        assert torch.equal(again(ids()).logits, logits)

    model.save_pretrained(tmp_path / "own", save_original_format=False)
    check(tmp_path / "own")
    add_lora(model, LoRAConfig(r=2, target_parameters=BOTH))
    model.save_pretrained(tmp_path / "adapted")  # as Trainer does
    check(tmp_path / "adapted")
    remove_lora(merge_lora(model)).save_pretrained(tmp_path / "merged")
    assert torch.equal(type(model).from_pretrained(tmp_path / "merged").eval()(ids()).logits, model(ids()).logits)
    alive = weakref.ref(model)
    del model, made
    assert alive() is None


def test_save_pretrained_in_the_checkpoints_own_form(tmp_path):
    model = pack_experts(moe_model("gpt_oss", hidden_size=32, intermediate_size=32), "mxfp4")
    model.config.quantization_config = transformers.Mxfp4Config(dequantize=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, held in stacks(model).items():
        assert torch.equal(again.get_parameter(name).float(), held.dequantise())


def test_blocks_of_128_are_transformers_own_layout():
    """FP8Experts': e4m3 beside gate_up_proj_scale_inv [E, N / 128, K / 128]."""
    model = pack_experts(moe_model(hidden_size=128, moe_intermediate_size=64), "float8_e4m3")
    state = model.state_dict()
    scale = state["model.layers.0.mlp.experts.gate_up_proj_scale_inv"]
    stored = state["model.layers.0.mlp.experts.gate_up_proj"]
    assert stored.shape == (4, 128, 128) and stored.dtype == torch.float8_e4m3fn and scale.shape == (4, 1, 1)
    expected = stored.float() * scale
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj.dequantise(), expected)


@KINDS
@DTYPES
def test_merged_in_16_bits_and_unmerged(kind, base_dtype):
    model = adapted(kind, base_dtype)
    before, kept = model(ids()).logits, {name: p for name, p in stacks(model).items()}
    merge_lora(model, safe_merge=True)
    assert not stacks(model)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-4)
    with disable_lora(model):
        base = model(ids()).logits
    state = model.state_dict()
    assert any("unmerged_weight" in key for key in state) and all(type(t) is torch.Tensor for t in state.values())
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    for name, p in stacks(model).items():
        assert torch.equal(p.dequantise(), kept[name].dequantise())
    assert torch.equal(model(ids()).logits, before)
    with disable_lora(model):
        assert torch.equal(model(ids()).logits, base)
    with pytest.raises((ValueError, FileNotFoundError)):
        merge_lora(model, original="nowhere")
    removed = remove_lora(copy.deepcopy(model))
    assert len(stacks(removed)) == 4 and torch.equal(removed(ids()).logits, base)
    assert not any(p.requires_grad for name, p in removed.named_parameters() if "experts" in name)
    merged = remove_lora(merge_lora(model))
    assert not stacks(merged) and not type(merged.model.layers[0].mlp.experts).__name__.startswith("LoRA")
    torch.testing.assert_close(merged(ids()).logits, before, rtol=1e-4, atol=1e-4)


@KINDS
def test_frozen_and_packed(kind):
    """With LoRA on attention alone, by whatever implementation is set."""
    register_experts()
    model = pack_experts(moe_model(kind, **SIZES), "mxfp4")
    expected = written_out(model)
    for implementation in ("eager", "grouped_mm", "lora_fast"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids()).logits, expected(ids()).logits, rtol=1e-5, atol=1e-5)
    add_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    found = loss_and_gradients(model)
    assert len(found) == 1 + 2 * 2 and all(g.isfinite().all() for g in found.values())
    assert pack_experts(model, "mxfp4") is model
    lines = {layer.name: layer for layer in examine(model)}
    line = lines["model.layers.0.mlp.experts"]
    assert "in mxfp4" in line.what and "run through lora_fast" in line.why
    adapters = {layer.name: layer for layer in examine(adapted(kind, "nf4"))}
    assert " in nf4, r=3" in adapters["model.layers.0.mlp.experts.down_proj"].what


@KINDS
def test_pefts_adapters_over_packed_experts(kind):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=BOTH)
    model = pack_experts(moe_model(kind, **SIZES), "nf4")
    dense = written_out(model)
    ours, stock = (stir(peft.get_peft_model(one, config)) for one in (model, dense))
    layers = patch_peft(ours).layers
    assert len(layers) == 6 and {layer.reason for layer in layers} == {'set_backend("reference") is on'}
    same(loss_and_gradients(ours), loss_and_gradients(stock), 1e-5)
    logits = ours(ids()).logits
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(RuntimeError, match="experts in nf4 cannot be added to.*load_adapter.*merge_lora"):
            merge()
        assert not ours.get_model_status().merged_adapters and len(patch_peft(ours).layers) == 6
    assert torch.equal(ours(ids()).logits, logits)


@DTYPES
def test_packing_and_a_step_never_hold_a_second_model(base_dtype):
    """Allocations of the CPU: beside what it becomes, packing holds numbers of one expert; a step with checkpointing
    dense weights of one, too."""
    model = moe_model(experts=16, hidden_size=64, moe_intermediate_size=64).to(torch.bfloat16)
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    dense, stack = sum(p.nbytes for p in experts), max(p.nbytes for p in experts)
    gone = [weakref.ref(p) for p in experts]
    del experts
    config = LoRAConfig(r=1, target_parameters=BOTH, base_dtype=base_dtype)
    found = allocated(lambda: add_lora(model, config))
    adapters = sum(p.nbytes for p in lora_parameters(model))
    share = 0.52 if base_dtype == "float8_e4m3" else 0.29
    assert len(gone) == 4 and not any(p() is not None for p in gone)
    assert found.left - adapters <= share * dense + 4 * 1200, "and NF4's tables"
    per_expert = 40 * stack // 2 // 16  # bytes that quantising has for each of an expert's elements
    assert found.peak - adapters <= share * dense + per_expert
    block = model.model.layers[0].mlp

    def step():
        x = torch.randn(1, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        y = checkpoint(lambda x: block(x), x, use_reentrant=False)
        (y[0] if isinstance(y, tuple) else y).float().sum().backward()

    step()
    assert allocated(step).peak < stack, "dense weights of some experts of 16"


def fp8_model(**settings):
    """As transformers loads a checkpoint in fp8, and a model of ours whose experts hold the same bytes."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1}
    ours = pack_experts(moe_model(**sizes).to(torch.bfloat16), "float8_e4m3")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    config = transformers.FineGrainedFP8Config(**settings)
    model = replace_with_fp8_linear(moe_model(**sizes).to(torch.bfloat16), attention, config)
    experts, state = model.model.layers[0].mlp.experts, ours.state_dict()
    experts.to_empty(device="cpu")
    for name, p in experts.named_parameters():
        if f"model.layers.0.mlp.experts.{name}" in state:
            p.data = state[f"model.layers.0.mlp.experts.{name}"].clone()
    return model, ours


def test_fp8_experts_of_transformers_keep_their_bytes(tmp_path):
    model, ours = fp8_model()
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r'gate_up_proj: it is quantised .*pack_experts\(model, "float8_e4m3"\) first'):
        add_lora(model, LoRAConfig(r=2, target_parameters=BOTH))
    with pytest.raises(ValueError, match="experts: holds fp8, expected base_dtype='float8_e4m3', got 'nf4'"):
        pack_experts(model, "nf4")
    place = experts.gate_up_proj.data_ptr()
    assert pack_experts(pack_experts(model, "float8_e4m3"), "float8_e4m3") is model
    assert experts.gate_up_proj.stored.data_ptr() == place and experts.gate_up_proj.dtype == torch.bfloat16
    assert torch.equal(model(ids()).logits, ours(ids()).logits)
    assert model.state_dict().keys() == ours.state_dict().keys()
    stirred(add_lora(model, LoRAConfig(r=2, target_parameters=BOTH)))
    grads = loss_and_gradients(model)
    assert len(grads) == 5 and all(g.any() for g in grads.values())
    before = model(ids()).logits
    remove_lora(merge_lora(model))
    assert not stacks(model) and (model(ids()).logits - before).abs().max() < 0.2


def test_fp8_experts_of_another_form_are_refused():
    for settings, said in (
        ({"weight_block_size": (64, 64)}, "scales of shape"),
        ({"activation_scheme": "static"}, "static activation scheme"),
    ):
        model, _ = fp8_model(**settings)
        with pytest.raises(ValueError, match=f"cannot pack model.layers.0.mlp.experts: gate_up_proj .*{said}"):
            pack_experts(model, "float8_e4m3")


def test_gpt_oss_checkpoint_without_a_model_in_16_bits():
    """Its own tensors into a model without data."""
    stored = pack_experts(moe_model("gpt_oss", **SIZES), "mxfp4")
    with torch.device("meta"):
        model = type(stored)(stored.config)
    pack_experts(model, "mxfp4")
    assert not model.load_state_dict(stored.state_dict(), assign=True).missing_keys
    for name, p in stacks(model).items():
        assert torch.equal(p.dequantise(), stacks(stored)[name].dequantise())
    assert all(not p.is_meta for p in model.parameters())


@DTYPES
def test_torchs_distributed_state_dicts(base_dtype):
    model = adapted("gpt_oss", base_dtype)
    for _ in range(2):
        logits, state = model(ids()).logits, get_model_state_dict(model)
        assert all(type(t) is torch.Tensor for t in state.values()) and state.keys() == model.state_dict().keys()
        set_model_state_dict(model, state)
        assert torch.equal(model(ids()).logits, logits)
        merge_lora(model)
