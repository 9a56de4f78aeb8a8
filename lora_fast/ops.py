"""The fused kernels as one differentiable operator: an autograd Function in eager, a custom op under torch.compile."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_fast.dispatch import autocast_dtype, tell
from lora_fast.fp8 import E4M3, Fp8Weight
from lora_fast.kernels import launchers
from lora_fast.kernels.launch import plan_for, sig
from lora_fast.kernels.layout import Fp8, Made, MaybeTensor, Needs, Shared
from lora_fast.kernels.lora import lora_bwd, lora_fwd

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
        self.kinds = _dtype(bias), _dtype(magnitude)
        self.shared: Any = None
        self.elsewhere = None  # the tensors' device, where there are others
        if not self.compiling:
            self.elsewhere = None if _one_gpu() or x.device.type != "cuda" else x.device
            self.shared = _shared_of(x, weight, lora_A, lora_B, magnitude, self.fp8, self.save_x8, self.kind)

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
                lora_A, lora_B, bias, magnitude = map(_contiguous, (lora_A, lora_B, bias, magnitude))
        seed = draw_seed(x.device) if p > 0 else None
        if self.compiling:
            if not isinstance(scaling, torch.Tensor):
                scaling = torch.ones((), device=x.device, dtype=torch.float32) * scaling  # torch.full would recompile
            return torch.ops.lora_fast.lora_linear(
                x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, self.round_norm, self.keep_z,
                self.save_x8, *(fp8 or ()),
            )[0]  # fmt: skip
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
        return lora_fwd(self.shared, x if self.addressable else _addressable(x), weight, lora_A, lora_B, scaling, bias,
                        seed, p, magnitude, self.round_norm, self.keep_z, fp8, late)  # fmt: skip


def _contiguous(t: MaybeTensor) -> MaybeTensor:
    return t if t is None else t.contiguous()


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


@cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() <= 1


def _on(device: torch.device):
    if _one_gpu() or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _addressable(t: torch.Tensor) -> torch.Tensor:
    """t [..., C], contiguous or as the matrix of its rows, which is a copy only where it must be."""
    return t if t.dim() == 2 or t.is_contiguous() else t.reshape(-1, t.shape[-1])


def _backward(dy, shared: Shared, needs: Needs, saved, scaling, p, kinds) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias, dm), each None where ``needs`` does not ask for it. ``saved``: the fields of ``Saved``;
    ``kinds``: the dtypes of bias and magnitude. On the current device: autograd makes it dy's."""
    if (x := saved[0]) is not None and x.dim() != 2:
        saved = _addressable(x), *saved[1:]
    if not dy.is_contiguous():
        dy = _addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    return lora_bwd(shared, needs, dy, saved, scaling, p, kinds)


def _to_save(
    x, weight, lora_A, lora_B, y, made: Made, shared: Shared, fp8: Fp8 | None, needs: Needs, save_x8: bool
) -> tuple[MaybeTensor, ...]:
    """What the backward will read, and nothing else (but in the room, where all is small): the fields of ``Saved``."""
    again = needs.m and made.z is None  # dm from y, which may have to make z again
    need_ds = needs.x or needs.a
    room = needs.b or needs.m or (need_ds and (shared.cast or shared.dora)) or (needs.a and save_x8)
    row_scale, columns, col_scale = fp8 or (None, None, None)
    return (
        x if (needs.a and not save_x8) or again else None,
        weight if (needs.x and fp8 is None) or again else None,
        lora_A if needs.x and not shared.cast else None,
        lora_B if (need_ds or again) and not shared.cast else None,
        y if again else None,
        made.room if room else None,
        made.bits if need_ds else None,
        made.z if needs.m else None,
        made.x8 if needs.a and save_x8 else None,
        row_scale if again else None,
        columns if needs.x else None,
        col_scale if needs.x else None,
    )


def _dtype(t: MaybeTensor) -> torch.dtype | None:
    return None if t is None else t.dtype


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
        saved = _to_save(x, weight, lora_A, lora_B, y, made, fused.shared, fp8, needs, fused.save_x8)
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
    dx, *grads = _backward(dy, fused.shared, fused.needs, saved, scaling, p, fused.kinds)
    return dx, None, *grads, None, None


_backward_once = once_differentiable(_backward_of)


def _some(t: MaybeTensor, like: torch.Tensor) -> torch.Tensor:
    """A custom op returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t


@torch.library.custom_op("lora_fast::lora_linear", mutates_args=())
def _lora_linear_op(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: MaybeTensor,
    magnitude: MaybeTensor, scaling: torch.Tensor, seed: MaybeTensor, p: float, round_norm: bool, keep_z: bool,
    save_x8: bool, row_scale: MaybeTensor = None, columns: MaybeTensor = None, col_scale: MaybeTensor = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    fp8 = None if row_scale is None else Fp8(row_scale, columns, col_scale)
    lora_A, lora_B, bias, magnitude = map(_contiguous, (lora_A, lora_B, bias, magnitude))  # type: ignore[assignment]
    tensors = x, weight, lora_A, lora_B, bias, magnitude
    key = "lora_linear", fp8 is None, save_x8, *map(sig, tensors)
    shared = plan_for(key, _shared_of, x, weight, lora_A, lora_B, magnitude, fp8 is not None, save_x8, x.dtype)
    with _on(x.device):
        y, made = lora_fwd(shared, _addressable(x), weight, lora_A, lora_B, scaling, bias, seed, p, magnitude,
                           round_norm, keep_z, fp8)  # fmt: skip
    assert made.room is not None
    return y, made.room, _some(made.bits, y), _some(made.z, y), _some(made.x8 if save_x8 else None, y)


def _shared_of(x, weight, lora_A, lora_B, magnitude, fp8: bool, save_x8: bool, kind: torch.dtype) -> Shared:
    (n, k), r, kinds = weight.shape, lora_A.shape[0], (kind, lora_A.dtype, lora_B.dtype)
    return Shared(x.shape[:-1], k, n, r, kinds, magnitude is not None, fp8, fp8 or save_x8)


@_lora_linear_op.register_fake
def _(
    x, weight, lora_A, lora_B, bias, magnitude, scaling, seed, p, round_norm, keep_z, save_x8,
    row_scale=None, columns=None, col_scale=None,
):  # fmt: skip
    n, k = weight.shape
    m = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    room = _shared_of(x, weight, lora_A, lora_B, magnitude, row_scale is not None, save_x8, x.dtype).bytes
    bits = x.new_empty(0) if seed is None else x.new_empty(m, -(-k // 32), dtype=torch.int32)
    z = torch.empty_like(y) if keep_z else x.new_empty(0)
    x8 = x.new_empty(m, k, dtype=E4M3) if save_x8 else x.new_empty(0)
    return y, x.new_empty(room, dtype=torch.uint8), bits, z, x8


@torch.library.custom_op("lora_fast::lora_linear_bwd", mutates_args=())
def _lora_linear_bwd_op(
    dy: torch.Tensor, x: MaybeTensor, weight: MaybeTensor, lora_A: MaybeTensor, lora_B: MaybeTensor, y: MaybeTensor,
    room: MaybeTensor, bits: MaybeTensor, z: MaybeTensor, x8: MaybeTensor, row_scale: MaybeTensor, columns: MaybeTensor,
    col_scale: MaybeTensor, scaling: torch.Tensor, p: float, needs: list[bool], shape: list[int], dora: bool, fp8: bool,
    quantised: bool, a_dtype: torch.dtype, b_dtype: torch.dtype, bias_dtype: torch.dtype, m_dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    k, r = shape
    problem = dy.shape[:-1], k, dy.shape[-1], r, (dy.dtype, a_dtype, b_dtype), dora, fp8, quantised
    shared = plan_for(("lora_linear_bwd", dy.device, *problem), Shared, *problem)
    saved = x, weight, lora_A, lora_B, y, room, bits, z, x8, row_scale, columns, col_scale
    with _on(dy.device):
        grads = _backward(dy, shared, Needs(*needs), saved, scaling, p, (bias_dtype, m_dtype))
    return [_some(g, dy) for g in grads]


@_lora_linear_bwd_op.register_fake
def _(
    dy, x, weight, lora_A, lora_B, y, room, bits, z, x8, row_scale, columns, col_scale, scaling, p, needs, shape, dora,
    fp8, quantised, *dtypes,
):  # fmt: skip
    (k, r), n = shape, dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (r, k), (n, r), (n,), (n,)
    kinds = dy.dtype, *dtypes
    return [dy.new_empty(sh if need else 0, dtype=kind if need else None)
            for sh, kind, need in zip(shapes, kinds, needs, strict=True)]  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, bias, magnitude, scaling, _, ctx.p, _, keep_z, save_x8, *base = inputs
    y, room, bits, z, x8 = output
    ctx.needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
    fp8 = None if base[0] is None else Fp8(*base)
    shared = _shared_of(x, weight, lora_A, lora_B, magnitude, fp8 is not None, save_x8, x.dtype)
    made = Made(room, bits if ctx.p > 0 else None, z if keep_z else None, x8)
    saved = _to_save(x, weight, lora_A, lora_B, y, made, shared, fp8, ctx.needs, save_x8)
    ctx.save_for_backward(*saved, scaling)
    ctx.rest = (
        [shared.k, shared.r], shared.dora, shared.fp8, shared.quantised, lora_A.dtype, lora_B.dtype,
        _dtype(bias) or x.dtype, _dtype(magnitude) or x.dtype,
    )  # fmt: skip


def _op_backward(ctx, dy, *_):
    grads = torch.ops.lora_fast.lora_linear_bwd(dy, *ctx.saved_tensors, ctx.p, list(ctx.needs), *ctx.rest)
    dx, grad_a, grad_b, grad_bias, grad_m = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return dx, None, grad_a, grad_b, grad_bias, grad_m, *(None,) * 9


_lora_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
