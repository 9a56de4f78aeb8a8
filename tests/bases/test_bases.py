"""What a packed weight says of itself, the kernels' row for it, and how they agree."""

import pytest
import torch
import torch.nn.functional as F

from lora_fast.bases import PACKED
from lora_fast.bases.packed import as_plain, is_opaque, is_packed, rounds_norm
from lora_fast.kernels.bases import BASES, PLAIN
from lora_fast.kernels.operands import Operand, Scratch

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("kind", PACKED.values())
def test_the_kernels_row_is_that_of_the_weight(kind):
    base = BASES[kind.BASE]
    assert base.tensors == kind.INNER and base.e4m3 == kind.E4M3_PRODUCTS


@pytest.mark.parametrize("kind", PACKED.values())
def test_a_packed_weight_acts_as_its_dense_form(kind):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(5, 64)
    packed = kind.quantise(weight)
    dense = packed.dequantise()
    assert type(dense) is torch.Tensor and dense.dtype == packed.acts_as == weight.dtype
    assert ((dense - weight).abs() <= kind.ROUNDING * weight.abs()).float().mean() > 0.99
    assert torch.equal(packed + 0, dense) and torch.equal(as_plain(packed), dense)
    assert (F.linear(x, packed) - F.linear(x, dense)).norm() < 0.1 * F.linear(x, dense).norm()
    assert packed.is_made_from(weight) and not packed.is_made_from(-weight)
    assert is_packed(packed) and not is_packed(dense) and not is_opaque(packed)
    with pytest.raises(RuntimeError, match=f"an {kind.__name__} is read-only"):
        packed.add_(1)


def test_norms_are_rounded_over_what_peft_rounds_them_over():
    weight = torch.randn(8, 8)
    assert rounds_norm(weight)
    assert all(rounds_norm(kind.quantise(weight)) == kind.ROUNDS_NORM for kind in PACKED.values())


def operands(base):
    return tuple(Operand(i, (4, 4), (4, 1), torch.float32, DEVICE) for i in range(len(base.tensors)))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_products_read_what_a_backward_saves_for_them(base):
    held = operands(base)
    for name, of in (("y", base.y), ("dx", base.dx)):
        saved: list = [None] * len(held)
        read = base.read_by(y=name == "y", dx=name == "dx")
        saved[read] = held[read]
        found = of(saved, Scratch(DEVICE))
        assert found.matrix is not None and (found.scale is not None) == base.e4m3 and not found.launches
    assert held[base.read_by(y=True, dx=True)] == held and not held[base.read_by(y=False, dx=False)]
    assert base.y(held[base.for_y], Scratch(DEVICE)).matrix is held[0]  # as a forward is given them


def test_a_plain_base_is_one_tensor_that_both_products_read():
    (weight,) = operands(PLAIN)
    assert PLAIN.y([weight], Scratch(DEVICE)) == PLAIN.dx([weight], Scratch(DEVICE)) == (weight, None, ())
