"""tools/search_tiles.py as far as it goes without a GPU: what it tries, how it tells right from wrong, its table."""

import sys

import pytest
import torch
from checkout import ROOT
from devices import GPU, TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

sys.path.insert(0, str(ROOT / "tools"))  # the tool is run as a script, beside tile_work.py

import search_tiles
import tile_work
from tile_work import WAYS, Shape

from lora_fast.kernels import pass_tiles, tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.tiles import Tile

HALF, HOPPER = torch.float16, Chip(90, 132)
SMALL = {
    "product": Tile(m=64, n=32, k=32, stages=2),
    "product_with_s": Tile(m=32, n=32, k=32, stages=2),
    "down": Tile(m=32, k=64, r=16, ways=4),
    "pair": Tile(m=32, n=32),
    "decode": Tile(m=16, n=32, k=32, r=64),
}
EVERY = [(kernel, way) for kernel, ways in WAYS.items() for way in ways]


def small(kernel, way, copies=1):
    return tile_work.work(kernel, way, Shape(13, 72, 80), 8, HALF, "cpu", copies)


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("kernel, way", EVERY)
def test_every_kernel_is_run_and_held_against_torch(kernel, way):
    one = small(kernel, way, copies=2)
    with tiles.override(**{kernel: SMALL[kernel]}):
        made = one.program()
    assert tile_work.tile_of(kernel, made, Chip.of(torch.device("cpu"))) == SMALL[kernel]
    assert one.error(made) < tile_work.TOLERANCE / 4
    one.run(made, 1)
    one.given[0][next(iter(one.given[0]))][3].neg_()  # a row of x or dY
    assert one.error(made) > tile_work.TOLERANCE


@pytest.mark.interpreted
def test_s_apart():
    one = small("product_with_s", "fwd")
    with tiles.override(product_with_s=None):
        made = one.program()
    assert tile_work.tile_of("product_with_s", made, HOPPER) is None
    assert one.error(made) < tile_work.TOLERANCE / 4


def test_what_is_not_written_is_wrong():
    one = small("product", "fwd")
    one.run = lambda made, copy: None
    assert one.error(None) == torch.inf


@pytest.mark.parametrize(
    "kernel, shape, chosen",
    [
        ("product", (1024, 4096, 4096), lambda **_: tiles.product(1024, 4096, kind=HALF, tma=True, **_, masked=False)),
        ("product_with_s", (256, 4096, 4096), lambda **_: tiles.product_with_s(256, 4096, 4096, **_, masked=False)),
        ("down", (8192, 4096, 4096), lambda **_: pass_tiles.down(8192, 16, kind=HALF, tma=True, **_, masked=True)),
        ("down", (256, 4096, 4096), lambda **_: pass_tiles.down(256, 16, kind=HALF, tma=True, **_, masked=False)),
        ("pair", (512, 2048, 2048), lambda chip, **_: pass_tiles.pair(512, 4096, 16, chip=chip, masked=True)),
        ("decode", (128, 14336, 4096), lambda **_: tiles.decode(128, 4096)),
        ("decode", (1, 2048, 2048), lambda **_: tiles.decode(1, 2048)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_candidates(kernel, shape, chosen):
    """Not too many, each once, what is chosen now among them; fewer on a smaller chip."""
    shape = Shape(*shape)
    found = tile_work.candidates(kernel, shape, 16, HOPPER)
    assert 10 < len(found) == len(set(found)) < 160
    assert chosen(dtype=HALF, chip=HOPPER) in found and (None in found) == (kernel == "product_with_s")
    assert len(tile_work.candidates(kernel, shape, 16, Chip(89, 142))) < len(found)
    assert tile_work.refused(kernel, shape, 16, HALF, HOPPER) is None


def test_shapes_that_a_kernel_does_not_take():
    assert "multiples of 8" in tile_work.refused("product", Shape(64, 100, 64), 16, HALF, HOPPER)
    assert "up to 2048" in tile_work.refused("pair", Shape(4096, 64, 64), 16, HALF, HOPPER)
    assert "up to 64 rows" in tile_work.refused("decode", Shape(128, 64, 64), 16, HALF, HOPPER)
    assert "Hopper" in tile_work.refused("decode", Shape(1, 64, 64), 16, HALF, Chip(100, 148))


@pytest.mark.interpreted
def test_search_and_its_table(monkeypatch):
    """Times given: a wrong tile has none, what is chosen now and cuBLAS are shown wherever they stand."""
    good, better = Tile(m=32, n=32, k=32), Tile(m=64, n=32, k=32)
    one, broken = small("product", "fwd"), Tile(m=32, n=32, k=24)  # no power of two
    seen = {}

    def measured(runs, rounds, target_ms):
        seen.update(runs)
        return {name: [8.0 * place] * rounds for place, name in enumerate(sorted(runs, reverse=True), 1)}

    monkeypatch.setattr(search_tiles.timing, "graphed", lambda fn: fn)
    monkeypatch.setattr(search_tiles.timing, "measure", measured)
    rows, failed = search_tiles.search("product", one, [good, better, broken], 3, Chip.of(torch.device("cpu")))
    assert failed == 1 and [row.us for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert [row.name.endswith(", now") for row in rows].count(True) == 1
    assert {row.name for row in rows if not row.now} == {"cuBLAS", "Tile(m=32, n=32, k=32)", "Tile(m=64, n=32, k=32)"}
    seen["cuBLAS"]()
    shown = search_tiles.table(
        [
            search_tiles.Row(2.0, "a", False, 3),
            search_tiles.Row(2.5, "b", False, 0),
            search_tiles.Row(4.0, "c, now", True, 0),
            search_tiles.Row(5.0, "d", False, 0),
            search_tiles.Row(8.0, "cuBLAS", False, 0),
        ],
        top=1,
    )
    assert [line.split() for line in shown] == [
        ["1", "2.00", "us", "0.500", "a", "spills", "3"],
        ["3", "4.00", "us", "1.000", "c,", "now"],
        ["5", "8.00", "us", "2.000", "cuBLAS"],
    ]


@pytest.mark.skipif(GPU, reason="says so only where there is no GPU")
def test_without_a_gpu(capsys):
    assert search_tiles.main(["down", "--shape", "64,64,64"]) == 1
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["down", "--shape", "64,64"], "invalid shape_of value"),
        (["down"], "--shape"),
        (["pair", "--shape", "8,8,8", "--ways", "fwd"], "it has plain, masked"),
        (["pair", "--shape", "8,8,8", "--rank", "12"], "multiple of 8"),
    ],
)
def test_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit):
        search_tiles.main(arguments)
    assert said in capsys.readouterr().err
