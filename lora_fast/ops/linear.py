"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op (custom_op.py) under
torch.compile."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import autocast_dtype, tell
from lora_fast.fp8 import Fp8Weight
from lora_fast.kernels import launchers
from lora_fast.kernels.layout import Fp8, Made, Needs
from lora_fast.kernels.lora import lora_fwd
from lora_fast.ops import custom_op
from lora_fast.ops.parts import addressable, contiguous, dtype_of, gradients, one_gpu, shared_of, to_save

if (_why := launchers.why_not_direct()) is not None:
    tell("starts its kernels slowly", _why)


class Fused:
    """The fused form of ``reference.lora_linear`` (with a magnitude of ``reference.dora_linear``) for calls, checked
    before, whose tensors agree in dtype, shape, strides, device and in whether they ask for a gradient, and which ask
    for the same under one state of autocast: what follows from that is decided once. For a small layer the host's time
    is the layer's time."""

    def __init__(
        self, x, weight, lora_A, lora_B, bias, magnitude=None, save: str = "auto", round_norm: bool = False,
        save_x: str = "x",
    ) -> None:  # fmt: skip
        self.compiling, self.fp8 = torch.compiler.is_compiling(), isinstance(weight, Fp8Weight)
        dtype = autocast_dtype(x.device)
        self.kind = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        self.casts = self.kind != x.dtype or self.kind != weight.dtype
        self.contiguous = all(t is None or t.is_contiguous() for t in (lora_A, lora_B, bias, magnitude))
        self.as_given = not (self.fp8 or self.casts) and self.contiguous
        self.addressable = x.dim() == 2 or x.is_contiguous()
        self.round_norm = round_norm and not self.fp8
        train = torch.is_grad_enabled()
        self.needs = Needs(*(t is not None and train and t.requires_grad for t in (x, lora_A, lora_B, bias, magnitude)))
        self.records = any(self.needs)
        self.save_x8 = save_x == "fp8" and self.needs.a and self.kind != torch.float64
        # z is kept where y cannot stand for it: y lacks what the bias drowns, and z again takes all that A and B keep.
        keeps_y = save == "auto" and bias is None and not self.save_x8 and self.needs.a and self.needs.b
        self.keep_z = self.needs.m and not keeps_y
        self.kinds = dtype_of(bias), dtype_of(magnitude)
        self.shared: Any = None
        self.elsewhere = None  # the tensors' device, where there are others
        if not self.compiling:
            self.elsewhere = None if one_gpu() or x.device.type != "cuda" else x.device
            self.shared = shared_of(x, weight, lora_A, lora_B, magnitude, self.fp8, self.save_x8, self.kind)

    def __call__(self, x, weight, lora_A, lora_B, scaling, bias, p: float, magnitude=None) -> torch.Tensor:
        """y; p = 0 means no dropout."""
        if self.elsewhere is not None and self.elsewhere.index != torch.cuda.current_device():
            with torch.cuda.device(self.elsewhere):
                return self(x, weight, lora_A, lora_B, scaling, bias, p, magnitude)
        fp8 = None
        if not self.as_given:
            if self.fp8:
                weight, fp8 = weight.rows, Fp8(weight.row_scale, weight.columns, weight.col_scale)
            if self.casts:
                x, weight = x.to(self.kind), weight if fp8 is not None else weight.to(self.kind)
            if not self.contiguous:
                lora_A, lora_B, bias, magnitude = map(contiguous, (lora_A, lora_B, bias, magnitude))
        seed = draw_seed(x.device) if p > 0 else None
        if self.compiling:
            if not isinstance(scaling, torch.Tensor):
                scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
            return custom_op.lora_linear(
                x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, self.round_norm, self.keep_z,
                self.save_x8, *(fp8 or ()),
            )  # fmt: skip
        if not self.records:
            return self.forward(x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, fp8)[0]
        late: list = []
        apply = _LoRALinear.apply if torch._C._are_functorch_transforms_active() else _apply
        y = apply(x, weight, lora_A, lora_B, bias, magnitude, (self, scaling, seed, p, fp8), late)
        if late:
            program, bound = late
            program.run(bound, -1)
        return y

    def forward(
        self, x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, fp8, late: list | None = None
    ) -> tuple[torch.Tensor, Made]:
        """y and what was made on the way to it; ``late`` as in ``lora_fwd``."""
        return lora_fwd(self.shared, x if self.addressable else addressable(x), weight, lora_A, lora_B, scaling, bias,
                        seed, p, magnitude, self.round_norm, self.keep_z, fp8, late)  # fmt: skip


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
    """Where the product makes nothing that the backward reads, its launch goes to the list ``late``, for when ``apply``
    has saved what it does read. A checkpoint's second forward (not reentrant) ends when the last tensor is saved: it
    then skips the product of its last layer, as it does that of a frozen ``nn.Linear``.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, magnitude, call, late):
        fused, scaling, seed, p, fp8 = call
        needs = fused.needs  # the gradient of the magnitude reads y or z
        y, made = fused.forward(x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, fp8,
                                None if needs.m else late)  # fmt: skip
        saved = to_save(x, weight, lora_A, lora_B, y, made, fused.shared, fp8, needs, fused.save_x8)
        if isinstance(scaling, torch.Tensor):
            saved, scaling = (*saved, scaling), None
        ctx.save_for_backward(*saved)
        ctx.rest = fused, scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        # once_differentiable takes its time even where nobody will differentiate again.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward_of(ctx, dy)


# What Function.apply comes to where no transform of functorch is at work, and in less time.
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _backward_of(ctx, dy):
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f'{error}\nDoRA without a bias keeps its output for the gradient of the magnitude. With save="z" (an '
            "argument of dora_linear, an attribute of DoRALinear and of patched PEFT layers) it keeps a tensor of its "
            "own, and the output may be changed in place."
        ) from error
    fused, scaling, p = ctx.rest
    if scaling is None:
        *saved, scaling = saved
    dx, *grads = gradients(dy, fused.shared, fused.needs, saved, scaling, p, fused.kinds)
    return dx, None, *grads, None, None


_backward_once = once_differentiable(_backward_of)
