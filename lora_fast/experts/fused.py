"""The fused kernels of the experts as one differentiable operator: an autograd Function in eager, a custom op under
torch.compile (custom_op.py)."""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.bases.packed import tensors_of
from lora_fast.bases.stack import PackedStack
from lora_fast.dispatch import autocast_dtype, refuse_transforms
from lora_fast.experts import custom_op
from lora_fast.experts.custom_op import Adapters, Weights, problem_of
from lora_fast.experts.form import Adapter, ExpertsForm
from lora_fast.kernels.bases import PLAIN
from lora_fast.kernels.experts.gate import Gate
from lora_fast.kernels.experts.problem import Needs
from lora_fast.kernels.experts.run import Call, MaybeTensor, backward, forward, to_save
from lora_fast.ops.parts import contiguous, on


def gate_of(form: ExpertsForm) -> Gate:
    """The constants of the kernels' one formula."""
    kind, alpha, limit = form.gate.kind, form.gate.alpha, form.gate.limit
    return Gate(
        alpha=alpha if kind == "gpt_oss" else 1.0,
        limit=None if kind == "silu" or math.isinf(limit) else limit,
        plus=1.0 if kind == "gpt_oss" else 0.0,
        interleaved=form.interleaved,
    )


def lies_turned(weight: torch.Tensor, transposed: bool) -> bool:
    """Whether the last dimension in memory is the outputs': ``transposed``, or a view of the other layout. Packed it
    never is."""
    if isinstance(weight, PackedStack):
        return False
    return transposed ^ (weight.stride(-1) != 1 and weight.stride(-2) == 1)


class FusedExperts:
    """The fused form of ``reference.lora_experts`` for calls, checked before, whose tensors agree in dtype, shape,
    strides, device and in whether they ask for a gradient, and which ask for the same under one state of autocast: what
    follows from that is decided once. Nothing rests on the routing."""

    def __init__(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_lora: Adapter | None = None,
        down_lora: Adapter | None = None,
        gate_up_bias: MaybeTensor = None,
        down_bias: MaybeTensor = None,
        *,
        form: ExpertsForm,
    ) -> None:
        dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
        self.kind = x.dtype if dtype is None else dtype
        self.about = Weights(
            (len(gate_up), gate_up.shape[2 if form.transposed else 1] // 2),
            (lies_turned(gate_up, form.transposed), lies_turned(down, form.transposed)),
            (_base_of(gate_up), _base_of(down)),
        )
        self.tensors_of = tensors_of(gate_up), tensors_of(down)
        self.turns = tuple(turned != form.transposed for turned in self.about.turned)
        self.gate = gate_of(form)
        adapters = _adapters(gate_up_lora, down_lora)
        asking = x, top_k_weights, *adapters
        needs = Needs(*(t is not None and train and t.requires_grad for t in asking))
        self.records, self.compiling = any(needs), torch.compiler.is_compiling()
        if not self.compiling:  # else the operator makes its own
            rows = x.to(self.kind)
            self.problem = problem_of(rows, top_k_index, top_k_weights, adapters, self.about, needs, self.gate)
        small = *asking, top_k_index, gate_up_bias, down_bias
        self.contiguous = all(t is None or t.is_contiguous() for t in small)

    def held(self, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the weights: plain ones in the dtype of the products, a view of the other layout as that."""
        found: list[torch.Tensor] = []
        for weight, inner, turns in zip((gate_up, down), self.tensors_of, self.turns, strict=True):
            if inner is not None:
                found += inner(weight)
            else:
                weight = weight.to(self.kind)
                found.append(weight.mT if turns else weight)
        return tuple(found)

    def __call__(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_lora: Adapter | None = None,
        down_lora: Adapter | None = None,
        gate_up_bias: MaybeTensor = None,
        down_bias: MaybeTensor = None,
    ) -> torch.Tensor:
        """y [T, H], in x's dtype."""
        adapters: Any = _adapters(gate_up_lora, down_lora)
        weights_held, biases, kind = self.held(gate_up, down), (gate_up_bias, down_bias), x.dtype
        rows: Any = x.to(self.kind)
        ids: Any = top_k_index
        weights: Any = top_k_weights
        if not self.contiguous:
            rows, ids, weights, *adapters = map(contiguous, (rows, ids, weights, *adapters))
            biases = contiguous(gate_up_bias), contiguous(down_bias)
        held = *weights_held, *biases
        scalings = [1.0 if lora is None else lora.scaling for lora in (gate_up_lora, down_lora)]
        if self.compiling:
            y = custom_op.experts(rows, ids, weights, tuple(adapters), held, self.about, scalings, self.gate)
            return y.to(kind)
        refuse_transforms()
        with on(x.device):
            call = Call(*scalings)
            if not self.records:
                return forward(self.problem, call, rows, ids, weights, tuple(adapters), held)[0].to(kind)
            y = _Experts.apply(rows, ids, weights, *adapters, held, self.problem, call)
            if call.deferred is not None:
                program, bound, first = call.deferred
                program.run(bound, first)
        return y.to(kind)


def _base_of(weight: torch.Tensor) -> str:
    """The name of the row of ``BASES`` that it is."""
    return weight.BASE if isinstance(weight, PackedStack) else PLAIN.name


def _adapters(*loras: Adapter | None) -> Adapters:
    a1, b1, a2, b2 = (t for lora in loras for t in ((None, None) if lora is None else lora[:2]))
    return a1, b1, a2, b2


class _Experts(torch.autograd.Function):
    """The launches that make nothing for the backward, the last product and the sum over a token's experts, wait until
    ``apply`` has saved what it does read. A checkpoint's second forward (not reentrant) ends when the last tensor is
    saved: it then skips them."""

    @staticmethod
    def forward(ctx: Any, x: Any, ids: Any, weights: Any, *rest: Any) -> Any:
        *adapters, held, problem, call = rest
        call.defers = True
        y, h, room = forward(problem, call, x, ids, weights, tuple(adapters), held)
        ctx.save_for_backward(*to_save(problem, x, h, room, tuple(adapters), held))
        ctx.rest = problem, call.s1, call.s2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any) -> Any:
        problem, *scalings = ctx.rest
        saved = ctx.saved_tensors
        dx, dw, *of_adapters = backward(problem, Call(*scalings), dout.contiguous(), saved[:5], saved[5:])
        return dx, None, dw, *of_adapters, None, None, None
