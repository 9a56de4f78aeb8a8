"""What the operators share: the device that they run on, tensors that kernels can address, what a backward reads."""

from contextlib import nullcontext
from functools import cache

import torch

from lora_fast.kernels.layout import Fp8, Made, MaybeTensor, Needs, Shared
from lora_fast.kernels.lora import lora_bwd


def contiguous(t: MaybeTensor) -> MaybeTensor:
    return t if t is None or t.is_contiguous() else t.contiguous()


@cache
def one_gpu() -> bool:
    return torch.cuda.device_count() <= 1


def on(device: torch.device):
    """A context in which this device is the current one."""
    if one_gpu() or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def addressable(t: torch.Tensor) -> torch.Tensor:
    """t [..., C], contiguous or as the matrix of its rows, which is a copy only where it must be."""
    return t if t.dim() == 2 or t.is_contiguous() else t.reshape(-1, t.shape[-1])


def gradients(dy, shared: Shared, needs: Needs, saved, scaling, p, kinds) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias, dm), each None where ``needs`` does not ask for it. ``saved``: the fields of ``Saved``;
    ``kinds``: the dtypes of bias and magnitude. On the current device: autograd makes it dy's."""
    if (x := saved[0]) is not None and x.dim() != 2:
        saved = addressable(x), *saved[1:]
    if not dy.is_contiguous():
        dy = addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    return lora_bwd(shared, needs, dy, saved, scaling, p, kinds)


def to_save(
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


def dtype_of(t: MaybeTensor) -> torch.dtype | None:
    return None if t is None else t.dtype


def some(t: MaybeTensor, like: torch.Tensor) -> torch.Tensor:
    """A custom op returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t


def shared_of(x, weight, lora_A, lora_B, magnitude, fp8: bool, save_x8: bool, kind: torch.dtype) -> Shared:
    (n, k), r, kinds = weight.shape, lora_A.shape[0], (kind, lora_A.dtype, lora_B.dtype)
    return Shared(x.shape[:-1], k, n, r, kinds, magnitude is not None, fp8, fp8 or save_x8)
