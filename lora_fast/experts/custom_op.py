"""The fused experts as an operator for torch.compile: ``torch.ops.lora_fast.lora_experts``, y of a layer.

Under autograd it becomes ``lora_experts_fwd``, and its gradients ``lora_experts_bwd``, else ``lora_experts_alone``, as
``lora_linear`` does (ops/custom_op.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.experts.gate import Gate
from lora_fast.kernels.experts.problem import Kinds, Needs, Problem
from lora_fast.kernels.experts.run import Call, Held, MaybeTensor, backward, forward, to_save
from lora_fast.kernels.memo import Memo
from lora_fast.ops.parts import contiguous, dtype_of, on
from lora_fast.ops.registering import register

Adapters = tuple[MaybeTensor, ...]  # lora_A and lora_B of gate_up, and of down

_GATE = "bool[] turned, float alpha, float limit, float plus, bool interleaved, str gate_up_base, str down_base"
_GIVEN = f"""(Tensor x, Tensor ids, Tensor weights, Tensor? a1, Tensor? b1, Tensor? a2, Tensor? b2,
    Tensor? gate_up_bias, Tensor? down_bias, Tensor[] held, SymInt[] shape, float s1, float s2, {_GATE})"""
_library = torch.library.Library("lora_fast", "FRAGMENT")
_library.define(f"lora_experts{_GIVEN} -> Tensor")
_library.define(f"lora_experts_alone{_GIVEN} -> Tensor")
_library.define(f"lora_experts_fwd{_GIVEN} -> Tensor[]")
_library.define(f"""lora_experts_bwd(Tensor dout, Tensor?[] saved, float s1, float s2, SymInt[] sizes,
    ScalarType w_kind, ScalarType a1_kind, ScalarType b1_kind, ScalarType a2_kind, ScalarType b2_kind, bool[] needs,
    {_GATE}) -> Tensor[]""")  # not ScalarType[], of which numbers arrive up to torch 2.11
_problems = Memo()


class _Given(NamedTuple):
    """The arguments of ``lora_experts``."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    a1: MaybeTensor
    b1: MaybeTensor
    a2: MaybeTensor
    b2: MaybeTensor
    gate_up_bias: MaybeTensor
    down_bias: MaybeTensor
    tensors: Sequence[torch.Tensor]  # of gate_up and of down
    shape: Sequence[int]  # E and I
    s1: float
    s2: float
    turned: Sequence[bool]
    alpha: float
    limit: float  # 0: none
    plus: float
    interleaved: bool
    gate_up_base: str
    down_base: str

    @property
    def adapters(self) -> Adapters:
        return self[3:7]

    @property
    def held(self) -> Held:
        return *self.tensors, self.gate_up_bias, self.down_bias

    def problem(self, *needs: bool) -> Problem:
        gate = Gate(self.alpha, self.limit or None, self.plus, self.interleaved)
        weights = Weights((self.shape[0], self.shape[1]), (self.turned[0], self.turned[1]), self[-2:])
        return problem_of(self.x, self.ids, self.weights, self.adapters, weights, Needs(*needs), gate)


class Weights(NamedTuple):
    """What programs depend on of the experts' weights."""

    shape: tuple[int, int]  # E and I
    turned: tuple[bool, bool]  # whether the outputs come last: of gate_up, of down
    bases: tuple[str, str]  # rows of ``BASES``


def problem_of(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    adapters: Adapters,
    held: Weights,
    needs: Needs,
    gate: Gate,
) -> Problem:
    """For tensors as ``forward`` takes them."""
    (tokens, h), (experts, i) = x.shape, held.shape
    a1, _, a2, _ = adapters
    return Problem(
        tokens,
        ids.shape[1],
        experts,
        h,
        i,
        0 if a1 is None else a1.shape[0] // experts,
        0 if a2 is None else a2.shape[0] // experts,
        Kinds(x.dtype, weights.dtype, *map(dtype_of, adapters)),
        needs,
        held.turned,
        gate,
        x.device,
        held.bases,
    )


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    adapters: Adapters,
    held: Held,
    about: Weights,
    scalings: Sequence[float],
    gate: Gate,
) -> torch.Tensor:
    """y, by way of the operator."""
    *tensors, gate_up_bias, down_bias = held
    numbers = gate.alpha, gate.limit or 0.0, gate.plus, gate.interleaved
    small = *adapters, gate_up_bias, down_bias
    return torch.ops.lora_fast.lora_experts(
        x, ids, weights, *small, tensors, about.shape, *scalings, about.turned, *numbers, *about.bases
    )


def _alone(*args: Any) -> torch.Tensor:
    return _forward(*args)[0]


def _forward(*args: Any) -> list[torch.Tensor]:
    """y, h and the room."""
    given = _Given(*args)
    rest = *given.shape, *given.turned, *given[14:]
    tensors = *given[:9], *given.tensors
    key = *((None if t is None else (t.device, t.dtype, t.shape, t.stride())) for t in tensors), *rest
    problem = _problems.get(key) or _problems.keep(key, given.problem())
    small: Any = tuple(map(contiguous, given[:9]))
    held = *given.tensors, *small[7:]
    with on(given.x.device):
        return list(forward(problem, Call(given.s1, given.s2), small[0], small[1], small[2], small[3:7], held))


def _forward_fake(*args: Any) -> list[torch.Tensor]:
    given = _Given(*args)
    x, problem = given.x, given.problem()
    return [
        x.new_empty(x.shape),
        x.new_empty(problem.slots, 2 * problem.i),
        x.new_empty(problem.bytes, dtype=torch.uint8),
    ]


def _gradients(
    dout: torch.Tensor, saved: Sequence[MaybeTensor], s1: float, s2: float, *rest: Any
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order of ``Needs``."""
    strides = (None if t is None else (t.dtype, t.shape, t.stride()) for t in saved)
    sizes, *kinds, needs, turned, alpha, limit, plus, interleaved, first, second = rest
    key = (
        dout.device,
        dout.dtype,
        dout.shape,
        *strides,
        *sizes,
        *kinds,
        *needs,
        *turned,
        alpha,
        limit,
        plus,
        interleaved,
        first,
        second,
    )
    problem = _problems.get(key)
    if problem is None:
        k, count, i, r1, r2 = sizes
        gate = Gate(alpha, limit or None, plus, interleaved)
        every = Kinds(dout.dtype, *kinds)
        tokens, h = dout.shape
        problem = Problem(
            tokens,
            k,
            count,
            h,
            i,
            r1,
            r2,
            every,
            Needs(*needs),
            (turned[0], turned[1]),
            gate,
            dout.device,
            (first, second),
        )
        _problems.keep(key, problem)
    with on(dout.device):
        grads = backward(problem, Call(s1, s2), dout.contiguous(), tuple(saved[:5]), tuple(saved[5:]))
    return [grad for grad in grads if grad is not None]


def _gradients_fake(dout: torch.Tensor, saved: Any, s1: float, s2: float, *rest: Any) -> list[torch.Tensor]:
    (k, count, i, r1, r2), *kinds, needs, _, _, _, _, _, _, _ = rest
    tokens, h = dout.shape
    shapes = (tokens, h), (tokens, k), (count * r1, h), (2 * i, count * r1), (count * r2, i), (h, count * r2)
    made = zip(shapes, (dout.dtype, *kinds), needs, strict=True)
    return [dout.new_empty(shape, dtype=kind) for shape, kind, need in made if need]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        given, needed = _Given(*args), ctx.needs_input_grad
        problem = given.problem(needed[0], *needed[2:7])
        y, h, room = torch.ops.lora_fast.lora_experts_fwd(*args)
        ctx.save_for_backward(*to_save(problem, given.x, h, room, given.adapters, given.held))
        kinds = [kind or given.x.dtype for kind in problem.kinds[1:]]
        sizes = [problem.k, problem.experts, problem.i, problem.r1, problem.r2]
        ctx.rest = given.s1, given.s2, sizes, *kinds, list(problem.needs), *args[13:]
        ctx.given = len(args)
        return y

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        found = torch.ops.lora_fast.lora_experts_bwd(dout, ctx.saved_tensors, *ctx.rest)
        needs = ctx.rest[8]
        dx, *others = (found.pop(0) if need else None for need in needs)
        return dx, None, *others, *(None,) * (ctx.given - 7)


def _recorded(*given: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
        return _Experts.apply(*given)
    return torch.ops.lora_fast.lora_experts_alone(*given)


register(
    _library,
    "lora_experts",
    recorded=_recorded,
    alone=_alone,
    forward=_forward,
    gradients=_gradients,
    forward_fake=_forward_fake,
    gradients_fake=_gradients_fake,
)
