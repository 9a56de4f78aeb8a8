"""The adapted weight and its gradients: the formula in float64, the fused kernels under the error rule."""

import pytest
import torch
from accuracy import draw

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
