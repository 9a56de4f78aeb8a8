"""Tiles of the kernels for experts: see kernels/tiles.py. Times are in microseconds on an H200, for Qwen3-30B-A3B's
experts (H 2048, I 768, E 128, k 8), 4096 tokens, 16 ranks, where nothing else is said."""

import torch
import triton

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.tiles import Tile, choice

CHUNK = 512  # rows of an expert that a program of a pass by columns takes: balanced experts of 128 have fewer


@choice
def experts_product(n: int, c: int, *, dtype: torch.dtype, chip: Chip, tma: bool) -> Tile:
    """A product over experts [., N], contracted over C. Its rows are those of the table of tiles, so the same whatever
    n and c are. Tiles of 64 rows read too much from L2, though an expert's last tile is half empty: +4 to 8%."""
    if dtype.itemsize > 2:
        return Tile(m=64, n=64, k=32, warps=8)
    if chip.small or not tma:
        return Tile(m=128, n=128, k=32, warps=8)  # what fits 100 KB, and loads by pointers
    if min(n, c) <= 1024 and not chip.newer:  # two programs a processor: 253 -> 227 for the down product
        return Tile(m=128, n=128, k=64, fill=2.0)
    return Tile(m=128, n=256, k=64, warps=8, stages=4)  # four stages: 1 to 3% less than three


@choice
def experts_rows(c: int, ranks: int, *, dtype: torch.dtype) -> Tile:
    """P = s X A_e^T, and the gathered X: m rows a program, k of X's c columns a step. With 32 rows 2.6 times slower."""
    if dtype.itemsize > 2:
        return Tile(m=32, k=64, r=ranks, stages=2)
    if c % 8 and ranks > 16:  # loads of single elements: more spill
        return Tile(m=32, k=64, r=ranks, stages=2)
    return Tile(m=64, k=128, r=ranks, stages=3 if ranks <= 16 else 2)


@choice
def experts_gate(i: int, *, backward: bool, interleaved: bool) -> Tile:
    """Elementwise: m rows, n of I's columns. Backward 16 rows would take 86 for 75, of gpt-oss-20b's, which are
    interleaved, 8 rows 163 for 152."""
    columns = min(256, max(16, triton.next_power_of_2(i)))
    return Tile(m=16 if not backward else 4 if interleaved else 8, n=columns)


@choice
def experts_columns(c: int, ranks: int, *, dtype: torch.dtype, chip: Chip, low: bool) -> Tile:
    """G_e = X^T P over a chunk of rows: m rows a step, n columns a program. ``low``: parts of X Q_e are made on the
    way, as many as there are programs along the columns."""
    columns = min(256 if low else 128, max(16, triton.next_power_of_2(c)))
    if dtype.itemsize > 2 or chip.small or not chip.has_tma or (c % 8 and ranks > 16):  # what fits registers
        return Tile(m=32, n=min(columns, 64), r=ranks, stages=2)
    if low and ranks > 16:
        return Tile(m=64, n=columns, r=ranks, warps=8, stages=2)
    return Tile(m=64, n=columns, r=ranks)
