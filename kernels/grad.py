"""Gradients that contract over rows: G = Z^T P [N, R] from Z [M, N] and P [M, R], in one read of Z.

For Z = dY, P = S it gives dB, and on the way dS = scaling * dY B (from the same tile) and dbias, the column sums (a
column of ones beside S, or in registers where the tile goes there). For Z = drop(x), P = dS it gives dA^T. A program
owns BLOCK_N columns and a range of rows, keeps its G in registers and steps through the rows; a second kernel
(parts.py) adds up the programs' parts.

With DoRA's gain g, dZ = dY * g takes the place of dY: dB = g * (dY^T S) and dS = scaling * dY (g * B), so the products
still read dY's tile as it is; dZ itself is written for those who come after, and the column sums of dY * z (or y, see
parts.py) make dm.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import (
    TL,
    acc_dtype,
    lift_of,
    load_tile,
    mask_words,
    mma,
    padded_rank,
    precision,
    store_tile,
    unpack_words,
    wait_for_stream,
    wide,
)
from lora_fast.kernels.down import down_plan
from lora_fast.kernels.launch import Block, Plan, Steps, as_scaling, launch, plan_for, scaling_kind, sig
from lora_fast.kernels.parts import Dora, sum_plan
from lora_fast.kernels.tiles import grad_splits, grad_tile, tma_fits

FUSED_RANK = 32  # the largest rank at which dS comes from the pass that makes dB: its parts grow with the rank
FUSED_RANK_DORA = 16  # with a gain, whose tiles make twice as many parts, and dZ is there to be read
WIDE_RANK = 64  # the largest rank at which dB comes from the pass that makes dZ


@triton.jit(do_not_specialize=["M", "rows_each"])
def _grad_kernel(
    z, dz, kept_ptr, p_ptr, b_ptr, bits_ptr, gain_ptr, g_ptr, parts_ptr, row_scale_ptr, scaling,
    M, N, R, RS, rows_each, sum_at, dm_at, g_at,
    stride_zm, stride_zn, stride_bn, stride_br, stride_gs, stride_gn, stride_gr, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DM_ROWS: tl.constexpr,
    WITH_G: tl.constexpr, WITH_DS: tl.constexpr, WITH_SUM: tl.constexpr, GAIN: tl.constexpr, WITH_DZ: tl.constexpr,
    WITH_DM: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr, LIFTED: tl.constexpr, SCALING_PTR: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_stream(PDL)
    pid_n, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col, rank = pid_n * BLOCK_N, pid_r * BLOCK_R
    cols = col + tl.arange(0, BLOCK_N)
    ranks = rank + tl.arange(0, BLOCK_R)
    if GAIN:
        gain = tl.load(gain_ptr + cols, mask=cols < N, other=0.0)
    if WITH_DS:
        b = load_tile(b_ptr, col, rank, N, R, stride_bn, stride_br, False, BLOCK_N, BLOCK_R)
        if GAIN:
            b = (b.to(ACC) * gain[:, None]).to(DTYPE)
    if WITH_DM:
        dm = tl.zeros([DM_ROWS, BLOCK_N], dtype=ACC)
    if WITH_SUM and GAIN:
        sums = tl.zeros([DM_ROWS, BLOCK_N], dtype=ACC)
    g = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACC)
    first = split * rows_each  # a multiple of BLOCK_M
    if WITH_DM:
        y = load_tile(kept_ptr, first, col, M, N, N, 1, False, BLOCK_M, BLOCK_N)
    for m in range(first, tl.minimum(first + rows_each, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        tile = load_tile(z, m, col, M, N, stride_zm, stride_zn, TMA, BLOCK_M, BLOCK_N)
        if WITH_DM:
            dots = tl.reshape(tile.to(ACC) * y.to(ACC), (BLOCK_M // DM_ROWS, DM_ROWS, BLOCK_N))
            dm += tl.sum(dots, 0)
            # The next step's, by hand: the compiler's pipeline takes the operands of products alone.
            y = load_tile(kept_ptr, m + BLOCK_M, col, M, N, N, 1, False, BLOCK_M, BLOCK_N)
        if WITH_SUM and GAIN:  # in registers, where the tile is anyway
            sums += tl.sum(tl.reshape(tile.to(ACC), (BLOCK_M // DM_ROWS, DM_ROWS, BLOCK_N)), 0)
        if WITH_DZ:
            store_tile(dz, tile.to(ACC) * gain[None, :], m, col, M, N, DTYPE, TMA)
        if MASK:
            words = mask_words(bits_ptr, tl.minimum(rows, M - 1), col, stride_bits, BLOCK_N)
            tile = tl.where(unpack_words(words), tile, 0.0)
        if SCALED:
            tile = tile.to(DTYPE)
        if WITH_G:
            p = load_tile(p_ptr, m, rank, M, RS, RS, 1, False, BLOCK_M, BLOCK_R)
            if SCALED:
                scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
                p = (p.to(ACC) * scale[:, None]).to(DTYPE)
        else:
            p = tl.zeros([BLOCK_M, BLOCK_R], dtype=DTYPE)
        if WITH_SUM and not GAIN:
            p = tl.where(ranks[None, :] == R, 1.0, p.to(ACC)).to(DTYPE)
        if WITH_G or (WITH_SUM and not GAIN):
            g = mma(tile.T, p, g, PRECISION)
        if WITH_DS:
            ds = mma(tile, b, tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC), PRECISION)
            ds_ptrs = parts_ptr + (pid_n.to(tl.int64) * M + rows[:, None]) * RS + ranks[None, :]
            tl.store(ds_ptrs, ds, mask=(rows[:, None] < M) & (ranks[None, :] < RS))
    if WITH_SUM and GAIN:
        tl.store(parts_ptr + sum_at + split * N + cols, tl.sum(sums, 0), mask=cols < N)
    elif WITH_SUM:
        sum_ptrs = parts_ptr + sum_at + split * N + cols[:, None] + ranks[None, :] * 0
        tl.store(sum_ptrs, g, mask=(cols[:, None] < N) & (ranks[None, :] == R))
    if WITH_DM:
        tl.store(parts_ptr + dm_at + split * N + cols, tl.sum(dm, 0), mask=cols < N)
    if WITH_G:
        if GAIN:
            g *= gain[:, None]
        if LIFTED:
            g *= lift_of(scaling, SCALING_PTR)
        g_ptrs = g_ptr + g_at + split * stride_gs + cols.to(tl.int64)[:, None] * stride_gn + ranks[None, :] * stride_gr
        tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=(cols[:, None] < N) & (ranks[None, :] < R))


class ColumnPass(NamedTuple):
    """The launches for a pass, and the float32 parts between them: those of dS [column blocks, M, padded R], of the
    column sums [splits, N], of dm [splits, N] and of G [splits, N, R] (none where rows are not split), one after
    another."""

    main: Plan
    add: Plan | None
    parts: int  # how many numbers
    summed: bool  # whether G has parts
    lifted: bool

    def steps(self, z, p, b, bits, g, ds, sums, scaling, keep_scale, parts, dora: Dora | None = None,
              row_scale=None) -> Steps:  # fmt: skip
        gain, norm, kept, dz, dm, again = (None,) * 6 if dora is None else dora
        main = (z, dz, kept, p, b, bits, gain, parts if g is None or self.summed else g, parts, row_scale,
                scaling if self.lifted else None)  # fmt: skip
        if self.add is None:
            return [(self.main, main)]
        add = parts, ds, sums, g, scaling, keep_scale, dm, gain, norm, z, *(again or (None,) * 5)
        return [(self.main, main), (self.add, add)]


def column_plan(
    z: torch.Tensor, r: int, g: torch.Tensor | None, b: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0, with_sum: bool = False, masked: bool = False, dora: Dora | None = None,
    kind: torch.dtype | None = None, lifted: bool = False,
) -> ColumnPass:  # fmt: skip
    """The launches for Z = z [M, N]: g is the [N, R] view that G goes to, b [N, at least R] what dS is made with.
    ``kind`` is P's dtype where z is e4m3, with a scale for each row. ``lifted``: b carries a part of the scaling that
    P = S lacks, so G gets it here."""
    (m, n), scaled, kind = z.shape, kind is not None, kind or z.dtype
    rs, ranks = padded_rank(max(r, 1)), r + (with_sum and dora is None)
    dz, dm = (None, None) if dora is None else (dora.dz, dora.dm)
    with_dz, with_dm = dz is not None, dm is not None
    exact = precision(kind, min(z.shape) if b is not None else m)
    if exact == "tf32" and with_sum and dora is None:
        exact = "ieee"  # dbias is no product: it stays exact
    tma = tma_fits(z) and (dz is None or tma_fits(dz))
    tile, options, fill = grad_tile(m, n, ranks, kind, z.device, tma, b is not None, masked, with_dz or with_dm, scaled)
    col_blocks, splits, rank_blocks, rows_each = grad_splits(m, n, ranks, tile, fill, z.device)
    summed = g is not None and splits > 1
    ds_size, sum_size, dm_size, g_size = (b is not None) * m * rs, with_sum * n, with_dm * n, summed * n * r
    sum_at = col_blocks * ds_size  # all multiples of 16, which Triton compiles in
    dm_at = sum_at + -(-splits * sum_size // 16) * 16
    g_at = dm_at + -(-splits * dm_size // 16) * 16
    flags = {"WITH_DS": b is not None, "WITH_SUM": with_sum, "WITH_DM": with_dm}
    constants = {**tile, **flags, "WITH_G": g is not None, "GAIN": dora is not None, "WITH_DZ": with_dz,
                 "MASK": masked, "SCALED": scaled, "LIFTED": lifted,
                 "SCALING_PTR": lifted and isinstance(scaling, torch.Tensor), "TMA": tma, "ACC": acc_dtype(kind),
                 "PRECISION": exact, "DTYPE": TL[kind]}  # fmt: skip
    # Parts of G lie as the gradient does: [N, R], or [R, N] seen from the side.
    g_strides = (n * r, *g.stride()) if g is not None else (0, 0, 0)
    b_strides = b.stride() if b is not None else (0, 0)
    ints = (m, n, r, rs, rows_each, sum_at, dm_at, g_at if summed else 0, *z.stride(), *b_strides, *g_strides,
            triton.cdiv(n, 32) if masked else 0)  # fmt: skip
    blocks = None
    if tma:
        blocks = {i: Block.of(t, [tile["BLOCK_M"], tile["BLOCK_N"]]) for i, t in enumerate((z, dz)) if t is not None}
    main = Plan(_grad_kernel, (col_blocks, splits, rank_blocks), constants, options, z, ints, blocks)
    sizes, add = (ds_size, sum_size, dm_size, g_size), None
    if any(sizes):
        add = sum_plan(z, kind, scaling, flags, dora, splits, col_blocks, sizes, (sum_at, dm_at, g_at), lifted)
    return ColumnPass(main, add, g_at + splits * g_size, summed, lifted)


def new_parts(z: torch.Tensor, size: int) -> torch.Tensor:
    return z.new_empty(size, dtype=wide(z))


def _source(dy: torch.Tensor, dora: Dora | None) -> tuple[torch.Tensor, Dora | None]:
    """What a further pass over dZ reads: dZ in memory, or dY and the gain that makes dZ of it."""
    if dora is None:
        return dy, None
    return (dy, Dora(dora.gain)) if dora.dz is None else (dora.dz, None)


class DyPass(NamedTuple):
    """The launches of everything that needs dY: one pass where dS and dB fit it, else several."""

    over_dy: ColumnPass | None
    ds: Plan | None
    over_dz: ColumnPass | None  # dB, where it was not made from dY

    @property
    def parts(self) -> int:
        return max((step.parts for step in (self.over_dy, self.over_dz) if step is not None), default=0)

    def steps(self, dy, s, b, grad_b, ds, grad_bias, scaling, keep_scale, one, parts, dora: Dora | None) -> Steps:
        found: Steps = []
        if self.over_dy is not None:
            in_it = None if self.over_dz is not None else grad_b
            found += self.over_dy.steps(dy, s, b if self.ds is None else None, None, in_it, ds, grad_bias, scaling,
                                        keep_scale, parts, dora)  # fmt: skip
        source, gain = _source(dy, dora)
        if self.ds is not None:
            found.append((self.ds, (source, b, ds, *(None,) * 4, scaling, keep_scale, *(None,) * 4)))
        if self.over_dz is not None:
            found += self.over_dz.steps(source, s, None, None, grad_b, None, None, scaling, one, parts, gain)
        return found


def dy_plan(
    dy: torch.Tensor, r: int, b: torch.Tensor | None, scaling: float | torch.Tensor, grad_b: torch.Tensor | None,
    grad_bias: torch.Tensor | None, dora: Dora | None, lifted: bool = False,
) -> DyPass:  # fmt: skip
    """The launches for these tensors (see ``dy_bwd``; b may have more columns than r, and if ``lifted`` it carries a
    part of the scaling)."""
    most = FUSED_RANK if dora is None else FUSED_RANK_DORA
    source, gain = _source(dy, dora)
    fused = b is not None and grad_b is not None and r <= most
    ds = over_dy = over_dz = None
    if b is not None and not fused:
        assert gain is None
        ds = down_plan(source, b.t()[:r], scaling, False, lifted=lifted)
    in_it = grad_b
    if dora is not None and grad_b is not None and r > WIDE_RANK:
        in_it, over_dz = None, column_plan(source, r, grad_b, None, scaling, dora=gain, lifted=lifted)
    wanted = in_it, grad_bias, dora and dora.dz, dora and dora.dm
    if fused or any(t is not None for t in wanted):
        over_dy = column_plan(dy, 0 if in_it is None else r, in_it, b if fused else None, scaling,
                              grad_bias is not None, dora=dora, lifted=lifted)  # fmt: skip
    return DyPass(over_dy, ds, over_dz)


def needs_dz(r: int, need_ds: bool, need_b: bool) -> bool:
    """Whether DoRA's dS or dB is made from dZ in memory: at ranks that do not fit the pass over dY, and where dS is
    wanted without dB."""
    return (need_ds and (not need_b or r > FUSED_RANK_DORA)) or (need_b and r > WIDE_RANK)


def dy_bwd(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float | torch.Tensor,
    grad_b: torch.Tensor | None,
    grad_bias: torch.Tensor | None = None,
    keep_scale: float = 1.0,
    dora: Dora | None = None,
) -> torch.Tensor | None:
    """Everything that needs dY [M, N]: returns dS = scaling * keep_scale * dZ B [M, padded R] if b [N, R] is given,
    and fills grad_b [N, R] from s [M, padded R], grad_bias [N] and what ``dora`` asks for. Without dora dZ is dY."""
    ds = dy.new_empty(dy.shape[0], padded_rank(b.shape[1])) if b is not None else None
    if dy.shape[0] == 0:
        for grad in (grad_b, grad_bias, dora and dora.dm):
            if grad is not None:
                grad.zero_()
        return ds
    like, scaling = b if b is not None else grad_b, as_scaling(scaling)
    r = 0 if like is None else like.shape[1]
    if dora is not None and dora.dz is None and needs_dz(r, b is not None, grad_b is not None):
        dora = dora._replace(dz=dy.new_empty(dy.shape))
    key = ("dy", sig(dy), sig(b), sig(grad_b), sig(grad_bias), scaling_kind(scaling), precision(dy.dtype, 256), r,
           dora and dora.sigs())  # fmt: skip
    plan = plan_for(key, dy_plan, dy, r, b, scaling, grad_b, grad_bias, dora)
    launch(plan.steps(dy, s, b, grad_b, ds, grad_bias, scaling, keep_scale, 1.0, new_parts(dy, plan.parts), dora))
    return ds


def a_bwd(x: torch.Tensor, ds: torch.Tensor, grad_a: torch.Tensor, bits: torch.Tensor | None = None) -> None:
    """Fill grad_a [R, K] with dS^T (mask * x) from x [M, K] and ds [M, padded R]."""
    if x.shape[0] == 0:
        grad_a.zero_()
        return
    key = ("a_bwd", sig(x), sig(grad_a), bits is None, precision(x.dtype, 256))
    plan = plan_for(key, column_plan, x, grad_a.shape[0], grad_a.t(), None, 1.0, False, bits is not None)
    launch(plan.steps(x, ds, None, bits, grad_a, None, None, 1.0, 1.0, new_parts(x, plan.parts)))
