"""Gradients that contract over rows: G = Z^T P [N, R] from Z [M, N] and P [M, R], in one read of Z.

For Z = dY, P = S it gives dB, and on the way dS = scaling * dY B (from the same tile) and dbias, the column sums (a
column of ones beside S, or in registers where the tile goes there). For Z = drop(x), P = dS it gives dA^T. A program
owns BLOCK_N columns and a range of rows, keeps its G in registers and steps through the rows; a second kernel
(sums.py) adds up the programs' parts.

With DoRA's gain g, dZ = dY * g takes the place of dY: dB = g * (dY^T S) and dS = scaling * dY (g * B), so the products
still read dY's tile as it is; dZ itself is written for those who come after, and the column sums of dY * z (or y, see
sums.py) make dm.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import (
    TL,
    Matrix,
    acc_dtype,
    late,
    lift_of,
    load_tile,
    mask_words,
    masked,
    mma,
    padded_rank,
    precision,
    store_tile,
    wait_for_stream,
)
from lora_fast.kernels.operands import Number, Operand, Tiles, launch
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Dora, Parts, add_parts
from lora_fast.kernels.tiles import tma_fits


@triton.jit(do_not_specialize=["M", "rows_each"])
def _grad_kernel(
    z,
    dz,
    kept_ptr,
    p_ptr,
    b_ptr,
    bits_ptr,
    gain_ptr,
    g_ptr,
    parts_ptr,
    row_scale_ptr,
    scaling,
    M,
    N,
    R,
    RS,
    rows_each,
    sum_at,
    dm_at,
    g_at,
    stride_zm,
    stride_zn,
    stride_bn,
    stride_br,
    stride_gs,
    stride_gn,
    stride_gr,
    stride_p,
    stride_bits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DM_ROWS: tl.constexpr,
    WITH_SUM: tl.constexpr,
    SCALING_PTR: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    ONES: tl.constexpr = WITH_SUM and gain_ptr is None  # a column of ones beside P makes the sums
    pid_n, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col, rank = pid_n * BLOCK_N, pid_r * BLOCK_R
    cols = col + tl.arange(0, BLOCK_N)
    ranks = rank + tl.arange(0, BLOCK_R)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + cols, mask=cols < N, other=0.0)
    if b_ptr is not None:
        b = load_tile(Matrix(b_ptr, N, R, stride_bn, stride_br), col, rank, BLOCK_N, BLOCK_R)
        if gain_ptr is not None:
            b = (b.to(ACC) * gain[:, None]).to(DTYPE)
    if kept_ptr is not None:
        dm = tl.zeros([DM_ROWS, BLOCK_N], dtype=ACC)
    if WITH_SUM and not ONES:
        sums = tl.zeros([DM_ROWS, BLOCK_N], dtype=ACC)
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    first = split * rows_each  # a multiple of BLOCK_M
    if kept_ptr is not None:
        y = load_tile(Matrix(kept_ptr, M, N, N, 1), first, col, BLOCK_M, BLOCK_N)
    for m in range(first, tl.minimum(first + rows_each, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        tile = load_tile(Matrix(z, M, N, stride_zm, stride_zn), m, col, BLOCK_M, BLOCK_N, TMA)
        if kept_ptr is not None:
            dots = tl.reshape(tile.to(ACC) * y.to(ACC), (BLOCK_M // DM_ROWS, DM_ROWS, BLOCK_N))
            dm += tl.sum(dots, 0)
            # The next step's, by hand: the compiler's pipeline takes the operands of products alone.
            y = load_tile(Matrix(kept_ptr, M, N, N, 1), m + BLOCK_M, col, BLOCK_M, BLOCK_N)
        if WITH_SUM and not ONES:  # in registers, where the tile is anyway
            sums += tl.sum(tl.reshape(tile.to(ACC), (BLOCK_M // DM_ROWS, DM_ROWS, BLOCK_N)), 0)
        if dz is not None:
            store_tile(Matrix(dz, M, N, N, 1), tile.to(ACC) * gain[None, :], m, col, DTYPE, TMA)
        if bits_ptr is not None:
            words = mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N)
            tile = masked(tile, words)
        if row_scale_ptr is not None:
            tile = tile.to(DTYPE)
        if p_ptr is not None:
            p = load_tile(Matrix(p_ptr, M, RS, stride_p, 1), m, rank, BLOCK_M, BLOCK_R)
            if row_scale_ptr is not None:
                scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
                p = (p.to(ACC) * scale[:, None]).to(DTYPE)
        else:
            p = tl.zeros([BLOCK_M, BLOCK_R], dtype=DTYPE)
        if ONES:
            p = tl.where(ranks[None, :] == R, 1.0, p.to(ACC)).to(DTYPE)
        if p_ptr is not None or ONES:
            g = mma(tile.T, p, g, PRECISION)
            if kept_ptr is not None or dz is not None or (WITH_SUM and not ONES):
                g = late(g)  # Triton 3.7 loads the next tile over one that is read twice while it is multiplied
        if b_ptr is not None:
            ds = mma(tile, b, tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC), PRECISION)
            ds_ptrs = parts_ptr + (pid_n.to(tl.int64) * M + rows[:, None]) * RS + ranks[None, :]
            tl.store(ds_ptrs, ds, mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    if ONES:
        sum_ptrs = parts_ptr + sum_at + split * N + cols[:, None] + ranks[None, :] * 0
        tl.store(sum_ptrs, g, mask=(cols[:, None] < N) & (ranks[None, :] == R))
    elif WITH_SUM:
        tl.store(parts_ptr + sum_at + split * N + cols, tl.sum(sums, 0), mask=cols < N)
    if kept_ptr is not None:
        tl.store(parts_ptr + dm_at + split * N + cols, tl.sum(dm, 0), mask=cols < N)
    if p_ptr is not None:
        if gain_ptr is not None:
            g *= gain[:, None]
        if scaling is not None:  # the part of it that B carries, and P = S lacks
            g *= lift_of(scaling, SCALING_PTR)
        g_ptrs = g_ptr + g_at + split * stride_gs + cols.to(tl.int64)[:, None] * stride_gn + ranks[None, :] * stride_gr
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols[:, None] < N) & (ranks[None, :] < R))


@dataclass(kw_only=True)
class ColumnPass:
    """One read of Z = z [M, N], and what is wanted of it: G = Z^T P into the [N, R] view g; dS = scaling * keep * Z B;
    the column sums; and what ``dora`` says, with whose gain Z * g takes Z's place.

    Its launches leave float32 ``parts`` between them, for which they are given memory.
    """

    z: Operand
    r: int
    p: Operand | None = None  # [M, padded R]; P, where g is wanted
    g: Operand | None = None
    b: Operand | None = None  # [N, at least R]; B, where ds is wanted
    ds: Operand | None = None
    sums: Operand | None = None
    dora: Dora[Operand] | None = None
    bits: Operand | None = None  # of a mask on Z
    row_scale: Operand | None = None  # [M]; of an e4m3 Z
    kind: torch.dtype | None = None  # of the products, where it is not z's
    scaling: Operand | Number | None = None  # of ds; and where lifted of g
    keep: Number | None = None
    lifted: bool = False  # B carries a part of the scaling that P = S lacks, so G gets it here

    def __post_init__(self) -> None:
        (m, n), self.dtype = self.z.shape, self.kind or self.z.dtype
        self.dz, self.dm = (None, None) if self.dora is None else (self.dora.dz, self.dora.dm)
        self.ones = self.sums is not None and self.dora is None  # a column of ones beside P makes the sums
        ranks, fused = self.r + self.ones, self.ds is not None
        self.tma = tma_fits(self.z) and (self.dz is None or tma_fits(self.dz))
        chip, dora = Chip.of(self.z.device), self.dz is not None or self.dm is not None
        self.tile = pass_tiles.grad(
            m,
            n,
            ranks,
            dtype=self.dtype,
            chip=chip,
            tma=self.tma,
            fused=fused,
            dora=dora,
            masked=self.bits is not None,
            scaled=self.row_scale is not None,
        )
        col_blocks, splits, rank_blocks, self.rows_each = pass_tiles.grad_splits(m, n, ranks, tile=self.tile, chip=chip)
        self.grid = col_blocks, splits, rank_blocks
        self.parts = Parts(
            col_blocks,
            splits,
            ds=m * padded_rank(max(self.r, 1)) if fused else 0,
            sums=0 if self.sums is None else n,
            dm=0 if self.dm is None else n,
            g=n * self.r if self.g is not None and splits > 1 else 0,
        )

    def launches(self, memory: Operand | None) -> list[Launch]:
        """Over this memory for the parts, if there are any."""
        main = self._main(memory)
        if not any(self.parts[2:]):
            return [main]
        assert memory is not None
        with_ds = self.ds is not None
        add = add_parts(
            self.parts,
            memory,
            self.z,
            self.dtype,
            ds=self.ds,
            sums=self.sums,
            g=self.g,
            dora=self.dora,
            scaling=self.scaling if with_ds else None,
            keep=self.keep if with_ds else None,
            lifted=self.lifted,
        )
        return [main, add]

    def _main(self, memory: Operand | None) -> Launch:
        z, g, b, dora, dz, tile, kind = self.z, self.g, self.b, self.dora, self.dz, self.tile, self.dtype
        (m, n), block = z.shape, [tile.m, tile.n]
        exact = precision(kind, m if b is None else min(m, n))
        if exact == "tf32" and self.ones:
            exact = "ieee"  # dbias is no product: it stays exact
        kept = dora.kept if dora is not None and dora.dm is not None else None
        scaling = self.scaling if self.lifted else None
        return launch(
            _grad_kernel,
            self.grid,
            tile.options,
            z,
            z=Tiles(z, block) if self.tma else z,
            dz=Tiles(dz, block) if self.tma and dz is not None else dz,
            kept_ptr=kept,
            p_ptr=self.p,
            b_ptr=b,
            bits_ptr=self.bits,
            gain_ptr=dora and dora.gain,
            g_ptr=memory if self.parts.g else g,
            parts_ptr=memory,
            row_scale_ptr=self.row_scale,
            scaling=scaling,
            M=m,
            N=n,
            R=self.r,
            RS=padded_rank(max(self.r, 1)),
            rows_each=self.rows_each,
            sum_at=self.parts.sums_at,
            dm_at=self.parts.dm_at,
            g_at=self.parts.g_at if self.parts.g else 0,
            stride_zm=z.stride(0),
            stride_zn=z.stride(1),
            stride_bn=0 if b is None else b.stride(0),
            stride_br=0 if b is None else b.stride(1),
            # Parts of G lie as the gradient does: [N, R], or [R, N] seen from the side.
            stride_gs=0 if g is None else n * self.r,
            stride_gn=0 if g is None else g.stride(0),
            stride_gr=0 if g is None else g.stride(1),
            stride_p=0 if self.p is None else self.p.stride(0),
            stride_bits=0 if self.bits is None else triton.cdiv(n, 32),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_R=tile.r,
            DM_ROWS=tile.sum_rows,
            WITH_SUM=self.sums is not None,
            SCALING_PTR=isinstance(scaling, Operand),
            TMA=self.tma,
            ACC=acc_dtype(kind),
            PRECISION=exact,
            DTYPE=TL[kind],
        )
