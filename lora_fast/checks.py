"""What a call of the functional API must fit: errors that name the argument, what was given and what is expected."""

import math
from typing import Any

import torch

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, is_opaque

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(tensors: dict[str, Any]) -> None:
    """Raise where what goes by these names, "x" first, is no tensor, not floating, or not where x is."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected float16, bfloat16, float32 or float64")
        if t.device != (device := tensors["x"].device):
            raise ValueError(f"{name}: got a tensor on {t.device}, expected {device}, where x is")


def check_linear(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, bias: Any, dropout_p: Any, *, adapted: bool = True
) -> torch.dtype:
    """Raise on arguments that do not fit together; return the dtype that the products are made in. Of a layer that is
    not ``adapted`` lora_A and lora_B are not looked at."""
    tensors = {"x": x, "weight": weight}
    if adapted:
        tensors |= {"lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    check_tensors(tensors)
    if isinstance(weight, PackedWeight) and not weight.WHOLE:
        raise TypeError(
            f"weight: got an {type(weight).__name__}, expected the whole weight, as FSDP2 gathers it for a layer's "
            "forward"
        )
    if is_opaque(weight):
        raise TypeError(f"weight: got a {type(weight).__name__}, expected a plain tensor or an Fp8Weight")
    if x.dim() < 1:
        raise ValueError("x: got a tensor without dimensions, expected [..., K]")
    k = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        who = " (DeepSpeed's ZeRO-3 has partitioned it)" if hasattr(weight, "ds_id") else ""
        raise ValueError(f"weight: got shape {tuple(weight.shape)}{who}, expected [N, {k}] to fit x {tuple(x.shape)}")
    n = weight.shape[0]
    if adapted:
        if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A: got shape {tuple(lora_A.shape)}, expected [r, {k}] with r >= 1")
        if lora_B.shape != (n, r := lora_A.shape[0]):
            raise ValueError(f"lora_B: got shape {tuple(lora_B.shape)}, expected {(n, r)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {(n,)}")
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or not scaling.dtype.is_floating_point:
            shape = tuple(scaling.shape)
            raise ValueError(f"scaling: got a {scaling.dtype} tensor of shape {shape}, expected a 0-dim floating one")
        if scaling.device != x.device:
            raise ValueError(f"scaling: got a tensor on {scaling.device}, expected {x.device}, where x is")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        if not torch.compiler.is_compiling():  # there a float may be symbolic
            raise TypeError(f"scaling: got {type(scaling).__name__}, expected a number or a 0-dim tensor")
    elif not torch.compiler.is_compiling() and not math.isfinite(scaling):
        raise ValueError(f"scaling: got {scaling}, expected a finite number")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if weight.requires_grad:
        raise ValueError("weight: requires grad, expected a frozen base weight (weight.requires_grad_(False))")
    autocast = dispatch.autocast_dtype(x.device)
    if autocast is not None and x.dtype != torch.float64:
        if weight.dtype == torch.float64:
            raise TypeError(f"weight: got dtype {weight.dtype}, which autocast leaves alone, expected x's {x.dtype}")
        return autocast
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected x's {x.dtype} (or autocast)")
    return x.dtype


def check_dora(magnitude: Any, weight: torch.Tensor, detach_norm: Any, round_norm: Any, save: Any) -> None:
    """Raise where what DoRA has beside LoRA does not fit the weight or is none of what it may be."""
    if not isinstance(magnitude, torch.Tensor):
        raise TypeError(f"magnitude: got {type(magnitude).__name__}, expected a tensor")
    if magnitude.dtype not in FLOATS:
        raise TypeError(f"magnitude: got dtype {magnitude.dtype}, expected float16, bfloat16, float32 or float64")
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"magnitude: got shape {tuple(magnitude.shape)}, expected {tuple(weight.shape[:1])}")
    if magnitude.device != weight.device:
        raise ValueError(f"magnitude: got a tensor on {magnitude.device}, expected {weight.device}, where weight is")
    for name, flag in (("detach_norm", detach_norm), ("round_norm", round_norm)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, expected True or False")
    if save not in ("auto", "z"):
        raise ValueError(f'save: got {save!r}, expected "auto" or "z"')


def check_save_x(save_x: Any) -> None:
    """Raise where it is none of what it may be."""
    if save_x not in ("x", "fp8"):
        raise ValueError(f'save_x: got {save_x!r}, expected "x" or "fp8"')
