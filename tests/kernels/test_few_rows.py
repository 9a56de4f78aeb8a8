"""Layers of few rows: with every tile, S made with the product or ahead of it; what is wrong in a row stays there."""

import math

import pytest
import torch
from accuracy import check, compare, draw, eager, gradients
from devices import TRITON
from dora_forms import hold, magnitude, plain

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from fused import forgetful, fused, fused_dora, masked

from lora_fast import functional, paths
from lora_fast.kernels import decode, few_rows, layer, magnitudes, pair, tiles

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROWS = {"cpu": (1, 65), "cuda": (1, 2, 17, 63, 64, 65, 127, 256, 511, 1023, 2048)}
CASES = [pytest.param("cpu", HALF, (72, 96, 16), marks=pytest.mark.interpreted)]
CASES += [pytest.param("cpu", HALF, (72, 96, 40), marks=pytest.mark.interpreted)]
LARGE = [(512, 776, 16), (4096, 1024, 8), (1032, 2048, 32), (896, 520, 24), (1024, 776, 64), (520, 1024, 100)]
CASES += [pytest.param("cuda", dtype, shape, marks=pytest.mark.gpu) for dtype in (BF16, HALF) for shape in LARGE]


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.fixture(params=tiles.PRODUCT, ids=lambda tile: f"{tile.m}x{tile.n}")
def tile(request):
    """All products take this tile."""
    with tiles.override(product=request.param):
        yield request.param


@pytest.fixture
def made(monkeypatch):
    """The names of the launches for few rows that were planned."""
    found = set()
    for module in (few_rows, pair, magnitudes, decode):
        honest = module.launch

        def seen(kernel, *args, honest=honest, **given):
            found.add(kernel.fn.__name__)
            return honest(kernel, *args, **given)

        monkeypatch.setattr(module, "launch", seen)
    monkeypatch.setattr(paths, "calls", {})
    return found


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape", CASES, ids=ids)
@pytest.mark.parametrize("p, adapter", [(0.0, None), (0.1, FLOAT), (0.0, FLOAT), (0.1, None)], ids=ids)
def test_error_rule(device, dtype, shape, p, adapter, tile, made):
    if device == "cpu" and shape[2] > 32 and tile != tiles.LEAST:
        pytest.skip("the product makes no S of so many ranks: other tiles make no difference")
    if device == "cpu" and (p > 0) != (adapter == FLOAT):
        pytest.skip("the interpreter is slow; float16 needs copies of the adapters in any case")
    for m in ROWS[device]:
        draws = 16 if device == "cuda" and m < 64 else 2
        check(
            fused(p),
            [masked(draw(m, *shape, dtype, device, seed, bias=m % 2 > 0, adapter=adapter), p) for seed in range(draws)],
        )
    assert "_pair_kernel" in made


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape", CASES, ids=ids)
@pytest.mark.parametrize("p", [0.1, 0.0])
def test_error_rule_of_dora(device, dtype, shape, p, tile, made):
    if device == "cpu" and shape[2] > 32 and tile != tiles.LEAST:
        pytest.skip("see above")
    if device == "cpu" and p == 0:
        pytest.skip("the interpreter is slow")
    for m in ROWS[device]:
        draws = 16 if device == "cuda" and m < 64 else 2
        hold(fused_dora(p), [masked(draw(m, *shape, dtype, device, seed, bias=m % 2 > 0), p) for seed in range(draws)])
    assert {"_pair_kernel", "_dz_kernel"} <= made, "up to 1024 rows"


@pytest.mark.parametrize("dtype", [HALF, pytest.param(BF16, marks=pytest.mark.gpu)])
def test_s_comes_with_the_product(device, dtype, made):
    """Where the adapters need no copies: in bfloat16, which the interpreter cannot multiply, in the forward, too."""
    inputs = draw(40, 64, 48, 16, dtype, device)
    check(fused(), [inputs])
    assert "_few_rows_kernel" in made


DECODED = [
    pytest.param("cpu", HALF, shape, marks=pytest.mark.interpreted)
    for shape in ((1, 64, 96, 8), (17, 1024, 72, 16), (33, 136, 200, 64), (70, 264, 72, 16))
]
DECODED += [
    pytest.param("cuda", dtype, (m, *shape), marks=pytest.mark.gpu)
    for dtype in (BF16, HALF)
    for m in (1, 2, 17, 63, 64)
    for shape in ((2048, 2048, 16), (14336, 4096, 8), (4096, 6152, 40))
]


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape", DECODED, ids=ids)
@pytest.mark.parametrize("adapter", [None, FLOAT], ids=str)
def test_error_rule_without_a_backward(device, dtype, shape, adapter, made):
    """As in decoding: y of few rows, where nothing asks for a gradient."""
    ours, eagers, truths = [], [], []
    for seed in range(2 if device == "cpu" else 4):
        inputs = draw(*shape, dtype, device, seed, bias=seed % 2 > 0, adapter=adapter)
        m = magnitude(inputs)

        def formula(kind, inputs=inputs, m=m):
            x, w, a, b, bias, size = (
                None if t is None else t.to(kind or t.dtype)
                for t in (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, m)
            )
            return {"y": eager(x, w, a, b, bias, 2.0), "dora": plain()(x, w, a, b, size, bias)}

        given = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B
        dora = fused_dora()(inputs)(*given, m, inputs.bias)
        ours.append({"y": fused()(inputs)(*given, inputs.bias), "dora": dora})
        eagers.append(formula(None))
        truths.append(formula(torch.float64))
    compare(ours, eagers, truths, dtype)
    assert "_decode_kernel" in made


@pytest.mark.medium
def test_a_compiled_forward_alone(device, made):
    """The operator knows whether a backward will come, though inside it nothing asks for a gradient."""
    inputs = draw(5, 64, 48, 8, HALF, device)

    def fn(x, a, b):
        return functional.lora_linear(x, inputs.weight, a, b, 2.0, backend="triton")

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]
    y = compiled(*leaves)
    assert "_decode_kernel" not in made
    ours, expected = (torch.autograd.grad(out, leaves, inputs.dy) for out in (y, fn(*leaves)))
    assert all(map(torch.equal, ours, expected))
    with torch.no_grad():
        assert torch.allclose(compiled(*leaves), y, rtol=1e-2, atol=1e-2)
    assert "_decode_kernel" in made


def test_a_nan_stays_in_its_row(device):
    inputs = draw(130, 72, 136, 8, HALF, device)
    clean = gradients(fused()(inputs), inputs)
    inputs.x[17], inputs.dy[17] = math.nan, math.nan
    ours, others = gradients(fused()(inputs), inputs), torch.arange(130) != 17
    for name in ("y", "dx"):
        assert ours[name][17].isnan().all() and torch.equal(ours[name][others], clean[name][others])


@pytest.mark.parametrize("dtype", [HALF, pytest.param(BF16, marks=pytest.mark.gpu)])
def test_checkpoint_of_a_layer(device, dtype):
    """The second forward ends when all is saved, without the product of its last layer, unless that makes S."""
    inputs = draw(40, 64, 48, 16, dtype, device)
    plain = gradients(fused()(inputs), inputs)

    def fn(*args):
        return torch.utils.checkpoint.checkpoint(fused()(inputs), *args, use_reentrant=False)

    ours = gradients(fn, inputs)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["product", "product_with_s"])
def test_mutants_fail(device, name, monkeypatch):
    """Products that forget the low-rank term, with a B so small that nothing else shows it."""
    dtype = HALF if device == "cpu" else BF16
    adapter = FLOAT if name == "product" else None  # whose copies the launch that makes S ahead of it makes, too
    inputs = draw(40, 64, 48, 16, dtype, device, adapter=adapter, b_std=0.002)
    monkeypatch.setattr(layer, name, forgetful(getattr(layer, name)))
    monkeypatch.setattr(paths, "calls", {})
    with pytest.raises(AssertionError, match="error too large"):
        check(fused(), [inputs])
