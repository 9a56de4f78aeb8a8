"""Small device functions that several kernels call, and what their launchers share."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.launchers import INTERPRETED
from lora_fast.kernels.operands import Operand

COMPILED = tl.constexpr(not INTERPRETED)  # the interpreter has no inline assembly
TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)  # the largest e4m3 number
FP8_LEAST = tl.constexpr(2.0**-60)  # rows whose largest element is smaller are scaled as if it were this


@triton.jit
def wait_for_stream(PDL: tl.constexpr):
    """First thing in every kernel: wait for what the one before wrote; with PDL 2 let the next one be set up now."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def power_above(x):
    """The least power of two that is x or more, for positive float32 x."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


class Matrix(NamedTuple):
    """A matrix as device code sees it. What is loaded through a descriptor needs no strides, what is stored is
    contiguous. (Of records like this: None stays None in them, but a constant is one for whom it is handed to only if
    the record is made in the call itself.)"""

    ptr: Any  # or a tensor descriptor
    rows: Any
    cols: Any
    stride_r: Any
    stride_c: Any


class Bits(NamedTuple):
    """A dropout mask as device code sees it: words, so many a row."""

    ptr: Any
    stride: Any
    rows: Any


@triton.jit
def scalar(s, POINTER: tl.constexpr):
    """A runtime number, or the value behind a pointer to one."""
    if POINTER:
        s = tl.load(s).to(tl.float32)
    return s


@triton.jit
def lift_of(scaling, POINTER: tl.constexpr):
    """The power of two that B carries of a scaling above 1 in float16 (``LIFTED``). S with all of it would pass 65504
    where the layer's output does not; B is small, and a power of two rounds nothing."""
    one = tl.full((), 1, tl.float32)
    return power_above(tl.maximum(tl.abs(one * scalar(scaling, POINTER)), one))


@triton.jit
def low_scale(scaling, POINTER: tl.constexpr, LIFTED: tl.constexpr):
    """The scaling, or what of it B does not carry: what products with B are multiplied by, and S."""
    s = scalar(scaling, POINTER)
    if LIFTED:
        s /= lift_of(scaling, POINTER)
    return s


@triton.jit
def late(t):
    """t, and no use of it before this: the compiler puts what first becomes of a loaded tile right behind the load, and
    so waits there."""
    if COMPILED:
        PACK: tl.constexpr = 32 // t.dtype.primitive_bitwidth
        t = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [t], t.dtype, is_pure=False, pack=PACK)
    return t


@triton.jit
def load_tile(t, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr = False):
    """The [ROWS, COLS] tile at (row, col) of a matrix, by its descriptor or its pointer; zero past its ends."""
    if TMA:
        tile = t.ptr.load([row, col])
    else:
        rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        zero = tl.full((), 0, tl.int64)
        first = t.ptr + (zero + row) * t.stride_r + (zero + col) * t.stride_c  # offsets within the tile fit 32 bits
        inside = (rows < t.rows - row) & (cols < t.cols - col)
        tile = tl.load(first + (rows * t.stride_r + cols * t.stride_c), mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(t, tile, row, col, DTYPE: tl.constexpr, TMA: tl.constexpr = False):
    """Put a tile to (row, col) of a matrix with contiguous rows, what is inside of it."""
    if TMA:
        t.ptr.store([row, col], tile.to(DTYPE))
    else:
        rows, cols = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
        zero = tl.full((), 0, tl.int64)
        first = t.ptr + (zero + row) * t.stride_r + col
        tl.store(first + (rows * t.stride_r + cols), tile.to(DTYPE), mask=(rows < t.rows - row) & (cols < t.cols - col))


@triton.jit
def fp8_scale(peak):
    """The scale of a row with this largest absolute value: the least power of two that brings it into e4m3's range."""
    return power_above(tl.maximum(peak, FP8_LEAST).to(tl.float32) / FP8_MAX)


@triton.jit
def mask_words(bits_ptr, rows, col, stride, WIDTH: tl.constexpr):
    """The words that hold the mask bits of columns col to col + WIDTH (both multiples of 32) of the given rows."""
    words = col // 32 + tl.arange(0, WIDTH // 32)
    return tl.load(
        bits_ptr + rows.to(tl.int64)[:, None] * stride + words[None, :], mask=words[None, :] < stride, other=0
    )


@triton.jit
def masked(t, words):
    """t [..., 32 * words], zero where the bits of mask words [..., words] are not set. Numbers of 16 bits by pairs: a
    shift for each, which puts its bit on top, a choice of bytes by these signs, an and."""
    words = tl.expand_dims(words, len(words.shape))
    if COMPILED and t.dtype.primitive_bitwidth == 16:
        signs = tl.reshape(words << (31 - tl.arange(0, 32)), t.shape)
        both: tl.constexpr = "{ .reg .b32 m; prmt.b32 m, $2, $3, 0xFFBB; and.b32 $0, $1, m; }"
        t = tl.inline_asm_elementwise(both, "=r,r,r,r", [t, signs], t.dtype, is_pure=True, pack=2)
    else:
        t = tl.where(tl.reshape((words >> tl.arange(0, 32)) & 1, t.shape) == 1, t, 0.0)
    return t


@triton.jit
def _round_tf32(x):
    """x to the 10 bits of mantissa that the matrix unit reads, to nearest: by itself it would cut the rest off."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN of all ones would overflow


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In float32 each step's product is summed by itself first, which halves the rounding error."""
    if a.dtype == tl.float32:
        if PRECISION == "tf32":
            a = _round_tf32(a)
            b = _round_tf32(b)
        one = (tl.num_programs(0) > 0).to(tl.float32)  # at run time: by itself the compiler would fold the sum away
        acc += tl.dot(a, b, input_precision=PRECISION) * one
    else:
        acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
    return acc


def padded_rank(r: int) -> int:
    """Columns of S and dS: r rounded up to the 16 that a matrix instruction takes; the padding holds zeros."""
    return -(-r // 16) * 16


def acc_dtype(dtype: torch.dtype) -> tl.dtype:
    """Accumulators are float32; float64 exists in the interpreter alone, for gradcheck."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide(*tensors: torch.Tensor | Operand) -> torch.dtype:
    """The dtype of sums, norms and gains in memory: float32, float64 if one of the tensors is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def precision(dtype: torch.dtype, terms: int) -> str:
    """How float32 products that sum up so many terms are made: in tf32 where torch's setting allows it, else as three
    tf32 products. Those are as exact as float32 in long sums, and several times faster than arithmetic without the
    matrix units, which short sums keep."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if terms >= 256 else "ieee"
