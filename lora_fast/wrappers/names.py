"""A model's modules under the names that they have without other tools' wrappers, inside the model or around it.

Compiled, checkpointed or parallelised, a model is the same one to everything that reads its adapter: no name in a file
or a state dict may hold a wrapper's ``_orig_mod`` or ``module``.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# {a class, or the base of one: the name under which it holds the module that it stands for}. By their names, since
# some of them are slow to import and others belong to packages that are not there.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "ActivationWrapper": "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper and offload_wrapper
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "ModelEmaV2": "module",  # timm
    "ModelEmaV3": "module",
    "_FabricModule": "_forward_module",  # Lightning Fabric
    "QuantWrapper": "module",  # torch.ao.quantization
}
# What only a wrapper calls a module: other than "module", these can be told in a name by themselves.
_TELLING = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper stands for; None of a module that is no wrapper."""
    return module._modules.get(_held_as(type(module)))


def unwrapped(model: Any) -> Any:
    """The model inside all wrappers around it."""
    while isinstance(model, nn.Module) and (inner := inside(model)) is not None:
        model = inner
    return model


def prefix(model: nn.Module) -> str:
    """What the wrappers around a model put before the names of its modules."""
    inner = inside(model)
    return "" if inner is None else f"{_held_as(type(model))}.{prefix(inner)}"


def plain_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """``named_modules()`` as without wrappers: these are left out, and their parts of the names."""
    found = list(model.named_modules(remove_duplicate=remove_duplicate))
    if not any(map(_held_as, {type(module) for _, module in found})):
        return found
    return list(_walk(model, "", set() if remove_duplicate else None))


def _walk(module: nn.Module, name: str, seen: set[nn.Module] | None) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield name, module
    for part, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{part}" if name else part, seen)


def plain_name(name: str) -> str:
    """A name without those parts that only wrappers put in: of a file or state dict that was made from inside them."""
    return _TELLING.sub("", name)


def is_compiled(module: nn.Module) -> bool:
    """Whether this is torch.compile's wrapper, which goes on calling the very module that it was given, whatever is put
    in that one's place."""
    return _held_as(type(module)) == "_orig_mod"


def compiled_alone(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """Names of the modules of these kinds that torch.compile was given by themselves."""
    return [
        plain_name(f"{name}.").removesuffix(".") or "itself"
        for name, module in model.named_modules()
        if is_compiled(module) and isinstance(unwrapped(module), kinds)
    ]


def _held_as(kind: type) -> str:
    return next((_WRAPPERS[base.__name__] for base in kind.__mro__ if base.__name__ in _WRAPPERS), "")
