"""transformers' modules of experts: which of them :func:`lora_fast.experts.functional.lora_experts` computes, in what
form, and why not the others. Nothing here imports transformers: whoever has such a module has done that."""

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lora_fast.bases.packed import is_opaque
from lora_fast.bases.stack import PackedStack
from lora_fast.checks import FLOATS
from lora_fast.dispatch import autocast_dtype
from lora_fast.experts.form import ExpertsForm, Gate
from lora_fast.experts.reference import apply_gate
from lora_fast.kept import PLAIN

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_WITHOUT, _WITH_BIAS = (GATE_UP, DOWN), (GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias")
# What the decorator of transformers' experts, use_experts_implementation, sets on each module.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class _OwnGate(NamedTuple):
    """A class of transformers' with a gate of its own."""

    model: str
    name: str
    kind: str
    limit: str  # the attributes that hold these
    alpha: str | None = None


_OWN_GATES = (
    _OwnGate("gpt_oss", "GptOssExperts", "gpt_oss", "limit", "alpha"),
    _OwnGate("openai_privacy_filter", "OpenAIPrivacyFilterExperts", "gpt_oss", "limit", "alpha"),
    _OwnGate("minimax_m3_vl", "MiniMaxM3VLExperts", "gpt_oss", "swiglu_limit", "swiglu_alpha"),
    _OwnGate("deepseek_v4", "DeepseekV4Experts", "clamped", "limit"),
    _OwnGate("hy_v4", "HYV4Experts", "clamped", "swiglu_limit"),
    _OwnGate("glm5_next", "Glm5NextTextExperts", "clamped", "swiglu_limit"),
)
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call the number of experts


class Frozen(NamedTuple):
    """The tensors of a module of experts: its own, in whatever layout."""

    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any

    @property
    def packed(self) -> bool:
        """Whether a weight is in 8 or 4 bits."""
        return isinstance(self.gate_up, PackedStack) or isinstance(self.down, PackedStack)

    def why_not_input(self, x: torch.Tensor) -> str | None:
        """Why these experts and an input need someone else's forward, in words."""
        if type(x) not in PLAIN or x.dim() != 2:
            return f"the input is a {type(x).__name__} of {x.dim()} dimensions, not a tensor [T, H]"
        if x.dtype != (dtype := self.gate_up.dtype) and autocast_dtype(x.device) is None:
            return f"the input is {x.dtype} and the experts {dtype}, without autocast"
        return None


def is_experts(module: nn.Module) -> bool:
    """Whether it is one of transformers' modules of experts that take implementations from outside."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "_apply_gate")


def holds_fp8(module: nn.Module) -> bool:
    """Whether it is transformers' FP8Experts, which stand for a model's own where its checkpoint is in fp8."""
    kind = _fp8_experts()
    return kind is not None and isinstance(module, kind)


def _fp8_experts() -> Any:
    return getattr(sys.modules.get("transformers.integrations.finegrained_fp8"), "FP8Experts", None)


def form_of(module: nn.Module) -> ExpertsForm | str:
    """How the module computes, or why it is none that we know, in words.

    Its gate is known by the identity of the function, never by a name alone, and tried on some numbers: transformers
    may change a formula.
    """
    if not is_experts(module):
        return f"a {type(module).__name__} is none of transformers' modules of experts"
    form = _form_of(module)
    if isinstance(form, str):
        return form
    key = type(module), type(getattr(module, "act_fn", None)), form
    if key not in _tried:
        _tried[key] = _computes_so(module, form)
    return form if _tried[key] else f"{type(module).__name__} computes its gate otherwise than we know"


_tried: dict[tuple[Any, ...], bool] = {}


def _form_of(module: Any) -> ExpertsForm | str:
    kind = getattr(type(module), "ADAPTED", type(module))  # what it was before add_lora
    name = kind.__name__
    # The decorator's forward, around which functools.wraps puts the looks of the original.
    forward = getattr(kind.forward, "__globals__", {}).get("__name__")
    if forward != "transformers.integrations.moe":
        return f"{name} has a forward of its own"
    if not module.has_gate:
        return f"{name} has no gate"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} has a norm behind each expert"
    missing = [key for key in (GATE_UP, DOWN) if not hasattr(module, key)]
    if missing:
        return f"{name} has no {missing[0]}"
    gate = _gate_of(module)
    if isinstance(gate, str):
        return gate
    return ExpertsForm(module.is_transposed, not module.is_concatenated, gate)


def _gate_of(module: Any) -> Gate | str:
    function, name = type(module)._apply_gate, type(module).__name__
    if "_apply_gate" in vars(module):
        return f"the gate of {name} was replaced"
    act = getattr(module, "act_fn", None)
    silu = act in (None, F.silu) or (type(act).__name__ in ("SiLU", "SiLUActivation") and "forward" not in vars(act))
    if function is getattr(sys.modules["transformers.integrations.moe"], "_default_apply_gate", None):
        return Gate() if act is not None and silu else f"the activation of {name} is {type(act).__name__}, not SiLU"
    if function is getattr(_fp8_experts(), "_apply_gate", None):
        alpha, limit = getattr(module, "swiglu_alpha", None), getattr(module, "limit", None)
        if alpha is not None:
            return Gate("gpt_oss", float(alpha), float(module.swiglu_limit))
        if not silu:
            return f"the activation of {name} is {type(act).__name__}, not SiLU"
        return Gate() if limit is None else Gate("clamped", limit=float(limit))
    for own in _OWN_GATES:
        file = sys.modules.get(f"transformers.models.{own.model}.modeling_{own.model}")
        if function is getattr(getattr(file, own.name, None), "_apply_gate", None):
            if own.kind == "clamped" and not silu:
                return f"the activation of {name} is {type(act).__name__}, not SiLU"
            alpha = 1.0 if own.alpha is None else float(getattr(module, own.alpha))
            return Gate(own.kind, alpha, float(getattr(module, own.limit)))
    return f"{name} has a gate of its own"


def _computes_so(module: Any, form: ExpertsForm) -> bool:
    with torch.inference_mode(False), torch.no_grad():
        h = torch.linspace(-11, 13, 256, dtype=torch.float32, device="cpu")
        h = torch.stack([h, h.roll(77)], -1).reshape(16, 32)
        return torch.allclose(module._apply_gate(h), apply_gate(h, form), rtol=1e-5, atol=1e-6)


def frozen_of(module: Any) -> Frozen:
    """Its tensors as they are now."""
    own, names = module._parameters, _WITH_BIAS if module.has_bias else _WITHOUT
    try:  # as attributes each would take the host a microsecond
        found = [own[name] for name in names]
    except KeyError:
        found = [getattr(module, name) for name in names]
    return Frozen(*found, *(None,) * (4 - len(found)))


def why_not_now(module: Any, frozen: Frozen, gathered: bool = False) -> str | None:
    """Why a module whose form is known cannot be computed as it stands, with these tensors, in words.

    ``gathered``: FSDP will have gathered the parameters when forward runs.
    """
    if why := _parallel(module, frozen.gate_up):
        return f"expert parallelism: {why}"
    for name, t in zip(_WITH_BIAS, frozen, strict=True):
        if t is None or isinstance(t, PackedStack):
            continue
        if type(t) not in PLAIN and not gathered:
            return f"{name} is a {type(t).__name__}"
        if t.dtype not in FLOATS or (type(t) not in PLAIN and is_opaque(t)):
            return f"{name} is quantised ({t.dtype})"
        if t.requires_grad:
            return f"{name} requires grad"
    return None


def _parallel(module: Any, gate_up: torch.Tensor) -> str | None:
    if hasattr(module, "_is_expert_parallel"):
        return "the module says so" if module._is_expert_parallel else None
    # Before transformers had the flag: fewer experts here than the configuration has.
    here, config = gate_up.shape[0], getattr(module, "config", None)
    counts = [getattr(config, name, None) for name in _COUNTS]
    total = max((count for count in counts if isinstance(count, int)), default=here)
    return f"the module has {here} of {total} experts" if here < total else None
