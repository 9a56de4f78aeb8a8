"""What a step of an adapted embedding launches (see rows.py for the equations): a program forward, and one backward."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton

from lora_fast.kernels import pass_tiles
from lora_fast.kernels.binding import bound_program
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import padded_rank, precision, wide
from lora_fast.kernels.embedding.grad import column_sums, down_of_dy, runs_of_ids, sums_of_parts
from lora_fast.kernels.embedding.norm import column_norms
from lora_fast.kernels.embedding.rows import rows_of_y
from lora_fast.kernels.operands import Scratch
from lora_fast.kernels.problem import MaybeTensor
from lora_fast.kernels.program import Launch, Program


class Needs(NamedTuple):
    """Whose gradients a backward makes."""

    a: bool = True
    b: bool = True
    m: bool = False


ADAPTER = Needs()


@dataclass(eq=False)
class Problem:
    """Calls that are alike in the dtypes, shapes and strides of their tensors, and the programs made for them."""

    round_norm: bool = False
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)


class Forward(NamedTuple):
    """What a forward reads and fills: ids [M] of 32 or 64 bits, e [V, N], a [R, V], b [N, R] in any float dtypes and
    strides, a factor of one element, m [N]; y [M, N] in e's dtype, norm and gain [N] of DoRA."""

    e: Any
    ids: Any
    a: Any
    b: Any
    scaling: Any
    factor: Any
    m: Any
    y: Any
    norm: Any
    gain: Any
    rest: tuple[Any, ...] = ()


class Backward(NamedTuple):
    """What a backward reads and fills: dy [M, N], contiguous, the ids and how they are sorted, the rest as a forward's;
    da [R, V], zero before, db [N, R], dm [N], each contiguous, or None if it is not needed."""

    dy: Any
    ids: Any
    found: Any
    order: Any
    e: Any
    a: Any
    b: Any
    scaling: Any
    factor: Any
    norm: Any
    gain: Any
    padding: Any
    da: Any
    db: Any
    dm: Any
    rest: tuple[Any, ...] = ()


def forward_launches(at: Forward, problem: Problem) -> list[Launch]:
    e, a, b, launches = at.e, at.a, at.b, []
    if at.m is not None:
        (v, n), tile = e.shape, pass_tiles.embedding_norm(len(a))
        count = pass_tiles.splits(n, triton.cdiv(v, tile.k), tile=tile, chip=Chip.of(e.device))
        parts = Scratch(e.device).part((count, n), wide(e, a, b))
        launches = column_norms(at.norm, e, a, b, at.scaling, parts, at.m, at.gain, problem.round_norm)
    if len(at.ids):
        launches.append(rows_of_y(at.y, at.ids, e, a, b, at.scaling, at.factor, at.gain))
    return launches


def backward_launches(at: Backward, problem: Problem) -> list[Launch]:
    dy, e, a, b, by, factor = at.dy, at.e, at.a, at.b, at.scaling, at.factor
    (m, n), r, kind = dy.shape, len(a), wide(dy, a, b)
    scratch, launches = Scratch(dy.device), []
    if at.da is not None:
        p = scratch.part((m, padded_rank(r)), kind)
        leads = scratch.part((triton.cdiv(m, pass_tiles.embedding_runs(r).m), padded_rank(r)), kind)
        launches.append(down_of_dy(p, dy, b, by, factor, at.gain))
        launches += runs_of_ids(at.da, at.found, at.order, p, leads, at.padding)
    if at.db is not None or at.dm is not None:
        tile = pass_tiles.embedding_columns(r)
        columns, steps = n if at.db is None else n * triton.cdiv(r, tile.r), triton.cdiv(m, tile.m)
        count = pass_tiles.splits(columns, steps, tile=tile, chip=Chip.of(dy.device))
        g_parts = None if at.db is None else scratch.part((count, n, r), kind)
        dm_parts = None if at.dm is None else scratch.part((count, n), kind)
        launches.append(column_sums(dy, at.ids, e, a, b, by, factor, g_parts, dm_parts))
        launches.append(sums_of_parts(dy, count, g_parts, dm_parts, by, factor, at.norm, at.gain, db=at.db, dm=at.dm))
    return launches


def forward(
    problem: Problem,
    ids: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    factor: MaybeTensor = None,
    m: MaybeTensor = None,
) -> tuple[torch.Tensor, MaybeTensor, MaybeTensor]:
    """(y [M, N], norm, gain), as :class:`Forward` says."""
    y, norm, gain = weight.new_empty(ids.numel(), weight.shape[1]), None, None
    if m is not None:
        norm = weight.new_empty(weight.shape[1], dtype=wide(weight, a, b))
        gain = torch.empty_like(norm)
    if m is not None or y.numel():
        program, bound = bound_program(
            problem, (forward_launches, _exact()), Forward, (weight, ids, a, b, scaling, factor, m, y, norm, gain)
        )
        program.run(bound)
    return y, norm, gain


def backward(
    problem: Problem,
    dy: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float | torch.Tensor,
    factor: MaybeTensor = None,
    *,
    norm: MaybeTensor = None,
    gain: MaybeTensor = None,
    padding: int = -1,
    needs: Sequence[bool] = ADAPTER,
) -> tuple[MaybeTensor, MaybeTensor, MaybeTensor]:
    """(dA [R, V], dB [N, R], dm [N]) in the dtypes of a, b and in float32 or better, each None if not needed; dy and
    the rest as :class:`Backward` says. dA is zero at the id ``padding``, as torch has it."""
    of_a, of_b, of_m = needs
    n, empty = dy.shape[1], not dy.numel()
    da = a.new_zeros(a.shape) if of_a else None
    db = (b.new_zeros if empty else b.new_empty)(b.shape) if of_b else None
    kind = wide(dy, a, b) if of_m else None
    dm = (dy.new_zeros if empty else dy.new_empty)(n, dtype=kind) if of_m else None
    if not empty and any(needs):
        found = order = None
        if of_a:
            found, order = torch.sort(ids, stable=True)
        given = dy, ids, found, order, weight, a, b, scaling, factor, norm, gain, padding, da, db, dm
        program, bound = bound_program(problem, (backward_launches, _exact(), *needs), Backward, given)
        program.run(bound)
    return da, db, dm


def _exact() -> str:
    """How float32 products are made: torch's setting may change."""
    return precision(torch.float32, 256)
