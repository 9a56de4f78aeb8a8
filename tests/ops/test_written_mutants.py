"""Faults that writing a packed weight out could have: each is seen by the comparison, bit for bit, with the layer over
the dense weight, at the size of its tests."""

from dataclasses import replace

import pytest
import torch
from base_calls import CALLS, needs_triton, normal, results

from lora_fast.bases.four_bits import BlockWeight, Nf4Weight
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.fp8 import Fp8Weight

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]
CALL = CALLS[0]  # all gradients


def other_nibbles(base, monkeypatch):
    from lora_fast.kernels import bases

    wrong = bases._four_bits(low_first=not base.name.startswith("mxfp4"))
    exact, eight = wrong.bases(base.name.removesuffix("_e4m3"), base.tensors[base.e4m3 : len(base.tensors) - base.e4m3])
    return eight if base.e4m3 else exact


def the_next_blocks_scale(base, monkeypatch):
    """Of blocks twice as large: from the second on each has another one's."""
    from lora_fast.kernels import four_bits

    right = four_bits._blocks
    monkeypatch.setattr(four_bits, "_blocks", lambda *given: {**right(*given), "BLOCK": 2 * right(*given)["BLOCK"]})
    return base


def stale(base, monkeypatch):
    """dX reads what happens to lie where W should have been written."""

    def unwritten(held, wanted):
        return base.unpack_dx(held, wanted)._replace(launches=())

    return replace(base, unpack_dx=unwritten)


def other_scales(base, monkeypatch):
    """fp8's scales, block after block along the columns of blocks instead of along the rows."""
    from lora_fast.kernels import block_scales

    monkeypatch.setattr(block_scales, "BLOCK", 64)
    return base


MUTANTS = [
    (other_nibbles, Nf4Weight, False),
    (the_next_blocks_scale, BlockWeight, False),
    (stale, Nf4Weight, True),
    (other_scales, ScaledFp8Weight, False),
]


@pytest.mark.medium
@pytest.mark.parametrize("mutant, kind, e4m3", MUTANTS)
def test_mutants_fail(device, mutant, kind, e4m3, monkeypatch):
    from lora_fast import functional
    from lora_fast.kernels import bases
    from lora_fast.kernels.program import forget_programs

    n, k = (144, 160) if kind is ScaledFp8Weight else (48, 80)
    packed = kind.quantise(normal(n, k, torch.float32, device))
    dense = packed.dequantise()
    if e4m3:
        packed, dense = packed.for_e4m3(), Fp8Weight.quantise(dense)
    expected = results(dense, device, torch.float32, m=20, **CALL)
    name = packed.BASE
    with monkeypatch.context() as within:
        within.setattr(functional, "_calls", {})
        within.setitem(bases.BASES, name, mutant(bases.BASES[name], within))
        forget_programs()
        found = results(packed, device, torch.float32, m=20, **CALL)
    forget_programs()
    assert not all(map(torch.equal, found, expected))
    assert all(map(torch.equal, results(packed, device, torch.float32, m=20, **CALL), expected))


def test_a_fused_multiply_add_of_the_nested_scales_is_seen():
    """One rounding in the place of two: other scales, in a large weight other elements, in 16 bits, too."""
    weight = Nf4Weight.quantise(normal(1024, 4096, torch.bfloat16))
    exact = weight.code2.double()[weight.absmax.int()] * weight.absmax2.double()[weight.blocks() // 256]
    fused = (exact + weight.offset.double()).float()  # of 24 bits by 24: exact in float64
    assert 0.001 < (fused != weight.scales()).float().mean() < 0.5
    mutant = BlockWeight(weight.packed, fused, weight.table, shape=weight.shape, dtype=weight.dtype)
    assert (mutant.dequantise() != weight.dequantise()).any()
