"""LoRA on the weights of experts, each with a low-rank update of its own."""

from typing import Any

import torch
from torch import nn

from lora_fast.bases import scaled
from lora_fast.bases.fp8 import E4M3
from lora_fast.bases.stack import STACKED, PackedStack, check_stackable
from lora_fast.experts.form import ExpertsForm
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.known import DOWN, GATE_UP, form_of, frozen_of, holds_fp8, is_experts, why_not_now
from lora_fast.experts.reference import merged_weight
from lora_fast.layers.packed_state import STACKED_NAMES, Stack, collect, pack_given, part_of, spread
from lora_fast.layers.parameters import AdaptedModule, ParameterLoRA, adapted, why_no_matrix


class AdaptedExperts(AdaptedModule):
    """A module of experts with one :class:`ExpertsLoRA` or two, or whose weights are packed.

    A state dict holds of packed weights the plain tensors that checkpoints have for them, and takes these, in whatever
    layout the module acts: ``gate_up_proj_blocks`` [E, N, K / 32, 16] and ``gate_up_proj_scales`` of MXFP4 (gpt-oss'),
    ``gate_up_proj`` and ``gate_up_proj_scale_inv`` [E, N / 128, K / 128] or ``gate_up_proj_scale`` [E, N, 1] of e4m3
    (transformers' FP8Experts), and of NF4 bitsandbytes' of the matrix [E N, K].
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], the ids [T, k] and the weights [T, k] of each token's experts, to [T, H]; raises as lora_experts."""
        adapters, weights = self.adapters(), frozen_of(self)
        plain = all(one.enabled and one.merged for one in adapters) or not any(
            one.enabled or one.merged for one in adapters
        )
        if plain and not weights.packed and not holds_fp8(self):  # which has no products in 16 bits
            return super().forward(hidden_states, top_k_index, top_k_weights)
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
            form=adapters[0].form if adapters else _form_of(self),
        )

    def is_adapted(self) -> bool:
        return super().is_adapted() or frozen_of(self).packed or holds_fp8(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (GATE_UP, DOWN):
            spread(destination, prefix + name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key: t for key, t in state_dict.items() if key.startswith(prefix)}
        assign = args[0].get("assign_to_params_buffers", False)
        try:
            for name in (GATE_UP, DOWN):
                collect_stack(own, prefix + name, self._parameters[name], _form_of(self).transposed, assign)
        except (TypeError, ValueError) as error:
            args[-1].append(str(error))
            return
        super()._load_from_state_dict(own, prefix, *args)


for _name in STACKED_NAMES:  # by which torch's distributed checkpoints ask for parts
    for _key in (GATE_UP, DOWN):
        setattr(AdaptedExperts, _key + _name, part_of(_key, _name))


def _form_of(module: nn.Module) -> ExpertsForm:
    form = form_of(module)
    assert isinstance(form, ExpertsForm)
    return form


def collect_stack(state_dict: dict[str, Any], key: str, own: Any, turned: bool, assign: bool) -> None:
    """:func:`collect` for experts [E, N, K], ``turned`` [E, K, N]; a plain weight is packed as they are."""
    experts, n, k = own.shape
    n, k = (k, n) if turned else (n, k)
    collect(state_dict, key, own, (experts * n, k), assign, Stack(experts, turned))
    if assign:
        pack_given(state_dict, key, own)


def pack(module: nn.Module, parameter: str, base_dtype: str) -> None:
    """Put a :class:`lora_fast.bases.PackedStack` in the place of a weight of experts, which is freed if nothing else
    holds it; raises as :func:`check_packable`. One that is kept so stays."""
    weight, turned = module._parameters[parameter], _form_of(module).transposed
    assert weight is not None
    check_packable(weight, base_dtype, turned)
    if not isinstance(weight, PackedStack):
        stack = PackedStack.pack(weight, STACKED[base_dtype], turned)
        module._parameters[parameter] = nn.Parameter(stack, requires_grad=False)
    freeze(module)
    if not isinstance(module, AdaptedModule):
        module.__class__ = adapted(type(module), AdaptedExperts)


def take_fp8(module: Any, dtype: torch.dtype) -> None:
    """Have transformers' FP8Experts, of which :func:`why_not_taken` finds nothing, act as ``dtype`` over the same
    bytes."""
    for key in (GATE_UP, DOWN):
        weight, scale = (module._parameters.pop(name) for name in (key, key + scaled.BY_BLOCKS))
        experts, n, k = weight.shape
        tensors = {"": weight.flatten(0, 1), scaled.BY_BLOCKS: scale.flatten(0, 1)}
        matrix = scaled.ScaledFp8Weight.from_tensors(tensors, (experts * n, k), dtype, key)
        module.register_parameter(key, nn.Parameter(PackedStack.of(matrix, experts, False), requires_grad=False))
    freeze(module)
    module.__class__ = adapted(type(module), AdaptedExperts)


def why_not_taken(module: Any) -> str | None:
    """Why :func:`take_fp8` does not take transformers' FP8Experts, in words; None where it does."""
    if isinstance(form := form_of(module), str):
        return form
    assert not form.transposed
    for key in (GATE_UP, DOWN):
        weight, scale = (module._parameters.get(name) for name in (key, key + scaled.BY_BLOCKS))
        if weight is None or scale is None or weight.dtype != E4M3 or weight.dim() != 3:
            return f"{key} is {None if weight is None else weight.dtype}, expected {E4M3} [E, N, K] beside its scales"
        experts, n, k = weight.shape
        expected = (experts, n // scaled.BLOCK, -(-k // scaled.BLOCK))
        if n % scaled.BLOCK or tuple(scale.shape) != expected or tuple(module.block_size or ()) != (scaled.BLOCK,) * 2:
            got = f"scales of shape {tuple(scale.shape)} for blocks of {module.block_size}"
            return f"{key} has {got}, expected one for each 128 x 128 of an expert: {scaled.REMEDY}"
        if getattr(module, f"{key}_activation_scale", None) is not None:
            return f"{key} quantises its input over a fixed scale (a static activation scheme): {scaled.REMEDY}"
    return None


def freeze(module: nn.Module) -> None:
    """All that the module itself holds."""
    for p in module._parameters.values():
        if p is not None:
            p.requires_grad_(False)


def check_packable(weight: torch.Tensor, base_dtype: str | None, turned: bool) -> None:
    """Raise where a weight of experts cannot be kept so: as :func:`lora_fast.bases.stack.check_stackable`."""
    if base_dtype not in list(STACKED):
        raise ValueError(f"base_dtype: got {base_dtype!r}, expected {' or '.join(map(repr, STACKED))}")
    check_stackable(weight, STACKED[base_dtype], turned)


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
        self.form = form = _form_of(self.owner)
        self.experts, n, k = self.weight.shape
        self.out_features, self.in_features = (k, n) if form.transposed else (n, k)

    def attach(self) -> None:
        """As :class:`ParameterLoRA`'s; all that the experts hold freezes."""
        super().attach()
        freeze(self.owner)

    def quantise_base(self, base_dtype: str, base_compute: None = None) -> None:
        """Keep the frozen weight in 8 or 4 bits (:class:`lora_fast.bases.PackedStack`), made expert by expert: "nf4",
        "mxfp4", or "float8_e4m3", which here has exact products, too.

        Raises:
            TypeError, ValueError: another base_dtype, any base_compute; a weight that cannot be kept so; a merged one.
        """
        if base_compute is not None:
            raise ValueError(f"base_compute: got {base_compute!r}, expected None: products over experts are of 16 bits")
        if self.merged:
            raise ValueError("quantise_base: the layer is merged; unmerge it first")
        pack(self.owner, self.parameter, base_dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        spread(destination, prefix + "unmerged_weight")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, base = {key: t for key, t in state_dict.items() if key.startswith(prefix)}, self.unmerged_weight
        if base is not None:
            try:
                collect_stack(own, prefix + "unmerged_weight", base, self.form.transposed, False)
            except ValueError as error:
                args[-1].append(str(error))
                return
        super()._load_from_state_dict(own, prefix, *args)

    def merged_weight(self) -> torch.Tensor:
        return merged_weight(self.weight.detach(), self.adapter, self.form.transposed)

    def extra_repr(self) -> str:
        base = self.base_weight
        kept = f", base_dtype={base.base_dtype!r}" if isinstance(base, PackedStack) else ""
        return f"experts={self.experts}, {super().extra_repr()}{kept}"


for _name in STACKED_NAMES:
    setattr(ExpertsLoRA, f"unmerged_weight{_name}", part_of("unmerged_weight", _name))


def adapter_of(module: nn.Module) -> type[ParameterLoRA]:
    """The class of adapters of the module's parameters."""
    return ExpertsLoRA if is_experts(module) else ParameterLoRA


def why_not_adapted(module: nn.Module, parameter: str) -> str | None:
    """Why this parameter of the module can have no adapter, in words; None where it can."""
    held = module._parameters.get(parameter)
    if held is not None and held.dtype.itemsize < 2 and held.dim() > 2:
        way = 'pack_experts(model, "float8_e4m3") first' if holds_fp8(module) else "experts in 16 or 32 bits"
        return f"it is quantised ({held.dtype}); expected {way}"
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
