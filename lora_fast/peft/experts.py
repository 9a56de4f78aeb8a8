"""PEFT's LoRA on the parameters of experts, with a fused forward: what ``patch_peft`` makes of instances of theirs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.modules import module as torch_module

from lora_fast import dispatch
from lora_fast.blocks.gated import hooked
from lora_fast.experts.form import Adapter, ExpertsForm
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.known import DOWN, GATE_UP, Frozen, form_of, frozen_of, is_experts, why_not_now
from lora_fast.kept import PLAIN
from lora_fast.peft.rules import HOOKS_ON_ALL, active, kind_of, parameter
from lora_fast.peft.scalings import is_number
from lora_fast.wrappers import zero3


class FastExperts(ParamWrapper):
    """PEFT's outermost ``ParamWrapper`` around a module of experts, whose forward computes the experts with their
    adapters instead of writing out the adapted weights of all of them.

    PEFT wraps the module once for each parameter that has an adapter; the wrappers inside stay stock, and this one
    reads their adapters in each call. Where anything is out of the ordinary (:meth:`examine`) the call is stock PEFT's,
    with one warning for each reason.
    """

    keeps_adapter = True  # see lora_fast.layers.replacing
    base_layer: Any
    _form: ExpertsForm
    _name: str  # of the module, its last part

    @classmethod
    def adopt(cls, wrapper: Any, name: str) -> None:
        """Make ``wrapper``, of which :func:`why_never_fused` finds nothing, one of these."""
        form = form_of(wrapper.get_base_layer())
        assert isinstance(form, ExpertsForm)
        wrapper.__class__ = cls
        wrapper._form, wrapper._name = form, name.rpartition(".")[2]

    def release(self) -> None:
        """Make the wrapper stock again."""
        del self._form, self._name
        self.__class__ = ParamWrapper  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [T, H], the ids [T, k] and weights [T, k] of its experts, to [T, H], as stock PEFT's; raises as it does, or
        as :func:`lora_fast.experts.functional.lora_experts`."""
        parts: Parts | str | None = self.examine()
        if isinstance(parts, Parts):
            why = _why_not_call(args, kwargs) or parts.frozen.why_not_input(x)
            if why is None:
                frozen, gate_up_lora, down_lora = parts
                index, weights = args
                return lora_experts(
                    x,
                    index,
                    weights,
                    frozen.gate_up,
                    frozen.down,
                    gate_up_lora,
                    down_lora,
                    gate_up_bias=frozen.gate_up_bias,
                    down_bias=frozen.down_bias,
                    form=self._form,
                )
            parts = why
        if parts is not None:
            names = " and ".join(f"{self._name}.{wrapper.parameter_name}" for wrapper in chain_of(self))
            dispatch.tell(f"leaves {names} to stock PEFT", parts)
        return super().forward(x, *args, **kwargs)

    def examine(self, gathered: bool = False) -> "str | Parts | None":
        """Why the experts, in their present state, run stock PEFT's forward, in words; or, if they need not, what to
        compute; None where no adapter is active. The host waits for this in every call.

        ``gathered``: FSDP will have gathered the parameters when forward runs.
        """
        found: dict[str, Adapter] = {}
        wrappers = chain_of(self)
        for wrapper in wrappers:
            adapter = _adapter_of(wrapper, gathered)
            if isinstance(adapter, str):
                return adapter
            if adapter is not None:
                found[wrapper.parameter_name] = adapter
        if not found:
            return None
        base: Any = wrappers[-1]._modules["base_layer"]  # nn.Module's own attribute look-up takes its time
        if any(map(hooked, wrappers[1:])) or hooked(base):
            return zero3.LEFT if zero3.splits(base) else "the experts have hooks or a replaced forward"
        frozen = frozen_of(base)
        if zero3.is_split(frozen.gate_up):
            return zero3.LEFT
        return why_not_now(base, frozen, gathered) or Parts(frozen, found.get(GATE_UP), found.get(DOWN))


FastExperts.__name__ = ParamWrapper.__name__  # which PEFT compares; a pickle finds the class by __qualname__


class Parts(NamedTuple):
    """A module of experts with its active adapters."""

    frozen: Frozen
    gate_up: Adapter | None
    down: Adapter | None


def chain_of(wrapper: Any) -> list[Any]:
    """The wrapper and those inside it, one for each parameter."""
    found = [wrapper]
    while isinstance(inner := found[-1]._modules["base_layer"], ParamWrapper):
        found.append(inner)
    return found


def outermost(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """{name: wrapper} of the wrappers among PEFT's layers that are in no other one."""
    wrappers = {name: layer for name, layer in layers.items() if isinstance(layer, ParamWrapper)}
    inside = {id(wrapper._modules["base_layer"]) for wrapper in wrappers.values()}
    return {name: wrapper for name, wrapper in wrappers.items() if id(wrapper) not in inside}


def why_never_fused(wrapper: Any) -> str | None:
    """Why an outermost wrapper stays stock for good, in words; None where a :class:`FastExperts` can stand in for it.

    Only facts that do not change count here; the rest is :meth:`FastExperts.examine`'s.
    """
    if type(wrapper) is not ParamWrapper:
        return f"PEFT's {kind_of(wrapper)}, not its ParamWrapper itself"
    wrappers = chain_of(wrapper)
    base = wrappers[-1].base_layer
    form = form_of(base)
    if wrappers[-1].num_experts == 1 and not is_experts(base):
        return f"target_parameters: a matrix of a {kind_of(base)}, small beside experts: PEFT writes it out, adapted"
    if isinstance(form, str):
        return f"target_parameters: {form}"
    for one in wrappers:
        if type(one) is not ParamWrapper:
            return f"PEFT's {kind_of(one)}, not its ParamWrapper itself"
        if one.parameter_name not in (GATE_UP, DOWN):
            return f"an adapter of {one.parameter_name}: only those of {GATE_UP} and {DOWN} are fused"
        if one.num_experts < 2:
            return "a single expert"
        if getattr(one, "_did_swap_in_out_features", False) == form.transposed:
            return "this PEFT has lora_A on the output's side"
    return None


def _why_not_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if torch_module._has_any_global_hook():
        return HOOKS_ON_ALL
    if kwargs.get("adapter_names") is not None:
        return "several adapters in one batch (adapter_names)"
    if kwargs or len(args) != 2:
        names = ", ".join(kwargs) or "none by name"
        return f"forward was given {1 + len(args)} arguments and {names}, expected three"
    return None


def _adapter_of(wrapper: Any, gathered: bool) -> str | Adapter | None:
    """The active adapter of one parameter; None where it has none, or is merged, or its adapters are disabled."""
    if wrapper.disable_adapters:
        return "merged, to be unmerged" if wrapper.merged else None
    if wrapper.merged:
        return None
    names = active(wrapper)
    if len(names) != 1:
        return "several active adapters" if names else None
    modules, name = wrapper._modules, names[0]
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        kind = kind_of(up if type(down) is nn.Linear else down)
        return f"lora_A or lora_B is a {kind}, not an nn.Linear itself"
    if hooked(down) or hooked(up):
        return "lora_A or lora_B has hooks or a replaced forward"
    a, b = parameter(down, "weight"), parameter(up, "weight")
    if not gathered and (type(a) not in PLAIN or type(b) not in PLAIN):
        return f"an adapter's weight is a {type(b if type(a) in PLAIN else a).__name__}"
    if not is_number(scaling := wrapper.scaling[name]):
        return f"the scaling is {scaling!r}, not a finite number"
    return Adapter(a, b, float(scaling))
