"""What a forward makes of the weights alone, and a layer has made once for many forwards: DoRA's n and g, and the
copies of A and B that products read."""

from typing import NamedTuple

from lora_fast.kernels.bases import Read
from lora_fast.kernels.cast import Cast, cast_adapters
from lora_fast.kernels.norm import norms
from lora_fast.kernels.operands import Number, Operand, Scratch
from lora_fast.kernels.problem import Problem, Small
from lora_fast.kernels.program import Launch


class Keeping(NamedTuple):
    """The arguments of the program that makes what a layer keeps, in this order."""

    a: Operand
    b: Operand
    magnitude: Operand | None  # of DoRA
    kept: Operand
    scaling: Operand | Number
    held: tuple[Operand, ...]  # those of the base's tensors that y reads


def kept_launches(at: Keeping, problem: Problem) -> list[Launch]:
    """The gain is made from copies of the adapters where a forward makes it from copies."""
    kept, scratch = problem.kept(at.kept), Scratch(at.a.device)
    a, b, copies = at.a, at.b, []
    if problem.casts:
        a, b = problem.seen(
            *(part or scratch.part(*problem.shapes[name]) for name, part in (("a", kept.a), ("b", kept.b)))
        )
        copies = [cast_adapters(at.a, Cast(at.a, at.b, a, b), at.scaling, problem.lifted)]
    if at.magnitude is None:
        return copies
    w = problem.base.y(at.held, problem.wanted(scratch))
    return [*w.launches, *copies, *gain_launches(problem, w, a, b, at.magnitude, at.scaling, kept, scratch)]


def gain_launches(
    problem: Problem,
    w: Read,
    a: Operand,
    b: Operand,
    magnitude: Operand,
    scaling: Operand | Number,
    into: Small,
    scratch: Scratch,
    room: Operand | None = None,
) -> list[Launch]:
    """The norm and the gain, from adapters as the products read them; ``room`` as in ``norms``."""
    return norms(
        w.matrix,
        a,
        b,
        scaling,
        into.norm,
        m=magnitude,
        gain=into.gain,
        w_scale=w.scale,
        round_norm=problem.round_norm,
        scratch=scratch,
        room=room,
        lifted=problem.lifted,
    )
