"""out = X W_e' + P Q_e' [+ bias_e] for the rows of each expert: gemm.py's loop over tiles that are rows of one expert.

X [S, C], P [S, ranks]; W [E, N, C] and Q [E, N, ranks] (W_T), or [E, C, N] and [E, ranks, N]. A tile's expert and rows
come from the table that the sort left; which programs have tiles is read from memory, so a CUDA graph serves any
routing. Weights are read as matrices of three dimensions that end with each expert: in two a tile would go on into the
next one's numbers, and a NaN there, times zero, would come out. Rows of a tile past its expert's end are computed (they
are the next expert's, or nobody's) and not stored.
"""

import triton
import triton.language as tl

from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import TL, Matrix, load_tile, mma, precision, wait_for_stream
from lora_fast.kernels.experts import tiles
from lora_fast.kernels.experts.route import Table
from lora_fast.kernels.gemm import halves, tile_of
from lora_fast.kernels.operands import Operand, Tiles, launch
from lora_fast.kernels.program import Launch

GROUP_M = 8  # tiles of rows that are walked together


@triton.jit
def _store(out_ptr, bias_ptr, acc, row, end, col, N, DTYPE: tl.constexpr):
    rows, cols = row + tl.arange(0, acc.shape[0]), col + tl.arange(0, acc.shape[1])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptr + at, acc.to(DTYPE), mask=(rows < end)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["S", "length"])
def _experts_kernel(
    x,
    w,
    p,
    q,
    out_ptr,
    bias_ptr,
    tiles_ptr,
    length,
    S,
    E,
    N,
    C,
    R,
    stride_we,
    stride_wr,
    stride_wc,
    stride_qe,
    stride_qr,
    stride_qc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    W_T: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    grid_m = tl.load(tiles_ptr + 3 * length + E)
    grid_n = tl.cdiv(N, BLOCK_N)
    n_rank = 0 if p is None else tl.cdiv(R, BLOCK_C) * BLOCK_C
    end = n_rank + tl.cdiv(C, BLOCK_C) * BLOCK_C
    tile = tl.program_id(0) - PROGRAMS
    mine = tl.cdiv(grid_m * grid_n - tl.program_id(0), PROGRAMS)
    c = end - BLOCK_C
    row = 0
    col = 0
    expert = 0
    pid_m = 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(0, mine * (end // BLOCK_C)):
        c += BLOCK_C
        if c == end:
            c = 0
            tile += PROGRAMS
            pid_m, pid_n = tile_of(tile, grid_m, grid_n, GROUP_M)
            expert = tl.load(tiles_ptr + pid_m)
            row = tl.load(tiles_ptr + length + pid_m)
            col = pid_n * BLOCK_N
        xs, ws, at, to = x, w, c - n_rank, C
        we, wr, wc = stride_we, stride_wr, stride_wc
        if p is not None:
            if c < n_rank:
                xs, ws, at, to = p, q, c, R
                we, wr, wc = stride_qe, stride_qr, stride_qc
        a = load_tile(Matrix(xs, S, to, to, 1), row, at, BLOCK_M, BLOCK_C, TMA)
        if TMA:
            if W_T:
                b = tl.reshape(ws.load([expert, col, at]), (BLOCK_N, BLOCK_C)).T
            else:
                b = tl.reshape(ws.load([expert, at, col]), (BLOCK_C, BLOCK_N))
        else:
            of_expert = ws + tl.full((), 1, tl.int64) * expert * we
            if W_T:
                b = load_tile(Matrix(of_expert, N, to, wr, wc), col, at, BLOCK_N, BLOCK_C).T
            else:
                b = load_tile(Matrix(of_expert, to, N, wr, wc), at, col, BLOCK_C, BLOCK_N)
        acc = mma(a, b, acc, PRECISION)
        if c == end - BLOCK_C:
            last = tl.load(tiles_ptr + 2 * length + pid_m)
            of_bias = None if bias_ptr is None else bias_ptr + expert * N
            left, right = halves(acc)
            _store(out_ptr, of_bias, left, row, last, col, N, DTYPE)
            _store(out_ptr, of_bias, right, row, last, col + BLOCK_N // 2, N, DTYPE)
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)


def _tma_fits(*tensors: Operand) -> bool:
    """As for matrices (tiles.py), of any dimensions."""
    return Chip.of(tensors[0].device).has_tma and all(
        t.strides[-1] == 1
        and all(stride * t.element_size() % 16 == 0 for stride in t.strides[:-1])
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def experts_product(
    x: Operand,
    w: Operand,
    out: Operand,
    table: Table,
    *,
    transposed: bool,
    p: Operand | None = None,
    q: Operand | None = None,
    bias: Operand | None = None,
) -> Launch:
    """out [S, N], its rows of each expert: x w_e^T + p q_e^T if transposed (w [E, N, C], q [E, N, R]), else x w_e + p
    q_e ([E, C, N], [E, R, N]). x [S, C], p [S, R] and out contiguous, all in one dtype; w of any strides; bias [E, N]
    contiguous, in any dtype; p and q or neither."""
    (s, c), n, (experts, *_) = x.shape, out.shape[1], w.shape
    chip, read = Chip.of(x.device), [t for t in (x, w, p, q) if t is not None]
    tma = _tma_fits(*read)
    tile = tiles.experts_product(n, c, dtype=x.dtype, chip=chip, tma=tma)
    bm, bn, bc, programs = tile.m, tile.n, tile.k, int(chip.processors * tile.fill)
    assert bm == table.rows
    left, right = [bm, bc], [1, bn, bc] if transposed else [1, bc, bn]

    def tiled(t: Operand | None, box: list[int]) -> Operand | Tiles | None:
        return Tiles(t, box) if tma and t is not None else t

    return launch(
        _experts_kernel,
        (min(programs, table.length * triton.cdiv(n, bn)),),
        tile.options,
        x,
        x=tiled(x, left),
        w=tiled(w, right),
        p=tiled(p, left),
        q=tiled(q, right),
        out_ptr=out,
        bias_ptr=bias,
        tiles_ptr=table.at,
        length=table.length,
        S=s,
        E=experts,
        N=n,
        C=c,
        R=0 if p is None else p.shape[1],
        stride_we=w.stride(0),
        stride_wr=w.stride(1),
        stride_wc=w.stride(2),
        stride_qe=0 if q is None else q.stride(0),
        stride_qr=0 if q is None else q.stride(1),
        stride_qc=0 if q is None else q.stride(2),
        BLOCK_M=bm,
        BLOCK_N=bn,
        BLOCK_C=bc,
        GROUP_M=GROUP_M,
        PROGRAMS=programs,
        W_T=transposed,
        TMA=tma,
        PRECISION=precision(x.dtype, 0),  # as three tf32 products two in a row have 2.03 times eager's error
        DTYPE=TL[x.dtype],
    )
