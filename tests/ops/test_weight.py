"""The adapted weight and its gradients: the formula in float64, the fused kernels under the error rule."""

from itertools import product

import pytest
import torch
from accuracy import compare, draw
from devices import CPU, CUDA
from torch import nn

from lora_fast import LoRAConfig, dispatch, parametrize
from lora_fast.reference import lora_weight


def leaves(inputs, dora=False, dtype=None):
    m = [1 + torch.arange(len(inputs.weight), device=inputs.weight.device) % 3] if dora else []
    tensors = [inputs.weight, inputs.lora_A, inputs.lora_B, *m]
    return [t.detach().to(dtype or torch.float64).requires_grad_() for t in tensors]


def test_gradcheck():
    """DoRA's norm is no constant to the finite differences: there by hand, in the next test."""
    w, a, b, m = leaves(draw(1, 7, 5, 3, torch.float64), dora=True)
    assert torch.autograd.gradcheck(lambda *t: lora_weight(*t, 0.7), (w, a, b))
    assert torch.autograd.gradcheck(lambda m: lora_weight(w.detach(), a.detach(), b.detach(), 0.7, m), (m,))


def test_gradients_of_dora():
    """As a function of W, A and B whose norm was fixed."""
    w, a, b, m = leaves(draw(1, 7, 5, 3, torch.float64), dora=True)
    norm = torch.linalg.vector_norm(w + 0.7 * b @ a, dim=1).detach()
    grad = torch.randn(5, 7, dtype=torch.float64)
    found = torch.autograd.grad(lora_weight(w, a, b, 0.7, m), (w, a, b, m), grad)
    by_hand = torch.autograd.grad((m / norm)[:, None] * (w + 0.7 * b @ a), (w, a, b, m), grad)
    assert torch.autograd.gradcheck(lambda w, a, b, m: (m / norm)[:, None] * (w + 0.7 * b @ a), (w, a, b, m))
    for one, other in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1, 1), (4, 2, 3, 3)])
def test_shapes_and_dtypes(shape):
    weight = torch.randn(shape, dtype=torch.float16).transpose(0, 1).contiguous().transpose(0, 1)
    n, k = shape[0], weight[0].numel()
    a, b = torch.randn(2, k), torch.randn(n, 2)
    found = lora_weight(weight, a, b, 0.5)
    assert found.shape == weight.shape and found.dtype == torch.float16
    expected = (weight.double().flatten(1) + 0.5 * b.double() @ a.double()).view(shape)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


def test_rows_of_zeros():
    w, a, b, m = leaves(draw(1, 7, 5, 3, torch.float64), dora=True)
    w.data[2], b.data[2] = 0, 0
    result = lora_weight(w, a, b, 0.7, m)
    result.sum().backward()
    assert not result[2].any() and all(torch.isfinite(t.grad).all() for t in (w, a, b, m)) and m.grad[2] == 0


FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = [(45, 70, 3), (96, 64, 16), (5, 9, 1), (16, 24, 40), (33, 130, 70)]
LARGE = [(4096, 4096, 16), (1024, 4096, 64), (1001, 1003, 12), (4097, 2048, 100), (32000, 768, 8), (64, 576, 4)]
# Whether DoRA, and the adapters' dtype if it is another.
KINDS = {"lora": (False, None), "dora-float32": (True, FLOAT), "dora": (True, None), "lora-float32": (False, FLOAT)}
# Interpreted, which is slow, each shape has half of them.
CASES = [
    pytest.param(
        *device.values,
        dtype,
        shape,
        *KINDS[kind],
        marks=device.marks,
        id=f"{device.values[0]}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}-{kind}",
    )
    for device, dtypes, shapes in ((CPU, (FLOAT, HALF), SMALL), (CUDA, (BF16, HALF, FLOAT), SMALL + LARGE))
    for dtype, (i, shape), (j, kind) in product(dtypes, enumerate(shapes), enumerate(KINDS))
    if (device is CUDA or (i + j // 2) % 2 == 0) and (dtype != FLOAT or KINDS[kind][1] is None or device is CUDA)
]


def results(fn, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    w = fn(*tensors[:3], 0.7, *tensors[3:])
    w.backward(grad.to(w.dtype))
    return {"W": w.detach(), **{f"d{name}": t.grad for name, t in zip("wABm", tensors, strict=False)}}


def eager(weight, a, b, scaling, magnitude=None):
    """minLoRA's formula, in the weight's dtype; then as PEFT's DoRA has it."""
    v = weight + scaling * (b.to(weight.dtype) @ a.to(weight.dtype))
    if magnitude is None:
        return v
    norm = torch.linalg.vector_norm(v.detach(), dim=1).to(weight.dtype)
    return (magnitude.to(weight.dtype) / norm)[:, None] * v


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape, dora, adapter", CASES)
def test_kernels(poisoned, device, dtype, shape, dora, adapter):
    from lora_fast.ops.weight import lora_weight as fused

    ours, eagers, truths = [], [], []
    n, k, r = shape
    for seed in range(4 if device == "cpu" else 16 if n * k < 10000 else 1):
        inputs = draw(1, k, n, r, dtype, device, seed, adapter=adapter)
        grad = draw(n, k, 1, 1, dtype, device, seed + 100).x
        m = [torch.rand(n, device=device).to(adapter or dtype) - 0.3] if dora else []
        tensors = [inputs.weight, inputs.lora_A, inputs.lora_B, *m]
        ours.append(results(fused, tensors, grad))
        assert [t.dtype for t in ours[-1].values()] == [dtype, *(t.dtype for t in tensors)]
        eagers.append(results(eager, tensors, grad))
        truths.append(results(lora_weight, [t.double() for t in tensors], grad))
    compare(ours, eagers, truths, dtype)


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", [(7, 5, 3), (40, 70, 70)])
def test_kernels_in_float64(shape, dora):
    from lora_fast.ops.weight import lora_weight as fused

    n, k, r = shape
    tensors = leaves(draw(1, k, n, r, torch.float64), dora)
    grad = torch.randn(n, k, dtype=torch.float64)
    ours, truth = results(fused, tensors, grad), results(lora_weight, tensors, grad)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name])
    if not dora and n == 7:
        assert torch.autograd.gradcheck(lambda *t: fused(*t, 0.7), tensors, fast_mode=True)


@pytest.mark.medium
def test_zero_rows_strides_and_needs(poisoned, device):
    from lora_fast.ops.weight import lora_weight as fused

    tensors = [t.float().detach() for t in leaves(draw(1, 64, 40, 3, FLOAT, device), True)]
    tensors[0][2], tensors[2][2] = 0, 0
    grad = torch.randn(40, 64, device=device)
    truth = results(lora_weight, tensors, grad)
    transposed = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in tensors]
    for inputs, dw in ((tensors, grad), (transposed, grad.t().contiguous().t())):
        for name, t in results(fused, inputs, dw).items():
            torch.testing.assert_close(t, truth[name], rtol=1e-4, atol=1e-4)
    assert not truth["W"][2].any()
    expanded = results(fused, tensors, torch.ones((), device=device).expand(40, 64))
    torch.testing.assert_close(expanded["dm"], results(lora_weight, tensors, torch.ones_like(grad))["dm"])
    for wanted in range(4):  # one gradient alone
        chosen = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        for some in (chosen, chosen[:3]):
            if some[-1] is chosen[3] or wanted < 3:
                fused(*some[:3], 0.7, *some[3:]).backward(grad)
                reference = [t.detach().clone().requires_grad_(t.requires_grad) for t in some]
                lora_weight(*reference[:3], 0.7, *reference[3:]).backward(grad)
                torch.testing.assert_close(chosen[wanted].grad, reference[wanted].grad, rtol=1e-4, atol=1e-4)
                chosen[wanted].grad = None


@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_opcheck_and_compile(device, dora):
    from lora_fast.ops.weight import lora_weight as fused

    tensors = [t.float().detach().requires_grad_() for t in leaves(draw(1, 20, 12, 3, FLOAT, device), dora)]
    magnitude = tensors[3] if dora else None
    torch.library.opcheck(torch.ops.lora_fast.lora_weight, (*tensors[:3], 0.7, magnitude))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    grad = torch.randn(12, 20, device=device)
    ours, again = results(compiled, tensors, grad), results(fused, tensors, grad)
    assert all(torch.equal(ours[name], again[name]) for name in again)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_layers_run_on_them(device, dora, monkeypatch):
    """A Linear, a Conv2d and an Embedding under set_backend("triton"), beside the reference."""
    monkeypatch.setattr(dispatch, "_backend", "triton")
    config = LoRAConfig(r=3, target_modules=".*", use_dora=dora)
    layers = nn.Embedding(9, 18), nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 5)
    model = nn.Sequential(*layers)
    before = model.to(device)(torch.arange(9, device=device))
    parametrize.add_lora(model, config)
    torch.testing.assert_close(model(torch.arange(9, device=device)), before)
    for p in parametrize.get_lora_params(model):
        p.data += 0.3 * torch.randn_like(p)
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setattr(dispatch, "_backend", backend)
        y = model(torch.arange(9, device=device))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in parametrize.get_lora_params(model))])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(dispatch, "_backend", "triton")
    torch.testing.assert_close(parametrize.merge_lora(model)(torch.arange(9, device=device)), y)
