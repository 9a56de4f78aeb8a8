"""patch_peft over linear layers whose weight is torchao's NF4Tensor, as torchtune's models have them."""

import copy

import pytest
import torch
from nf4tensors import MAKERS
from torch import nn

from lora_fast import patch_peft, unpatch_peft

peft = pytest.importorskip("peft")


def net(make, dora):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*sizes, bias=bias) for sizes, bias in (((256, 128), True), ((128, 256), False))))
    for linear in model:
        linear.weight = nn.Parameter(make(linear.weight.detach()), requires_grad=False)
    settings = peft.LoraConfig(r=4, target_modules=["0", "1"], use_dora=dora, init_lora_weights=False)
    return peft.get_peft_model(model, settings)


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("make", MAKERS)
def test_patch_peft(make):
    model, x = net(make, dora=False), torch.randn(5, 256)
    theirs = step(model, x)
    report = patch_peft(model)
    assert [layer.remark for layer in report.layers] == 2 * ["4-bit base"]
    for ours, their in zip(step(model, x), theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    unpatch_peft(model)
    base = model.base_model.model[0].base_layer.weight
    assert type(base).__name__ == "NF4Tensor" and torch.equal(step(model, x)[0], theirs[0])


def test_8_bit_products():
    """They are asked for without a base_dtype, as over what is packed already; the bytes stay. (PEFT cannot begin DoRA
    over an NF4Tensor, whose dequantize is none of PyTorch's.)"""
    model, x = net(MAKERS[0], dora=False), torch.randn(5, 256)
    patch_peft(model, base_compute="float8_e4m3")
    weights = [layer.base_layer.weight for layer in model.base_model.model]
    assert {weight.BASE for weight in weights} == {"four_bits_e4m3"}
    assert all(torch.isfinite(t).all() for t in step(model, x))
    unpatch_peft(model)
    assert {type(layer.base_layer.weight).__name__ for layer in model.base_model.model} == {"NF4Tensor"}


def test_what_others_weights_were_loaded_into_is_written_out():
    """Their scales are no NF4Tensor's, or another one's: unpatch_peft keeps the numbers, not the class."""
    x = torch.randn(5, 256)
    for change in (lambda w: w.copy_(torch.randn(w.shape)), lambda w: w.absmax.mul_(2)):
        model = net(MAKERS[0], dora=False)
        patch_peft(model)
        with torch.no_grad():
            change(model.base_model.model[0].base_layer.weight)
        y = model(x).detach()
        unpatch_peft(model)
        first, second = (layer.base_layer.weight for layer in model.base_model.model)
        assert type(first) is nn.Parameter and type(second).__name__ == "NF4Tensor"
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
