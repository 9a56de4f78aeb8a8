"""Frozen experts through the fused kernels, by way of transformers' own interface: :func:`register_experts`."""

from typing import Any

import torch

from lora_fast import dispatch
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.known import form_of, frozen_of, why_not_now

NAME = "lora_fast"


def register_experts() -> None:
    """Make ``"lora_fast"`` one of transformers' implementations of experts, for models whose experts are frozen, with
    or without adapters elsewhere: ``model.set_experts_implementation("lora_fast")``, or ``from_pretrained(...,
    experts_implementation="lora_fast")``. To be called before either; again does no harm.

    What it does not know (another gate, another layout), and experts that train, run through transformers'
    ``grouped_mm``, with a :class:`lora_fast.SlowPathWarning` for each reason. LoRA on experts themselves is
    :func:`lora_fast.patch_peft`'s, or add_lora's: PEFT writes out the adapted weights before any implementation runs.

    Raises:
        ImportError: without transformers.
        RuntimeError: a transformers that takes no implementations but its own.
    """
    try:
        import transformers
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("register_experts needs transformers: pip install transformers") from error
    refusal = (
        f"transformers {transformers.__version__} has a fixed list of experts implementations, expected a version that "
        "takes others (5.17 and 5.22 do)"
    )
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:  # transformers 4
        raise RuntimeError(refusal) from error
    ExpertsInterface.register(NAME, experts_forward)
    try:  # as set_experts_implementation asks; a model is looked at for grouped_mm alone
        PreTrainedModel.get_correct_experts_implementation(None, NAME)  # type: ignore[arg-type]
    except ValueError as error:
        ExpertsInterface._global_mapping.pop(NAME, None)
        raise RuntimeError(refusal) from error


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls as the forward of a module of experts: [T, H] to [T, H]; raises as lora_experts."""
    form = form_of(self)
    if isinstance(form, str):
        why: str | None = form
    else:
        frozen = frozen_of(self)
        why = why_not_now(self, frozen) or frozen.why_not_input(hidden_states)
    if why is not None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        dispatch.tell("leaves experts to transformers' grouped_mm", why)
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return lora_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        frozen.gate_up,
        frozen.down,
        gate_up_bias=frozen.gate_up_bias,
        down_bias=frozen.down_bias,
        form=form,  # type: ignore[arg-type]
    )
