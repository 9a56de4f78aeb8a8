"""Weights as fp8 checkpoints hold them: their numbers against an oracle that reads byte by byte, and a layer over one
against the layer over its dense form, bit for bit."""

import pytest
import torch
from base_calls import CALLS, FORMS, needs_triton, normal, results, scaled
from crossed import crossed

from lora_fast.bases.scaled import E8M0, ScaledFp8Weight
from lora_fast.fp8 import E4M3, Fp8Weight


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


@pytest.mark.medium
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
            ours, dense = (t.view(torch.uint8) for t in (written(weight, dtype), weight.dequantise(dtype)))
            assert torch.equal(ours, dense), (n, k, dtype)  # the signs of zeros, too


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


@needs_triton
@pytest.mark.medium
@pytest.mark.parametrize(
    "device, e4m3, form, call",
    crossed(
        [
            *((False, form, call) for form, call in zip(FORMS, range(4), strict=True)),
            *((True, form, call) for form, call in zip(FORMS, (4, 5, 6, 3), strict=True)),
        ],
        (False, True),
        FORMS,
        range(len(CALLS)),
    ),
)
@pytest.mark.usefixtures("poisoned")
def test_a_layer_has_the_bits_of_one_over_the_dense_weight(device, e4m3, form, call):
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
            ours = results(packed, device, dtype, m=m, **CALLS[call])
            assert all(map(torch.equal, ours, results(dense, device, dtype, m=m, **CALLS[call])))
            assert all(t.isfinite().all() for t in ours)


@needs_triton
@pytest.mark.medium
def test_rows_of_zeros_and_no_rows_of_x(device):
    for form in FORMS:
        packed = scaled(form, 48, 80, device=device)
        packed.stored[::3] = 0
        for call in (CALLS[0], CALLS[3]) if device == "cuda" else (CALLS[3 * (form in FORMS[::2])],):
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
    for call in (CALLS[0], CALLS[3]) if device == "cuda" else (CALLS[3 * (form == "float32")],):
        ours = results(packed.for_e4m3(), device, torch.float32, m=20, **call)
        for one, other in zip(ours, results(packed.dequantise(), device, torch.float32, m=20, **call), strict=True):
            assert (one - other).norm() <= 0.06 * other.norm()
