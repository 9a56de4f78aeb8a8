"""LoRA and DoRA on an embedding: checked inputs, one choice of path, then the fused kernels or plain torch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch, reference
from lora_fast.bases.packed import PackedWeight, is_opaque
from lora_fast.checks import FLOATS
from lora_fast.paths import Facts, facts_of, remember


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_embedding_A: torch.Tensor,
    lora_embedding_B: torch.Tensor,
    scaling: float | torch.Tensor,
    magnitude: torch.Tensor | None = None,
    *,
    embed_scale: float | torch.Tensor | None = None,
    padding_idx: int | None = None,
    round_norm: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Rows of a frozen embedding with a low-rank update: ``y = c (E[ids] + scaling * A^T[ids] B^T)``, with a magnitude
    DoRA's ``y = (magnitude / n) * c (E[ids] + scaling * A^T[ids] B^T)``, ``n`` the norms of the columns of
    ``E + scaling * (B A)^T``, constants in the backward.

    Formulas of Hu et al. 2021 (arXiv 2106.09685) and Liu et al. 2024 (arXiv 2402.09353), as PEFT has them on
    ``nn.Embedding``. Gradients reach both adapters and the magnitude; their sums have a fixed order, so that two runs
    give the same bits. The product is made in the adapters' dtype, summed in float32, and y rounded once.

    Args:
        ids: [...], int32 or int64, each in 0 to V - 1. On a GPU an id outside makes its row of y NaN, for nothing waits
            to look at it.
        weight: E [V, N], floating, must not require a gradient.
        lora_embedding_A: [R, V], any floating dtype; its gradient, which is dense, comes in its own.
        lora_embedding_B: [N, R], likewise.
        scaling: a number, or a 0-dim floating tensor. It gets no gradient.
        magnitude: [N], floating, any sign; used in float32 or better.
        embed_scale: c, which Gemma's embeddings have: a number, or a tensor of one element. E's rows are multiplied by
            it in E's dtype, as those do.
        padding_idx: the id whose column of lora_embedding_A gets no gradient, as in ``nn.Embedding``; None for none.
        round_norm: round n to the weight's dtype, as PEFT does.
        backend: "auto" (what :func:`lora_fast.set_backend` says), "triton" or "reference".

    Returns:
        [..., N] in weight's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype, a packed weight.
        ValueError: wrong shapes or devices, a scaling that is not finite, padding_idx outside of 0 to V - 1, a weight
            that requires grad.
        IndexError: an id outside (in plain torch on the CPU).
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    tensors = ids, weight, lora_embedding_A, lora_embedding_B
    facts, call = _recall(tensors, magnitude, scaling, embed_scale, padding_idx, round_norm, backend)
    if call is None:
        _check(*tensors, scaling, magnitude, embed_scale, padding_idx, round_norm)
        call = _settle(*tensors, magnitude, padding_idx, round_norm, backend)
        remember(_calls, facts, call)
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.detach()
    if isinstance(embed_scale, torch.Tensor):
        embed_scale = embed_scale.detach()
    return call(*tensors, scaling, magnitude, embed_scale)


_calls: dict[Facts, Callable[..., torch.Tensor]] = {}  # what takes them, by their facts


def _recall(
    tensors: tuple[Any, ...],
    magnitude: Any,
    scaling: Any,
    embed_scale: Any,
    padding_idx: Any,
    round_norm: Any,
    backend: str,
) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts): all that the checks of a call and the choice of its path rest on, but
    for numbers, which are right here. The host waits for this in every step. No facts where numbers are wrong or
    something is no tensor, which the checks will say, and under compilation."""
    if is_compiling() or type(round_norm) is not bool or not (padding_idx is None or type(padding_idx) is int):
        return None, None
    try:
        numbers = tuple(
            None if value is None or type(value) is float and math.isfinite(value) else facts_of(value)
            for value in (scaling, embed_scale)
        )
        facts = (
            *map(facts_of, tensors),
            None if magnitude is None else facts_of(magnitude),
            *numbers,
            scaling is None,
            embed_scale is None,
            padding_idx,
            round_norm,
            torch.is_grad_enabled(),
            dispatch.get_backend(),
            backend,
        )
        return facts, _calls.get(facts)
    except (AttributeError, RuntimeError, TypeError):
        return None, None


def _settle(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor | None,
    padding_idx: int | None,
    round_norm: bool,
    backend: str,
) -> Callable[..., torch.Tensor]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    if dispatch.choose(backend, weight.device, weight.dtype) == "triton":
        from lora_fast.ops.embedding import FusedEmbedding  # needs Triton

        return FusedEmbedding(ids, weight, lora_A, lora_B, magnitude, padding_idx, round_norm)
    return partial(reference.lora_embedding, padding_idx=padding_idx, round_norm=round_norm)


def _check(
    ids: Any,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    scaling: Any,
    magnitude: Any,
    embed_scale: Any,
    padding_idx: Any,
    round_norm: Any,
) -> None:
    """Raise on arguments that do not fit together."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids: got {type(ids).__name__}, expected a tensor")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: got dtype {ids.dtype}, expected int32 or int64")
    floating = {"weight": weight, "lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if magnitude is not None:
        floating["magnitude"] = magnitude
    for name, t in floating.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected float16, bfloat16, float32 or float64")
        if t.device != ids.device:
            raise ValueError(f"{name}: got a tensor on {t.device}, expected {ids.device}, where ids are")
    if isinstance(weight, PackedWeight) or is_opaque(weight):
        raise TypeError(f"weight: got a {type(weight).__name__}, expected a plain tensor")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [V, N]")
    v, n = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != v or len(lora_A) < 1:
        raise ValueError(f"lora_embedding_A: got shape {tuple(lora_A.shape)}, expected [r, {v}] with r >= 1")
    if lora_B.shape != (n, len(lora_A)):
        raise ValueError(f"lora_embedding_B: got shape {tuple(lora_B.shape)}, expected {(n, len(lora_A))}")
    if magnitude is not None and magnitude.shape != (n,):
        raise ValueError(f"magnitude: got shape {tuple(magnitude.shape)}, expected {(n,)}")
    _check_number("scaling", scaling, ids.device)
    if embed_scale is not None:
        _check_number("embed_scale", embed_scale, ids.device)
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
            raise TypeError(f"padding_idx: got {padding_idx!r}, expected an integer or None")
        if not 0 <= padding_idx < v:
            raise ValueError(f"padding_idx: got {padding_idx}, expected one of 0 to {v - 1}")
    if not isinstance(round_norm, bool):
        raise TypeError(f"round_norm: got {round_norm!r}, expected True or False")
    if weight.requires_grad:
        raise ValueError("weight: requires grad, expected a frozen base weight (weight.requires_grad_(False))")


def _check_number(name: str, value: Any, device: torch.device) -> None:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            shape = tuple(value.shape)
            raise ValueError(
                f"{name}: got a {value.dtype} tensor of shape {shape}, expected a floating one of one element"
            )
        if value.device != device:
            raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}, where ids are")
    elif torch.compiler.is_compiling():
        return  # a float may be symbolic
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number or a tensor of one element")
    elif not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
