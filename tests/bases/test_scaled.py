"""Weights as fp8 checkpoints hold them: their numbers against an oracle that reads byte by byte, and a layer over one
against the layer over its dense form, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from base_calls import CALLS, FORMS, named, needs_triton, normal, results, scaled
from torch import nn

from lora_fast import DoRALinear, LoRALinear
from lora_fast.bases.scaled import E8M0, ScaledFp8E4m3Weight, ScaledFp8Weight
from lora_fast.bases.scaled_shards import ScaledFp8Shard
from lora_fast.fp8 import E4M3, Fp8Weight
from lora_fast.functional import lora_linear

KINDS = ScaledFp8Weight, ScaledFp8E4m3Weight


def value_of(byte):
    """e4m3 by its definition."""
    sign, exponent, digits = byte >> 7, (byte >> 3) & 15, byte & 7
    if (exponent, digits) == (15, 7):
        return float("nan")
    size = 2.0**-6 * digits / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + digits / 8)
    return -size if sign else size


def oracle(weight):
    """Element by element: byte times scale in float32."""
    n, k = weight.shape
    values = torch.tensor([value_of(byte) for byte in range(256)])[weight.stored.int()]
    if weight.scale.dtype == torch.uint8:
        scale = torch.tensor([[2.0 ** (e - 127) for e in row] for row in weight.scale.tolist()])
    else:
        scale = weight.scale.float()
    for i in range(n):
        for j in range(k):
            values[i, j] *= scale[i, 0] if weight.by_rows else scale[i // 128, j // 128]
    return values.to(weight.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(form, dtype):
    for n, k in ((130, 140), (1, 129), (12, 48)):
        weight = scaled(form, n, k, dtype)
        assert torch.equal(weight.dequantise(), oracle(weight)), (n, k)
    assert weight.dequantise(torch.float32).dtype == torch.float32


def test_every_byte_and_the_ends_of_exponents():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(3, 1)
    for exponents in ([0, 254], [255, 127]):
        scale = torch.tensor([exponents], dtype=torch.uint8).view(E8M0)
        weight = ScaledFp8Weight.from_tensors({"": stored.view(E4M3), "_scale_inv": scale}, (3, 256), torch.float32)
        exact = torch.tensor([value_of(byte) for byte in range(256)], dtype=torch.float64)
        powers = torch.tensor([float("nan") if e == 255 else 2.0 ** (e - 127) for e in exponents], dtype=torch.float64)
        expected = (exact * powers.repeat_interleave(128)).float()
        torch.testing.assert_close(weight.dequantise(), expected.expand(3, -1), rtol=0, atol=0, equal_nan=True)


def written(weight, dtype):
    """W as the kernel writes it for a product in this dtype."""
    from lora_fast.kernels.block_scales import Scaled, whole
    from lora_fast.kernels.operands import run

    def fill(out, stored, scale):
        return whole(Scaled(stored, scale), out)

    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    run(fill, out=out, stored=weight.stored, scale=weight.scale)
    return out


@needs_triton
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_writes_these_values(device, form):
    shapes = (
        ((130, 140), (1, 129), (200, 16)) if device == "cpu" else ((130, 140), (1, 129), (4096, 1536), (1000, 2056))
    )
    for n, k in shapes:
        weight = scaled(form, n, k, device=device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(written(weight, dtype), weight.dequantise(dtype)), (n, k, dtype)


@needs_triton
def test_the_kernel_keeps_nan_and_denormals(device):
    stored = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256).repeat(2, 1)
    for exponents in ([0, 254], [255, 127], [1, 120]):
        scale = torch.tensor([exponents], dtype=torch.uint8, device=device)
        weight = ScaledFp8Weight(stored, scale, shape=(2, 256), dtype=torch.float32)
        ours, expected = written(weight, torch.float32), weight.dequantise()
        assert expected[:, [0x7F, 0xFF]].isnan().all()
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("form", ["float32", "rows"])
def test_the_scale_of_the_wrong_block_is_seen(device, form):
    """The neighbours' scale, to the right or below, gives other values: no test would pass with it."""
    weight = scaled(form, 260, 270, device=device)
    right = written(weight, torch.float32)
    for dim in (0, 1):
        if form == "rows" and dim:
            continue
        moved = ScaledFp8Weight(weight.stored, weight.scale.roll(1, dim), shape=weight.shape, dtype=weight.dtype)
        wrong = written(moved, torch.float32)
        assert not torch.equal(wrong, right) and torch.equal(wrong, moved.dequantise())
    assert torch.equal(right, weight.dequantise())


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_weight_is_near(form):
    weight = normal(130, 140) * torch.rand(130, 1)
    packed = scaled(form, 130, 140)
    packed.copy_(weight)
    assert ((packed.dequantise() - weight).abs() <= 2**-4 * weight.abs() + 2**-10 * packed.scales()).all()
    assert packed.is_made_from(weight) and packed.is_made_from(packed.dequantise())
    other = weight.clone()
    other[129, 139] += 0.2 * other.abs().max()
    assert not packed.is_made_from(other)
    empty = scaled(form, 4, 16)
    empty.copy_(torch.zeros(4, 16))
    assert not empty.dequantise().any()


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


@needs_triton
@pytest.mark.medium
@pytest.mark.parametrize("call", CALLS, ids=named)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_a_layer_has_the_bits_of_one_over_the_dense_weight(device, form, e4m3, call):
    if device == "cpu" and CALLS.index(call) % len(FORMS) != FORMS.index(form):
        pytest.skip("some stand for the others there: the interpreter is slow")
    if device == "cpu":
        kinds = [torch.float16 if FORMS.index(form) % 2 else torch.float32]
        shapes = [(144, 160, 20)] if e4m3 else [(131, 140, 20)]
    else:
        kinds = [torch.bfloat16, torch.float16, torch.float32]
        shapes = [(48, 80, 70), (1024, 2048, 3000), (528, 656, 300), *([] if e4m3 else [(301, 203, 100)])]
    for dtype in kinds:
        for n, k, m in shapes:
            packed = scaled(form, n, k, dtype, device)
            dense = packed.dequantise()
            if e4m3:
                packed, dense = packed.for_e4m3(), Fp8Weight.quantise(dense)
            ours = results(packed, device, dtype, m=m, **call)
            assert all(map(torch.equal, ours, results(dense, device, dtype, m=m, **call)))
            assert all(t.isfinite().all() for t in ours)


@needs_triton
@pytest.mark.medium
def test_rows_of_zeros_and_no_rows_of_x(device):
    for form in FORMS:
        packed = scaled(form, 48, 80, device=device)
        packed.stored[::3] = 0
        for call in (CALLS[0], CALLS[3]):
            for m in (0, 5):
                ours = results(packed, device, torch.float32, m=m, **call)
                assert all(map(torch.equal, ours, results(packed.dequantise(), device, torch.float32, m=m, **call)))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_that_over_the_dense_weight(form):
    for call in (CALLS[0], CALLS[3]):
        packed = scaled(form, 48, 80)
        dense = results(packed.dequantise(), "cpu", torch.float32, backend="reference", **call)
        assert all(map(torch.equal, results(packed, "cpu", torch.float32, backend="reference", **call), dense))


@needs_triton
@pytest.mark.medium
@pytest.mark.parametrize("form", ["float32", "rows"])
def test_products_of_8_bits_are_within_their_rounding(device, form):
    packed = scaled(form, 144, 160, device=device)
    for call in (CALLS[0], CALLS[3]):
        ours = results(packed.for_e4m3(), device, torch.float32, m=20, **call)
        for one, other in zip(ours, results(packed.dequantise(), device, torch.float32, m=20, **call), strict=True):
            assert (one - other).norm() <= 0.06 * other.norm()


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
    with pytest.raises(TypeError, match="got an ScaledFp8Weight, expected a plain one"):
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
