"""Chips, and tiles that are given in place of those that are chosen."""

import dataclasses

import pytest
import torch
from accuracy import check, draw
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from fused import fused

from lora_fast.kernels import gemm, operands, pass_tiles, tiles
from lora_fast.kernels.chip import SHARED_MEMORY, Chip, assume
from lora_fast.kernels.tiles import Tile

CPU, HALF = torch.device("cpu"), torch.float16
TINY = Tile(m=16, n=32, k=32, r=16)
CHOICES = [
    (tiles, "product", (4096, 4096), {"kind": HALF, "tma": True, "masked": False, "exact": "tf32"}),
    (tiles, "product_with_s", (256, 4096, 4096), {"masked": False}),
    (pass_tiles, "down", (256, 16), {"kind": HALF, "tma": True, "masked": True}),
    (pass_tiles, "grad", (4096, 4096, 16), {"tma": True, "fused": True, "masked": False, "dora": False}),
    (pass_tiles, "weight", (4096, 16), {"kind": HALF}),
]


def test_a_chip_and_what_follows_from_it():
    assert Chip.of(CPU) == Chip(90, 4), "where the interpreter runs"
    hopper, ada, blackwell = Chip(90, 132), Chip(89, 142), Chip(120, 170)
    assert (hopper.small, ada.small, blackwell.small) == (False, True, True)
    assert (hopper.has_tma, ada.has_tma, blackwell.has_tma) == (True, False, True)
    assert [chip.hopper for chip in (ada, hopper, blackwell)] == [False, True, False]
    assert [Chip(n, 1).shared_memory for n in (87, 103, 121)] == [SHARED_MEMORY[n] for n in (86, 100, 120)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        hopper.processors = 1


def test_an_assumed_chip_decides():
    def large():
        return tiles.product(4096, 4096, dtype=HALF, kind=HALF, chip=Chip.of(CPU), tma=True, masked=True)

    before = large()
    with assume(Chip(100, 148)):
        assert Chip.of(CPU) == Chip(100, 148) and large() != before
        with assume(Chip(80, 108)):
            assert Chip.of(CPU).capability == 80
        assert Chip.of(CPU).capability == 100
    assert large() == before


@pytest.mark.parametrize("module, name, args, others", CHOICES, ids=lambda value: value if type(value) is str else "")
def test_override(module, name, args, others):
    def chosen():
        return getattr(module, name)(*args, dtype=HALF, chip=Chip(90, 132), **others)

    before = chosen()
    with tiles.override(**{name: TINY}):
        assert chosen() == TINY
        with tiles.override(pair=TINY):
            assert chosen() == TINY and pass_tiles.pair(512, 4096, 16, chip=Chip(90, 132), masked=False) == TINY
        assert pass_tiles.pair(512, 4096, 16, chip=Chip(90, 132), masked=False) != TINY
    assert chosen() == before
    assert isinstance(before, Tile) and before != TINY


def test_what_is_none_of_the_kernels_is_no_override():
    with pytest.raises(TypeError, match="no kernel's tile is called produkt"), tiles.override(produkt=TINY):
        pass


@pytest.mark.interpreted
def test_no_program_outlives_its_tiles(monkeypatch):
    planned: list[dict] = []

    def noting(kernel, *args, **given):
        planned.append(given)
        return operands.launch(kernel, *args, **given)

    monkeypatch.setattr(gemm, "launch", noting)
    inputs = draw(40, 64, 48, 16, torch.float32, "cpu")

    def rows_of_products():
        """Of those that are planned for a layer's forward and backward."""
        planned.clear()
        check(fused(), [inputs])
        return {given["BLOCK_M"] for given in planned}

    chosen = rows_of_products()
    assert chosen and not rows_of_products(), "a program is made once"
    with tiles.override(product=Tile(m=32, n=32, k=16)):
        assert rows_of_products() == {32} != chosen
    assert rows_of_products() == chosen
