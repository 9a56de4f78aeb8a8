"""Weights of 4 bits an element, written out for a product: ``W[n, k] = table[nibble] * scale[block]``.

A 32-bit word holds eight elements that follow each other in a row. One read of the words, one write of W: in the
products' dtype [N, K], or in e4m3 over scales that are given, by rows [N, K] for y, by columns [K, N] for dX.
"""

# mypy: disable-error-code="assignment, attr-defined, misc, var-annotated"
# In the kernels tuples grow, which mypy does not follow.

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import COMPILED, TL, wait_for_stream
from lora_fast.kernels.nibbles import (
    NAMES,
    Stored,
    columns_assembly,
    four_of_column,
    four_of_row,
    look_up,
    of_neighbour,
    pair,
    pairs_assembly,
    rows_assembly,
    scale_of,
    shift_of,
    store_four,
)
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch

THREADS = 128
WORDS = 2  # of 32 bits a thread, for W in 16 or 32 bits
ROWS = 4  # of a program, for e4m3 by rows, whose threads each take 64 bits of a row


@triton.jit
def _whole_kernel(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    out_ptr,
    WORDS_IN_ALL,
    BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    w = Stored(packed_ptr, absmax_ptr, table_ptr, code2_ptr, absmax2_ptr, offset_ptr)
    first = tl.program_id(0).to(tl.int64) * (THREADS * WORDS)
    lane = tl.arange(0, THREADS)
    words, scales = (), ()
    for u in tl.static_range(WORDS):  # all of them are under way before the first is used
        at = first + u * THREADS + lane
        words = words + (tl.load(w.packed + at, mask=at < WORDS_IN_ALL, other=0),)
    for u in tl.static_range(WORDS):
        at = first + u * THREADS + lane
        scales = scales + (scale_of(w, at // (BLOCK // 8), at < WORDS_IN_ALL),)
    for u in tl.static_range(WORDS):
        at = first + u * THREADS + lane
        inside = at < WORDS_IN_ALL
        if KIND == tl.float32:
            for half in tl.static_range(2):
                e = look_up(words[u], 4 * half, scales[u], w.table, LOW_FIRST)
                f = look_up(words[u], 4 * half + 1, scales[u], w.table, LOW_FIRST)
                g = look_up(words[u], 4 * half + 2, scales[u], w.table, LOW_FIRST)
                h = look_up(words[u], 4 * half + 3, scales[u], w.table, LOW_FIRST)
                store_four(out_ptr, at * 8 + 4 * half, e, f, g, h, inside)
        else:
            if ASSEMBLY is not None:
                a, b, c, d = tl.inline_asm_elementwise(
                    ASSEMBLY,
                    "=r,=r,=r,=r,r,f,l",
                    [words[u], scales[u], w.table.to(tl.int64)],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=True,
                    pack=1,
                )
            else:
                a = pair(words[u], 0, scales[u], w.table, LOW_FIRST, KIND)
                b = pair(words[u], 2, scales[u], w.table, LOW_FIRST, KIND)
                c = pair(words[u], 4, scales[u], w.table, LOW_FIRST, KIND)
                d = pair(words[u], 6, scales[u], w.table, LOW_FIRST, KIND)
            store_four(out_ptr, at * 4, a, b, c, d, inside)


@triton.jit
def _rows_kernel(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    scale_ptr,
    gain_ptr,
    out_ptr,
    N,
    K16,
    BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    WEAK: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """With a gain only the rows for which it is below WEAK."""
    across = tl.cdiv(K16, THREADS)  # programs; a second axis of the grid would end at 65535 of them
    row = tl.program_id(0) // across * ROWS
    lane = tl.program_id(0) % across * THREADS + tl.arange(0, THREADS)
    wait_for_stream(PDL)
    w = Stored(packed_ptr, absmax_ptr, table_ptr, code2_ptr, absmax2_ptr, offset_ptr)
    words, scales, factors, places, wanted = (), (), (), (), ()
    for u in tl.static_range(ROWS):
        inside = (lane < K16) & (row + u < N)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + (row + u + 0 * lane), mask=inside, other=WEAK)
            inside &= tl.abs(gain) < WEAK
        at = (row + u).to(tl.int64) * K16 + lane
        words = words + (tl.load(w.packed + at, mask=inside, other=0),)
        places, wanted = places + (at,), wanted + (inside,)
    for u in tl.static_range(ROWS):
        scales = scales + (scale_of(w, places[u] // (BLOCK // 16), wanted[u]),)
        factors = factors + (1 / tl.load(scale_ptr + tl.minimum(row + u, N - 1)),)
    for u in tl.static_range(ROWS):
        if ASSEMBLY is not None:
            a, b, c, d = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=r,=r,=r,=r,l,f,f,l",
                [words[u], scales[u], factors[u], w.table.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            low, high = words[u].to(tl.int32), (words[u] >> 32).to(tl.int32)
            a = four_of_row(low, 0, scales[u], factors[u], w.table, LOW_FIRST, KIND)
            b = four_of_row(low, 4, scales[u], factors[u], w.table, LOW_FIRST, KIND)
            c = four_of_row(high, 0, scales[u], factors[u], w.table, LOW_FIRST, KIND)
            d = four_of_row(high, 4, scales[u], factors[u], w.table, LOW_FIRST, KIND)
        store_four(out_ptr, places[u] * 4, a, b, c, d, wanted[u])


@triton.jit
def _columns_kernel(
    packed_ptr,
    absmax_ptr,
    table_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    scale_ptr,
    out_ptr,
    N,
    K16,
    BLOCK: tl.constexpr,
    LOW_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    THREADS: tl.constexpr,
    SHARED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A thread has 64 bits of each of sixteen rows, and so sixteen bytes of each of sixteen of the result's: nothing
    goes through shared memory. Eight neighbours have 128 rows, a whole line of the result. Threads are numbered by
    hand: with two dimensions the compiler would turn them. SHARED threads of a warp, eight apart, have elements of the
    same blocks; they find the scales of some rows each, and hand them round."""
    lane = tl.arange(0, THREADS)
    wait_for_stream(PDL)
    w = Stored(packed_ptr, absmax_ptr, table_ptr, code2_ptr, absmax2_ptr, offset_ptr)
    sixteen = tl.program_id(1) * 8 + lane % 8
    double = tl.program_id(0) * (THREADS // 8) + lane // 8
    inside = (sixteen * 16 < N) & (double < K16)
    first = (sixteen * 16).to(tl.int64) * K16 + double
    words, scales = (), ()
    for row in tl.static_range(16):
        words = words + (tl.load(w.packed + first + row * K16, mask=inside, other=0),)
    if SHARED > 1:
        own = ()
        for j in tl.static_range(16 // SHARED):
            row = lane // 8 % SHARED * (16 // SHARED) + j
            own = own + (scale_of(w, (first + row * K16) // (BLOCK // 16), inside),)
        for row in tl.static_range(16):
            scales = scales + (of_neighbour(own[row % (16 // SHARED)], row // (16 // SHARED), SHARED),)
    else:
        for row in tl.static_range(16):
            scales = scales + (scale_of(w, (first + row * K16) // (BLOCK // 16), inside),)
    table = tl.load(w.table + lane % 16)  # whose numbers are looked up in the registers of these threads
    for i in tl.static_range(16):
        factor = 1 / tl.load(scale_ptr + double * 16 + i, mask=double < K16, other=1.0)
        made = ()  # of each four rows
        for q in tl.static_range(4):
            four, their = (), scales[4 * q : 4 * q + 4]
            for row in tl.static_range(4 * q, 4 * q + 4):
                word = (words[row] >> (i // 8 * 32)).to(tl.int32)
                four = four + ((word if ASSEMBLY is None else word >> shift_of(i % 8, LOW_FIRST)),)
            if ASSEMBLY is not None:
                made = made + (
                    tl.inline_asm_elementwise(
                        ASSEMBLY,
                        "=r,r,r,r,r,f,f,f,f,f,f",
                        four + their + (factor, table),
                        dtype=tl.int32,
                        is_pure=True,
                        pack=1,
                    ),
                )
            else:
                made = made + (four_of_column(four, their, i % 8, factor, w.table, LOW_FIRST, KIND),)
        at = (double * 16 + i).to(tl.int64) * (N // 4) + sixteen * 4
        store_four(out_ptr, at, made[0], made[1], made[2], made[3], inside)


def whole(w: Stored, out: Operand, *, low_first: bool) -> Launch:
    """out [N, K], 16 or 32 bits wide, is filled with W; N * K is a multiple of BLOCK."""
    words = w.packed.shape[0] // 4
    half = out.dtype.itemsize == 2
    return launch(
        _whole_kernel,
        (triton.cdiv(words, THREADS * WORDS),),
        {"num_warps": THREADS // 32},
        out,
        short=True,
        **_read(w, torch.int32),
        out_ptr=out.seen_as((words * 4,), torch.int32) if half else out,
        WORDS_IN_ALL=words,
        KIND=TL[out.dtype],
        ASSEMBLY=pairs_assembly(low_first, NAMES[out.dtype]) if half and COMPILED.value else None,
        THREADS=THREADS,
        WORDS=WORDS,
        **_blocks(w, low_first),
    )


def by_rows(
    w: Stored, out: Operand, scale: Operand, *, low_first: bool, kind: torch.dtype, gain: Operand | None, weak: float
) -> Launch:
    """out [N, K], e4m3, is filled with W, rounded to ``kind``, over the scales [N] of its rows, powers of two; with a
    gain [N] only in rows where that is below ``weak``. K is a multiple of 16."""
    n, k = out.shape
    return launch(
        _rows_kernel,
        (triton.cdiv(k // 16, THREADS) * triton.cdiv(n, ROWS),),
        {"num_warps": THREADS // 32},
        out,
        short=True,
        **_read(w, torch.int64),
        scale_ptr=scale,
        gain_ptr=gain,
        out_ptr=out.seen_as((n * k // 4,), torch.int32),
        N=n,
        K16=k // 16,
        KIND=TL[kind],
        WEAK=weak,
        ASSEMBLY=rows_assembly(low_first, NAMES[kind]) if COMPILED.value else None,
        THREADS=THREADS,
        ROWS=ROWS,
        **_blocks(w, low_first),
    )


def by_columns(w: Stored, out: Operand, scale: Operand, *, low_first: bool, kind: torch.dtype) -> Launch:
    """out [K, N], e4m3, is filled with W^T, rounded to ``kind``, over the scales [K] of its rows, powers of two. K and
    N are multiples of 16."""
    (k, n), blocks = out.shape, _blocks(w, low_first)
    block = blocks["BLOCK"]
    return launch(
        _columns_kernel,
        (triton.cdiv(k // 16, THREADS // 8), triton.cdiv(n, 128)),
        {"num_warps": THREADS // 32},
        out,
        short=True,
        **_read(w, torch.int64),
        scale_ptr=scale,
        out_ptr=out.seen_as((n * k // 4,), torch.int32),
        N=n,
        K16=k // 16,
        KIND=TL[kind],
        ASSEMBLY=columns_assembly(NAMES[kind]) if COMPILED.value else None,
        THREADS=THREADS,
        SHARED=min(block // 16, 4) if COMPILED.value and k % block == 0 else 1,
        **blocks,
    )


def _read(w: Stored, word: torch.dtype) -> dict[str, Operand | None]:
    """The arguments of a kernel that reads W word by word."""
    words = w.packed.seen_as((w.packed.shape[0] // word.itemsize,), word)
    return {f"{name}_ptr": t for name, t in w._replace(packed=words)._asdict().items()}


def _blocks(w: Stored, low_first: bool) -> dict[str, int | bool]:
    return {"BLOCK": 2 * w.packed.shape[0] // w.absmax.shape[0], "LOW_FIRST": low_first}
