"""What a merge keeps, and what may happen to a layer before it is put back: files of PEFT's, assignments, modes."""

import copy

import pytest
import torch
from merged import CASTS, KIND, made, merge, unmerge, weights
from peft_nets import inputs, stir
from safetensors.torch import load_file
from tied import IDS, llama
from torch import nn

from lora_fast import LoRAConfig, add_lora, merge_lora, patch_peft, unmerge_lora
from lora_fast.fp8 import Fp8Weight

peft = pytest.importorskip("peft")

BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@BOTH
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_pefts_file_of_a_merged_model_with_an_adapted_head(fp8, dora, tmp_path):
    """PEFT takes the head's base weight along, which is not to be the merged one."""
    base = llama(tie_word_embeddings=False).eval()
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], use_dora=dora)
    model = stir(peft.get_peft_model(copy.deepcopy(base), config))
    patch_peft(model, base_dtype="float8_e4m3" if fp8 else None)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "merged"))
    assert any(name.endswith("lm_head.base_layer.weight") for name in before)
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
    live = model.state_dict()["base_model.model.lm_head.base_layer.weight"]
    assert torch.equal(live, model.base_model.model.lm_head.base_layer.weight)
    model.unmerge_adapter()
    if not fp8:  # stock's base would be another
        found = peft.PeftModel.from_pretrained(base, tmp_path / "merged").eval()
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits)


@BOTH
def test_bases_in_8_bits_that_fsdp2_leaves_alone(dora, mesh):
    from torch.distributed.fsdp import fully_shard

    config = LoRAConfig(r=2, target_modules=["0", "2"], use_dora=dora, base_dtype="float8_e4m3")
    model = stir(add_lora(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)), config))
    x = inputs()
    expected, bases = model(x).detach(), [layer.weight for layer in (model[0], model[2])]
    fully_shard(model, mesh=mesh, ignored_params=set(bases))
    for _ in range(2):
        merge_lora(model)
        assert not isinstance(model[0].weight, Fp8Weight)
        unmerge_lora(model)
        assert all(layer.weight is base for layer, base in zip((model[0], model[2]), bases, strict=True))
        torch.testing.assert_close(model(x), expected)


@BOTH
def test_a_weight_that_is_assigned_to_a_merged_layer_is_refused(dora):
    """As transformers does to tie a head; unmerging would lose it, or it the merge."""
    model = llama().eval()
    stir(add_lora(model, LoRAConfig(r=2, target_modules=["lm_head"], use_dora=dora)))
    expected = model(IDS).logits
    merge_lora(model)
    for change in (
        model.tie_weights,
        lambda: model.resize_token_embeddings(32),
        lambda: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(32, 16))),
        lambda: setattr(model.lm_head, "weight", None),
    ):
        with pytest.raises(ValueError, match="weight: the layer is merged; .*unmerge"):
            change()
        torch.testing.assert_close(model(IDS).logits, expected)
    unmerge_lora(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, expected)


@BOTH
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]], ids=["plain", "adapted"])
def test_a_head_that_is_tied_to_a_merged_embedding(targets, dora):
    """As tie_weights does; with the unmerge it gets the base, and stays tied. It may have been merged itself then."""
    model = llama().eval()
    stir(add_lora(model, LoRAConfig(r=2, target_modules=targets, use_dora=dora)))
    embed, head = model.model.embed_tokens, model.lm_head
    expected, base = model(IDS).logits, embed.weight
    embed.merge()
    model.tie_weights()
    assert head.weight is embed.weight is not base
    merge_lora(model)
    unmerge_lora(model)
    assert head.weight is embed.weight is base
    assert torch.equal(model(IDS).logits, expected)


@KIND
def test_merged_layers_are_moved_loaded_and_sharded(kind, mesh):
    """All that puts parameters into a layer without a word to whoever reads this."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    x, source = inputs(), made(kind)
    expected = source(x).detach()
    state = copy.deepcopy(source.state_dict())
    for change in (
        lambda m: m.double().float(),
        lambda m: m.load_state_dict(state, assign=True),
        copy.deepcopy,
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), x),
        lambda m: fully_shard(m, mesh=mesh),
    ):
        merge(model := made(kind))
        change(model)
        torch.testing.assert_close(model(x), expected)
    merge(model := made(kind))
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(wrapped(x), expected)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        pass
    torch.testing.assert_close(wrapped(x), expected)


@KIND
@pytest.mark.parametrize("way", ["plain", "safe", "FSDP2"])
def test_merged_in_inference_mode_and_trained_after(kind, way, mesh):
    """Merged, too: another adapter may be trained in front of it. The gradients are those without the merge."""
    from torch.distributed.fsdp import fully_shard

    def gradients(model):
        model.zero_grad()
        model(x).square().sum().backward()
        return [getattr(g := p.grad, "full_tensor", lambda g=g: g)() for p in model.parameters() if p.requires_grad]

    model, x = made(kind), inputs()
    expected, base = gradients(model), weights(model)
    if way == "FSDP2":
        fully_shard(model, mesh=mesh)
    y = model(x).detach()  # FSDP2's forwards fail in inference mode, with any layers
    with torch.inference_mode():
        if way == "safe":
            for layer in lora_layers(model):
                layer.merge(safe_merge=True)
        else:
            merge(model)
    torch.testing.assert_close(model(x).detach(), y)
    model(x.clone().requires_grad_()).sum().backward()
    with torch.inference_mode():
        unmerge(model)
    assert all(
        torch.equal(getattr(w, "full_tensor", lambda w=w: w)(), b) for w, b in zip(weights(model), base, strict=True)
    )
    for found, g in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, g)


@KIND
def test_models_made_in_inference_mode_merge_there_and_outside(kind):
    with torch.inference_mode():
        model, x = made(kind), inputs()
        y = model(x)
        merge(model)
        torch.testing.assert_close(model(x), y)
        unmerge(model)
    with torch.no_grad():
        merge(model)
        unmerge(model)
        torch.testing.assert_close(model(x), y)


def taken(model, wanted):
    return {name: t.detach().clone() for name, t in model.state_dict().items() if wanted(name)}


@pytest.mark.medium
@CASTS
@KIND
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base_dtype", [None, "float8_e4m3"], ids=["", "fp8"])
def test_the_next_base_after_the_adapters_of_a_merged_model(kind, merged, base_dtype, recwarn):
    """A dict by ``lora_`` in the keys has what was kept, too, without the merged weights, which are not waited for."""

    def fresh(seed):
        if "peft" not in kind:
            return made(kind, seed, base_dtype=base_dtype)
        model = made(kind, seed)
        patch_peft(model, base_dtype=base_dtype)
        return model

    source, target, x = fresh(1), fresh(5), inputs()
    expected, other = source(x).detach(), fresh(1)
    merge(source)
    adapters, rest = (taken(source, lambda name, w=w: ("lora_" in name) == w) for w in (True, False))
    bases = {n: torch.randn_like(t.float()).to(t.dtype) for n, t in rest.items()}
    other.load_state_dict(bases, strict=False)
    for then in (rest, bases):  # the merged weights, if they come, are none
        if merged:
            merge(target)
        target.load_state_dict(adapters, strict=False)
        target.load_state_dict(then, strict=False)
        if merged and "peft" not in kind:
            unmerge(target)
        torch.testing.assert_close(target(x), expected if then is rest else other(x))
    assert not [w for w in recwarn if "is taken for" in str(w.message)]


@pytest.mark.parametrize("merged", [["default"], ["more0"], ["default", "more0"]])
def test_merged_weights_of_some_adapters_are_known(merged):
    source, target = (made("peft", seed, more=[{"r": 2}]) for seed in (1, 5))
    base, x = weights(source), inputs()
    source.merge_adapter(merged)
    target.load_state_dict(taken(source, lambda name: "lora_" in name), strict=False)
    target.load_state_dict(taken(source, lambda name: "lora_" not in name), strict=False)
    assert all(map(torch.equal, weights(target), base))
    source.unmerge_adapter()
    torch.testing.assert_close(target(x), source(x))


@KIND
def test_what_cannot_be_told_is_said(kind):
    source, target = made(kind), made(kind, 5)
    base = weights(target)
    merge(source)
    target.load_state_dict(taken(source, lambda name: "lora_unmerged" in name), strict=False)
    bases = {name: torch.randn_like(t) for name, t in taken(source, lambda name: "lora_" not in name).items()}
    with pytest.warns(UserWarning, match=r"up\..*weight: is taken for the merged weight .* load it once more"):
        target.load_state_dict(bases, strict=False)
    assert all(map(torch.equal, weights(target), base))
    target.load_state_dict(bases, strict=False)
    assert all(any(torch.equal(w, t) for t in bases.values()) for w in weights(target))
