"""State dicts of merged models: the live weights, and what was kept of the bases, back into layers of every state."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from merged import CASTS, KIND, OWN, PATCHED, base_layers, made, merge, unmerge, weights
from peft_nets import Net, config, inputs, stir, stock_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import lora_fast
from lora_fast import DoRALinear, LoRAConfig, LoRALinear, add_lora, merge_lora
from lora_fast.fp8 import Fp8Weight

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moved(model):
    """With other bases and adapters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model


@CASTS
@KIND
@pytest.mark.parametrize("through", ["copy", "file"])
def test_a_dict_taken_while_merged_gives_the_same_function(kind, through, tmp_path):
    source, x = made(kind), inputs()
    expected, base = source(x), weights(source)
    merge(source)
    live, state = weights(source), copy.deepcopy(source.state_dict())
    weight = [t for name, t in state.items() if name.endswith("weight") and ("up" in name or "down" in name)]
    assert all(any(torch.equal(t, w) for t in weight) for w in live + base)
    if through == "file":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt")
    for merged in (False, True):
        target = moved(made(kind, 5))
        if merged:
            merge(target)
        target.load_state_dict(state)
        torch.testing.assert_close(target(x), expected)
        unmerge(target)
        assert all(torch.equal(a, b) for a, b in zip(weights(target), base, strict=True))
        torch.testing.assert_close(target(x), expected)
        assert list(target.state_dict()) == list(made(kind).state_dict())
        merge(target)
        assert all(torch.equal(a, b) for a, b in zip(weights(target), live, strict=True))


@CASTS
@KIND
def test_a_dict_without_what_was_kept_is_a_base(kind):
    source, target, x = made(kind), moved(made(kind, 5)), inputs()
    expected, state = source(x), copy.deepcopy(source.state_dict())
    merge(target)
    target.load_state_dict(state)
    unmerge(target)
    torch.testing.assert_close(target(x), expected, rtol=0, atol=0)


def test_loaded_strictly_into_stock_it_fails():
    source = made("lora")
    merge(source)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.lora_unmerged_weight"):
        Net().load_state_dict({name: t for name, t in source.state_dict().items() if ".lora_A" not in name})


@CASTS
@KIND
@pytest.mark.parametrize("merged", [False, True])
def test_in_parts_in_any_order(kind, merged):
    source, x = made(kind), inputs()
    expected, base = source(x), weights(source)
    merge(source)
    state = copy.deepcopy(source.state_dict())
    parts = [{}, {}, {}]  # live weights; what was kept; the rest
    for name, t in state.items():
        parts[1 if "unmerged" in name else 2 if "lora_" in name or "weight" not in name else 0][name] = t
    for order in itertools.permutations(parts):
        target = moved(made(kind, 5))
        if merged:
            merge(target)
        for part in order:
            target.load_state_dict(part, strict=False)
        unmerge(target)
        assert all(torch.equal(a, b) for a, b in zip(weights(target), base, strict=True))
        torch.testing.assert_close(target(x), expected, rtol=0, atol=0)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to": lambda m: m.to(torch.float64).to(torch.float32),
}


@KIND
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_merged_models_say_the_same(kind, how):
    source = made(kind)
    merge(source)
    expected = copy.deepcopy(source.state_dict())
    found = COPIES[how](source)
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.state_dict().items())
    unmerge(found)
    assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(made(kind)), strict=True))


@pytest.mark.parametrize("kind", PATCHED)
@pytest.mark.parametrize("bias, more", [("none", "up"), ("all", "weight"), ("lora_only", "lora")])
def test_pefts_file_is_the_same_merged_or_not(kind, bias, more, tmp_path):
    """Also of adapters whose names are in other keys."""
    model = made(kind, bias=bias)
    model.add_adapter(more, model.peft_config["default"] if bias == "none" else config())
    stir(model)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for folder in (".", more):
        before, after = (load_file(tmp_path / f / folder / "adapter_model.safetensors") for f in ("before", "merged"))
        assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.parametrize("kind", OWN)
def test_files_and_layers_of_a_merged_model(kind, tmp_path):
    model, x = made(kind), inputs()
    expected = model(x)
    lora_fast.save_adapter(model, tmp_path / "before")
    merge_lora(model)
    lora_fast.save_adapter(model, tmp_path / "merged")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "merged"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
    assert model.up.to_linear().state_dict().keys() == {"weight", "bias"}
    plain = lora_fast.remove_lora(copy.deepcopy(model))
    assert plain.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(plain(x), expected)


@KIND
def test_accelerate_reads_the_live_weights(kind):
    accelerate = pytest.importorskip("accelerate")
    model = made(kind)
    merge(model)
    state = accelerate.Accelerator(cpu=True).get_state_dict(model)
    rest = {name: t for name, t in state.items() if "lora_" not in name}
    assert all(any(torch.equal(t, w) for t in rest.values()) for w in weights(model))


@pytest.mark.parametrize("kind", OWN + PATCHED)
def test_an_fp8_base_is_kept_as_one(kind):
    if kind in PATCHED:
        model = stir(stock_model(use_dora=kind == "peft dora"))
        lora_fast.patch_peft(model, base_dtype="float8_e4m3")
    else:
        model = made(kind, base_dtype="float8_e4m3")
    fresh, x = copy.deepcopy(model), inputs()
    expected, held = model(x), base_layers(model)[0].weight.rows.float().clone()
    merge(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    (kept,) = [t for name, t in state.items() if "up" in name and "unmerged_weight" in name]
    (live,) = [t for name, t in state.items() if name.endswith(("up.weight", "up.base_layer.weight"))]
    assert isinstance(kept, Fp8Weight) and type(live) is torch.Tensor
    for name, p in fresh.named_parameters():
        if "lora_" in name:
            p.data.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(base_layers(fresh)[0].weight.rows.float(), held)
    torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)


@CASTS
@KIND
@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
def test_distributed_state_dicts_of_plain_models(mesh, kind, options):
    source, x = made(kind), inputs()
    expected, base = source(x), weights(source)
    merge(source)
    for merged in (False, True):
        state = get_model_state_dict(source, options=StateDictOptions(**options))
        assert any("lora_unmerged_weight" in name for name in state)
        target = moved(made(kind, 5))
        if merged:
            merge(target)
        set_model_state_dict(target, copy.deepcopy(state), options=StateDictOptions(**options))
        unmerge(target)
        assert all(torch.equal(a, b) for a, b in zip(weights(target), base, strict=True))
        torch.testing.assert_close(target(x), expected)
        adapters = {name: t for name, t in state.items() if "lora_" in name and "unmerged" not in name}
        merge(target)
        set_model_state_dict(target, adapters, options=StateDictOptions(strict=False, **options))
        unmerge(target)  # of which torch made whole dicts, with the live weights
        torch.testing.assert_close(target(x), expected)


def test_one_layer_alone():
    for kind in (LoRALinear, DoRALinear):
        layer, x = kind(7, 5, r=3, init_lora_weights=False), torch.randn(3, 7)
        expected = layer(x)
        layer.merge()
        fresh = kind(7, 5, r=3)
        fresh.load_state_dict(layer.state_dict(), assign=True)
        torch.testing.assert_close(fresh(x), expected)


def test_a_tied_head_of_a_merged_model_is_saved(tmp_path):
    """Nothing in the dict shares memory with what the head was tied to."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(4)[None]
    add_lora(model, LoRAConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    fresh, expected = copy.deepcopy(model), model(ids).logits
    merge_lora(model).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(state["lm_head.lora_unmerged_weight"], model.model.embed_tokens.weight)
    for p in fresh.parameters():
        p.data.zero_()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(ids).logits, expected)
