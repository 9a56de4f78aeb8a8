"""Weights in 4 bits: their numbers against an oracle that reads nibble by nibble and against bitsandbytes, and a layer
over one against the layer over its dense form, bit for bit."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from base_calls import CALLS, named, needs_triton, normal, results
from devices import CPU, CUDA
from torch import nn

from lora_fast import DoRALinear, LoRALinear
from lora_fast.bases.four_bits import E2M1, KINDS, NF4, BlockWeight, Mxfp4Weight, Nf4Weight, dynamic_map
from lora_fast.fp8 import Fp8Weight

EXACT = BlockWeight, Nf4Weight, Mxfp4Weight


def oracle(weight):
    """Element by element, in Python's integers and float32."""
    packed, (n, k) = weight.packed.tolist(), weight.shape
    values = (E2M1 if weight.LOW_FIRST else NF4), []
    nested = hasattr(weight, "code2")
    for i in range(n * k):
        byte, first, block = packed[i // 2], i % 2 == 0, i // weight.block
        nibble = byte & 15 if first == weight.LOW_FIRST else byte >> 4
        absmax = weight.absmax[block]
        if nested:
            scale = weight.code2[int(absmax)] * weight.absmax2[block // 256] + weight.offset[0]
        else:
            scale = torch.tensor(2.0 ** (int(absmax) - 127)) if weight.LOW_FIRST else absmax
        values[1].append(torch.tensor(values[0][nibble]) * scale)
    return torch.stack(values[1]).view(n, k).to(weight.dtype)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(kind, dtype):
    weight = kind.quantise(normal(12, 48, dtype))  # blocks that straddle rows
    assert torch.equal(weight.dequantise(), oracle(weight))
    assert weight.dequantise(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", EXACT)
def test_codes_are_the_nearest(kind):
    weight = normal(16, 64)
    packed = kind.quantise(weight)
    scales = packed.scales().repeat_interleave(packed.block).view(weight.shape)
    if kind is Nf4Weight:  # nearest to the scale before that was rounded
        scales = BlockWeight.quantise(weight).scales().repeat_interleave(64).view(weight.shape)
    table = torch.tensor(E2M1 if kind.LOW_FIRST else NF4)
    distances = (weight[..., None] / scales[..., None] - table).abs()
    high, low = packed.packed >> 4, packed.packed & 15
    codes = torch.stack((low, high) if kind.LOW_FIRST else (high, low), -1).view(weight.shape)
    chosen = distances.gather(-1, codes.long()[..., None])[..., 0]
    assert (chosen <= distances.amin(-1) + 1e-6).all()


def test_mxfp4_rounds_ties_to_even_and_keeps_what_it_can_hold():
    exact = torch.tensor([[*E2M1, *E2M1]]) * 2.0**-5
    assert torch.equal(Mxfp4Weight.quantise(exact).dequantise(), exact)
    ties = torch.zeros(1, 32)
    ties[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(Mxfp4Weight.quantise(ties).dequantise()[0, :8], rounded)


@pytest.mark.parametrize("kind", EXACT)
def test_extremes(kind):
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 0], weight[3] = 1e-30, 1e30, normal(1, 64)[0]
    dense = kind.quantise(weight).dequantise()
    assert torch.isfinite(dense).all() and not dense[0].any()
    assert (dense[2, 0] - 1e30).abs() < 0.3e30


def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_as_bitsandbytes(dtype, nested, where):
    """In blocks that straddle rows, too, which its code for CPUs does not read as that for GPUs does."""
    bnb, kind = bitsandbytes(), Nf4Weight if nested else BlockWeight
    for n, k in ((64, 256), (48, 128), *([(48, 80), (4096, 14336)] if where == "cuda" else [])):
        weight = normal(n, k, dtype, where)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
        ours = kind.quantise(weight)
        if dtype == torch.float32 and where == "cuda":  # 1 / absmax is not the exact one there
            assert (ours.packed != packed.flatten()).float().mean() < 1e-4
            ours.packed.copy_(packed.flatten())
        assert torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.table, state.code)
        if nested and where == "cpu":  # where it takes the other one of two codes that are almost as near, now and then
            assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1
            assert (ours.absmax != state.absmax).float().mean() <= 0.02
            ours.absmax.copy_(state.absmax)
        if nested:
            assert torch.equal(ours.absmax2, state.state2.absmax) and torch.equal(ours.code2, state.state2.code)
            assert torch.equal(ours.offset[0], state.offset)
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.dequantise(), bnb.dequantize_4bit(packed, state))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS.values())
def test_copies(kind):
    weight = kind.quantise(normal(32, 64))
    parameter = nn.Parameter(weight, requires_grad=False)
    stored = io.BytesIO()
    torch.save({"weight": parameter}, stored)
    stored.seek(0)
    loaded = torch.load(stored)["weight"]
    for same in (weight.clone(), weight.detach(), copy.deepcopy(parameter), pickle.loads(pickle.dumps(weight)), loaded):
        assert type(same) is kind and all(
            torch.equal(getattr(same, name), getattr(weight, name)) for name in kind.INNER
        )
    assert isinstance(loaded, nn.Parameter) and not loaded.requires_grad
    half = weight.to(torch.bfloat16)
    assert type(half) is kind and half.dtype == torch.bfloat16
    assert weight.to("meta").is_meta and torch.empty_like(weight).shape == (32, 64)
    other = kind.quantise(normal(32, 64, seed=2))
    other.copy_(weight)
    assert torch.equal(other.dequantise(), weight.dequantise())
    other.copy_(Fp8Weight.quantise(normal(32, 64, seed=3)))
    assert not torch.equal(other.dequantise(), weight.dequantise())


def test_bad_weights():
    for weight, error, message in (
        (torch.ones(3, 5), ValueError, r"weight: got shape \(3, 5\), expected N \* K a multiple of 64"),
        (torch.ones(2, 64).double(), TypeError, "float64"),
        (torch.full((2, 64), torch.nan), ValueError, "not finite"),
        (torch.ones(128), ValueError, r"expected \[N, K\]"),
        (Nf4Weight.quantise(torch.ones(2, 64)), TypeError, "got one in nf4, expected a plain one"),
    ):
        with pytest.raises(error, match=message):
            Nf4Weight.quantise(weight)
    for shape in ((8, 64), (64, 8)):
        with pytest.raises(ValueError, match=rf"base_compute: got float8_e4m3 for \({shape[0]}, {shape[1]}\)"):
            Nf4Weight.quantise(torch.ones(shape)).for_e4m3()


# Interpreted, which is slow: every call over one kind, and two stand for them over the others and in e4m3.
BIT_BY_BIT = [
    pytest.param(*device.values, kind, e4m3, call, marks=device.marks, id=f"{device.values[0]}-{kind.__name__}-{name}")
    for device, kind, e4m3, call in product((CPU, CUDA), EXACT, (False, True), CALLS)
    if device is CUDA
    or call is CALLS[4 if (kind is BlockWeight) == e4m3 else 0]
    or (kind is Nf4Weight and (not e4m3 or call in (CALLS[4], CALLS[6])))
    for name in ["e4m3-" * e4m3 + named(call)]
]


@needs_triton
@pytest.mark.medium
@pytest.mark.parametrize("device, kind, e4m3, call", BIT_BY_BIT)
@pytest.mark.usefixtures("poisoned")
def test_a_layer_has_the_bits_of_one_over_the_dense_weight(device, kind, e4m3, call):
    if device == "cpu":
        kinds, shapes = [torch.float16 if kind is Nf4Weight else torch.float32], [(16 if e4m3 else 48, 80, 20)]
    else:
        kinds, shapes = (
            [torch.bfloat16, torch.float16, torch.float32],
            [(48, 80, 70), (1024, 2048, 3000), (512, 512, 300)],
        )
    for dtype in kinds:
        for n, k, m in shapes:
            packed = kind.quantise(normal(n, k, dtype, device))
            dense = packed.dequantise()
            if e4m3:
                packed, dense = packed.for_e4m3(), Fp8Weight.quantise(dense)
            ours = results(packed, device, dtype, m=m, **call)
            assert all(map(torch.equal, ours, results(dense, device, dtype, m=m, **call)))
            assert all(t.isfinite().all() for t in ours)


@needs_triton
def test_rows_that_several_programs_write(device):
    from lora_fast.kernels import four_bits
    from lora_fast.kernels.nibbles import Stored
    from lora_fast.kernels.operands import run

    def fill(out, scale, packed, absmax, table):
        told = {"low_first": False, "kind": torch.float16, "gain": None, "weak": 0.0}
        return four_bits.by_rows(Stored(packed, absmax, table), out, scale, **told)

    weight = BlockWeight.quantise(normal(16, 2112, torch.float16, device))
    dense = Fp8Weight.quantise(weight.dequantise())
    out = torch.zeros_like(dense.rows)
    run(fill, out=out, scale=dense.row_scale, packed=weight.packed, absmax=weight.absmax, table=weight.table)
    assert torch.equal(out.view(torch.uint8), dense.rows.view(torch.uint8))


@pytest.mark.parametrize("kind", EXACT)
def test_the_reference_is_that_over_the_dense_weight(kind):
    for call in (CALLS[0], CALLS[3]):
        packed = kind.quantise(normal(48, 80))
        dense = results(packed.dequantise(), "cpu", torch.float32, backend="reference", **call)
        assert all(map(torch.equal, results(packed, "cpu", torch.float32, backend="reference", **call), dense))


@needs_triton
@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("base_dtype", ["nf4", "mxfp4"])
def test_two_layers_of_one_model(device, layer, base_dtype):
    """Each product reads its own layer's weight, in whichever memory that is written out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96)).to(device)
    ours = nn.Sequential(*(layer.from_linear(linear, r=4, base_dtype=base_dtype) for linear in net))
    dense = copy.deepcopy(ours)
    for one in (*ours, *dense):
        torch.manual_seed(1)
        nn.init.normal_(one.lora_B)
    for one in dense:
        one.weight = nn.Parameter(one.weight.dequantise(), requires_grad=False)
    x = torch.randn(20, 64, device=device)
    grads = []
    for model in (ours, dense):
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 5 and all(map(torch.equal, *grads))
