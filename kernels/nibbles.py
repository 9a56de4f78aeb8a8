"""Device code that looks 4-bit elements up: ``table[nibble] * scale``, rounded, eight of a 32-bit word at a time.

The table of sixteen numbers lies in the registers of half a warp, so that an element costs one shuffle: no gather, no
shared memory. That is assembly; beside it stands the same in Triton, for the interpreter and for float32. Values are
rounded as bitsandbytes rounds them, to the bit: ``.rn`` keeps the compiler from fusing a product and a sum.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import COMPILED

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}  # in assembly


class Stored(NamedTuple):
    """A 4-bit weight's tensors. The scale of a block is absmax, or, where that is one byte, ``code2[absmax] * absmax2 +
    offset`` (absmax2 for 256 blocks each), or without code2 a power of two: absmax is its exponent, plus 127."""

    packed: Any  # [N K / 2] bytes
    absmax: Any  # [N K / BLOCK] float32 or uint8
    table: Any  # [16] float32, values of the nibbles
    code2: Any = None  # [256] float32
    absmax2: Any = None  # [N K / BLOCK / 256] float32
    offset: Any = None  # [1] float32


# Assembly ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def shift_of(i: int, low_first: bool) -> int:
    """Where in a word its element i lies: two in a byte, the first in its high half or in its low one."""
    return 8 * (i // 2) + 4 * (i % 2 == low_first)


_REGISTERS = "{ .reg .b32 t, p, q, lo, hi; .reg .f32 table, v<8>; .reg .b16 h<8>; .reg .b64 at;"


def _assembly(table: int, lines: list[str]) -> str:
    """With the address of the table in this operand."""
    own = "mov.u32 t, %laneid; and.b32 t, t, 15; mul.wide.u32 at, t, 4;"
    return "\n".join([_REGISTERS, own, f"add.s64 at, at, ${table}; ld.global.nc.f32 table, [at];", *lines, "}"])


def _element(v: str, word: str, shift: int, scale: str) -> list[str]:
    """Looks an element up, whose lane the low four bits of the shifted word name, and multiplies it."""
    found = f"shr.u32 t, {word}, {shift}; shfl.sync.idx.b32 {v}, table, t, 0x101f, 0xffffffff;"
    return [found, f"mul.rn.f32 {v}, {v}, {scale};"]


def _to_e4m3(out: str, first: str, second: str, factors: tuple[str, str], kind: str) -> list[str]:
    """Two floats, rounded to ``kind``, times powers of two, in e4m3."""
    lines = [f"mul.rn.f32 {v}, {v}, {factor};" for v, factor in zip((first, second), factors, strict=True)]
    if kind == "bf16":  # which has float32's exponents, so that both at once are multiplied in it
        lines = [f"cvt.rn.bf16x2.f32 p, {second}, {first}; cvt.rn.bf16x2.f32 q, {factors[1]}, {factors[0]};"]
        lines += ["mov.b32 t, 0x80008000; fma.rn.bf16x2 p, p, q, t;"]
        lines += [f"shl.b32 t, p, 16; mov.b32 {first}, t; and.b32 t, p, 0xffff0000; mov.b32 {second}, t;"]
    if kind == "f16":
        lines = [f"cvt.rn.f16.f32 h7, {v}; cvt.f32.f16 {v}, h7;" for v in (first, second)] + lines
    return [*lines, f"cvt.rn.satfinite.e4m3x2.f32 {out}, {second}, {first};"]


@cache
def e4m3_assembly(kind: str) -> str:
    """$0: four floats $1..$4, rounded to ``kind``, times powers of two $5..$8, in e4m3."""
    lines = [f"mov.f32 v{i}, ${1 + i};" for i in range(4)]
    for pair in range(2):
        factors = f"${5 + 2 * pair}", f"${6 + 2 * pair}"
        lines += _to_e4m3(f"h{pair}", f"v{2 * pair}", f"v{2 * pair + 1}", factors, kind)
    return "\n".join([_REGISTERS, *lines, "mov.b32 $0, {h0, h1}; }"])


@cache
def pairs_assembly(low_first: bool, kind: str) -> str:
    """$0..$3: eight elements in 16 bits; of the word $4, the scale $5, the table $6."""
    lines = []
    for i in range(8):
        lines += _element(f"v{i}", "$4", shift_of(i, low_first), "$5")
    return _assembly(6, lines + [f"cvt.rn.{kind}x2.f32 ${j}, v{2 * j + 1}, v{2 * j};" for j in range(4)])


@cache
def rows_assembly(low_first: bool, kind: str) -> str:
    """$0..$3: sixteen elements in e4m3; of the double word $4, the scale $5, the row's factor $6, the table $7."""
    lines = ["mov.b64 {lo, hi}, $4;"]
    for half, word in enumerate(("lo", "hi")):
        for i in range(8):
            lines += _element(f"v{i}", word, shift_of(i, low_first), "$5")
        for j in range(4):
            lines += _to_e4m3(f"h{j}", f"v{2 * j}", f"v{2 * j + 1}", ("$6", "$6"), kind)
        lines += [f"mov.b32 ${2 * half + j}, {{h{2 * j}, h{2 * j + 1}}};" for j in range(2)]
    return _assembly(7, lines)


@cache
def columns_assembly(kind: str) -> str:
    """$0: four rows of a column in e4m3; of words $1..$4 whose low four bits they are, their scales $5..$8, the
    column's factor $9, the table's number $10 of this lane."""
    lines = ["mov.f32 table, $10;"]
    for row in range(4):
        lines += _element(f"v{row}", f"${1 + row}", 0, f"${5 + row}")
    for pair in range(2):
        lines += _to_e4m3(f"h{pair}", f"v{2 * pair}", f"v{2 * pair + 1}", ("$9", "$9"), kind)
    return "\n".join([_REGISTERS, *lines, "mov.b32 $0, {h0, h1}; }"])


# The same in Triton, for its interpreter and for float32 --------------------------------------------------------------


@triton.jit
def look_up(words, i: tl.constexpr, scale, table_ptr, LOW_FIRST: tl.constexpr):
    """Element i of words, in float32."""
    shift: tl.constexpr = shift_of(i, LOW_FIRST)
    return tl.load(table_ptr + ((words >> shift) & 15).to(tl.int32)) * scale


@triton.jit
def half_bits(v, KIND: tl.constexpr):
    """The bits of v in 16 bits, in an int32; bfloat16 by hand, since the interpreter's cast cuts."""
    if KIND == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        bits = v.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits


@triton.jit
def e4m3_bits(v, factor, KIND: tl.constexpr):
    """The bits of v, rounded to KIND, times a power of two, in e4m3; likewise by hand."""
    if KIND == tl.bfloat16:
        v = (half_bits(v, KIND) << 16).to(tl.float32, bitcast=True)
    if KIND == tl.float16:
        v = v.to(tl.float16).to(tl.float32)
    bits = (v * factor).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF  # multiples of 2^-9
    return tl.where(size < (121 << 23), small, tl.minimum(normal, 0x7E)) | ((bits >> 24) & 0x80)


@triton.jit
def pair(words, i: tl.constexpr, scale, table_ptr, LOW_FIRST: tl.constexpr, KIND: tl.constexpr):
    """Elements i and i + 1, in 16 bits."""
    high = half_bits(look_up(words, i + 1, scale, table_ptr, LOW_FIRST), KIND)
    return half_bits(look_up(words, i, scale, table_ptr, LOW_FIRST), KIND) | (high << 16)


@triton.jit
def four_of_row(words, i: tl.constexpr, scale, factor, table_ptr, LOW_FIRST: tl.constexpr, KIND: tl.constexpr):
    """Elements i to i + 3, in e4m3."""
    four = e4m3_bits(look_up(words, i, scale, table_ptr, LOW_FIRST), factor, KIND)
    for j in tl.static_range(1, 4):
        four |= e4m3_bits(look_up(words, i + j, scale, table_ptr, LOW_FIRST), factor, KIND) << (8 * j)
    return four


@triton.jit
def four_of_column(words, scales, i: tl.constexpr, factor, table_ptr, LOW_FIRST: tl.constexpr, KIND: tl.constexpr):
    """Element i of the words of four rows, in e4m3."""
    four = e4m3_bits(look_up(words[0], i, scales[0], table_ptr, LOW_FIRST), factor, KIND)
    for j in tl.static_range(1, 4):
        four |= e4m3_bits(look_up(words[j], i, scales[j], table_ptr, LOW_FIRST), factor, KIND) << (8 * j)
    return four


@triton.jit
def power_of(exponent):
    """2 to the exponents less 127, in float32; 255 is NaN."""
    bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_of(w, block, inside):
    """The scales of blocks, in float32."""
    if w.code2 is not None:
        code = tl.load(w.absmax + block, mask=inside, other=0).to(tl.int32)
        code2, absmax2 = tl.load(w.code2 + code), tl.load(w.absmax2 + block // 256, mask=inside, other=0.0)
        offset = tl.load(w.offset)
        if COMPILED:  # two roundings, whatever the compiler would fuse
            scale = tl.inline_asm_elementwise(
                "{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 $0, t, $3; }",
                "=f,f,f,f",
                [code2, absmax2, offset],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            scale = code2 * absmax2 + offset
    elif w.absmax.dtype.element_ty == tl.uint8:
        scale = power_of(tl.load(w.absmax + block, mask=inside, other=127).to(tl.int32))
    else:
        scale = tl.load(w.absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def of_neighbour(t, at: tl.constexpr, GROUP: tl.constexpr):
    """What this one of each GROUP lanes, a power of two of them eight apart in a warp, holds of t [threads]."""
    GIVEN: tl.constexpr = f"mov.u32 t, %laneid; and.b32 t, t, {31 - 8 * (GROUP - 1)}; or.b32 t, t, {8 * at};"
    ASSEMBLY: tl.constexpr = "{ .reg .b32 t; " + GIVEN + " shfl.sync.idx.b32 $0, $1, t, 31, 0xffffffff; }"
    return tl.inline_asm_elementwise(ASSEMBLY, "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def store_four(out_ptr, at, a, b, c, d, inside):
    """Four 32-bit pieces that follow each other, by one thread at once."""
    four = tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 2, 1)), (a.shape[0], 4))
    tl.store(out_ptr + at[:, None] + tl.arange(0, 4)[None, :], four, mask=inside[:, None])
