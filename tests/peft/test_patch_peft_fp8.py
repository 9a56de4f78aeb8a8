"""patch_peft on PEFT models whose base is held in fp8: results as over the dequantised base, keys, merges, refusals."""

import copy

import pytest
import torch
from fp8_nets import BAD, MAKERS, Net, dense, step

from lora_fast import patch_peft, unpatch_peft
from lora_fast.bases.scaled import ScaledFp8E4m3Weight

peft = pytest.importorskip("peft")


def adapted(model):
    """(PEFT's model, classes of its modules, its keys)"""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["first", "second"]))
    if any("lora_" in name and p.dtype.itemsize == 1 for name, p in model.named_parameters()):
        pytest.skip("this PEFT leaves adapters in the base's 8 bits")
    before = {name: type(m) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    return model, before, keys


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_patch_peft(make):
    net, x = Net(make), torch.randn(5, 160)
    plain = dense(net)
    model, before, keys = adapted(net)
    report = patch_peft(model)
    assert [layer.remark for layer in report.layers] == 2 * ["scaled fp8 base"]
    assert sorted(model.state_dict()) == sorted(keys)
    other, *_ = adapted(plain)
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if "lora_A" in name:  # which PEFT rounds to the base's dtype at the start
            theirs[name].data.copy_(p.data)
    patch_peft(other)
    assert all(map(torch.equal, step(model, x), step(other, x)))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight.stored.zero_()
    model.load_state_dict(state)
    y = model(x)
    assert torch.equal(y, other(x))
    model.merge_adapter()
    assert model.base_model.model.first.base_layer.weight.dtype == torch.float32
    torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    with model.disable_adapter(), other.disable_adapter():
        assert torch.equal(model(x), other(x))
    unpatch_peft(model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    again = model.state_dict()
    assert list(again) == keys and all(torch.equal(t, state[name]) for name, t in again.items())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_copy_that_others_weights_were_loaded_into_goes_back_with_their_scales(make):
    model, *_ = adapted(Net(make))
    patch_peft(model)
    model = copy.deepcopy(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    scale = next(name for name in state if "first.base_layer.weight_scale" in name)
    state[scale] = (2 * state[scale].float()).to(state[scale].dtype)
    model.load_state_dict(state)
    unpatch_peft(model)
    again = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.items()) and len(again) == len(state)


def test_patch_peft_with_8_bit_products_and_its_refusals():
    model, *_ = adapted(Net(MAKERS["blocks"]))
    report = patch_peft(model, base_compute="float8_e4m3")
    assert all("scaled fp8 base, 8-bit products" in layer.remark for layer in report.layers)
    assert type(model.base_model.model.first.base_layer.weight) is ScaledFp8E4m3Weight
    net = Net(MAKERS["blocks"])
    BAD["static"][0](net.second)
    model, before, keys = adapted(net)
    layers = {layer.name: layer for layer in patch_peft(model).layers}
    assert "static activation scheme" in layers["base_model.model.second"].reason
    assert "scaled fp8 base" in layers["base_model.model.first"].remark
