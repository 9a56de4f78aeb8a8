"""``model(..., adapter_names=[...])``: a batch whose samples name an adapter each, in training and in inference.

PEFT hands the names to its layers by hooks, which are gone when a checkpoint recomputes. Checkpoints that transformers'
models make are therefore given functions that remember the names; in those that a model makes by itself a layer takes
the names of its last call.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from lora_fast.batch.form import Adapter
from lora_fast.batch.functional import dora_linear_batch, lora_linear_batch
from lora_fast.peft.rules import examine, is_dora, rate, why_not_this_call

BASE = "__base__"  # PEFT's name for samples without an adapter
LAST = "_last_names"  # of a layer: the names of its last call in training, and whether those before it were others
CHECKPOINT = "_gradient_checkpointing_func"  # of a module of transformers'
_remembered: ContextVar[Sequence[str] | None] = ContextVar("adapter_names", default=None)


@contextmanager
def naming(tuner: Any, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """``stock``, the tuner's ``_enable_peft_forward_hooks``, which also serves a model in training, whose checkpoints
    then remember the names."""
    names = kwargs.get("adapter_names")
    if names is None:
        with stock(*args, **kwargs):
            yield
        return
    with ExitStack() as stack:
        training, tuner.training = tuner.training, False  # which stock asks before it looks at the names
        try:
            stack.enter_context(stock(*args, **kwargs))
        finally:
            tuner.training = training
        if training:
            _tell_frozen(tuner, names)
            stack.enter_context(_remembering(tuner, list(names)))
        yield


def _tell_frozen(tuner: Any, names: Sequence[str]) -> None:
    """Name adapters that do not train where they occur first."""
    seen = vars(tuner).setdefault("names_seen", {BASE})
    for name in set(names) - seen if torch.is_grad_enabled() else ():
        seen.add(name)
        own = [p for key, p in tuner.named_parameters() if "lora_" in key and f".{name}." in f"{key}."]
        if own and not any(p.requires_grad for p in own):
            warnings.warn(f"adapter_names: {name!r} occurs, and none of its parameters requires grad", stacklevel=6)


@contextmanager
def _remembering(tuner: nn.Module, names: list[str]) -> Iterator[None]:
    """Checkpoints that are made meanwhile run again with these names."""
    before = [(module, vars(module)[CHECKPOINT]) for module in tuner.modules() if CHECKPOINT in vars(module)]
    for module, checkpoint in before:
        setattr(module, CHECKPOINT, partial(_checkpointed, checkpoint, names, module))
    try:
        yield
    finally:
        for module, checkpoint in before:
            setattr(module, CHECKPOINT, checkpoint)


def _checkpointed(
    checkpoint: Callable[..., Any],
    names: list[str],
    module: nn.Module,
    function: Callable[..., Any],
    *args: Any,
    **kw: Any,
) -> Any:
    return checkpoint(partial(_with_names, names, module, function), *args, **kw)


def _with_names(names: list[str], module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token, hooks = _remembered.set(names), []
    if _recomputes():  # others' layers have no hooks of PEFT's then
        hooks = [one.register_forward_pre_hook(partial(_give, names), with_kwargs=True) for one in _others(module)]
    try:
        return function(*args, **kwargs)
    finally:
        _remembered.reset(token)
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


def _recomputes() -> bool:
    """Whether a backward is going on in this thread."""
    return torch._C._current_graph_task_id() != -1


def names_of(layer: Any, kwargs: dict[str, Any]) -> Sequence[str] | None:
    """The names that a call of a layer has: those it is given, or in a checkpoint's second run those of its first.

    Raises:
        RuntimeError: in such a run, if it is not known which of several calls it repeats.
    """
    names = kwargs.get("adapter_names")
    if torch.compiler.is_compiling():
        return names
    if names is None:
        names = _remembered.get()
        if names is None and _recomputes() and LAST in vars(layer):
            names, others = vars(layer)[LAST]
            if others:
                raise RuntimeError(
                    "adapter_names: a checkpoint recomputes, and the model was called with other names, too, since the "
                    "last backward: call backward after each forward"
                )
            vars(layer)[LAST] = names, None
            return names
    if layer.training and not _recomputes():
        last = vars(layer).get(LAST)
        if names is not None:
            waits = last is not None and last[1] is not None
            vars(layer)[LAST] = names, waits and (last[1] or list(last[0]) != list(names))
        elif last is not None:
            del vars(layer)[LAST]
    return names


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
    which = _which(tuple(place.get(name, -1) for name in names), x.device)
    weight, bias = layer.frozen()
    if kinds[there[0]]:
        return dora_linear_batch(x, weight, adapters, which, bias, round_norm=True)
    return lora_linear_batch(x, weight, adapters, which, bias)


def _which(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    return _known(numbers, device)


@lru_cache(maxsize=4096)
def _known(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On the device, where all layers find it; the host does not wait for the copy."""
    with torch.inference_mode(False):
        made = torch.tensor(numbers)
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
