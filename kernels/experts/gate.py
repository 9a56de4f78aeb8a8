"""a = (up' + PLUS) * gate' * sigmoid(ALPHA gate'), row by row, and its gradient; gate' = min(gate, LIMIT), up' = up
clamped to +-LIMIT, where there is a limit. h [S, 2I] holds gate and up side by side, or (INTERLEAVED) in turn.

This is SwiGLU (ALPHA 1, PLUS 0), DeepSeek V4's with a limit, and gpt-oss' (ALPHA 1.702, PLUS 1, LIMIT 7).

The gradient comes from that of the second projection's input without the routing weight, da', so y need not be kept:
dw = <da', a>, in parts of columns; dh = gate'(h, w da'); and w a, which the gradient of the second lora_A reads, may
lie where da' lay. Pure elementwise: with thin products on the way both directions take 1.5 to 3 times as long.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_fast.kernels.common import TL, wait_for_stream
from lora_fast.kernels.experts import tiles
from lora_fast.kernels.experts.route import Route
from lora_fast.kernels.operands import Operand, launch
from lora_fast.kernels.program import Launch


class Gate(NamedTuple):
    """The constants of the formula above; ``limit`` None: nothing is clamped."""

    alpha: float = 1.0
    limit: float | None = None
    plus: float = 0.0
    interleaved: bool = False

    @property
    def constants(self) -> dict[str, float | bool | None]:
        return {name.upper(): value for name, value in self._asdict().items()}


@triton.jit
def _gate_and_up(h_ptr, rows, there, col, N, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, KIND: tl.constexpr):
    """Both [rows, BLOCK], float32."""
    cols = col + tl.arange(0, BLOCK)
    inside = there[:, None] & (cols < N)[None, :]
    if INTERLEAVED and h_ptr.dtype.element_ty == tl.int32:  # as h is in KIND of 16 bits: a word is a gate and its up
        words = tl.load(h_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=inside, other=0)
        if KIND == tl.bfloat16:
            gate, up = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
        else:
            gate, up = words.to(tl.int16).to(KIND, bitcast=True), (words >> 16).to(tl.int16).to(KIND, bitcast=True)
    elif INTERLEAVED:
        both = 2 * col + tl.arange(0, 2 * BLOCK)
        inside = there[:, None] & (both < 2 * N)[None, :]
        h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * (2 * N) + both[None, :], mask=inside, other=0.0)
        gate, up = tl.split(tl.reshape(h, (h.shape[0], BLOCK, 2)))
    else:
        first = h_ptr + rows.to(tl.int64)[:, None] * (2 * N)
        gate = tl.load(first + cols[None, :], mask=inside, other=0.0)
        up = tl.load(first + N + cols[None, :], mask=inside, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _word(low, high):
    """Two numbers of 16 bits as one of 32."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 65535) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _gate_kernel(
    h_ptr,
    a_ptr,
    rows_ptr,
    N,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PLUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    rows, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS
    there, cols = rows < tl.load(rows_ptr), col + tl.arange(0, COLS)
    gate, up = _gate_and_up(h_ptr, rows, there, col, N, COLS, INTERLEAVED, KIND)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    a = (up + PLUS) * gate * tl.sigmoid(gate * ALPHA)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=there[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["S"])
def _gate_grad_kernel(
    da_ptr,
    h_ptr,
    weight_ptr,
    rows_ptr,
    dh_ptr,
    wa_ptr,
    dw_ptr,
    S,
    N,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PLUS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_stream(PDL)
    rows, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS
    there, cols = rows < tl.load(rows_ptr), col + tl.arange(0, COLS)
    inside, at = there[:, None] & (cols < N)[None, :], rows.to(tl.int64)[:, None] * N + cols[None, :]
    gate, up = _gate_and_up(h_ptr, rows, there, col, N, COLS, INTERLEAVED, KIND)
    weight = tl.load(weight_ptr + rows, mask=there, other=0.0)
    open_gate = tl.full([ROWS, COLS], True, tl.int1)
    open_up = open_gate
    if LIMIT is not None:
        open_gate = gate <= LIMIT
        open_up = (up >= -LIMIT) & (up <= LIMIT)
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    sigmoid = tl.sigmoid(gate * ALPHA)
    swish = gate * sigmoid
    a = (up + PLUS) * swish
    if da_ptr is not None:
        da = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if dw_ptr is not None:
            tl.store(dw_ptr + tl.program_id(1).to(tl.int64) * S + rows, tl.sum(da * a, 1), mask=there)
        if dh_ptr is not None:
            da *= weight[:, None]
            d_gate = (up + PLUS) * (sigmoid + ALPHA * swish * (1 - sigmoid))
            d_gate = (da * tl.where(open_gate, d_gate, 0.0)).to(KIND)
            d_up = (da * tl.where(open_up, swish, 0.0)).to(KIND)
            first = dh_ptr + rows.to(tl.int64)[:, None] * (2 * N)
            if INTERLEAVED and dh_ptr.dtype.element_ty == tl.int32:
                tl.store(dh_ptr + at, _word(d_gate, d_up), mask=inside)
            elif INTERLEAVED:
                both = 2 * col + tl.arange(0, 2 * COLS)
                joined = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * COLS))
                tl.store(first + both[None, :], joined, mask=there[:, None] & (both < 2 * N)[None, :])
            else:
                tl.store(first + cols[None, :], d_gate, mask=inside)
                tl.store(first + N + cols[None, :], d_up, mask=inside)
    if wa_ptr is not None:
        if da_ptr is not None:
            tl.debug_barrier()  # wa may be da, which another thread may have yet to read
        tl.store(wa_ptr + at, (a * weight[:, None]).to(wa_ptr.dtype.element_ty), mask=inside)


def _words(t: Operand | None, gate: Gate) -> Operand | None:
    """h or its gradient, as words of two numbers where these alternate and have 16 bits: so that a thread has the same
    elements of all that it reads."""
    if t is None or not gate.interleaved or t.dtype.itemsize != 2:
        return t
    return t.seen_as((t.shape[0], t.shape[1] // 2), torch.int32)


def gate_forward(h: Operand, a: Operand, route: Route, gate: Gate) -> Launch:
    """a [S, I] from h [S, 2I]."""
    s, i = a.shape
    tile = tiles.experts_gate(i, backward=False, interleaved=gate.interleaved)
    return launch(
        _gate_kernel,
        (triton.cdiv(s, tile.m), triton.cdiv(i, tile.n)),
        tile.options,
        h,
        h_ptr=_words(h, gate),
        a_ptr=a,
        rows_ptr=route.rows,
        N=i,
        **gate.constants,
        KIND=TL[h.dtype],
        ROWS=tile.m,
        COLS=tile.n,
    )


def dw_parts(i: int, gate: Gate) -> int:
    """Parts that ``gate_backward`` leaves of each row's dw."""
    return triton.cdiv(i, tiles.experts_gate(i, backward=True, interleaved=gate.interleaved).n)


def gate_backward(
    h: Operand,
    route: Route,
    gate: Gate,
    *,
    da: Operand | None,
    dh: Operand | None,
    wa: Operand | None,
    dw: Operand | None,
) -> Launch:
    """dh [S, 2I] and parts of dw [parts, S], float32, from da [S, I], and wa [S, I], which may be da; each where it is
    given."""
    s, i = h.shape[0], h.shape[1] // 2
    tile = tiles.experts_gate(i, backward=True, interleaved=gate.interleaved)
    return launch(
        _gate_grad_kernel,
        (triton.cdiv(s, tile.m), triton.cdiv(i, tile.n)),
        tile.options,
        h,
        da_ptr=da,
        h_ptr=_words(h, gate),
        weight_ptr=route.weight,
        rows_ptr=route.rows,
        dh_ptr=_words(dh, gate),
        wa_ptr=wa,
        dw_ptr=dw,
        S=s,
        N=i,
        **gate.constants,
        KIND=TL[h.dtype],
        ROWS=tile.m,
        COLS=tile.n,
    )
