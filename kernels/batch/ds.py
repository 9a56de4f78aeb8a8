"""dS = s dY B_j of the rows of each adapter j, from the parts that columns.py leaves, added up in a fixed order."""

from typing import NamedTuple

import triton
import triton.language as tl

from lora_fast.kernels.batch.places import Where
from lora_fast.kernels.batch.ranks import ROWS, UNIT, Ranks
from lora_fast.kernels.common import TL, acc_dtype, wait_for_stream
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

DS_ROWS = 16  # rows that a program adds up the parts of dS for


@triton.jit(do_not_specialize=["M"])
def _ds_kernel(
    parts_ptr,
    own_ptr,
    owner_ptr,
    within_ptr,
    units_ptr,
    scales_ptr,
    ds_ptr,
    M,
    PARTS,
    TOTAL,
    stride_units,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """dS of these rows, of the units of ranks that they use: its parts added up where a rank is of the row's adapter,
    else 0."""
    wait_for_stream(PDL)
    row = tl.program_id(0) * BLOCK_M
    size, i = M.to(tl.int64) * WIDTH, row.to(tl.int64) * WIDTH + tl.arange(0, BLOCK_M * WIDTH)
    total = tl.zeros([BLOCK_M * WIDTH], dtype=ACC)
    for first in range(0, PARTS, 4):  # four loads under way at a time
        part = first + tl.arange(0, 4)
        inside = (part < PARTS)[:, None] & (i < size)[None, :]
        total += tl.sum(tl.load(parts_ptr + part[:, None] * size + i[None, :], mask=inside, other=0.0), 0)
    total = tl.reshape(total, (BLOCK_M, WIDTH))
    rows = row + tl.arange(0, BLOCK_M)
    own = tl.load(own_ptr + rows, mask=rows < M, other=-1)
    units, count = units_ptr, 1
    if units_ptr is not None:
        units += row // ROWS * stride_units
        count = tl.load(units)
    for unit in range(0, count):
        if units_ptr is not None:
            unit = tl.load(units + 1 + unit)
        ranks = unit * UNIT + tl.arange(0, UNIT)
        owner = tl.load(owner_ptr + ranks, mask=ranks < TOTAL, other=-2)
        within = tl.load(within_ptr + ranks, mask=ranks < TOTAL, other=0)
        scale = tl.load(scales_ptr + ranks, mask=ranks < TOTAL, other=0.0)
        its = tl.gather(total, tl.broadcast_to(within[None, :], (BLOCK_M, UNIT)), 1)
        ds = tl.where(own[:, None] == owner[None, :], its * scale[None, :], 0.0)
        ds_ptrs = ds_ptr + rows.to(tl.int64)[:, None] * TOTAL + ranks[None, :]
        tl.store(ds_ptrs, ds.to(DTYPE), mask=(rows < M)[:, None] & (ranks < TOTAL)[None, :])


class LowRank(NamedTuple):
    """dS = scales * dZ B, which is made on the way of dB: ds [M, ranks in all], b [N, ranks in all], scales [ranks in
    all]."""

    ds: Operand
    b: Operand
    scales: Operand


def add_ds(parts: Operand, z: Operand, where: Where, low: LowRank, ranks: Ranks) -> Launch:
    """Fills ``low.ds`` from parts [column blocks, M, the most ranks of an adapter] of dZ B, of z's dtype."""
    count, m, width = parts.shape
    return launch(
        _ds_kernel,
        (triton.cdiv(m, DS_ROWS),),
        {"num_warps": 4},
        z,
        parts_ptr=parts,
        own_ptr=where.own,
        owner_ptr=where.tables.owner,
        within_ptr=where.tables.within,
        units_ptr=where.units,
        scales_ptr=low.scales,
        ds_ptr=low.ds,
        M=m,
        PARTS=count,
        TOTAL=ranks.total,
        WIDTH=width,
        stride_units=0 if where.units is None else where.units.stride(0),
        BLOCK_M=DS_ROWS,
        ROWS=ROWS,
        UNIT=UNIT,
        ACC=acc_dtype(z.dtype),
        DTYPE=TL[z.dtype],
    )
