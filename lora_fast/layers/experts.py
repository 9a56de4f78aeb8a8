"""LoRA on the weights of experts, each with a low-rank update of its own."""

import torch
from torch import nn

from lora_fast.experts.form import ExpertsForm
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.known import DOWN, GATE_UP, form_of, frozen_of, is_experts, why_not_now
from lora_fast.experts.reference import merged_weight
from lora_fast.layers.parameters import AdaptedModule, ParameterLoRA, why_no_matrix


class AdaptedExperts(AdaptedModule):
    """A module of experts with one :class:`ExpertsLoRA` or two."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], the ids [T, k] and the weights [T, k] of each token's experts, to [T, H]; raises as lora_experts."""
        adapters = self.adapters()
        if all(one.enabled and one.merged for one in adapters) or not any(
            one.enabled or one.merged for one in adapters
        ):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        weights = frozen_of(self)
        loras = {}
        for one in adapters:
            if one.merged and not one.enabled:
                field = "gate_up" if one.parameter == GATE_UP else "down"
                weights = weights._replace(**{field: one.base_weight})
            elif one.enabled and not one.merged:
                loras[one.parameter] = one.adapter
        return lora_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            weights.gate_up,
            weights.down,
            loras.get(GATE_UP),
            loras.get(DOWN),
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            form=adapters[0].form,
        )


class ExpertsLoRA(ParameterLoRA):
    """A trainable low-rank update of one parameter of E experts: ``W_e + scaling * B_e A_e``, scaling as in
    :class:`lora_fast.LoRALinear`. Their products are made one after the other, and no weight is written out.

    Args:
        module: one of transformers' modules of experts, of a known form.
        parameter: "gate_up_proj" or "down_proj".
        r: rank of each expert's update, >= 1.

    Attributes:
        lora_A [E r, in] (an expert's rows side by side), lora_B [out, r E] (the experts fastest): PEFT's layout.
        form: how the experts lie in memory, and their gate.

    The rest is :class:`ParameterLoRA`'s.
    """

    WAY = AdaptedExperts
    form: ExpertsForm

    @staticmethod
    def why_not(module: nn.Module, parameter: str) -> str | None:
        return why_no_experts(module, parameter)

    def _measure(self) -> None:
        form = form_of(self.owner)
        assert isinstance(form, ExpertsForm)
        self.form = form
        self.experts, n, k = self.weight.shape
        self.out_features, self.in_features = (k, n) if form.transposed else (n, k)

    def attach(self) -> None:
        """As :class:`ParameterLoRA`'s; all that the experts hold freezes."""
        super().attach()
        for p in self.owner._parameters.values():
            if p is not None:
                p.requires_grad_(False)

    def merged_weight(self) -> torch.Tensor:
        return merged_weight(self.weight.detach(), self.adapter, self.form.transposed)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


def adapter_of(module: nn.Module) -> type[ParameterLoRA]:
    """The class of adapters of the module's parameters."""
    return ExpertsLoRA if is_experts(module) else ParameterLoRA


def why_not_adapted(module: nn.Module, parameter: str) -> str | None:
    """Why this parameter of the module can have no adapter, in words; None where it can."""
    held = module._parameters.get(parameter)
    if held is not None and held.dtype.itemsize < 2 and held.dim() > 2:
        return f"it is quantised ({held.dtype}); expected experts in 16 or 32 bits"
    if is_experts(module) or (held is not None and held.dim() == 3):
        return why_no_experts(module, parameter)
    return why_no_matrix(module, parameter)


def why_no_experts(module: nn.Module, parameter: str) -> str | None:
    """Why an :class:`ExpertsLoRA` cannot adapt this parameter of the module, in words; None where it can."""
    form = form_of(module)
    if isinstance(form, str):
        return form
    if parameter not in (GATE_UP, DOWN):
        return f"{parameter} is none of {GATE_UP} and {DOWN}"
    if "forward" in vars(module):
        return "the module's forward was replaced"
    why = why_not_now(module, frozen_of(module))
    return None if why is None or why.endswith("requires grad") else why
