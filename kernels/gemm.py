"""out = X W' + [keep *] P Q' (+ bias): one kernel body for y = x W^T + S B^T + bias and dX = dY W + mask * (dS A).

X [M, C], W [N, C] (W_T) or [C, N], P [M, R], Q [N, R] (W_T) or [R, N]. After the K loop of the base product one step
adds the low-rank product to the same accumulator, then the epilogue stores the tile in two halves. Under a dropout mask
the low-rank product has an accumulator of its own per half, masked and added. Persistent: each program walks over tiles.
"""

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import TL, acc_dtype, descriptor, keep_bits, launch, layout, load_tile, mma, precision
from lora_fast.kernels.tiles import gemm_tile, n_programs, tma_fits


@triton.jit
def _tile_of(tile, grid_m, grid_n, GROUP_M: tl.constexpr):
    """Walk GROUP_M row blocks at a time, so that neighbouring programs share tiles of X and W in the cache."""
    group = tile // (GROUP_M * grid_n)
    first = group * GROUP_M
    size = tl.minimum(grid_m - first, GROUP_M)
    return first + (tile % size), (tile % (GROUP_M * grid_n)) // size


@triton.jit
def _rank_step(acc, p, q, row, col, rank, M, N, R, stride_p, stride_qr, stride_qc, dtype: tl.constexpr,
               W_T: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, COLS: tl.constexpr,
               BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + P Q' for BLOCK_R ranks, for the tile [BLOCK_M, COLS] at (row, col)."""
    a = load_tile(p, row, rank, M, stride_p, stride_p, 1, TMA, BLOCK_M, BLOCK_R)
    if W_T:
        b = load_tile(q, col, rank, N, R, stride_qr, stride_qc, TMA, COLS, BLOCK_R).to(dtype).T
    else:
        b = load_tile(q, rank, col, R, N, stride_qr, stride_qc, TMA, BLOCK_R, COLS).to(dtype)
    return mma(a, b, acc, PRECISION)


@triton.jit
def _low_rank(acc, p, q, row, col, M, N, R, stride_p, stride_qr, stride_qc, dtype: tl.constexpr,
              W_T: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, COLS: tl.constexpr,
              BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + P Q' over all ranks."""
    if RANK_STEPS == 1:
        acc = _rank_step(acc, p, q, row, col, 0, M, N, R, stride_p, stride_qr, stride_qc, dtype,
                         W_T, TMA, BLOCK_M, COLS, BLOCK_R, PRECISION)  # fmt: skip
    else:  # one buffer: pipelining here would take the shared memory that the K loop needs
        for step in tl.range(0, RANK_STEPS, num_stages=1):
            acc = _rank_step(acc, p, q, row, col, step * BLOCK_R, M, N, R, stride_p, stride_qr, stride_qc, dtype,
                             W_T, TMA, BLOCK_M, COLS, BLOCK_R, PRECISION)  # fmt: skip
    return acc


@triton.jit
def _finish(acc, p, q, out, bias_ptr, bits_ptr, keep_scale, row, col, M, N, R,
            stride_p, stride_qr, stride_qc, stride_om, stride_bits, dtype: tl.constexpr,
            W_T: tl.constexpr, TMA: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
            HAS_BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The epilogue of half a tile: under a mask its low-rank product, bias, store."""
    rows = row + tl.arange(0, acc.shape[0])
    cols = col + tl.arange(0, acc.shape[1])
    if MASK:
        keep = keep_bits(bits_ptr, tl.minimum(rows, M - 1).to(tl.int64), col, stride_bits, acc.shape[1])
        low = _low_rank(tl.zeros_like(acc), p, q, row, col, M, N, R, stride_p, stride_qr, stride_qc, dtype,
                        W_T, TMA, acc.shape[0], acc.shape[1], BLOCK_R, RANK_STEPS, PRECISION)  # fmt: skip
        acc += tl.where(keep == 1, low * keep_scale, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(acc.dtype)[None, :]
    if TMA:
        out.store([row, col], acc.to(dtype))
    else:
        ptrs = out + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
        tl.store(ptrs, acc.to(dtype), mask=(rows[:, None] < M) & (cols[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    x, w, p, q, out, bias_ptr, bits_ptr, keep_scale, M, N, C, R,
    stride_xm, stride_xc, stride_wr, stride_wc, stride_p, stride_qr, stride_qc, stride_om, stride_bits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr, PROGRAMS: tl.constexpr,
    W_T: tl.constexpr, TMA: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, PROGRAMS, flatten=TMA and RANK_STEPS == 1):
        pid_m, pid_n = _tile_of(tile, grid_m, grid_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for c in range(0, C, BLOCK_C):
            a = load_tile(x, row, c, M, C, stride_xm, stride_xc, TMA, BLOCK_M, BLOCK_C)
            if W_T:
                b = load_tile(w, col, c, N, C, stride_wr, stride_wc, TMA, BLOCK_N, BLOCK_C).T
            else:
                b = load_tile(w, c, col, C, N, stride_wr, stride_wc, TMA, BLOCK_C, BLOCK_N)
            acc = mma(a, b, acc, PRECISION)
        if not MASK:
            acc = _low_rank(acc, p, q, row, col, M, N, R, stride_p, stride_qr, stride_qc, DTYPE, W_T, TMA,
                            BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION)  # fmt: skip
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(left, p, q, out, bias_ptr, bits_ptr, keep_scale, row, col, M, N, R,
                stride_p, stride_qr, stride_qc, stride_om, stride_bits, DTYPE, W_T, TMA, BLOCK_R, RANK_STEPS,
                HAS_BIAS, MASK, PRECISION)  # fmt: skip
        _finish(right, p, q, out, bias_ptr, bits_ptr, keep_scale, row, col + HALF, M, N, R,
                stride_p, stride_qr, stride_qc, stride_om, stride_bits, DTYPE, W_T, TMA, BLOCK_R, RANK_STEPS,
                HAS_BIAS, MASK, PRECISION)  # fmt: skip


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    transposed: bool,
    bias: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """``x w^T + p q^T + bias`` if transposed (w [N, C], q [N, R]), else ``x w + mask * (p q)`` (w [C, N], q [R, N]).

    x [M, C] and w in one dtype, which the result has; p [M, padded R]; q in any floating dtype; bits as ``mask_bits``
    gives for the result's shape, kept elements of the low-rank product multiplied by keep_scale.
    """
    m, c = x.shape
    n, r = (w.shape[0], q.shape[1]) if transposed else (w.shape[1], q.shape[0])
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    tma = tma_fits(x, w, out)
    if tma and not tma_fits(q):
        q = torch.nn.functional.pad(q, (0, -q.shape[1] % 16))
    if r > 32 and q.dtype.itemsize > x.dtype.itemsize:
        q = q.to(x.dtype)  # a tile of it in float32 would not fit beside the K loop's buffers
    tile, options = gemm_tile(m, n, c, r, x.dtype, x.device, tma, bits is not None)
    exact = precision(x.dtype)

    def make():
        programs = min(n_programs(x.device), triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]))
        constants = {**tile, "PROGRAMS": n_programs(x.device), "W_T": transposed, "TMA": tma,
                     "HAS_BIAS": bias is not None, "MASK": bits is not None, "ACC": acc_dtype(x.dtype),
                     "PRECISION": exact, "DTYPE": TL[x.dtype]}  # fmt: skip
        return (programs,), constants, options

    operands = (x, w, p, q, out)
    if tma:
        bm, bn, bc, br = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_C"], tile["BLOCK_R"]
        cols = bn // 2 if bits is not None else bn
        operands = (
            descriptor(x, bm, bc), descriptor(w, *((bn, bc) if transposed else (bc, bn))), descriptor(p, bm, br),
            descriptor(q, *((cols, br) if transposed else (br, cols))), descriptor(out, bm, bn // 2),
        )  # fmt: skip
    key = (layout(x), layout(w), layout(p), layout(q), layout(bias), bits is None, transposed, exact, x.device)
    args = (
        *operands, bias, bits, keep_scale, m, n, c, r, *x.stride(), *w.stride(), p.stride(0), *q.stride(), n,
        bits.stride(0) if bits is not None else 0,
    )  # fmt: skip
    launch(_gemm_kernel, key, make, args)
    return out
