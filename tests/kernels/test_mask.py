"""Dropout masks: their rate, their independence, and that forward and backward read the same one."""

import math

import pytest
import torch
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.functional import lora_linear
from lora_fast.kernels import down, gemm, passes
from lora_fast.kernels.mask import keep_count, keep_scale, mask_bits, unpack

pytestmark = pytest.mark.usefixtures("poisoned")


def drawn(device, p, m=200, k=1000, seed=1):
    return unpack(mask_bits(torch.tensor([seed], device=device), p, m, k), k)


def correlation(a, b):
    """Between two sets of bits, in standard deviations of what independent ones give."""
    a, b = (t.flatten().double() - t.double().mean() for t in (a, b))
    return ((a * b).sum() / (a.norm() * b.norm())).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_rate(device, p):
    keep = drawn(device, p)
    sigma = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(keep.double().mean().item() - 1 / keep_scale(p)) < 5 * sigma


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rates_of_rows_columns_and_bits(device, p):
    """Each row, column and bit of a word has the rate, with the spread of independent draws (chi-square)."""
    keep = drawn(device, p, 320, 992).double()
    q = 1 / keep_scale(p)
    for counts, each in ((keep.sum(0), 320), (keep.sum(1), 992), (keep.view(320, 31, 32).sum((0, 1)), 320 * 31)):
        chi = ((counts - q * each) ** 2 / (q * (1 - q) * each)).sum().item()
        freedom = counts.numel()
        assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(device, p):
    keep = drawn(device, p)
    for shift in (1, 2, 3, 4, 31, 32, 64, 128, 512):
        assert abs(correlation(keep[:, shift:], keep[:, :-shift])) < 5, f"columns {shift} apart"
    for shift in (1, 2, 4, 8, 16, 64, 128):
        assert abs(correlation(keep[shift:], keep[:-shift])) < 5, f"rows {shift} apart"
    for seed in (0, 2, 1 + 2**32, 1 - 2**63):
        assert abs(correlation(keep, drawn(device, p, seed=seed))) < 5, f"seeds 1 and {seed}"


def test_a_seed_gives_its_bits_again(device):
    assert torch.equal(drawn(device, 0.3, 20), drawn(device, 0.3, 20))
    assert not torch.equal(drawn(device, 0.3, 20), drawn(device, 0.3, 20, seed=2))
    seeds = [7, 7 + 2**32, 7 + 2**63 - 2**64]  # the high half counts too
    assert len({tuple(drawn(device, 0.5, 2, 64, seed).flatten().tolist()) for seed in seeds}) == 3


def test_no_elements(device):
    assert mask_bits(torch.tensor([1], device=device), 0.5, 0, 40).shape == (0, 2)
    assert unpack(mask_bits(torch.tensor([1], device=device), 0.5, 0, 40), 40).shape == (0, 40)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.001, 0.1, 0.3, 0.5, 0.75, 0.999, 1 - 1e-9])
def test_the_rate_is_near_p_and_never_all_or_nothing(p):
    unit = 0.5 / keep_count(0.5)  # of probability
    kept = 1 / keep_scale(p)
    assert kept == keep_count(p) * unit
    assert 0 < kept < 1 and unit <= 2**-12
    assert abs(kept - (1 - p)) <= (unit / 2 if unit <= p <= 1 - unit else unit)


def test_unpack():
    bits = torch.tensor([[1, -(2**31)], [6, 0]], dtype=torch.int32)
    assert unpack(bits, 64).nonzero().tolist() == [[0, 0], [0, 63], [1, 1], [1, 2]]
    assert unpack(bits, 40).shape == (2, 40)


@pytest.mark.parametrize("k", [48, 45, 288])
def test_every_kernel_reads_the_same_mask(device, k):
    """down, dA and the dX product, each probed so that it returns the mask itself."""
    m, p = 20, 0.5
    bits = mask_bits(torch.tensor([3], device=device), p, m, k)
    keep = unpack(bits, k).float()
    eye = torch.eye(k, device=device)
    ones = torch.ones(m, k, device=device)
    s = down.down_fwd(ones, eye, 1.0, bits, 2.0)
    assert torch.equal(s[:, :k], 2 * keep)
    grad_a = torch.empty(m, k, device=device)
    passes.a_bwd(ones, torch.eye(m, 32, device=device), grad_a, bits)
    assert torch.equal(grad_a, keep)
    first = torch.zeros(m, 16, device=device)
    first[:, 0] = 1
    q = torch.ones(1, k, device=device)
    dx = gemm.gemm(
        torch.zeros(m, 8, device=device), torch.zeros(8, k, device=device), first, q, transposed=False, bits=bits
    )
    assert torch.equal(dx, keep)


def test_a_seed_is_a_tensor_or_a_number(device):
    number = 2**62 + 12345
    one, other = mask_bits(torch.tensor([number], device=device), 0.3, 9, 70), mask_bits(number, 0.3, 9, 70, device)
    assert torch.equal(one, other)
    assert not torch.equal(one, mask_bits(number + 1, 0.3, 9, 70, device))


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_the_operator_uses_one_mask(device, p):
    """The same through the operator, with square adapters of ones and zeros: y, dX and dA are all the mask itself."""
    n = 48
    eye, scale = torch.eye(n, device=device), keep_scale(p)
    leaves = [t.requires_grad_() for t in (torch.ones(n, n, device=device), eye.clone(), eye.clone())]

    def run(dy):
        torch.manual_seed(0)
        weight = torch.zeros(n, n, device=device)
        y = lora_linear(leaves[0], weight, *leaves[1:], 1.0, dropout_p=p, backend="triton")
        return y.detach(), *torch.autograd.grad(y, leaves[:2], dy)

    y, dx, _ = run(torch.ones(n, n, device=device))
    _, _, grad_a = run(eye)
    keep = y > 0
    assert abs(keep.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p)) / n
    for found in (y, dx, grad_a):
        torch.testing.assert_close(found, keep * scale)
