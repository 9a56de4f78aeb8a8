"""float16 ends at 65504: what stock LoRA keeps below it, the layers keep below it, too."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, draw, gradients
from devices import CPU, CUDA, TRITON

import lora_fast
from lora_fast import functional, reference
from lora_fast.fp8 import Fp8Weight

HALF, FLOAT = torch.float16, torch.float32
WAYS = [pytest.param("cpu", "reference", id="reference")]
if TRITON:
    WAYS += [pytest.param(*way.values, "triton", marks=way.marks, id=f"{way.values[0]}-kernels") for way in (CPU, CUDA)]
SHAPES = [(5, 24, 16, 3), (17, 64, 40, 16), (70, 48, 96, 40)]
LARGE = [(1024, 1024, 2048, 16), (4096, 1024, 520, 200)]


def massive(shape, device, adapter=HALF, b_std=0.3, scaling=32.0, seed=0):
    """Inputs with an activation of 30000 in some rows, whose S with all of the scaling is beyond float16."""
    inputs = draw(*shape, HALF, device, seed, adapter=adapter, b_std=b_std)
    inputs.scaling = scaling
    inputs.x[::3, 5] = 30000
    inputs.weight[:, 5] *= 2**-6
    inputs.lora_A[:, 5] = 0.2 * inputs.lora_A[:, 5].sign()
    inputs.lora_B[:] /= 64
    inputs.dy[:] /= 1024
    return inputs


CALLS = [(32.0, HALF, False), (32.0, FLOAT, True), (5.3, FLOAT, False), (0.7, HALF, True), (-24.0, FLOAT, False)]


@pytest.mark.medium
@pytest.mark.parametrize("scaling, adapter, as_tensor", CALLS)
@pytest.mark.parametrize("device, backend", WAYS)
def test_massive_activations(device, backend, scaling, adapter, as_tensor):
    """y and all gradients are as near to float64's as those of torch with the scaling last."""

    def fn(inputs):
        s = torch.tensor(inputs.scaling, device=device) if as_tensor else inputs.scaling
        return lambda x, w, a, b, bias: functional.lora_linear(x, w, a, b, s, bias, backend=backend)

    for shape in SHAPES + (LARGE if device == "cuda" else []):
        draws = [massive(shape, device, adapter, scaling=scaling, seed=seed) for seed in range(2)]
        s = F.linear(draws[0].x, draws[0].lora_A.half())
        assert s.isfinite().all() and (abs(scaling) < 24) == (s * scaling).isfinite().all()
        assert all(t.isfinite().all() for t in gradients(fn(draws[0]), draws[0]).values())
        check(fn, draws)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("device, backend", WAYS)
def test_a_fresh_adapter_is_the_base(device, backend, dora, dropout):
    """With B = 0 nothing is added, however large S would be."""
    for shape in SHAPES:
        inputs = massive(shape, device, FLOAT, b_std=0.0, scaling=64.0)
        norm = reference.dora_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 64.0)

        def fn(x, w, a, b, bias, norm=norm):
            if dora:
                return functional.dora_linear(x, w, a, b, norm, 64.0, bias, dropout_p=dropout, backend=backend)
            return functional.lora_linear(x, w, a, b, 64.0, bias, dropout_p=dropout, backend=backend)

        found = gradients(fn, inputs)
        torch.testing.assert_close(found["y"], F.linear(inputs.x, inputs.weight, inputs.bias), rtol=2e-3, atol=1e-2)
        assert all(t.isfinite().all() for t in found.values()) and found["dB"].any()


@pytest.mark.parametrize("round_norm", [False, True])
@pytest.mark.parametrize("device, backend", WAYS)
def test_dora(device, backend, round_norm):
    """z, the norm (of W plus all of scaling * B A) and dm."""
    for shape in SHAPES + (LARGE if device == "cuda" else []):
        inputs = massive(shape, device, FLOAT)
        given = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B
        norm = reference.dora_norm(*(t.double() for t in given[1:]), inputs.scaling)
        magnitude = (0.9 * norm).float().requires_grad_()
        x, w, a, b = (t.clone().requires_grad_(t is not inputs.weight) for t in given)
        y = functional.dora_linear(x, w, a, b, magnitude, inputs.scaling, round_norm=round_norm, backend=backend)
        y.backward(inputs.dy)
        leaves = x, w, a, b, magnitude
        double = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        truth = reference.dora_linear(*double, inputs.scaling)
        truth.backward(inputs.dy.double())
        assert y.isfinite().all()
        for ours, exact in [(y, truth), *((leaves[i].grad, double[i].grad) for i in (0, 2, 3, 4))]:
            assert (ours.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("device, backend", WAYS)
def test_over_fp8_and_under_autocast(device, backend):
    inputs = massive(SHAPES[1], device, FLOAT)
    weight = Fp8Weight.quantise(inputs.weight)
    args = inputs.lora_A, inputs.lora_B, inputs.scaling
    y = functional.lora_linear(inputs.x, weight, *args, backend=backend)
    truth = reference.lora_linear(inputs.x.double(), inputs.weight.double(), *(t.double() for t in args[:2]), 32.0)
    assert y.isfinite().all() and (y.double() - truth).norm() < 0.05 * truth.norm()
    if backend == "reference" and device == "cpu":
        return  # torch's autocast on the CPU has no float16 on all processors
    with torch.autocast(device, HALF):
        y = functional.lora_linear(inputs.x.float(), inputs.weight.float(), *args, backend=backend)
    assert y.dtype == HALF and (y.double() - truth).norm() < 4e-3 * truth.norm()


@pytest.mark.parametrize("device, backend", WAYS)
def test_huge_and_tiny_scalings(device, backend):
    """Whatever the scaling, a power of two of it is what B carries: nothing is rounded that was not."""
    for scaling in (1e-3, 1.0, 2.0, 1024.0):
        inputs = draw(17, 64, 40, 16, HALF, device)
        inputs.scaling = scaling
        inputs.lora_B[:] /= scaling

        def fn(given):
            return lambda x, w, a, b, bias: functional.lora_linear(x, w, a, b, given.scaling, bias, backend=backend)

        check(fn, [inputs])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("device, backend", WAYS[:2])
def test_models_that_peft_made(device, backend, use_dora):
    """Patched, they give what stock PEFT gives, which is finite; so do layers of ours with the same adapters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(device, HALF)
    config = peft.LoraConfig(r=4, lora_alpha=128, target_modules=["0"], use_dora=use_dora)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    x = torch.randn(6, 64, device=device, dtype=HALF)
    x[::2, 5] = 30000
    layer = model.base_model.model[0]
    layer.base_layer.weight.data[:, 5] *= 2**-6
    layer.lora_A["default"].weight.data[:, 5] = 0.2
    own = (lora_fast.DoRALinear if use_dora else lora_fast.LoRALinear).from_linear(layer.base_layer, 4, 128)
    own.lora_A.data.copy_(layer.lora_A["default"].weight)
    if use_dora:
        layer.lora_magnitude_vector["default"].weight.data.copy_(layer.base_layer.weight.float().norm(dim=1))
        own.reset_magnitude()
    expected = model(x)
    assert expected.isfinite().all() and not (32 * layer.lora_A["default"](x)).isfinite().all()
    lora_fast.set_backend(backend)
    lora_fast.patch_peft(model)
    for y in (model(x), own(x)):
        torch.testing.assert_close(y, expected, rtol=4e-3, atol=4e-2)
