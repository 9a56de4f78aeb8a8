"""What a packed weight says of itself, the kernels' row for it, and how they agree."""

import pytest
import torch
import torch.nn.functional as F

from lora_fast.bases import PACKED
from lora_fast.bases.packed import as_plain, is_opaque, is_packed, rounds_norm
from lora_fast.bases.written import KINDS
from lora_fast.kernels.bases import BASES, PLAIN, Wanted
from lora_fast.kernels.operands import Operand, Scratch

DEVICE = torch.device("cpu")
ALL = PACKED["float8_e4m3"], *KINDS.values()


@pytest.mark.parametrize("kind", ALL)
def test_the_kernels_row_is_that_of_the_weight(kind):
    base = BASES[kind.BASE]
    assert base.tensors == kind.INNER and base.e4m3 == kind.E4M3_PRODUCTS


@pytest.mark.parametrize("kind", ALL)
def test_a_packed_weight_acts_as_its_dense_form(kind):
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(5, 64)
    packed = kind.quantise(weight)
    dense = packed.dequantise()
    assert type(dense) is torch.Tensor and dense.dtype == packed.acts_as == weight.dtype
    assert (dense - weight).norm() <= kind.ROUNDING * weight.norm()
    assert torch.equal(packed + 0, dense) and torch.equal(as_plain(packed), dense)
    assert (F.linear(x, packed) - F.linear(x, dense)).norm() < 0.1 * F.linear(x, dense).norm()
    assert (packed.multiplied() - dense).norm() <= 2**-4 * dense.norm()
    assert packed.is_made_from(weight) and not packed.is_made_from(-weight)
    assert is_packed(packed) and not is_packed(dense) and not is_opaque(packed)
    with pytest.raises(RuntimeError, match=f"an {kind.__name__} is read-only"):
        packed.add_(1)


def test_norms_are_rounded_over_what_peft_rounds_them_over():
    weight = torch.randn(16, 16)
    assert rounds_norm(weight)
    assert all(rounds_norm(kind.quantise(weight)) == kind.ROUNDS_NORM for kind in ALL)


def operands(base):
    """One that is unpacked has a byte for each two of 16 x 16 elements."""
    shape, strides = ((128,), (1,)) if base.unpack_y else ((4, 4), (4, 1))
    return tuple(Operand(i, shape, strides, torch.float32, DEVICE) for i in range(len(base.tensors)))


def wanted(base):
    return Wanted(16, 16, torch.float32, base.room(16, 16, torch.float32, Scratch(DEVICE)))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_products_read_what_a_backward_saves_for_them(base):
    held = operands(base)
    for name, of in (("y", base.y), ("dx", base.dx)):
        saved: list = [None] * len(held)
        read = base.read_by(y=name == "y", dx=name == "dx")
        saved[read] = held[read]
        found = of(saved, wanted(base))
        assert found.matrix is not None and (found.scale is not None) == base.e4m3
        assert bool(found.launches) == (base.unpack_y is not None)
    assert held[base.read_by(y=True, dx=True)] == held and not held[base.read_by(y=False, dx=False)]
    if base.unpack_y is None:
        assert base.y(held[base.for_y], wanted(base)).matrix is held[0]  # as a forward is given them


def test_a_plain_base_is_one_tensor_that_both_products_read():
    (weight,) = operands(PLAIN)
    assert PLAIN.y([weight], wanted(PLAIN)) == PLAIN.dx([weight], wanted(PLAIN)) == (weight, None, ())
