"""A base that no product can read as it is: its launch writes the weight into the program's memory first. W / 2 stands
for fewer bits."""

import pytest
import torch
import triton
import triton.language as tl

from lora_fast.bases.packed import PackedWeight, as_plain
from lora_fast.functional import dora_linear, lora_linear
from lora_fast.kernels import bases
from lora_fast.kernels.common import wait_for_stream
from lora_fast.kernels.operands import Operand, launch


@triton.jit
def _double_kernel(half_ptr, out_ptr, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_stream(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(half_ptr + i, mask=i < SIZE), mask=i < SIZE)


def unpack(held, wanted):
    (half,) = held
    (n, k), out = half.shape, wanted.room.seen_as(half.shape, wanted.kind)
    made = launch(
        _double_kernel, (triton.cdiv(n * k, 1024),), {}, half, half_ptr=half, out_ptr=out, SIZE=n * k, BLOCK=1024
    )
    return bases.Read(out, launches=[made])


class Halves(PackedWeight):
    INNER, BASE, LABEL = ("half",), "halves", "halved"
    ROUNDING, E4M3_PRODUCTS, ROUNDS_NORM = 0.0, False, True

    @staticmethod
    def __new__(cls, half, dtype):
        return cls.hold(half.shape, dtype, half)

    @classmethod
    def quantise(cls, weight):
        return cls(weight / 2, weight.dtype)

    def dequantise(self, dtype=None):
        return (2 * self.half).to(dtype or self.dtype)


def results(weight, magnitude, bias, p, x_grad, device):
    torch.manual_seed(0)
    shapes = (70, 48), (3, 48), (40, 3), (40,), (40,), (70, 40)
    x, a, b, m, offset, dy = (torch.randn(*shape, device=device) for shape in shapes)
    leaves = [a, b, *([x] if x_grad else []), *([m] if magnitude else []), *([offset] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    options = {"bias": offset if bias else None, "dropout_p": p, "backend": "triton"}
    y = dora_linear(x, weight, a, b, m, 2.0, **options) if magnitude else lora_linear(x, weight, a, b, 2.0, **options)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.medium
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("bias, p", [(False, 0.0), (True, 0.5)])
@pytest.mark.parametrize("magnitude", [False, True])
def test_the_same_bits_as_over_the_dense_weight(device, magnitude, bias, p, x_grad, monkeypatch):
    row = bases.Base("halves", ("half",), for_y=slice(1), for_dx=slice(1), unpack_y=unpack, unpack_dx=unpack)
    monkeypatch.setitem(bases.BASES, "halves", row)
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).to(device)
    ours = results(Halves.quantise(weight), magnitude, bias, p, x_grad, device)
    dense = results(weight, magnitude, bias, p, x_grad, device)
    assert all(map(torch.equal, ours, dense))


def test_acts_as_its_dense_form():
    weight = torch.randn(3, 4)
    packed = Halves.quantise(weight)
    assert torch.equal(packed @ weight.t(), weight @ weight.t())
    moved = packed.to(torch.bfloat16)
    assert type(moved) is Halves and moved.dtype == torch.bfloat16
    packed.copy_(-weight)
    assert torch.equal(as_plain(packed), -weight)


@pytest.mark.parametrize("name", [name for name, base in bases.BASES.items() if base.unpack_y])
def test_no_number_of_rows_is_too_many(name):
    """A grid has 65535 programs on its second axis, and a vocabulary or the experts of a layer have more rows."""

    def operand(*shape, kind=torch.uint8):
        strides = tuple(torch.empty(shape, device="meta").stride())
        return Operand(0, shape, strides, kind, torch.device("cpu"))

    base, n, k, wide = bases.BASES[name], 2**22, 2048, torch.float32
    shapes = {"stored": (n, k), "scale": (n // 128, k // 128), "packed": (n * k // 2,), "absmax": (n * k // 64,)}
    shapes |= {"row_scale": (n,), "col_scale": (k,), "table": (16,)}
    kinds = {"stored": torch.uint8, "packed": torch.uint8}
    held = [operand(*shapes.get(tensor, (1,)), kind=kinds.get(tensor, wide)) for tensor in base.tensors]
    wanted = bases.Wanted(n, k, torch.bfloat16, operand(2 * n * k))
    for read in (base.y(held, wanted), base.dx(held, wanted)):
        (made,) = read.launches
        assert max(made.grid[1:]) <= 65535 and made.grid[0] < 2**31
