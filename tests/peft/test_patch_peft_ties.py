"""Merging into a base weight that several of PEFT's layers have in common, and out of it, in every order."""

import copy

import pytest
import torch
from peft_nets import config, stir
from tied import IDS, llama
from torch import nn

from lora_fast import patch_peft

peft = pytest.importorskip("peft")
HEAD = "embed_tokens", "lm_head"


class Twins(nn.Module):
    """Two layers over one weight and bias."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.down.weight, self.down.bias = self.up.weight, self.up.bias

    def forward(self, ids):
        return self.down(torch.tanh(self.up(ids[..., None].float().cos().expand(*ids.shape, 16))))


def twins(later=()):
    torch.manual_seed(0)
    model = peft.get_peft_model(Twins(), config())
    for name in later:
        model.add_adapter(name, config())
    return stir(model).eval()


def headed(later=()):
    return headed_at(HEAD, later)


def headed_at(targets, later=()):
    model = peft.get_peft_model(llama(), config(target_modules=list(targets)))
    for name in later:
        model.add_adapter(name, config(target_modules=list(HEAD)))
    return stir(model).eval()


MODELS = {"head": (headed, HEAD), "linears": (twins, ("up", "down"))}
EACH = pytest.mark.parametrize("build, names", MODELS.values(), ids=MODELS)


def outputs(model):
    with torch.no_grad():
        y = model(IDS)
    return y if isinstance(y, torch.Tensor) else y.logits


def layers(model, names):
    found = {name.rpartition(".")[2]: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return [found[name] for name in names]


def weight(model, name):
    (layer,) = layers(model, [name])
    return layer.base_layer.weight


def all_at_once(model, names):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


def in_one_order(model, names):
    for layer in layers(model, names):
        layer.merge()
    yield
    for layer in layers(model, names):
        layer.unmerge()


def in_both_orders(model, names):
    for layer in layers(model, names[::-1]):
        layer.merge(safe_merge=True)
    yield
    for layer in layers(model, names):
        layer.unmerge()


def back_between(model, names):
    first, second = layers(model, names)
    first.merge()
    second.merge()
    first.unmerge()
    first.merge()
    yield
    second.unmerge()
    first.unmerge()


def several(model, names):
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    yield
    model.unmerge_adapter()


def disabled(model, names):
    model.merge_adapter()
    yield
    with model.disable_adapter():
        outputs(model)  # which unmerges, as stock's


@EACH
@pytest.mark.parametrize("way", [all_at_once, in_one_order, in_both_orders, back_between, several, disabled])
def test_a_merge_and_back_gives_the_base(build, names, way):
    stock = build(later=["other"])
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    before, expected = weight(ours, names[0]).detach().clone(), outputs(ours)
    steps, stocks = way(ours, names), way(stock, names)
    for _ in zip(steps, stocks, strict=True):
        torch.testing.assert_close(outputs(ours), outputs(stock))
        assert not torch.allclose(weight(ours, names[0]), before, atol=0.1)
    assert weight(ours, names[0]) is weight(ours, names[1])
    torch.testing.assert_close(weight(ours, names[0]), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)
    assert not any(layer.merged for layer in layers(ours, names))


@EACH
def test_merge_and_unload_is_stocks(build, names):
    stock = build()
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    torch.testing.assert_close(outputs(ours.merge_and_unload()), outputs(stock.merge_and_unload()))


@pytest.mark.parametrize("merged", [False, True])
def test_an_embedding_that_gets_its_adapter_later(merged):
    """The head's base has been kept then, if it is merged."""
    model = headed_at(["lm_head"])
    patch_peft(model)
    before = weight(model, "lm_head").detach().clone()
    if merged:
        model.merge_adapter()
    model.add_adapter("other", config(target_modules=list(HEAD)))
    stir(model.base_model.model.model)
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    torch.testing.assert_close(weight(model, "lm_head"), before, rtol=1e-5, atol=1e-5)


def test_bases_that_are_tied_after_the_patch():
    torch.manual_seed(0)
    apart = Twins()
    apart.down = nn.Linear(16, 16)
    model = stir(peft.get_peft_model(apart, config())).eval()
    patch_peft(model)
    up, down = layers(model, ("up", "down"))
    down.base_layer.weight = up.base_layer.weight
    before, expected = weight(model, "up").detach().clone(), outputs(model)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(weight(model, "up"), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)


def test_a_head_alone_is_exact():
    """The embedding it is tied to has no adapter, and so changes nothing."""
    model = headed_at(["lm_head"])
    patch_peft(model)
    before = weight(model, "lm_head").detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(weight(model, "lm_head"), before)


@EACH
def test_a_merged_state_dict_goes_back_into_the_merged_model(build, names):
    model = build()
    patch_peft(model)
    before = weight(model, names[0]).detach().clone()
    model.merge_adapter()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.unmerge_adapter()
    torch.testing.assert_close(weight(model, names[0]), before, rtol=1e-5, atol=1e-5)


@EACH
def test_shards(build, names, mesh):
    """Of FSDP2's; a forward leaves the outermost ones gathered."""
    from torch.distributed.fsdp import fully_shard

    model = build()
    patch_peft(model)
    before, expected = weight(model, names[0]).detach().clone(), outputs(model)
    with torch.no_grad():
        model.merge_adapter()
        merged = outputs(model)
        model.unmerge_adapter()
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-4)
        with model.disable_adapter(), pytest.raises(ValueError, match=r"^disable_adapter: .*after unmerge_adapter\(\)"):
            outputs(model)
        model.unmerge_adapter()
        torch.testing.assert_close(weight(model, names[0]).full_tensor(), before, rtol=1e-5, atol=1e-5)
