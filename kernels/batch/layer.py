"""A layer whose rows have adapters of their own, y_i = W x_i + B_j S_i + bias with j = which_i: what its forward and
its backward launch, in their order.

The adapters lie beside each other along the rank, and S and dS hold zeros at ranks of other adapters than the row's:
then the products are those of a layer with one adapter of as many ranks (Hu et al. 2021, arXiv 2106.09685), dX = dY W +
mask * (dS A), y = x W^T + S B^T. Of more ranks than one step takes, a tile takes those that its rows use. dA and dB are
made for each adapter from its own rows (columns.py).
"""

from typing import Any, NamedTuple

from lora_fast.kernels.batch.columns import Gains, columns
from lora_fast.kernels.batch.ds import LowRank
from lora_fast.kernels.batch.gain import gains
from lora_fast.kernels.batch.magnitudes import Again
from lora_fast.kernels.batch.mixed import gain_mixed
from lora_fast.kernels.batch.pack import Given, pack
from lora_fast.kernels.batch.places import Where, lists, places
from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.ranks import ROWS
from lora_fast.kernels.batch.terms import Packed
from lora_fast.kernels.common import wide
from lora_fast.kernels.down import down
from lora_fast.kernels.gemm import Own, product
from lora_fast.kernels.grad import ColumnPass
from lora_fast.kernels.mask import mask
from lora_fast.kernels.operands import Number, Operand, Scratch
from lora_fast.kernels.passes import FUSED_RANK, FUSED_RANK_DORA, launches_of
from lora_fast.kernels.program import Launch
from lora_fast.kernels.tiles import FEW

Maybe = Any  # an operand (a seed may be a number), None where the problem has none


class Forward(NamedTuple):
    """The arguments of a forward's program, in this order."""

    x: Operand
    which: Operand
    a: Operand  # see ``Given``; or the addresses of all adapters, and neither b nor magnitudes
    b: Maybe
    bias: Maybe
    magnitudes: Maybe
    y: Operand
    z: Maybe
    room: Operand
    bits: Maybe
    seed: Maybe
    n_words: Number
    tables: Operand  # see ``Ranks.tables``, and ``Numbers``
    scales: Operand
    counts: Maybe
    held: tuple[Operand, ...]  # the base's tensors


def forward_launches(at: Forward, problem: Problem) -> list[Launch]:
    x, ranks, room, tables = at.x.rows(), problem.ranks, problem.room(at.room), problem.ranks.tables(at.tables)
    scratch = Scratch(x.device)
    w = problem.base.y(at.held, problem.wanted(scratch))
    lift = at.scales.block(1, 0, 1, ranks.total)
    given = Given.at(at.a, problem) if at.b is None else Given(at.a, at.b, at.magnitudes)
    packed, bad = pack(given, tables.groups, lift, room.a, room.b, problem, scratch)
    launches = [packed, places(at.which, x, tables.firsts, bad, at.scales, ranks, room.places)]
    if at.seed is not None:
        launches.append(mask(at.seed, at.bits, None, at.n_words, own=room.places.own, counts=at.counts))
    own, y, last = None, at.y.rows(), [*w.launches]
    if room.gain is not None and room.norm is not None:
        own, low = Own(room.places.whole, ROWS), at.scales.block(2, 0, 1, ranks.total)
        of = Packed(room.a, room.b, low, room.places.scales, tables)
        launches += [
            *w.launches,
            *gains(w.matrix, of, given, room.norm, room.gain, problem, scratch),
        ]
        last = [gain_mixed(y, room.gain, at.bias, room.places.own, room.places.whole)]
    launches.append(
        down(x, room.a, room.s, None, None, bits=at.bits, scales=room.places.scales, owned=room.owned(tables.owner))
    )
    z = None if at.z is None else at.z.rows()
    made = product(
        x,
        w.matrix,
        room.s,
        room.b,
        y,
        transposed=True,
        bias=at.bias,
        gain=room.gain,
        own=own,
        z=z,
        units=room.units,
    )
    last = [made, *last] if problem.dora else [*last, made]
    for launch in last:
        launch.late = not problem.needs.m
    return [*launches, *last]


class Backward(NamedTuple):
    """The arguments of a backward's program, in this order."""

    dy: Operand
    dx: Maybe  # the gradients; of the adapters as their copies lie: see ``columns``
    grad_a: Maybe
    grad_b: Maybe
    grad_bias: Maybe
    grad_m: Maybe  # [adapters, N]
    dz: Maybe
    tables: Operand
    scales: Operand
    x: Maybe
    room: Maybe
    bits: Maybe
    kept: Maybe  # z, or y
    held: tuple[Operand, ...]  # the base's tensors, where they are read


def backward_launches(at: Backward, problem: Problem) -> list[Launch]:
    dy, ranks, needs = at.dy.rows(), problem.ranks, problem.needs
    scratch, launches = Scratch(dy.device), list[Launch]()
    if needs.bias:
        launches += launches_of([ColumnPass(z=dy, r=0, sums=at.grad_bias)], wide(dy), scratch)
    if not (needs.x or needs.a or needs.b or needs.m):
        return launches
    room, tables = problem.room(at.room), ranks.tables(at.tables)
    scales, needs_ds = room.places.scales, needs.x or needs.a
    w: Any = problem.base.dx(at.held, problem.wanted(scratch)) if problem.reads_w else None
    if problem.z_again:
        launches += w.launches
        w = w._replace(launches=())
    where: Any = None
    if needs.a or needs.b or problem.dora:
        listed, found = lists(room.places.here, scratch)
        launches.append(listed)
        where = Where(room.places.own, found, room.places.units, tables)
    ds: Any = scratch.part((problem.m, ranks.total), problem.kind) if needs_ds else None
    most = FUSED_RANK_DORA if problem.dora else FUSED_RANK
    fused = needs_ds and needs.b and max(ranks.padded) <= most and problem.kind.itemsize <= 2
    if problem.m <= FEW and ranks.units == 1 and not problem.dora:
        # Programs without parts are enough for all processors: with 4 adapters a step of 2048 x 4096 x 4096 265 -> 255,
        # H200; with 16, and with DoRA, where dZ is read once more then, it takes longer.
        fused = False
    source, dora = dy, None
    if room.gain is not None and room.norm is not None:
        kept, again = None if at.kept is None else at.kept.rows(), None
        if problem.z_again:
            again = Again(at.x.rows(), w.matrix, room.s, room.b, tables.firsts)
        dora = Gains(room.gain, room.norm, kept, at.grad_m, at.dz, again)
        source = at.dz
    if needs.b or dora is not None:
        launches += columns(
            dy,
            room.s if needs.b else None,
            at.grad_b,
            where,
            ranks,
            ranks_first=False,
            scratch=scratch,
            lift=at.scales.block(1, 0, 1, ranks.total) if problem.lifted else None,
            low=LowRank(ds, room.b, scales) if fused else None,
            dora=dora,
        )
    if needs_ds and not fused:
        launches.append(down(source, room.b.t(), ds, None, None, scales=scales, owned=room.owned(tables.owner)))
    if needs.a:
        x = at.x.rows()
        launches += columns(x, ds, at.grad_a, where, ranks, ranks_first=True, scratch=scratch, bits=at.bits)
    if needs.x:
        launches += w.launches
        launches.append(
            product(source, w.matrix, ds, room.a, at.dx.rows(), transposed=False, bits=at.bits, units=room.units)
        )
    return launches
