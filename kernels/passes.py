"""Passes over dY and over x: which of them a backward takes, and in what order.

Everything that needs dY comes from one pass where dS and dB fit it, else from several.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lora_fast.kernels.common import padded_rank, wide
from lora_fast.kernels.down import down
from lora_fast.kernels.grad import ColumnPass
from lora_fast.kernels.operands import Number, Operand, Scratch, as_scaling, run
from lora_fast.kernels.program import Launch
from lora_fast.kernels.sums import Dora

FUSED_RANK = 32  # the largest rank at which dS comes from the pass that makes dB: its parts grow with the rank
FUSED_RANK_DORA = 16  # with a gain, whose tiles make twice as many parts, and dZ is there to be read
WIDE_RANK = 64  # the largest rank at which dB comes from the pass that makes dZ

Pass = ColumnPass | Launch


def needs_dz(r: int, need_ds: bool, need_b: bool) -> bool:
    """Whether DoRA's dS or dB is made from dZ in memory: at ranks that do not fit the pass over dY, and where dS is
    wanted without dB."""
    return (need_ds and (not need_b or r > FUSED_RANK_DORA)) or (need_b and r > WIDE_RANK)


def dy_passes(
    dy: Operand,
    r: int,
    scaling: Operand | Number,
    keep: Number,
    *,
    s: Operand | None = None,
    b: Operand | None = None,
    grad_b: Operand | None = None,
    ds: Operand | None = None,
    grad_bias: Operand | None = None,
    dora: Dora[Operand] | None = None,
    lifted: bool = False,
) -> list[Pass]:
    """What needs dY [M, N] and is given: ds = scaling * keep * dZ b [M, padded R], grad_b [N, R] = dZ^T s, grad_bias
    [N], and what ``dora`` asks for. Without dora dZ is dY. b may have more columns than R."""
    source, gain = dy, None  # what a further pass over dZ reads: dZ in memory, or dY and the gain that makes dZ of it
    if dora is not None:
        source, gain = (dy, Dora(dora.gain)) if dora.dz is None else (dora.dz, None)
    fused = ds is not None and grad_b is not None and r <= (FUSED_RANK if dora is None else FUSED_RANK_DORA)
    apart = grad_b is not None and dora is not None and r > WIDE_RANK
    in_it = None if apart else grad_b
    wanted = in_it, grad_bias, *(() if dora is None else (dora.dz, dora.dm))
    passes: list[Pass] = []
    if fused or any(t is not None for t in wanted):
        passes.append(
            ColumnPass(
                z=dy,
                r=0 if in_it is None else r,
                p=None if in_it is None else s,
                g=in_it,
                b=b if fused else None,
                ds=ds if fused else None,
                sums=grad_bias,
                dora=dora,
                scaling=scaling,
                keep=keep,
                lifted=lifted,
            )
        )
    if ds is not None and not fused:
        assert b is not None and gain is None
        passes.append(down(source, b.t(), ds, scaling, keep, lifted=lifted))
    if apart:
        passes.append(ColumnPass(z=source, r=r, p=s, g=grad_b, dora=gain, scaling=scaling, lifted=lifted))
    return passes


def a_pass(
    x: Operand, ds: Operand, grad_a: Operand, *, bits: Operand | None = None, row_scale: Operand | None = None
) -> ColumnPass:
    """grad_a [R, K] = dS^T (mask * x) from x [M, K], perhaps in e4m3 with a scale for each row, and ds [M, padded
    R]."""
    kind = ds.dtype if row_scale is not None else None
    return ColumnPass(z=x, r=len(grad_a), p=ds, g=grad_a.t(), bits=bits, row_scale=row_scale, kind=kind)


def launches_of(
    passes: Sequence[Pass], kind: torch.dtype, scratch: Scratch, lender: Operand | None = None
) -> list[Launch]:
    """Those of the passes in their order, which take turns in the memory for their parts, numbers of this dtype: the
    lender's, if there is enough of it."""
    columns = [one for one in passes if isinstance(one, ColumnPass)]
    numbers, memory = max((one.parts.numbers for one in columns), default=0), None
    if numbers:
        owner = lender if lender is not None and lender.holds((numbers,), kind) else scratch
        memory = owner.part((numbers,), kind)
    return [launch for one in passes for launch in ([one] if isinstance(one, Launch) else one.launches(memory))]


def _over_dy(dy: Operand, **wanted: Any) -> list[Launch]:
    like = wanted["grad_b"] if wanted["b"] is None else wanted["b"]
    r = 0 if like is None else like.shape[1]
    return launches_of(dy_passes(dy, r, **wanted), wide(dy), Scratch(dy.device))


def _over_x(x: Operand, **wanted: Any) -> list[Launch]:
    return launches_of([a_pass(x, **wanted)], wide(x), Scratch(x.device))


def dy_bwd(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float | torch.Tensor,
    grad_b: torch.Tensor | None,
    grad_bias: torch.Tensor | None = None,
    keep_scale: float = 1.0,
    dora: Dora[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """Everything that needs dY [M, N]: returns dS = scaling * keep_scale * dZ B [M, padded R] if b [N, R] is given,
    and fills grad_b [N, R] from s [M, padded R], grad_bias [N] and what ``dora`` asks for. Without dora dZ is dY."""
    ds = dy.new_empty(dy.shape[0], padded_rank(b.shape[1])) if b is not None else None
    if dy.shape[0] == 0:
        for grad in (grad_b, grad_bias, dora and dora.dm):
            if grad is not None:
                grad.zero_()
        return ds
    like = b if b is not None else grad_b
    r = 0 if like is None else like.shape[1]
    if dora is not None and dora.dz is None and needs_dz(r, b is not None, grad_b is not None):
        dora = dora._replace(dz=dy.new_empty(dy.shape))
    run(
        _over_dy,
        dy=dy,
        scaling=as_scaling(scaling),
        keep=float(keep_scale),
        s=s,
        b=b,
        grad_b=grad_b,
        ds=ds,
        grad_bias=grad_bias,
        dora=dora,
    )
    return ds


def a_bwd(
    x: torch.Tensor,
    ds: torch.Tensor,
    grad_a: torch.Tensor,
    bits: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> None:
    """Fill grad_a [R, K] as ``a_pass`` says."""
    if x.shape[0] == 0:
        grad_a.zero_()
        return
    run(_over_x, x=x, ds=ds, grad_a=grad_a, bits=bits, row_scale=row_scale)
