"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op (custom_op.py) under
torch.compile."""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.bases.packed import rounds_norm, tensors_of
from lora_fast.dispatch import autocast_dtype, refuse_transforms, tell
from lora_fast.kept import Kept
from lora_fast.kernels import launchers
from lora_fast.kernels.lora import forward, make_kept
from lora_fast.kernels.problem import Call, MaybeTensor, Needs, Problem
from lora_fast.ops import custom_op
from lora_fast.ops.parts import addressable, base_of, contiguous, gradients, kinds_of, one_gpu, saved_by, to_save

if (_why := launchers.why_not_direct()) is not None:
    tell("starts its kernels slowly", _why)


class FusedLinear:
    """The fused form of ``reference.lora_linear`` (with a magnitude of ``reference.dora_linear``) for calls, checked
    before, whose tensors agree in dtype, shape, strides, device and in whether they ask for a gradient, and which ask
    for the same under one state of autocast: what follows from that is decided once. For a small layer the host's time
    is the layer's time."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        bias: MaybeTensor,
        magnitude: MaybeTensor = None,
        *,
        save: str = "auto",
        round_norm: bool = False,
        save_x: str = "x",
    ) -> None:
        dtype, train = autocast_dtype(x.device), torch.is_grad_enabled()
        kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        needs = Needs(*(t is not None and train and t.requires_grad for t in (x, lora_A, lora_B, bias, magnitude)))
        keep_x8 = save_x == "fp8" and needs.a and kind != torch.float64
        # z is kept where y cannot stand for it: y lacks what the bias drowns, and z again takes all that A and B keep.
        keeps_y = save == "auto" and bias is None and not keep_x8 and needs.a and needs.b
        (n, k), kinds = weight.shape, kinds_of(kind, lora_A, lora_B, bias, magnitude)
        self.problem = Problem(
            tuple(x.shape[:-1]),
            k,
            n,
            len(lora_A),
            kinds,
            needs,
            base_of(weight),
            dora=magnitude is not None,
            keep_x8=keep_x8,
            keep_z=needs.m and not keeps_y,
            round_norm=round_norm and rounds_norm(weight),
            alone=not any(needs),
        )
        self.how = "triton", kind, self.problem.round_norm  # beside the weights, what is kept of DoRA depends on this
        self.records, self.compiling = any(needs), torch.compiler.is_compiling()
        self.tensors_of = tensors_of(weight)
        self.kind, self.casts = kind, kind != x.dtype or kind != weight.dtype
        self.contiguous = all(t is None or t.is_contiguous() for t in (lora_A, lora_B, bias, magnitude))
        self.as_given = not self.casts and self.contiguous
        self.addressable = x.dim() == 2 or x.is_contiguous()
        # The tensors' device, where there are others.
        self.elsewhere = None if self.compiling or x.device.type != "cuda" or one_gpu() else x.device

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_A: Any,
        lora_B: Any,
        scaling: float | torch.Tensor,
        bias: MaybeTensor,
        p: float,
        magnitude: Any = None,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """y; p = 0 means no dropout."""
        if self.elsewhere is not None and self.elsewhere.index != torch.cuda.current_device():
            with torch.cuda.device(self.elsewhere):
                return self(x, weight, lora_A, lora_B, scaling, bias, p, magnitude, kept)
        held = (weight,) if self.tensors_of is None else self.tensors_of(weight)
        # what is kept is made of these: LoRA's copies of the adapter alone, DoRA's norm of the base, too
        of_base, adapter = ((), (lora_A, lora_B)) if magnitude is None else (held, (lora_A, lora_B, magnitude))
        if not self.as_given:
            if self.casts:
                x = x.to(self.kind)
                if self.tensors_of is None:
                    held = (weight.to(self.kind),)
            if not self.contiguous:
                lora_A, lora_B, bias, magnitude = map(contiguous, (lora_A, lora_B, bias, magnitude))
        call = Call(scaling, draw_seed(x.device) if p > 0 else None, p, held)
        if self.compiling:
            return custom_op.linear(self.problem, call, x, lora_A, lora_B, bias, magnitude)
        refuse_transforms()
        if not self.records:
            x = x if self.addressable else addressable(x)
            made = None
            if kept is not None and self.problem.lasting:
                make = partial(make_kept, self.problem, call, lora_A, lora_B, magnitude)
                made = kept.get(of_base, adapter, scaling, self.how, make)
            return forward(self.problem, call, x, lora_A, lora_B, bias, magnitude, made)[0]
        y = _apply(x, lora_A, lora_B, bias, magnitude, self, call)
        if call.deferred is not None:
            program, bound, first = call.deferred
            program.run(bound, first)
        return y


def draw_seed(device: torch.device) -> torch.Tensor | int:
    """A dropout seed from the device's generator, drawn outside the operator: so checkpointing, which restores that
    generator, draws the same one again.

    Where the launches are recorded (a CUDA graph, a compiled function) it is a tensor that every replay draws anew.
    Else it is a number, made on the host from the generator's seed and offset, which saves a launch.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # it counts in fours
    # Distinct for distinct (seed, offset), but for one in 2^62; bit 62 keeps it 64 bits wide.
    return (generator.initial_seed() + offset * 0x9E3779B97F4A7C15) % 2**62 + 2**62


class _LoRALinear(torch.autograd.Function):
    """Where the last product makes nothing that the backward reads, its launch waits until ``apply`` has saved what it
    does read. A checkpoint's second forward (not reentrant) ends when the last tensor is saved: it then skips the
    product of its last layer, as it does that of a frozen ``nn.Linear``.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, lora_A: Any, lora_B: Any, bias: Any, magnitude: Any, fused: Any, call: Any) -> Any:
        problem, scaling = fused.problem, call.scaling
        call.defers = not problem.needs.m  # the gradient of the magnitude reads y or z
        rows = x if fused.addressable else addressable(x)
        y, made = forward(problem, call, rows, lora_A, lora_B, bias, magnitude)
        saved = to_save(problem, made, call.held, x, lora_A, lora_B, y)
        if isinstance(scaling, torch.Tensor):
            saved, scaling = (*saved, scaling), None
        ctx.save_for_backward(*saved)
        ctx.rest = problem, scaling, call.p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of torch.func is at work, and in less time.
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _backward_of(ctx: Any, dy: Any) -> Any:
    saved = saved_by(ctx)
    problem, scaling, p = ctx.rest
    if scaling is None:
        *saved, scaling = saved
    return *gradients(problem, dy, saved, scaling, p), None, None


_backward_once = once_differentiable(_backward_of)
