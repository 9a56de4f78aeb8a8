"""Tiles of the passes over x (S, dA), over dY (dS, dB and the sums) and over W (norms, adapted weights): see tiles.py.
Times are in microseconds, where nothing else is said on an H100 for 8192 x 4096 and 16 ranks."""

from dataclasses import replace

import torch
import triton

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.tiles import FEW, Tile, choice, few_rows, rank_block


def casts_first(m: int, r: int, *, dtype: torch.dtype, masked: bool) -> bool:
    """Whether adapters are cast by a launch of their own, ahead of S = drop(x) A^T: many ranks in the wrong dtype, or
    few beside a mask, hold that up for longer than the launch takes (r = 64: 34 -> 26, r = 384: 162 -> 45)."""
    return m > 2048 and (r > 32 or masked) and dtype.itemsize <= 2


@choice
def down(
    m: int,
    r: int,
    *,
    dtype: torch.dtype,
    kind: torch.dtype,
    chip: Chip,
    tma: bool,
    masked: bool,
    quantised: bool = False,
    parts: bool = True,
) -> Tile:
    """S = x A^T: m rows a program, which walks over K with up to 128 ranks in its accumulator. ``kind`` is A's dtype.
    ``quantised``: where ``down_quantised`` starts from. ``parts``: whether programs may have some of r each."""
    column = kind.itemsize * rank_block(r, 32)  # bytes of a column of A's tile: more spills, on newer chips sooner
    roomy, narrow = tma and not chip.small and dtype.itemsize <= 2, kind.itemsize <= 2
    if (
        tma
        and not quantised
        and column <= (32 if chip.newer else 64)
        and (few_rows(m, r, dtype=dtype, chip=chip, most=4096 if masked else 2048))
    ):
        if m > 2048:  # under a mask: 21 -> 12, 4096 x 4096, H200
            return Tile(m=32, k=128, r=rank_block(r, 32), ways=4)
        # 256 x 4096: 8.7 -> 4.5, 256 x 14336: 27 -> 10, H200; with 64 along K it is three times slower.
        return Tile(m=16, k=256 if column <= 32 else 128, r=rank_block(r, 32), ways=4)
    if parts and m <= 1024 and r > 32 and roomy and narrow and not quantised and not chip.newer:
        # 512 x 4096 10.5 -> 7.8, 1024 x 8192 19 -> 14, r = 128 11.0 -> 6.9, H200; of 2048 rows it is worse.
        return Tile(m=16, k=128, r=32, stages=4, ways=4)
    block_r = rank_block(r, 128 if dtype.itemsize <= 2 else 64)
    if block_r == 128:
        if not roomy:
            return Tile(m=64, k=32, r=128, warps=8)  # what fits
        if not narrow:
            return Tile(m=128, k=64, r=128, warps=8)  # float32 adapters, cast in the loop
        if r <= 128:
            return Tile(m=64, k=128, r=128, stages=4)  # 40 -> 27, A through a descriptor
        return Tile(m=64, k=64, r=128)  # several programs for the same rows
    if block_r == 64:
        if not roomy:
            if dtype.itemsize > 2 and (chip.small or not chip.has_tma):  # with more it spills
                return Tile(m=32, k=32, r=64)
            return Tile(m=64, k=64, r=64, warps=8 if chip.capability >= 120 else 4, stages=3 if chip.small else 4)
        if narrow and not chip.newer:
            return Tile(m=64, k=256, r=64)
        return Tile(m=64, k=128, r=64, stages=3 if masked and m > 2048 else 4)
    if not roomy:
        block_m, block_k = 64 if m > 2048 else 16, 64 if dtype.itemsize <= 2 else 32
        return Tile(m=block_m, k=block_k, r=block_r, stages=3 if chip.small else 4)
    if m <= 2048:
        return Tile(m=16, k=256, r=block_r, stages=4)  # few rows: more programs
    if not masked:
        return Tile(m=64, k=256, r=block_r, stages=4)
    if block_r == 16:  # unpacking bits is what takes time: 8% less than with 64 rows and four warps, H200
        return Tile(m=32, k=256, r=16, warps=2, stages=3 if narrow else 4)
    return Tile(m=64, k=256, r=block_r)


@choice
def down_quantised(
    m: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    kind: torch.dtype,
    chip: Chip,
    tma: bool,
    masked: bool,
    with_gain: bool,
) -> Tile:
    """S as above by programs between which others quantise x [M, K], whole rows in registers where they fit."""
    tile = down(m, r, dtype=dtype, kind=kind, chip=chip, tma=tma, masked=masked, quantised=True)
    tile = replace(tile, k=min(tile.k, 128), stages=min(tile.stages, 3))  # all programs pay for shared memory
    if masked and tile.warps < 4:  # enough for S, too few for what quantises
        tile = replace(tile, m=64, warps=4)
    quant_k = min(triton.next_power_of_2(k), 16384)
    # 32 rows with a gain: 58 -> 52, K = 14336 267 -> 244; 16 without: 52 -> 50.
    rows = min(tile.m, 32 if with_gain or quant_k > 8192 else 16)
    warps = 8 if with_gain and quant_k > 8192 else tile.warps  # a row and its gains in registers
    return replace(tile, warps=warps, quant_rows=rows, quant_step=min(max(1, 8192 // quant_k), rows), quant_k=quant_k)


@choice
def pair(m: int, columns: int, r: int, *, chip: Chip, masked: bool) -> Tile:
    """dA and dB of few rows: m rows a step, n of all the columns of x and the dYs a program."""
    if r > 64:  # what fits
        return Tile(m=128, n=64, stages=3)
    if masked and m > 1024 and triton.cdiv(columns, 32) <= chip.processors:
        # A LoRA step of 2048 x 2048 x 512 65.4 -> 61.0, 2048 x 2048 x 2048 105.6 -> 102.0; with 160 programs of 4096 x
        # 1024 5% worse, and for 512 rows of 4096 x 4096 95 -> 98, H200.
        return Tile(m=512, n=32, warps=8, stages=2)
    if masked:  # which is applied in registers: more rows, fewer stages
        return Tile(m=256, n=64, stages=3)
    return Tile(m=128, n=64, stages=4)


@choice
def grad(
    m: int,
    n: int,
    r: int,
    *,
    dtype: torch.dtype,
    chip: Chip,
    tma: bool,
    fused: bool,
    masked: bool,
    dora: bool,
    scaled: bool = False,
) -> Tile:
    """G = Z^T P: n columns a program, m rows a step, r ranks in its accumulator. ``fused``: dS is made on the way,
    whose parts grow with the number of programs along the columns. ``scaled``: Z in e4m3."""
    block_r = rank_block(r, 128 if dtype.itemsize <= 2 else 64)
    narrow = n <= 1024 and m > 2048  # many programs share a column
    if not tma or chip.small or dtype.itemsize > 2:  # what fits; many programs, each with little on its way
        block_m = 64 if dtype.itemsize <= 2 else 32
        return Tile(m=block_m, n=64, r=block_r, warps=8 if dora else 4, fill=512 / block_m)
    if dora and fused and narrow:  # 25.2 -> 23.2, H200
        return Tile(m=64, n=128, r=block_r, sum_rows=4, stages=4, fill=2.0)
    if dora and fused:  # four stages: 65.2 -> 64.5, N = 14336 211 -> 204, H200; 128 columns make twice the parts
        return Tile(m=64, n=256, r=block_r, warps=8, stages=4)
    if dora:  # no dS: 82 -> 78, N = 14336 263 -> 245
        return Tile(m=128, n=64, r=block_r, fill=1.5)
    if fused and narrow and block_r == 16:  # 14.8 -> 12.8, H200
        return Tile(m=128, n=128, r=16)
    if fused and block_r == 16 and m > 2048:  # half the parts of dS
        return Tile(m=64, n=512, r=16)
    if fused and block_r == 64 and m > 2048:  # N = 14336: 159 instead of 176; 512 columns do not fit newer chips
        return Tile(m=64, n=256 if chip.newer else 512, r=64, warps=8, stages=2)
    if fused:  # few rows
        return Tile(m=64, n=256, r=block_r, warps=8 if block_r == 64 else 4)
    if masked and block_r <= 64:  # r = 16: 30, r = 64: 36
        return Tile(m=64, n=128, r=block_r, warps=4 if scaled or chip.newer else 2, fill=2.0)
    if masked:  # the mask is applied once for as many ranks as fit: r = 384: 93
        return Tile(m=64, n=128, r=rank_block(r, 128 if chip.newer else 256), warps=8, fill=1.1)
    if block_r <= 64:  # one program a processor, no parts: r = 16: 30 -> 24, r = 64: 35 -> 29
        return Tile(m=256 if block_r == 16 else 128, n=64, r=block_r, stages=4)
    if triton.cdiv(n, 64) * triton.cdiv(r, block_r) <= chip.processors:  # likewise: r = 128: 51 -> 33
        return Tile(m=128, n=64, r=block_r, stages=4)
    return Tile(m=64, n=128, r=block_r, warps=8 if chip.newer else 4, stages=4)  # r = 384: 86 -> 48


def grad_splits(m: int, n: int, r: int, *, tile: Tile, chip: Chip) -> tuple[int, int, int, int]:
    """(column blocks, row splits, rank blocks, rows a split): up to so many programs a processor; rows are not split
    for less than that they double the programs, which saves the launch that adds up parts."""
    col_blocks, rank_blocks = triton.cdiv(n, tile.n), triton.cdiv(max(r, 1), tile.r)
    blocks, wanted = col_blocks * rank_blocks, chip.processors * tile.fill
    splits = int(wanted // blocks) if 2.2 * blocks <= wanted else 1
    splits = max(1, min(splits, triton.cdiv(m, 2 * tile.m)))
    rows_each = triton.cdiv(triton.cdiv(m, splits), tile.m) * tile.m
    return col_blocks, triton.cdiv(m, rows_each), rank_blocks, rows_each


@choice
def batch_columns(
    m: int, r: int, *, dtype: torch.dtype, chip: Chip, tma: bool, masked: bool, fused: bool, dora: bool
) -> Tile:
    """G of one adapter among several: n columns a program, m rows a step, a part of a block of rows."""
    if dtype.itemsize > 2 or chip.small or not tma:  # what fits
        many = chip.capability >= 120 and (dora or not tma)
        return Tile(
            m=64 if r <= 32 and dtype.itemsize <= 2 and not chip.small else 32,
            n=64,
            r=r,
            warps=8 if many else 4,
            fill=4.0,
        )
    if m <= FEW and r == 16 and not fused and not dora:  # many programs, each by itself: see layer.py
        return Tile(m=64, n=64, r=16, stages=4)
    if masked:
        return Tile(m=64, n=128, r=r, fill=2.0)
    if dora and fused:  # with eight rows of sums it spills
        return Tile(m=64, n=256, r=r, warps=8, sum_rows=4, stages=4)
    if dora:
        return Tile(m=64, n=128 if r <= 32 else 64, r=r, sum_rows=4, stages=4, fill=2.0)
    if fused and r == 16:  # half the parts of dS: 44.8 -> 39.9 with these, 16 adapters, 8192 x 4096, H200
        return Tile(m=64, n=512, r=16, warps=8)
    if fused:
        return Tile(m=64, n=256, r=r)
    return Tile(m=64, n=256, r=r, warps=8, fill=2.0)  # 34 -> 28, 16 adapters 33 -> 24; with 128 x 64 64 of them take 45


@choice
def batch_norm(total: int, *, chip: Chip, tma: bool) -> Tile:
    """W A^T of all adapters of a batch, for DoRA's norms, in 16 bits: n rows of W and r of all ranks a program."""
    if not tma or chip.small or chip.newer:  # what fits
        return Tile(n=64, k=64, r=64)
    if total <= 64:
        return Tile(n=64, k=128, r=64, stages=4, fill=2.0)
    return Tile(n=128, k=64, r=rank_block(total, 256), warps=8)


@choice
def batch_gains(r: int, *, chip: Chip) -> Tile:
    """Norms from their terms: n rows of an adapter's a program, which takes little but waits for one load after
    another; k columns a step where rows are made again."""
    if chip.small or (r == 64 and not chip.hopper):  # with more rows it spills, or does not compile
        return Tile(n=16, k=64, r=r, stages=2)
    return Tile(n=128 if chip.hopper and r < 64 else 32, k=64, r=r, stages=2)


@choice
def glu_down(m: int, r: int, *, dtype: torch.dtype, chip: Chip, tma: bool) -> Tile:
    """h = act(e) g, of n columns a program, or by programs of m rows that walk over all of K, with ranks S = h A^T too.
    What is to be hidden is arithmetic: one program a processor, of 64 rows and four warps, took 314 (8192 x 14336,
    H200), bytes alone 172; several programs a processor take 180."""
    if r == 0 and m <= FEW:  # element by element; with S 512 x 8192 took 64, H200, where few programs had it all
        return Tile(m=16, n=256, k=128 if dtype.itemsize > 2 else 256, r=16)
    block_r = rank_block(r, 64)
    if dtype.itemsize > 2 or not tma or chip.small:
        return Tile(m=32, k=32 if dtype.itemsize > 2 else 64, r=block_r)  # what fits
    return Tile(m=32, k=128, r=block_r, stages=3 if block_r == 64 else 4)  # two programs a processor, of 8192 rows


@choice
def glu_grad(m: int, *, dora: bool) -> Tile:
    """de, dg and h, element by element: m rows a step, k steps and n columns a program."""
    if dora:  # gains and sums in registers: with 8 rows twice as many, and half the warps. Not measured yet.
        return Tile(m=4, n=256, k=8 if m <= FEW else 32)
    return Tile(m=8, n=256, k=2 if m <= FEW else 16)  # 354 for 8192 x 14336, H200: 4 TB/s


@choice
def norm(n: int, r: int, *, dtype: torch.dtype, kind: torch.dtype, chip: Chip) -> Tile:
    """Row norms: n rows of W a program, k columns a step. ``kind`` is the adapters' dtype."""
    block_r, wide = rank_block(r, 64), dtype.itemsize > 2 or kind.itemsize > 2
    if chip.small or wide:
        return Tile(n=16, k=32 if wide and block_r == 64 else 64, r=block_r)  # what fits
    if block_r == 64:
        return Tile(n=32, k=256, r=64, warps=8)
    if n <= 32 * chip.processors:
        return Tile(n=16, k=512, r=block_r, warps=8)  # few rows: few programs, with much on its way in each
    return Tile(n=16, k=256, r=block_r)


def norm_has_parts(r: int, *, dtype: torch.dtype, kind: torch.dtype, chip: Chip) -> bool:
    """Whether the norms come by way of parts: many ranks, of adapters in 16 bits."""
    return r > 64 and dtype.itemsize <= 2 and kind.itemsize <= 2 and not chip.small


@choice
def norm_parts() -> Tile:
    """Row norms of many ranks: n rows of W a program, k columns and r ranks a step."""
    return Tile(n=64, k=128, r=64, fill=2.0)


def norm_splits(n: int, k: int, *, tile: Tile, chip: Chip) -> int:
    """How many programs share the columns, where norms come by way of parts."""
    return max(1, min(int(chip.processors * tile.fill) // triton.cdiv(n, tile.n), triton.cdiv(k, tile.k)))


@choice
def weight(n: int, r: int, *, dtype: torch.dtype, kind: torch.dtype, chip: Chip) -> Tile:
    """The adapted weight: as the norms, which are its first half, but for what ptxas spills there on one chip or
    another: 512 columns, and three stages where they are not float32 adapters of many ranks."""
    tile = norm(n, r, dtype=dtype, kind=kind, chip=chip)
    if tile.k == 512:
        tile = replace(tile, k=256, warps=4)
    return replace(tile, stages=3 if kind.itemsize > 2 and tile.r == 64 else 2)


@choice
def weight_grad(r: int, *, dtype: torch.dtype, chip: Chip, dora: bool) -> Tile:
    """Gradients of an adapted weight: k columns a program, n rows a step, r ranks of dA in its accumulator."""
    block_r = rank_block(r, 64)
    if dtype.itemsize > 2:
        return Tile(n=16 if dora else 32, k=64, r=block_r, stages=2, fill=2.0)
    if chip.small or dora or (block_r == 64 and not chip.has_tma):
        return Tile(n=32, k=128, r=block_r, warps=8 if block_r == 64 or dora else 4, stages=2, fill=2.0)
    return Tile(n=64, k=256, r=block_r, warps=8, stages=2, fill=2.0)


def weight_grad_splits(n: int, k: int, r: int, *, tile: Tile, chip: Chip) -> tuple[int, int, int, int]:
    """(column blocks, row splits, rank blocks, rows a split): up to so many programs a processor."""
    col_blocks, rank_blocks = triton.cdiv(k, tile.k), triton.cdiv(r, tile.r)
    programs = int(chip.processors * tile.fill)
    splits = max(1, min(programs // (col_blocks * rank_blocks), triton.cdiv(n, 2 * tile.n)))
    rows_each = triton.cdiv(triton.cdiv(n, splits), tile.n) * tile.n
    return col_blocks, triton.cdiv(n, rows_each), rank_blocks, rows_each


def embedding(r: int) -> Tile:
    """Rows of an adapted embedding: m ids, n columns, r ranks at a time; more spill, without the matrix units."""
    return Tile(m=32, n=128, r=rank_block(r, 16))


def embedding_norm(r: int) -> Tile:
    """Sums of squares of an embedding's columns: k of its rows, n columns."""
    return Tile(n=128, k=64, r=rank_block(r, 16), warps=8, stages=2, fill=4.0)


def embedding_down(r: int) -> Tile:
    """P of an embedding's dY, m of whose rows a program walks along, n columns at a time."""
    return Tile(m=64, n=64, r=rank_block(r, 64), stages=2)


def embedding_columns(r: int) -> Tile:
    """Sums over an embedding's dY by columns, n a program, m rows at a time."""
    return Tile(m=32, n=64, r=rank_block(r, 16), stages=2, fill=4.0)


def embedding_runs(r: int) -> Tile:
    """Sums of P's rows by ids, m of them a program."""
    return Tile(m=64, r=rank_block(r, 16))


def splits(columns: int, steps: int, *, tile: Tile, chip: Chip) -> int:
    """Into how many parts programs share so many steps for each block of columns."""
    return max(1, min(steps, int(chip.processors * tile.fill) // triton.cdiv(columns, tile.n)))
