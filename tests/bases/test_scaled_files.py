"""What becomes of weights as fp8 checkpoints hold them: copies, state dicts, merges, other products, shards."""

import copy
import io
import pickle

import pytest
import torch
from base_calls import FORMS, scaled
from torch import nn

from lora_fast import DoRALinear, LoRALinear
from lora_fast.bases.scaled import E8M0, ScaledFp8E4m3Weight, ScaledFp8Weight
from lora_fast.bases.scaled_shards import ScaledFp8Shard
from lora_fast.fp8 import E4M3
from lora_fast.functional import lora_linear

KINDS = ScaledFp8Weight, ScaledFp8E4m3Weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_copies(kind, form):
    weight = scaled(form, 144, 160)
    weight = weight.for_e4m3() if kind is ScaledFp8E4m3Weight else weight
    parameter = nn.Parameter(weight, requires_grad=False)
    stored = io.BytesIO()
    torch.save({"weight": parameter}, stored)
    stored.seek(0)
    loaded = torch.load(stored)["weight"]
    for same in (weight.clone(), weight.detach(), copy.deepcopy(parameter), pickle.loads(pickle.dumps(weight)), loaded):
        assert type(same) is kind
        assert all(torch.equal(getattr(same, name), getattr(weight, name)) for name in kind.INNER)
    assert isinstance(loaded, nn.Parameter) and not loaded.requires_grad
    half = weight.to(torch.bfloat16)
    assert type(half) is kind and half.dtype == torch.bfloat16
    assert weight.to("meta").is_meta and torch.empty_like(weight).shape == (144, 160)
    assert torch.equal(ScaledFp8Weight.from_tensors(weight.tensors(), weight.shape, weight.dtype) + 0, weight + 0)
    memory = weight.tensors()[""].untyped_storage().data_ptr()
    assert memory == weight.stored.untyped_storage().data_ptr()


def test_bad_tensors():
    stored = torch.zeros(130, 140).to(E4M3)
    scale = torch.ones(2, 2)
    for change, message in (
        ({"": stored[:4]}, r"weight: got torch.float8_e4m3fn of shape \(4, 140\), expected .* of shape \(130, 140\)"),
        ({"": stored.float()}, "weight: got torch.float32"),
        ({"_scale_inv": scale[:1]}, r"weight_scale_inv: got shape \(1, 2\), expected \(2, 2\), one for each 128 x 128"),
        ({"_scale_inv": scale.double()}, "weight_scale_inv: got torch.float64, expected float32"),
        ({"_scale_inv": torch.ones(())}, r"weight_scale_inv: got one scale .*per-tensor.*dequantize=True"),
        ({"_scale_inv": None}, "weight: got torch.float8_e4m3fn without a scale, expected weight_scale_inv or"),
    ):
        tensors = {name: t for name, t in ({"": stored, "_scale_inv": scale} | change).items() if t is not None}
        with pytest.raises(ValueError, match=message):
            ScaledFp8Weight.from_tensors(tensors, (130, 140), torch.float32)
    with pytest.raises(ValueError, match=r"base_compute: got float8_e4m3 for \(130, 140\)"):
        scaled("float32", 130, 140).for_e4m3()


def layer_over(form, kind=LoRALinear, n=144, k=160, dtype=torch.float32, base_compute=None):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, dtype=dtype)
    linear.weight = nn.Parameter(scaled(form, n, k, dtype), requires_grad=False)
    layer = kind.from_linear(linear, r=4, base_compute=base_compute)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("base_compute", [None, "float8_e4m3"])
@pytest.mark.parametrize("form", FORMS)
def test_merging_goes_into_plain_weights_and_back(kind, base_compute, form):
    layer = layer_over(form, kind, dtype=torch.bfloat16, base_compute=base_compute)
    base, stored = layer.weight, layer.weight.stored.clone()
    assert base.E4M3_PRODUCTS == (base_compute is not None)
    layer.merge()
    assert type(layer.weight) is nn.Parameter and layer.weight.dtype == torch.bfloat16
    state = layer.state_dict()
    key = "lora_unmerged_weight" + ("_scale" if "rows" in form else "_scale_inv")
    assert state["weight"].dtype == torch.bfloat16 and state["lora_unmerged_weight"].dtype == E4M3 and key in state
    layer.unmerge()
    assert type(layer.weight) is type(base) and torch.equal(layer.weight.stored, stored)
    original = base.dequantise().float() * (1 + 2**-6 * torch.rand(144, 160))
    layer.merge(original=original.bfloat16())
    if kind is LoRALinear:
        exact = original.bfloat16().float() + layer.delta_weight()
        assert torch.equal(layer.weight, exact.bfloat16())
    layer.unmerge()
    with pytest.raises(ValueError, match="original: got another weight"):
        layer.merge(original=-original.bfloat16())


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("base_compute", [None, "float8_e4m3"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_state_dict_has_the_checkpoints_keys(kind, base_compute, form, merged, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = layer_over(form, kind, base_compute=base_compute)
    if merged:
        layer.merge()
    state = layer.state_dict()
    key = "weight_scale" if "rows" in form else "weight_scale_inv"
    if not merged:
        assert state["weight"].dtype == E4M3 and state[key].dtype == (
            E8M0 if form == "e8m0" else layer.weight.scale.dtype
        )
        assert not any(type(t) is not torch.Tensor for t in state.values())
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "layer.safetensors")
    for assign in (False, True):
        other = layer_over(form, kind, base_compute=base_compute)
        with torch.no_grad():
            other.weight.stored.zero_()
            other.lora_B.zero_()
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
        plain = layer.base_weight
        assert type(other.weight) is type(plain) and torch.equal(other.weight.dequantise(), plain.dequantise())
        if base_compute:
            assert torch.equal(other.weight.col_scale, plain.col_scale)
    elsewhere = layer_over("rows" if key.endswith("inv") else "float32", kind)
    with pytest.raises(RuntimeError, match="expected fp8 with .*assign=True takes either"):
        elsewhere.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    elsewhere.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(elsewhere.weight.dequantise(), layer.base_weight.dequantise())


def test_base_compute_without_a_base_dtype():
    layer = layer_over("float32")
    stored = layer.weight.stored
    layer.quantise_base(None, "float8_e4m3")
    assert type(layer.weight) is ScaledFp8E4m3Weight and layer.weight.stored is stored
    assert "base_dtype='scaled fp8', base_compute='float8_e4m3'" in repr(layer)
    layer.quantise_base(None, None)
    assert type(layer.weight) is ScaledFp8Weight and layer.weight.stored is stored
    with pytest.raises(TypeError, match="got one in scaled fp8, expected a plain one"):
        layer.quantise_base("nf4")
    with pytest.raises(
        ValueError, match="base_compute: got 'float8_e4m3', expected None without a base_dtype, but over"
    ):
        LoRALinear.from_linear(nn.Linear(16, 16), base_compute="float8_e4m3")
    layer.weight.stored[3, 5] = 0x7F
    with pytest.raises(ValueError, match="not finite"):
        layer.quantise_base(None, "float8_e4m3")
    with pytest.raises(ValueError, match="base_compute: got float8_e4m3 for"):
        layer_over("float32", n=20).quantise_base(None, "float8_e4m3")


@pytest.mark.parametrize("base_dtype", ["nf4", "mxfp4"])
def test_other_products_over_4_bits_that_are_there(base_dtype):
    layer = LoRALinear.from_linear(nn.Linear(64, 96), r=4, base_dtype=base_dtype)
    packed = layer.weight.packed
    for base in (base_dtype, None):
        layer.quantise_base(base, "float8_e4m3")
        assert layer.weight.E4M3_PRODUCTS and layer.weight.packed is packed
        layer.quantise_base(base)
        assert not layer.weight.E4M3_PRODUCTS and layer.weight.packed is packed
    short = LoRALinear.from_linear(nn.Linear(64, 8), r=4, base_dtype=base_dtype)
    with pytest.raises(ValueError, match=r"base_compute: got float8_e4m3 for \(8, 64\)"):
        short.quantise_base(base_dtype, "float8_e4m3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_parts_act_as_their_rows(kind, form):
    whole = scaled(form, 512, 160)
    whole = whole.for_e4m3() if kind is ScaledFp8E4m3Weight else whole
    dense, parts = whole.dequantise(), whole.chunk(4)
    assert all(isinstance(part, ScaledFp8Shard) and part.stored.shape == (128, 160) for part in parts)
    assert torch.equal(torch.cat(parts), dense)
    last = parts[-1]
    stored = io.BytesIO()
    torch.save(last, stored)
    stored.seek(0)
    for same in (pickle.loads(pickle.dumps(last)), torch.load(stored), copy.deepcopy(last), last.view_as(last)):
        assert type(same) is type(last) and torch.equal(same.dequantise(), dense[-128:])
    with pytest.raises(TypeError, match="expected the whole weight"):
        lora_linear(torch.zeros(1, 160), last, torch.zeros(2, 160), torch.zeros(128, 2), 1.0)
    for other in (dense[:128], whole):
        with pytest.raises(RuntimeError, match="load it before fully_shard"):
            last.copy_(other)
    if "rows" not in form:
        said = "expected a number of processes that divides its rows, into parts of whole blocks of 128"
        with pytest.raises(ValueError, match=rf"weight: got scaled fp8 \[512, 160\] to shard, {said}"):
            whole.chunk(8)
