"""Merged layers under ``patch_peft`` as stock PEFT has them: memory that others see, what trains or is loaded
meanwhile, and what is left of ours when the adapters are gone."""

import copy
import pickle
import warnings

import pytest
import torch
from peft_nets import inputs, patched, peft, stock_model
from torch import nn

from lora_fast import patch_peft


def both(**kwargs):
    """A stock model and a patched one, each with its name."""
    stock = stock_model(**kwargs)
    return ("stock", stock), ("ours", patched(stock, ("reference", "cpu")))


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_the_weight_stays_where_others_see_it(safe):
    """A process that shares it, or who holds a view, sees each merge and each unmerge."""
    for name, model in both():
        layer = model.base_model.model.up
        weight = layer.base_layer.weight
        for _ in range(2):
            base, seen = weight.detach().clone(), weight.data
            layer.merge(safe_merge=safe)
            seen = weight.data if safe else seen  # with safe_merge stock exchanges the memory, too
            assert torch.equal(seen, weight) and not torch.equal(seen, base), name
            layer.unmerge()
            torch.testing.assert_close(seen, base)
            assert seen.data_ptr() == weight.data_ptr(), name


def test_weights_in_one_memory_are_tied():
    """Other parameters over the same numbers: an unmerge gives back what the other's merge left."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight.data = net[0].weight.data
    stock = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    for name, model in (("stock", stock), ("ours", copy.deepcopy(stock))):
        one, two = model.base_model.model
        two.base_layer.weight.data = one.base_layer.weight.data
        if name == "ours":
            patch_peft(model)
        base = one.base_layer.weight.detach().clone()
        model.merge_adapter()
        one.unmerge()
        two.unmerge()
        torch.testing.assert_close(one.base_layer.weight, base)
        torch.testing.assert_close(two.base_layer.weight, base)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_trains_while_merged_stays(bias):
    for name, model in both(bias=bias):
        at = model.base_model.model.up.base_layer.bias
        start = at.detach().clone()
        model.merge_adapter()
        with torch.no_grad():
            at.add_(1)
        model.unmerge_adapter()
        torch.testing.assert_close(at, start + 1, msg=name)


def test_what_a_state_dict_does_not_speak_of_stays_merged():
    for name, model in both(more=[{}]):
        model.merge_adapter(["more0"])
        expected, state = model(inputs()), model.state_dict()
        for part in ({}, {n: t for n, t in state.items() if "head" in n or "default" in n}):
            model.load_state_dict(part, strict=False)
            assert torch.equal(model(inputs()), expected), name


def test_an_embedding_is_unmerged_as_linear_layers_are():
    """By a state dict of the merged adapter: the whole model runs the new one."""

    def made(seed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 2))
        torch.manual_seed(seed)
        return peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False))

    new, ids = made(2), torch.arange(6)
    ours = made(1)
    patch_peft(ours)
    ours.merge_adapter()
    peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(new))
    torch.testing.assert_close(ours(ids), new(ids))
    assert not any(layer.merged for layer in ours.base_model.model)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_nothing_of_ours_is_left(how):
    model = peft.get_peft_model(nn.Sequential(Mlp()), peft.LoraConfig(target_modules=["gate", "up", "down"]))
    assert patch_peft(model).blocks
    plain = getattr(model, how)()
    assert type(plain[0]) is Mlp and b"lora_fast" not in pickle.dumps(plain)
    assert not plain[0]._forward_hooks and not plain[0]._forward_pre_hooks
    torch.jit.script(plain[0])


def test_unload_tells_of_packed_bases():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(target_modules=["0"]))
    patch_peft(model, base_dtype="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged[0].weight) is nn.Parameter
    with pytest.warns(UserWarning, match="1 weights stay in 8 or 4 bits, 0.weight among them"):
        plain = model.unload()
    layer = plain[0]
    layer.weight = nn.Parameter(layer.weight.dequantise(), requires_grad=False)
    assert layer(torch.randn(2, 64)).shape == (2, 64)


def test_a_trace_of_dora_in_evaluation():
    """With a bias, whose sum looks at the gains on a CPU, and a norm that is kept between calls."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = inputs()
    for name, model in both(use_dora=True):
        expected = model.eval()(x)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, msg=name)
        torch.testing.assert_close(make_fx(model)(x)(x), expected, msg=name)


@pytest.mark.parametrize("scaling", [float("inf"), float("nan"), True], ids=str)
def test_a_scaling_that_is_no_finite_number_runs_stock(scaling):
    found = []
    for _, model in both():
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.scaling["default"] = scaling
        found.append(model(inputs()))
    torch.testing.assert_close(*found, equal_nan=True)
