"""The fused kernels as an operator for torch.compile: ``torch.ops.lora_fast.lora_linear``, y of a layer.

Under autograd it becomes ``lora_linear_fwd``, and its gradients ``lora_linear_bwd``, else ``lora_linear_alone``: these
are what a compiled graph holds, and they have no kernel for autograd in between. They are defined by hand and give
nothing empty, since the wrappers of ``torch.library.custom_op`` and each output take the host some microseconds in
every call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.kernels.common import FP8
from lora_fast.kernels.lora import forward
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.problem import Call, Kinds, Made, MaybeTensor, Needs, Problem, Saved
from lora_fast.ops.parts import addressable, contiguous, dtype_of, gradients, kinds_of, on, to_save
from lora_fast.ops.registering import register

_GIVEN = """(Tensor x, Tensor[] held, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? magnitude, Tensor scaling,
    Tensor? seed, float p, bool round_norm, bool keep_z, bool save_x8, str base)"""
_library = torch.library.Library("lora_fast", "FRAGMENT")
_library.define(f"lora_linear{_GIVEN} -> Tensor")
_library.define(f"lora_linear_alone{_GIVEN} -> Tensor")
_library.define(f"lora_linear_fwd{_GIVEN} -> Tensor[]")
_library.define("""lora_linear_bwd(Tensor dy, Tensor?[] saved, Tensor scaling, float p, SymInt[] shape,
    ScalarType a_kind, ScalarType b_kind, ScalarType bias_kind, ScalarType m_kind, bool[] needs, bool[] flags,
    str base) -> Tensor[]""")  # not ScalarType[], of which numbers arrive up to torch 2.11
lora_linear = torch.ops.lora_fast.lora_linear
_problems = Memo()


class _Given(NamedTuple):
    """The arguments of ``lora_linear``."""

    x: torch.Tensor
    held: Sequence[torch.Tensor]  # by the base
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: MaybeTensor
    magnitude: MaybeTensor
    scaling: torch.Tensor
    seed: MaybeTensor
    p: float
    round_norm: bool
    keep_z: bool
    save_x8: bool
    base: str

    def problem(self, *needs: bool, alone: bool = False) -> Problem:
        x, n, (r, k) = self.x, self.lora_B.shape[0], self.lora_A.shape
        kinds = kinds_of(x.dtype, self.lora_A, self.lora_B, self.bias, self.magnitude)
        return Problem(
            x.shape[:-1],
            k,
            n,
            r,
            kinds,
            Needs(*needs),
            self.base,
            dora=self.magnitude is not None,
            keep_x8=self.save_x8,
            keep_z=self.keep_z,
            round_norm=self.round_norm,
            alone=alone,
        )


def linear(problem: Problem, call: Call, x: torch.Tensor, *small: MaybeTensor) -> torch.Tensor:
    """y, by way of the operator; ``small``: lora_A, lora_B, bias and magnitude."""
    scaling = call.scaling
    if not isinstance(scaling, torch.Tensor):
        scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
    return lora_linear(
        x,
        call.held,
        *small,
        scaling,
        call.seed,
        call.p,
        problem.round_norm,
        problem.keep_z,
        problem.keep_x8,
        problem.base_name,
    )


def _alone(*args: Any) -> torch.Tensor:
    return _forward(*args, alone=True)[0]


def _forward(*args: Any, alone: bool = False) -> list[torch.Tensor]:
    """y, the room, and what there is of the mask's bits, z and an x in 8 bits, in this order."""
    given = _Given(*args)
    x, held, lora_A, lora_B, bias, magnitude, scaling, seed, p, *flags = given
    key = (
        x.device,
        x.dtype,
        x.shape,
        x.stride(),
        *((t.dtype, t.shape, t.stride()) for t in held),
        lora_A.dtype,
        lora_A.shape,
        lora_B.dtype,
        lora_B.shape,
        dtype_of(bias),
        dtype_of(magnitude),
        *flags,
        alone,
    )
    problem = _problems.get(key) or _problems.keep(key, given.problem(alone=alone))
    small: Any = map(contiguous, (lora_A, lora_B, bias, magnitude))
    with on(x.device):
        call = Call(scaling, seed, p, held)
        y, made = forward(problem, call, addressable(x), *small)
    found = [y, made.room, made.bits, made.z, made.x8 if given.save_x8 else None]
    return [t for t in found if t is not None]


def _forward_fake(*args: Any) -> list[torch.Tensor]:
    given, x = _Given(*args), args[0]
    problem = given.problem()
    found = [x.new_empty(*x.shape[:-1], problem.n), x.new_empty(problem.bytes, dtype=torch.uint8)]
    if given.seed is not None:
        found.append(x.new_empty(problem.m, -(-problem.k // 32), dtype=torch.int32))
    if given.keep_z:
        found.append(torch.empty_like(found[0]))
    if given.save_x8:
        found.append(x.new_empty(problem.m, problem.k, dtype=FP8))
    return found


def _gradients(
    dy: torch.Tensor, saved: Sequence[MaybeTensor], scaling: torch.Tensor, p: float, shape: Sequence[int], *rest: Any
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order of ``Needs``; flags are dora, keep_x8 and keep_z."""
    *kinds, needs, flags, base = rest
    held = (None if t is None else (t.dtype, t.shape) for t in saved[len(Saved._fields) :])
    key = dy.device, dy.dtype, dy.shape, *shape, *kinds, *needs, *flags, base, *held
    problem = _problems.get(key)
    if problem is None:
        (k, r), (dora, keep_x8, keep_z) = shape, flags
        problem = Problem(
            dy.shape[:-1],
            k,
            dy.shape[-1],
            r,
            Kinds(dy.dtype, *kinds),
            Needs(*needs),
            base,
            dora=dora,
            keep_x8=keep_x8,
            keep_z=keep_z,
        )
        _problems.keep(key, problem)
    with on(dy.device):
        grads = gradients(problem, dy, saved, scaling, p)
    return [grad for grad in grads if grad is not None]


def _gradients_fake(
    dy: torch.Tensor, saved: Any, scaling: Any, p: float, shape: Sequence[int], *rest: Any
) -> list[torch.Tensor]:
    *kinds, needs, _, _ = rest
    (k, r), n = shape, dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (r, k), (n, r), (n,), (n,)
    return [
        dy.new_empty(shape, dtype=kind)
        for shape, kind, need in zip(shapes, (dy.dtype, *kinds), needs, strict=True)
        if need
    ]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        given = _Given(*args)
        x, held, lora_A, lora_B, *_ = given
        problem = given.problem(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        y, room, *rest = torch.ops.lora_fast.lora_linear_fwd(*args)
        there = given.seed is not None, given.keep_z, given.save_x8
        bits, z, x8 = (rest.pop(0) if one else None for one in there)
        saved: Any = to_save(problem, Made(room, bits, z, x8), held, x, lora_A, lora_B, y)
        ctx.save_for_backward(*saved, given.scaling)
        kinds = [kind or x.dtype for kind in problem.kinds[1:]]
        flags = [problem.dora, problem.keep_x8, problem.keep_z]
        ctx.rest = given.p, [problem.k, problem.r], *kinds, list(problem.needs), flags, given.base
        ctx.given = len(args)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        *saved, scaling = ctx.saved_tensors
        needs = ctx.rest[-3]
        found = torch.ops.lora_fast.lora_linear_bwd(dy, saved, scaling, *ctx.rest)
        dx, grad_a, grad_b, grad_bias, grad_m = (found.pop(0) if need else None for need in needs)
        return dx, None, grad_a, grad_b, grad_bias, grad_m, *(None,) * (ctx.given - 6)


def _recorded(*given: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
        return _LoRALinear.apply(*given)
    return torch.ops.lora_fast.lora_linear_alone(*given)


register(
    _library,
    "lora_linear",
    recorded=_recorded,
    alone=_alone,
    forward=_forward,
    gradients=_gradients,
    forward_fake=_forward_fake,
    gradients_fake=_gradients_fake,
)
