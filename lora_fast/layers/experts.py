"""LoRA on the parameters of a module of experts: adapters as its children, and a class with another forward."""

import math
from typing import Any

import torch
from torch import nn

from lora_fast.experts.form import Adapter, ExpertsForm
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.known import DOWN, GATE_UP, form_of, frozen_of, why_not_now
from lora_fast.experts.reference import merged_weight
from lora_fast.layers.rules import check_hyperparameters, init_adapter
from lora_fast.wrappers.gather import is_sharded
from lora_fast.wrappers.placement import kind_of, offloading

CHILD = "lora_"  # and the parameter's name: what the module calls its adapter


class ExpertsLoRA(nn.Module):
    """A trainable low-rank update of one parameter of E experts: ``W_e + scaling * B_e A_e``, scaling as in
    :class:`lora_fast.LoRALinear`.

    Made beside the module of experts; from :meth:`attach` on it is its child, and what the module computes.

    Args:
        experts: one of transformers' modules of experts, of a known form.
        parameter: "gate_up_proj" or "down_proj".
        r: rank of each expert's update, >= 1.
        lora_alpha, use_rslora, init_lora_weights: as of :class:`lora_fast.LoRALinear`.

    Attributes:
        lora_A [E r, in] (an expert's rows side by side), lora_B [out, r E] (the experts fastest): trainable, PEFT's
            layout; float32 on a 16-bit base, else the base's dtype.
        merged, enabled: the adapter's state.

    Raises:
        TypeError, ValueError: experts that can have no adapter, an argument of the wrong type or outside its range.
    """

    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")
    keeps_adapter = True  # see lora_fast.layers.replacing
    unmerged_weight: torch.Tensor | None

    def __init__(
        self,
        experts: nn.Module,
        parameter: str,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        *,
        init_lora_weights: bool | str = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, 0.0, use_rslora, init_lora_weights)
        if why := why_not_adapted(experts, parameter):
            raise TypeError(f"experts: expected a parameter that can have an adapter, got one of which {why}")
        super().__init__()
        form = form_of(experts)
        assert isinstance(form, ExpertsForm)
        self.form, self.parameter = form, parameter
        self.r, self.lora_alpha, self.use_rslora, self.lora_dropout = r, lora_alpha, use_rslora, 0.0
        self.enabled = True
        self._owner = (experts,)  # in a tuple, where nn.Module does not take it for a child
        weight = self.weight
        self.experts, self.out_features, self.in_features = weight.shape
        if form.transposed:
            self.in_features, self.out_features = self.out_features, self.in_features
        dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)) for shape in self.adapter_shapes
        )
        self.register_buffer("unmerged_weight", None)
        self.reset_lora_parameters(init_lora_weights)
        self.train(experts.training)

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialise lora_A and lora_B anew, as PEFT does."""
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)
        if init_lora_weights == "gaussian":
            self.lora_A.mul_(self.experts)  # A ~ N(0, 1/r^2): the rank is r, not the number of rows

    def attach(self) -> None:
        """Become a child of the experts, which freeze, and what they compute."""
        experts = self.owner
        for p in experts._parameters.values():
            if p is not None:
                p.requires_grad_(False)
        if not isinstance(experts, AdaptedExperts):
            experts.__class__ = _adapted(type(experts))
        experts.add_module(CHILD + self.parameter, self)

    def release(self) -> None:
        """Leave the experts, which are as before: with the adapter in their weights if it is merged."""
        experts = self.owner
        del experts._modules[CHILD + self.parameter]
        if isinstance(experts, AdaptedExperts) and not any(experts.adapters()):
            experts.__class__ = type(experts).ADAPTED

    @property
    def owner(self) -> Any:
        """The module of experts."""
        return self._owner[0]

    @property
    def adapter_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.experts * self.r, self.in_features), (self.out_features, self.r * self.experts)

    @property
    def weight(self) -> torch.Tensor:
        """The experts' parameter as it is now, merged or not."""
        found: torch.Tensor = getattr(self.owner, self.parameter)
        return found

    @property
    def base_weight(self) -> torch.Tensor:
        """The frozen parameter without the adapter, whether merged or not."""
        return self.weight if self.unmerged_weight is None else self.unmerged_weight

    @property
    def bias(self) -> None:
        """None: what the experts have of biases stays theirs, and frozen."""

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @property
    def scaling(self) -> float:
        return float(self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r))

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.lora_A, self.lora_B, self.scaling)

    def enable(self) -> None:
        """Let the adapter act (the default)."""
        self.enabled = True

    def disable(self) -> None:
        """Let the experts compute without the adapter, merged or not, until :meth:`enable`."""
        self.enabled = False

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """Put ``W_e + scaling * B_e A_e``, summed in float32 and rounded once, in the parameter's place; nothing if
        merged already. The base is kept for :meth:`unmerge`: merged experts take twice the memory until
        ``remove_lora``.

        Raises:
            ValueError: with ``safe_merge``, a merged weight that is not finite; one that FSDP shards or accelerate
                offloads; an ``original``, which is for fp8 bases. The experts are then as they were.
        """
        if self.merged:
            return
        if original is not None:
            raise ValueError("original: got a tensor, expected None for experts")
        self.check_place()
        experts, weight = self.owner, self.weight
        with kind_of(weight):
            merged = merged_weight(weight.detach(), self.adapter, self.form.transposed)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError("safe_merge: the merged weight has NaN or infinite elements; the layer stays unmerged")
            self.register_buffer("unmerged_weight", weight.detach())
            experts._parameters[self.parameter] = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base back, bit for bit; nothing if not merged. Raises ValueError as :meth:`merge`."""
        if (base := self.unmerged_weight) is None:
            return
        self.check_place()
        with kind_of(base):
            self.owner._parameters[self.parameter] = nn.Parameter(base, requires_grad=False)
        self.register_buffer("unmerged_weight", None)

    def check_place(self) -> None:
        """Raise ValueError where the parameter cannot be merged into."""
        experts, weight = self.owner, self.weight
        managed = any(getattr(m, "_is_fsdp_managed_module", False) for m in (experts, self))
        if managed or is_sharded(weight) or offloading(experts) is not None or weight.is_meta:
            raise ValueError(
                f"{self.parameter}: is sharded, offloaded or without data, expected it whole and in memory; merge and "
                "unmerge before that"
            )

    def parts_of_adapter(self) -> tuple[str, ...]:
        """Names in a state dict of what a merge is made with."""
        return self.adapter_names

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, experts={self.experts}, r={self.r}"
        flags = {"use_rslora=True": self.use_rslora, "merged": self.merged, "disabled": not self.enabled}
        return ", ".join([text, f"lora_alpha={self.lora_alpha}", *(name for name, on in flags.items() if on)])


class AdaptedExperts(nn.Module):
    """A module of experts with one :class:`ExpertsLoRA` or two, which is what ``_adapted`` makes of its class."""

    ADAPTED: Any  # the class that it was, and is again without adapters

    def adapters(self) -> list[ExpertsLoRA]:
        return [child for child in self._modules.values() if isinstance(child, ExpertsLoRA)]

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self.ADAPTED,), vars(self).copy()  # the class itself is in no file


_classes: dict[type, type] = {}


def _adapted(kind: type) -> Any:
    """The class of experts of this kind that have adapters."""
    if kind not in _classes:
        own = {"__module__": kind.__module__, "ADAPTED": kind}
        _classes[kind] = type(f"LoRA{kind.__name__}", (AdaptedExperts, kind), own)
    return _classes[kind]


def _bare(kind: type) -> Any:
    adapted = _adapted(kind)
    return adapted.__new__(adapted)


def why_not_adapted(module: nn.Module, parameter: str) -> str | None:
    """Why no :class:`ExpertsLoRA` can be put on this parameter of the module, in words; None where it can."""
    form = form_of(module)
    if isinstance(form, str):
        return form
    if parameter not in (GATE_UP, DOWN):
        return f"{parameter} is none of {GATE_UP} and {DOWN}"
    if "forward" in vars(module):
        return "the module's forward was replaced"
    why = why_not_now(module, frozen_of(module))
    return None if why is None or why.endswith("requires grad") else why
