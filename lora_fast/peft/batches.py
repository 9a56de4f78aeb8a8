"""``model(..., adapter_names=[...])``: a batch whose samples name an adapter each, in training and in inference.

PEFT hands the names to its layers by hooks, which are gone when a checkpoint recomputes: see batch/names.py.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fast.batch.form import Adapter
from lora_fast.batch.functional import dora_linear_batch, lora_linear_batch
from lora_fast.batch.names import BASE, LAST, Names, numbers_on
from lora_fast.peft.rules import examine, is_dora, rate, why_not_this_call

_names = Names()


@contextmanager
def naming(tuner: Any, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """``stock``, the tuner's ``_enable_peft_forward_hooks``, which also serves a model in training, whose checkpoints
    then remember the names; and whose hooks are gone after an error, too."""
    names = kwargs.get("adapter_names")
    if names is None:
        with _ended(stock(*args, **kwargs)):
            yield
        return
    with ExitStack() as stack:
        training, tuner.training = tuner.training, False  # which stock asks before it looks at the names
        try:
            stack.enter_context(_ended(stock(*args, **kwargs)))
        finally:
            tuner.training = training
        if training:
            _tell_frozen(tuner, names)
            held = list(names)
            stack.enter_context(_names.holding(held))
            stack.enter_context(_names.remembered(tuner.modules(), held, _given_to_others))
        yield


@contextmanager
def _ended(stock: AbstractContextManager[Any]) -> Iterator[None]:
    """``stock`` without a word on errors within, after which it would not remove its hooks."""
    stock.__enter__()
    try:
        yield
    finally:
        stock.__exit__(None, None, None)


def _tell_frozen(tuner: Any, names: Sequence[str]) -> None:
    """Name adapters that do not train where they occur first."""
    seen = vars(tuner).setdefault("names_seen", {BASE})
    for name in set(names) - seen if torch.is_grad_enabled() else ():
        seen.add(name)
        own = [p for key, p in tuner.named_parameters() if "lora_" in key and f".{name}." in f"{key}."]
        if own and not any(p.requires_grad for p in own):
            warnings.warn(f"adapter_names: {name!r} occurs, and none of its parameters requires grad", stacklevel=6)


@contextmanager
def _given_to_others(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Where a checkpoint recomputes others' layers have no hooks of PEFT's."""
    hooks = [one.register_forward_pre_hook(partial(_give, names), with_kwargs=True) for one in _others(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _others(module: nn.Module) -> list[nn.Module]:
    """Layers of PEFT's that take names, and are none of ours."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    kinds = LoraLayer, ModulesToSaveWrapper
    return [one for one in module.modules() if isinstance(one, kinds) and not hasattr(type(one), "named_call")]


def _give(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"adapter_names": names}


def names_of(layer: Any, kwargs: dict[str, Any]) -> Sequence[str] | None:
    """The names that a call of a layer has: those it is given, or in a checkpoint's second run those of its first.
    Raises RuntimeError as :meth:`Names.of`."""
    names: Sequence[str] | None = _names.of(layer, kwargs.get("adapter_names"))
    return names


def unnamed(layer: Any) -> bool:
    """Whether it is plain that a call that is given no names has none."""
    return _names.here.names is None and LAST not in layer.__dict__


def named_call(layer: Any, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor | str:
    """y of a layer whose samples x [samples, ..., K] have these adapters; or why that is stock PEFT's, in words.

    Raises:
        ValueError: another number of names than of samples, merged adapters, DoRA beside LoRA.
    """
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    wanted = set(names)
    there = [name for name in layer._modules["lora_A"]._modules if name in wanted]
    if not there:
        return layer.base_layer(x)
    if why := why_not_this_call(layer, x, (), {}):
        return why
    adapters, kinds = [], {name: is_dora(layer, name) for name in there}
    if len(set(kinds.values())) > 1:
        dora = ", ".join(name for name in there if kinds[name])
        raise ValueError(f"adapter_names: got DoRA ({dora}) beside LoRA, expected adapters of one kind in a batch")
    for name in there:
        parts = examine(layer, [name])
        if isinstance(parts, str):
            return parts
        [(_, a, b, dropout)] = parts
        magnitude = layer.lora_magnitude_vector[name].weight if kinds[name] else None
        adapters.append(Adapter(a, b, layer.scaling.of(name, x.device), rate(dropout), magnitude))
    place = {name: i for i, name in enumerate(there)}
    which = numbers_on(tuple(place.get(name, -1) for name in names), x.device)
    weight, bias = layer.frozen()
    rows = x.to(weight.dtype) if layer.casts_back else x
    if kinds[there[0]]:
        y = dora_linear_batch(rows, weight, adapters, which, bias, round_norm=True, save=layer.save)
    else:
        y = lora_linear_batch(rows, weight, adapters, which, bias)
    return y.to(x.dtype) if layer.casts_back else y
