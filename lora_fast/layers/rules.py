"""What a layer with an adapter takes: its hyperparameters, the layer that it stands in for; and how adapters start."""

import math
from typing import Any

import torch
from torch import nn

from lora_fast import dispatch
from lora_fast.bases import COMPUTE, PACKED, is_kept_as, kind_of_base
from lora_fast.bases.packed import PackedWeight, is_opaque, packed_in
from lora_fast.bases.written import WrittenWeight, check_for_e4m3
from lora_fast.blocks.recognise import is_conv1d
from lora_fast.checks import FLOATS
from lora_fast.layers.held_linears import is_held, why_not_held


def check_base_dtype(base_dtype: Any, base_compute: Any = None) -> None:
    if base_dtype is not None and base_dtype not in list(PACKED):
        raise ValueError(f"base_dtype: got {base_dtype!r}, expected None or {' or '.join(map(repr, PACKED))}")
    if base_compute not in COMPUTE:
        raise ValueError(f"base_compute: got {base_compute!r}, expected {' or '.join(map(repr, COMPUTE))}")


def kind_asked_for(
    weight: torch.Tensor, base_dtype: str | None, base_compute: str | None, fan_in_fan_out: bool = False
) -> type[PackedWeight]:
    """The kind that the weight is to become. Without a ``base_dtype`` it is one that is written out for its products,
    is kept as it is, and has those of ``base_compute``.

    Raises:
        ValueError: it is none of these, or stored as [in, out].
    """
    if fan_in_fan_out:
        name, got = ("base_compute", base_compute) if base_dtype is None else ("base_dtype", base_dtype)
        raise ValueError(f"{name}: got {got!r}, expected None over a Conv1D, whose weight is stored as [in, out]")
    if base_dtype is not None:
        return kind_of_base(base_dtype, base_compute)
    if not isinstance(weight, WrittenWeight):
        what = "None without a base_dtype, but over weights that are in 4 bits or as an fp8 checkpoint holds them"
        raise ValueError(f"base_compute: got {base_compute!r}, expected {what}")
    return type(weight).for_compute(base_compute)


def check_quantisable(weight: torch.Tensor, kind: type[PackedWeight]) -> None:
    """Raise as :meth:`LoRALinear.from_linear` with a ``base_dtype`` where the weight cannot become one of this kind."""
    if dispatch.get_backend() != "reference" and (why := kind.why_not(weight.device)):
        raise RuntimeError(f"base_dtype: {why}")
    if is_kept_as(weight, kind):
        if kind.E4M3_PRODUCTS and type(weight) is not kind:
            check_for_e4m3(weight.shape)
            if dispatch.has_data(weight) and not torch.isfinite(weight.dequantise()).all():
                raise ValueError("weight: has elements that are not finite, expected finite ones for 8-bit products")
    elif not isinstance(weight, kind):
        kind.check(weight)


def arguments_of_base(weight: torch.Tensor) -> str:
    """The ``base_dtype`` that makes such a weight, and its ``base_compute``, as repr shows them; nothing of a plain
    one."""
    found = packed_in(weight)
    if found is None:
        return ""
    name = next((name for name, kind in PACKED.items() if isinstance(found, kind)), found.LABEL)
    compute = f", base_compute={found.BASE_COMPUTE!r}" if found.BASE_COMPUTE else ""
    return f", base_dtype={name!r}{compute}"


HOOKED = "has hooks or a replaced forward, which would be lost (register hooks after the conversion)"


def has_hooks(module: nn.Module) -> bool:
    return any(value for key, value in vars(module).items() if key.endswith("_hooks"))


def is_linear(module: Any) -> bool:
    """Whether it is linear and not hidden in another module: an ``nn.Linear`` or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of what :func:`is_linear`."""
    return tuple(linear.weight.shape) if is_conv1d(linear) else (linear.in_features, linear.out_features)  # type: ignore[arg-type]


def why_not_lora(module: nn.Module) -> str | None:
    """Why a :class:`LoRALinear` could not stand in for the module, in words; None where it can."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the output projection of nn.MultiheadAttention, which reads its weight and would skip the adapter"
    held = is_held(module)
    if type(module) is not nn.Linear and not held and not is_conv1d(module):
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    theirs = held and hasattr(module, "quantization_scheme")  # compressed-tensors', with a forward of its own
    if ("forward" in vars(module) and not theirs) or has_hooks(module):
        return HOOKED
    if held:
        return why_not_held(module)
    weight: Any = module.weight
    if weight.dtype not in FLOATS:
        return f"has a quantised weight ({weight.dtype})"
    if is_opaque(weight):
        return f"has a quantised weight (a {type(weight).__name__})"
    return None


# PEFT's values of init_lora_weights, but for those that change the base weight.
LEAVE_THE_BASE = True, False, "gaussian", "eva", "mica", "orthogonal"


def check_hyperparameters(
    r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init_lora_weights: bool | str
) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: got {r!r}, expected an integer >= 1")
    if r < 1:
        raise ValueError(f"r: got {r}, expected an integer >= 1")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {value!r}, expected a number")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: got {lora_alpha}, expected a finite number")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout: got {lora_dropout}, expected a probability in [0, 1)")
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora: got {use_rslora!r}, expected True or False")
    check_init(init_lora_weights)


def check_init(init_lora_weights: bool | str) -> None:
    if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
        hint = ""
        if isinstance(init_lora_weights, str):
            start = f"get_peft_model(model, LoraConfig(init_lora_weights={init_lora_weights!r}, ...))"
            hint = f"; for PEFT's other starts, have PEFT make it: {start}, then lora_fast.patch_peft(model)"
        raise ValueError(f"init_lora_weights: got {init_lora_weights!r}, expected True, False or 'gaussian'{hint}")


@torch.no_grad()
def init_adapter(lora_A: torch.Tensor, lora_B: torch.Tensor, init_lora_weights: bool | str) -> None:
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_A, std=1 / len(lora_A))
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)
