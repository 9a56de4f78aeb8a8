"""What the operators share: the device that they run on, tensors that kernels can address, what a backward reads."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from lora_fast.bases.packed import PackedWeight
from lora_fast.kernels.bases import PLAIN, TURNED
from lora_fast.kernels.lora import backward
from lora_fast.kernels.problem import Kinds, Made, MaybeTensor, Problem


def contiguous(t: MaybeTensor) -> MaybeTensor:
    return t if t is None or t.is_contiguous() else t.contiguous()


def base_of(weight: torch.Tensor) -> str:
    """The name of the base (a row of ``BASES``) that a weight [N, K] is."""
    if isinstance(weight, PackedWeight):
        return weight.BASE
    down, right = weight.stride()
    return TURNED.name if down == 1 < right else PLAIN.name


@cache
def one_gpu() -> bool:
    return torch.cuda.device_count() <= 1


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which this device is the current one."""
    if one_gpu() or device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def addressable(t: torch.Tensor) -> torch.Tensor:
    """t [..., C], contiguous or as the matrix of its rows, which is a copy only where it must be."""
    return t if t.dim() == 2 or t.is_contiguous() else t.reshape(-1, t.shape[-1])


def gradients(
    problem: Problem, dy: torch.Tensor, saved: Sequence[MaybeTensor], scaling: float | torch.Tensor, p: float
) -> tuple[MaybeTensor, ...]:
    """(dx, dA, dB, dbias, dm), each None where the problem does not need it. ``saved``: what ``to_save`` gave. On the
    current device: autograd makes it dy's."""
    if (x := saved[0]) is not None and x.dim() != 2:
        saved = addressable(x), *saved[1:]
    if not dy.is_contiguous():
        dy = addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    return backward(problem, dy, saved, scaling, p)


def saved_by(ctx: Any) -> Any:
    """``ctx.saved_tensors``; what autograd says of an output that was changed in place names the way out."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f'{error}\nDoRA without a bias keeps its output for the gradient of the magnitude. With save="z" (an '
            "argument of dora_linear and dora_linear_batch, an attribute of DoRALinear and of patched PEFT layers) it "
            "keeps a tensor of its own, and the output may be changed in place."
        ) from error


def to_save(
    problem: Problem,
    made: Made,
    held: Sequence[torch.Tensor],
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
) -> tuple[MaybeTensor, ...]:
    """What the backward will read, see ``Problem.save``."""
    saved: tuple[MaybeTensor, ...] = problem.save((None, x, lora_A, lora_B, y, *made, *held))
    return saved


def dtype_of(t: MaybeTensor) -> torch.dtype | None:
    return None if t is None else t.dtype


def kinds_of(
    kind: torch.dtype, lora_A: MaybeTensor, lora_B: MaybeTensor, bias: MaybeTensor, magnitude: MaybeTensor
) -> Kinds:
    """Of a layer whose products are made in ``kind``; that of adapters that it does not have, too."""
    of_a, of_b = dtype_of(lora_A) or kind, dtype_of(lora_B) or kind
    return Kinds(kind, of_a, of_b, dtype_of(bias), dtype_of(magnitude))


def some(t: MaybeTensor, like: torch.Tensor) -> torch.Tensor:
    """A custom op returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t
