"""Layers that transformers and compressed-tensors hold in fp8, as bases: found, shared, refused by name."""

import pytest
import torch
from fp8_nets import BAD, MAKERS, Net, dense, of_compressed_tensors, of_transformers, step
from torch import nn

from lora_fast import DoRALinear, LoRAConfig, LoRALinear, add_lora, remove_lora
from lora_fast.bases.scaled import ScaledFp8E4m3Weight, ScaledFp8Weight
from lora_fast.fp8 import E4M3

finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_is_that_over_the_dequantised_model(make, dora):
    model = Net(make)
    memory = [layer.weight.untyped_storage().data_ptr() for layer in (model.first, model.second)]
    x, config = torch.randn(5, 160), LoRAConfig(r=4, target_modules=["first", "second"], use_dora=dora)
    results = []
    for one in (model, dense(model)):
        torch.manual_seed(2)
        results.append(step(add_lora(one, config), x))
    assert len(results[0]) > 4 and all(map(torch.equal, *results))
    for layer, start in zip((model.first, model.second), memory, strict=True):
        assert type(layer) is (DoRALinear if dora else LoRALinear) and type(layer.weight) is ScaledFp8Weight
        assert layer.weight.dtype == torch.float32 and layer.weight.stored.untyped_storage().data_ptr() == start
    remove_lora(model)
    assert type(model.first) is nn.Linear and type(model.first.weight) is ScaledFp8Weight
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_acts_as_the_models_other_parameters(dtype):
    model = Net(MAKERS["blocks"])
    model.head.to(dtype)
    for layer in (model.first, model.second):
        layer.bias.data = layer.bias.data.to(dtype)
    add_lora(model, LoRAConfig(r=4, target_modules="all-linear", exclude_modules=["head"]))
    assert model.first.weight.dtype == dtype and model(torch.randn(3, 160, dtype=dtype)).dtype == dtype


def test_from_linear():
    for make, dtype in (("blocks", torch.float32), ("bf16 rows", torch.bfloat16)):
        layer = LoRALinear.from_linear(MAKERS[make](32, 48), r=4)
        assert layer.weight.dtype == dtype
    layer = LoRALinear.from_linear(of_transformers(32, 48, bias=False), r=4, base_compute="float8_e4m3")
    assert type(layer.weight) is ScaledFp8E4m3Weight and layer.weight.dtype == torch.bfloat16


def test_base_compute():
    model = Net(MAKERS["blocks"])
    config = LoRAConfig(r=4, target_modules="all-linear", base_compute="float8_e4m3", base_dtype_exclude=["second"])
    add_lora(model, config)
    kinds = [type(layer.weight) for layer in (model.first, model.second, model.head)]
    assert kinds == [ScaledFp8E4m3Weight, ScaledFp8Weight, nn.Parameter]
    plain = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="base_compute: got 'float8_e4m3', expected None without a base_dtype"):
        add_lora(plain, LoRAConfig(target_modules="all-linear", base_compute="float8_e4m3"))
    with pytest.raises(TypeError, match="got one in scaled fp8, expected a plain one to quantise"):
        add_lora(Net(MAKERS["rows"]), LoRAConfig(target_modules=["first"], base_dtype="nf4"))


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_what_cannot_be_is_named(change, message):
    model = Net(lambda n, k: of_transformers(n, k))
    change(model.second)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"target_modules: cannot convert second, which .*{message}"):
        add_lora(model, LoRAConfig(target_modules=["first", "second"]))
    assert kinds == [type(m) for m in model.modules()] and model.first.weight.dtype == E4M3
    with pytest.raises(TypeError, match=f"linear: expected a plain nn.Linear, got one that .*{message}"):
        LoRALinear.from_linear(model.second)


def test_grouped_linears_and_experts_are_named():
    grouped = finegrained.FP8GroupedLinear(128, 256, 2, block_size=(128, 128))
    with pytest.raises(TypeError, match="is a FP8GroupedLinear with an fp8 weight"):
        LoRALinear.from_linear(grouped)

    class FP8Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 256, 128).to(E4M3), requires_grad=False)
            self.gate_up_proj_scale_inv = nn.Parameter(torch.ones(4, 2, 2), requires_grad=False)

    model = nn.ModuleDict({"experts": FP8Experts(), "q_proj": of_transformers(160, 144)})
    with pytest.warns(UserWarning, match="stay frozen: experts.gate_up_proj$"):
        add_lora(model, LoRAConfig(target_modules="all-linear"))


def test_compressed_tensors_own_forward_goes():
    layer = of_compressed_tensors(32, 48, kind=nn.Linear)
    layer.quantization_scheme, layer.forward = object(), lambda x: 1 / 0
    adapted = LoRALinear.from_linear(layer, r=4)
    adapted(torch.randn(3, 48).to(adapted.weight.dtype))
