"""Every tile choice, as a function of the problem and the chip. Measured on H100 and H200 (benchmarks/NOTES.md);
elsewhere chosen to fit shared memory and registers, which the tests hold by compiling for each chip.

Each function returns (constexpr arguments, launch options). M enters in few steps only, so that a batch size that
changes from step to step compiles a bounded number of variants.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

if TYPE_CHECKING:
    from lora_fast.kernels.operands import Operand

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may use


@cache
def arch(device: torch.device) -> int:
    """Compute capability as 10 * major + minor; the interpreter on a CPU counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def n_programs(device: torch.device) -> int:
    """How many persistent programs fill the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def is_small(device: torch.device) -> bool:
    """Chips whose programs share about 100 KB of memory and whose matrix unit is a warp's."""
    return arch(device) in (86, 89) or arch(device) >= 120


def tma_fits(*tensors: "Operand") -> bool:
    """Whether tensor descriptors can read and write these matrices: Hopper or later, rows contiguous, strides and start
    multiples of 16 bytes."""
    return all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
               for t in tensors) and arch(tensors[0].device) >= 90  # fmt: skip


def rank_block(r: int, most: int) -> int:
    """The tile of ranks that one instruction sequence takes: a power of two from 16 to ``most``."""
    return min(max(triton.next_power_of_2(r), 16), most)


def few_rows(m: int, r: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the launches for few rows serve: those that leave most of the processors idle would, and those that pass
    over all rows in each program do not take too long for it."""
    return m <= 2048 and r <= 32 and dtype.itemsize == 2 and arch(device) >= 90 and not is_small(device)


def down_tile(
    m: int, k: int, r: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device, tma: bool, masked: bool,
    quantised: bool = False, with_gain: bool = False,
) -> tuple[dict, dict]:  # fmt: skip
    """S = x A^T: BLOCK_M rows a program, which walks over K with up to 128 ranks in its accumulator. ``kind`` is A's
    dtype. With few rows WAYS along K are taken side by side. Quantised: QUANT_ROWS rows a program that does that,
    QUANT_STEP at a time, QUANT_K elements of each."""
    column = kind.itemsize * rank_block(r, 32)  # bytes of a column of A's tile: more spills, on newer chips sooner
    fits = tma and not quantised and r <= 32 and column <= (64 if arch(device) < 100 else 32)
    if fits and few_rows(m if not masked else m // 2, r, dtype, device):
        block_m, block_k = (16, 256 if column <= 32 else 128) if m <= 2048 else (32, 128)  # 21 -> 12 us, 4096 x 4096
        tile = {"WAYS": 4, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": rank_block(r, 32),
                "QUANT_ROWS": 0, "QUANT_STEP": 0, "QUANT_K": 0}  # fmt: skip
        return tile, {"num_warps": 4, "num_stages": 3}
    block_r = rank_block(r, 128 if dtype.itemsize <= 2 else 64)
    block_m, warps, stages = (64 if m > 2048 else 16), 4, 3 if is_small(device) else 4
    roomy = tma and not is_small(device) and dtype.itemsize <= 2
    block_k = 256 if roomy else 64 if dtype.itemsize <= 2 else 32
    if masked and roomy and m > 2048:
        block_m, warps, stages = (32, 2, 3 if kind.itemsize <= 2 else 4) if block_r == 16 else (64, 4, 3)
    if block_r >= 64:
        block_m, block_k, warps = 64, 128 if roomy else 64, 4
        if roomy and kind.itemsize <= 2 and arch(device) < 100:
            block_k, stages = 256, 3
    if block_r >= 128:
        block_m, block_k, warps, stages = (128, 64, 8, 3) if roomy else (64, 32, 8, 3)
        if roomy and kind.itemsize <= 2:
            block_m, block_k, warps, stages = (64, 128, 4, 4) if r <= 128 else (64, 64, 4, 3)
    quant_rows = quant_step = quant_k = 0
    if quantised:  # little shared memory, which all programs of the launch pay for
        block_k, stages = min(block_k, 128), min(stages, 3)
        quant_k = min(triton.next_power_of_2(k), 16384)
        if masked and warps < 4:  # enough for S, too few for what quantises
            block_m, warps = 64, 4
        quant_rows = min(block_m, 32 if with_gain or quant_k > 8192 else 16)
        quant_step = min(max(1, 8192 // quant_k), quant_rows)
        if with_gain and quant_k > 8192:  # a row and its gains in registers
            warps = 8
    tile = {"WAYS": 0, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": block_r,
            "QUANT_ROWS": quant_rows, "QUANT_STEP": quant_step, "QUANT_K": quant_k}  # fmt: skip
    return tile, {"num_warps": warps, "num_stages": stages}


def casts_first(m: int, r: int, dtype: torch.dtype, masked: bool) -> bool:
    """Whether adapters are cast by a launch of their own, ahead of S = drop(x) A^T: many ranks in the wrong dtype, or
    few beside a mask, hold that up for longer than the launch takes."""
    return m > 2048 and (r > 32 or masked) and dtype.itemsize <= 2


def norm_tile(n: int, r: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """Row norms: BLOCK_N rows of W a program, BLOCK_K columns a step, SUMS sums of squares a row: what lies side by
    side in a row of a product's registers. ``kind`` is the adapters' dtype."""
    block_r, wide = rank_block(r, 64), dtype.itemsize > 2 or kind.itemsize > 2
    if is_small(device) or wide:
        block_n, block_k, warps = 16, 32 if wide and block_r == 64 else 64, 4
    elif block_r == 64:
        block_n, block_k, warps = 32, 256, 8
    else:  # few rows: few programs, with much on its way in each
        block_n, block_k, warps = (16, 512, 8) if n <= 32 * n_programs(device) else (16, 256, 4)
    tile = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r, "SUMS": min(64, block_k)}
    return tile, {"num_warps": warps, "num_stages": 3}


def norm_has_parts(r: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> bool:
    """Whether the norms come by way of parts: many ranks, of adapters in 16 bits."""
    return r > 64 and dtype.itemsize <= 2 and kind.itemsize <= 2 and not is_small(device)


def norm_parts_tile(n: int, k: int, device: torch.device) -> tuple[dict, dict, int]:
    """Row norms of many ranks: BLOCK_N rows of W a program, BLOCK_K columns and BLOCK_R ranks a step, SUMS as in
    ``norm_tile``; and how many programs share the columns."""
    splits = max(1, min(2 * n_programs(device) // triton.cdiv(n, 64), triton.cdiv(k, 128)))
    return {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": 64, "SUMS": 64}, {"num_warps": 4, "num_stages": 3}, splits


def grad_tile(
    m: int, n: int, r: int, dtype: torch.dtype, device: torch.device, tma: bool, fused: bool, masked: bool, dora: bool,
    scaled: bool = False,
) -> tuple[dict, dict, float]:  # fmt: skip
    """G = Z^T P: BLOCK_N columns a program, BLOCK_M rows a step, BLOCK_R ranks in its accumulator, DM_ROWS rows of sums
    in registers for DoRA's dm: as many as warps lie along the rows, so that a thread adds up its own. Scaled: Z in
    e4m3. Also how many programs a processor shall have."""
    block_r, fill, newer = rank_block(r, 128 if dtype.itemsize <= 2 else 64), 1.0, arch(device) >= 100
    narrow, dm_rows = n <= 1024 and m > 2048, 8  # narrow: many programs share a column
    if not tma or is_small(device) or dtype.itemsize > 2:
        block_n, block_m, warps, stages = 64, 64 if dtype.itemsize <= 2 else 32, 8 if dora else 4, 3
        fill = 512 / block_m
    elif dora and fused:
        block_n, block_m, warps, stages = 256, 64, 8, 4
        if narrow:
            block_n, warps, dm_rows, fill = 128, 4, 4, 2.0
    elif dora:
        block_n, block_m, warps, stages, fill = 64, 128, 4, 3, 1.5
    elif fused and narrow and block_r == 16:
        block_n, block_m, warps, stages = 128, 128, 4, 3
    elif fused and block_r in (16, 64) and m > 2048:
        block_n, block_m, warps, stages = (512, 64, 4, 3) if block_r == 16 else (512, 64, 8, 2)
        if block_r == 64 and newer:
            block_n = 256
    elif fused:
        block_n, block_m, warps, stages = 256, 64, 8 if block_r == 64 else 4, 3
    elif masked and block_r <= 64:
        block_n, block_m, warps, stages, fill = 128, 64, 4 if scaled or newer else 2, 3, 2.0
    elif masked:
        block_n, block_m, block_r, warps, stages, fill = 128, 64, rank_block(r, 128 if newer else 256), 8, 3, 1.1
    elif block_r <= 64:
        block_n, block_m, warps, stages = 64, 256 if block_r == 16 else 128, 4, 4
    elif triton.cdiv(n, 64) * triton.cdiv(r, block_r) <= n_programs(device):
        block_n, block_m, warps, stages = 64, 128, 4, 4
    else:
        block_n, block_m, warps, stages = 128, 64, 8 if newer else 4, 4
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "DM_ROWS": dm_rows}
    return tile, {"num_warps": warps, "num_stages": stages}, fill


def grad_splits(m: int, n: int, r: int, tile: dict, fill: float, device: torch.device) -> tuple[int, int, int, int]:
    """(column blocks, row splits, rank blocks, rows a split): up to so many programs a processor; rows are not split
    for less than that they double the programs, which saves the launch that adds up parts."""
    col_blocks, rank_blocks = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(max(r, 1), tile["BLOCK_R"])
    blocks, wanted = col_blocks * rank_blocks, n_programs(device) * fill
    splits = int(wanted // blocks) if 2.2 * blocks <= wanted else 1
    splits = max(1, min(splits, triton.cdiv(m, 2 * tile["BLOCK_M"])))
    rows_each = triton.cdiv(triton.cdiv(m, splits), tile["BLOCK_M"]) * tile["BLOCK_M"]
    return col_blocks, triton.cdiv(m, rows_each), rank_blocks, rows_each


def weight_tile(n: int, r: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> tuple[dict, dict]:
    """The adapted weight: as the norms, which are its first half, but for what ptxas spills there on one chip or
    another: 512 columns, and three stages where they are not float32 adapters of many ranks."""
    tile, options = norm_tile(n, r, dtype, kind, device)
    if tile["BLOCK_K"] == 512:
        tile, options = {**tile, "BLOCK_K": 256}, {**options, "num_warps": 4}
    return tile, {**options, "num_stages": 3 if kind.itemsize > 2 and tile["BLOCK_R"] == 64 else 2}


def weight_grad_tile(r: int, dtype: torch.dtype, device: torch.device, dora: bool) -> tuple[dict, dict]:
    """Gradients of an adapted weight: BLOCK_K columns a program, BLOCK_N rows a step, BLOCK_R ranks of dA in its
    accumulator."""
    block_r = rank_block(r, 64)
    if dtype.itemsize > 2:
        block_n, block_k, warps = 16 if dora else 32, 64, 4
    elif is_small(device) or dora or (block_r == 64 and arch(device) < 90):
        block_n, block_k, warps = 32, 128, 8 if block_r == 64 or dora else 4
    else:
        block_n, block_k, warps = 64, 256, 8
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": block_r}, {"num_warps": warps, "num_stages": 2}


def weight_grad_splits(n: int, k: int, r: int, tile: dict, device: torch.device) -> tuple[int, int, int, int]:
    """(column blocks, row splits, rank blocks, rows a split): about two programs a processor."""
    col_blocks, rank_blocks = triton.cdiv(k, tile["BLOCK_K"]), triton.cdiv(r, tile["BLOCK_R"])
    splits = max(1, min(2 * n_programs(device) // (col_blocks * rank_blocks), triton.cdiv(n, 2 * tile["BLOCK_N"])))
    rows_each = triton.cdiv(triton.cdiv(n, splits), tile["BLOCK_N"]) * tile["BLOCK_N"]
    return col_blocks, triton.cdiv(n, rows_each), rank_blocks, rows_each


class ProductTile(NamedTuple):
    """A tile of a product's result, and what a step of 64 along the contraction costs the processor that makes it."""

    m: int
    n: int
    c: int  # elements of the contraction a step
    warps: int
    stages: int
    cost: int  # in ns on an H200; on other chips the ratios are taken to be alike


# What ``product_tile`` picks of these was within 1% of the best of 17 tiles: the mean over 8 shapes, 128 to 2048 rows.
PRODUCT_TILES = (
    ProductTile(128, 256, 64, 8, 3, 770),  # reads the fewest bytes for an element of the result
    ProductTile(128, 128, 64, 4, 4, 410),
    ProductTile(64, 128, 64, 4, 6, 285),  # six stages: 22 -> 18 us for 256 x 4096 x 4096
    ProductTile(64, 64, 128, 4, 4, 195),
)
# There 128 x 128 spills with four warps, and so do tiles of 64 rows.
NEWER_PRODUCT_TILES = PRODUCT_TILES[0], PRODUCT_TILES[1]._replace(warps=8), ProductTile(128, 64, 64, 4, 4, 285)


def product_tile(m: int, n: int, device: torch.device, roomy: bool) -> ProductTile:
    """The tile with which the processor that has the most to do has the least. M enters by the number of turns that the
    processors take. Not roomy: with a mask or z beside the result, which 256 columns spill on newer chips."""
    tiles: tuple[ProductTile, ...] = PRODUCT_TILES
    if arch(device) >= 100:
        tiles = NEWER_PRODUCT_TILES if roomy else NEWER_PRODUCT_TILES[1:]

    def busiest(tile: ProductTile) -> int:
        return triton.cdiv(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), n_programs(device)) * tile.cost

    return min(tiles, key=busiest)


# The same where S is made on the way (few_rows.py), by what ``product_tile`` would pick. With 256 columns the second
# accumulator's share of the loop is least: 18.7 -> 15.9 us for dX of 1024 x 2048 x 2048 beside 128 x 128.
WITH_S = {
    PRODUCT_TILES[1]: ProductTile(64, 256, 64, 4, 4, 0),
    PRODUCT_TILES[2]: PRODUCT_TILES[2],
    PRODUCT_TILES[3]: PRODUCT_TILES[3],
}


def low_rank_tile_of(m: int, n: int, c: int, device: torch.device, masked: bool) -> ProductTile | None:
    """The tile of a product [M, N] over C that makes S, too. None where S is better made by a launch of its own: for
    the largest tile, whose loop the matrix units bound; where processors would make more than one tile, or much of the
    tiles lies outside; along a very long way; under a mask for many columns, which leave it no registers; and on chips
    where it was not tried."""
    tile = WITH_S.get(product_tile(m, n, device, roomy=not masked))
    if tile is None or arch(device) // 10 != 9 or c > 8192 or (tile.n > 128 and (masked or n % tile.n)):
        return None
    return tile if triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) <= n_programs(device) else None


def decodes(m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a forward alone is made with its operands the other way round: of up to 64 rows, or 128 where few columns
    have a long way along K, which programs share there."""
    few = m <= 64 or (m <= 128 and k >= 2 * n)
    return few and r <= 64 and dtype.itemsize == 2 and arch(device) // 10 == 9


def decode_tile(m: int, n: int) -> tuple[dict, dict]:
    """The forward of few rows without a backward: BLOCK_N rows of W, BLOCK_K columns a step, as many stages as
    fit."""
    block_m, block_n, block_k = rank_block(m, 128), *((128, 64) if n >= 4096 else (64, 128))
    stage = 2 * block_k * (block_n + block_m + 64)  # bytes
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": 64}
    return tile, {"num_warps": 4, "num_stages": min(6, 200_000 // stage)}


def decode_splits(n: int, k: int, tile: dict, device: torch.device) -> tuple[int, int]:
    """(how many programs share the way along K, steps of each): one program a processor, four steps at least."""
    steps = triton.cdiv(k, tile["BLOCK_K"])
    splits = max(1, min(n_programs(device) // triton.cdiv(n, tile["BLOCK_N"]), steps // 4))
    each = triton.cdiv(steps, splits)
    return triton.cdiv(steps, each), each


def pair_tile(masked: bool) -> tuple[dict, dict]:
    """dA and dB of few rows: BLOCK_M rows a step, more under a mask, which is applied in registers."""
    tile = {"BLOCK_M": 256 if masked else 128, "BLOCK_N": 64}
    return tile, {"num_warps": 4, "num_stages": 3 if masked else 4}


def gemm_tile(
    m: int, n: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device, tma: bool, masked: bool, exact: str,
    keep_z: bool, r: int,
) -> tuple[dict, dict]:  # fmt: skip
    """The product [M, N]: tiles of the result, the step along the contraction, GROUP_M row blocks walked together; for
    e4m3 operands also the step along the ranks. ``kind`` is the result's dtype."""
    bm, bn, bc, br, warps, stages = 128, 256, 64, 0, 8, 3
    if dtype == torch.float8_e4m3fn:
        bm, bn, bc, br = 64, 128 if tma or arch(device) < 120 else 64, 64, 16
        if tma and not is_small(device) and kind.itemsize <= 2:
            bm, bn, bc = 128, 256, 128
            if masked:
                br = rank_block(r, 64)
    elif dtype.itemsize > 2:
        bm, bn, bc = (64, 64, 32) if exact == "ieee" or is_small(device) or not tma else (128, 128, 32)
        if exact == "ieee" and masked:
            bc = 16
    elif is_small(device) or not tma:
        bm, bn, bc = 128, 128, 32
    else:
        bm, bn, bc, warps, stages, _ = product_tile(m, n, device, roomy=not (masked or keep_z))
    tile = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_C": bc, "BLOCK_R": br, "GROUP_M": 16}
    return tile, {"num_warps": warps, "num_stages": stages}
