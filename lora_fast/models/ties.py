"""Tensors that a model holds under several names, as embeddings tied to an output head, and modules_to_save.

PEFT trains a copy of a module that is to be saved, so that the other holders of its tensors keep the old ones, and
reads every tensor of the module from the adapter's file. In add_lora's models they train together; so a file must hold
what trained under every name, and a file that holds a value for some names only means a model without the tie.
"""

import copy
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fast.models.adapters import LAYERS, SAVED, adapter_tensors
from lora_fast.models.targets import some
from lora_fast.wrappers.gather import identities, one_by_one, stored, whole
from lora_fast.wrappers.names import plain_modules

Tensors = dict[str, torch.Tensor]


class Tie(NamedTuple):
    """A tensor of the module at ``place`` that something elsewhere holds too."""

    place: str
    name: str
    other: str

    def __str__(self) -> str:
        return f"{self.name} is tied to {self.other}"


class Undo(NamedTuple):
    """An entry of a module's __dict__ that was replaced."""

    entries: dict[str, Any]
    name: str
    old: Any


def all_tensors(model: nn.Module) -> Tensors:
    """What a state dict holds, each tensor under every name of its own."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in _modules(model)
        for name, tensor in _own(module)
    }


def places(model: nn.Module, entries: Collection[str], trained: Collection[str] = ()) -> list[str]:
    """Where PEFT would put its copies: names of modules, none inside another, that end in one of the entries; in the
    middle of a word only where that has tensors which ``trained`` names, as PEFT's files then have."""
    names = [name for name, _ in _modules(model)]
    ends = [name for name in names if name and any(name.endswith(entry) for entry in entries)]
    exact = [name for name in ends if any(f".{name}".endswith(f".{entry}") for entry in entries)]
    return _outermost([name for name in ends if name in exact or any(_within(each, [name]) for each in trained)])


def saved_places(model: nn.Module) -> list[str]:
    """Modules whose tensors, each under every name, are what trains in full, and those that PEFT takes for one of them
    because its name ends in theirs (``lm_head`` in ``head``): PEFT's modules_to_save for the model.

    Raises:
        ValueError: such a tensor belongs to the model itself too, or to a module with adapters inside: the format
            cannot say that.
    """
    modules = _modules(model)
    trained = _holders(model)
    owners = {name.rpartition(".")[0] for name in trained}
    found = _outermost([name for name, _ in modules if name in owners])
    for place in found:
        inside = list(dict(modules)[place].modules())
        if not place or any(isinstance(module, LAYERS) for module in inside):
            owner = next(owner for name, owner in trained.items() if _within(name, [place]))
            what = f"{place}, which has an adapter" if place else "the model itself"
            raise ValueError(
                f"modules_to_save: {owner} has a tensor that is tied to one of {what}: PEFT's format "
                "cannot hold that; torch.save(lora_state_dict(model), ...) does"
            )
    plain = [name for name, module in modules if not any(isinstance(m, LAYERS) for m in module.modules())]
    while more := [name for name in plain if name.endswith(tuple(found)) and not _within(name, found)]:
        found = _outermost([*found, *more])
    return found


def refuse_shared(model: nn.Module, layers: Collection[str]) -> None:
    """Refuse a file for layers that are in several places: PEFT gives an adapter to the first, add_lora to all.

    Raises:
        ValueError: there is one.
    """
    held = Counter(child for module in model.modules() for child in module._modules.values())
    if shared := [name for name, module in plain_modules(model) if name in layers and held[module] > 1]:
        raise ValueError(
            f"model: {some(shared)}: one layer in several places, of which PEFT adapts the first and "
            "add_lora all, so that no file means the same to both; give each place a layer of its own ("
            "their weights may be tied), or keep torch.save(lora_state_dict(model), ...)"
        )


def under_every_name(model: nn.Module, saved: list[str], state: Mapping[str, torch.Tensor]) -> Tensors:
    """``state`` of :func:`lora_fast.lora_state_dict`, and all tensors of the modules ``saved``; no two share memory."""
    first, keys = _first_names(model)
    more = {name: t for name, t in all_tensors(model).items() if name not in state and _within(name, saved)}
    values = stored(model, more)
    copied = {name: state[first[keys[name]]] if keys[name] in first else value for name, value in values.items()}
    return {**state, **{name: tensor.detach().clone() for name, tensor in copied.items()}}


def ties_to_cut(model: nn.Module, saved: list[str], state: Mapping[str, torch.Tensor]) -> list[Tie]:
    """The ties of the modules ``saved`` that a model in which ``state`` is right has not: to a tensor that the state
    has not or has with another value."""
    keys = identities(model, all_tensors(model))
    names: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        names.setdefault(key, []).append(name)
    return [
        Tie(place, name, other)
        for place in saved
        for name, key in keys.items()
        if _within(name, [place])
        for other in names[key]
        if not _within(other, [place]) and not (name in state and other in state and _same(state[name], state[other]))
    ]


def cut(model: nn.Module, place: str) -> list[Undo]:
    """Give the module at ``place`` copies of its own of what is held elsewhere too; what to put back to undo that."""
    modules = dict(_modules(model))
    inside = set(modules[place].modules())
    elsewhere = {m for name, m in modules.items() if not _within(name, [place])}
    if inside & elsewhere:
        parent, _, last = place.rpartition(".")
        children = modules[parent]._modules
        undo = [Undo(children, last, children[last])]
    else:
        held = {id(t) for m in elsewhere for _, t in _own(m)}
        tables: list[dict[str, Any]] = [table for m in inside for table in (m._parameters, m._buffers)]
        undo = [Undo(table, name, old) for table in tables for name, old in table.items() if id(old) in held]
    memo: dict[int, Any] = {}  # what is held twice in here stays one
    for entries, name, old in undo:
        entries[name] = copy.deepcopy(old, memo)
    return undo


def under_first_names(model: nn.Module, state: Mapping[str, torch.Tensor], adapter: str | None = None) -> Tensors:
    """The reverse of :func:`under_every_name`, for a converted model.

    Raises:
        ValueError: different values for what is one tensor in the model.
    """
    tensors = all_tensors(model)
    first, keys = _first_names(model, adapter)
    result: Tensors = {}
    for name, new in state.items():
        own = first.get(keys[name], name) if name in keys else name
        if not _same(new, result.setdefault(own, new)):
            raise ValueError(f"{name}: is tied to {own} in the model, but the adapter holds other values for it")
    frozen = {name: t for name in result if (t := tensors.get(name)) is not None and keys[name] not in first}
    frozen = stored(model, frozen)
    return {name: t for name, t in result.items() if name not in frozen or not _same(t, whole(frozen[name]))}


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(plain_modules(model, remove_duplicate=False))


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _first_names(model: nn.Module, adapter: str | None = None) -> tuple[dict[Hashable, str], dict[str, Hashable]]:
    """({identity of a tensor of the adapter: its name in lora_state_dict}, {name of any tensor: its identity})"""
    own = adapter_tensors(model, adapter)
    keys = identities(model, {**all_tensors(model), **own})
    return {keys[name]: name for name in own}, keys


def _holders(model: nn.Module) -> dict[str, str]:
    """{name of a tensor that trains in full, or that is tied to one: the module, of modules_to_save, that has it}"""
    tensors, full = all_tensors(model), {name for name, m in _modules(model) if SAVED in vars(m)}
    keys = identities(model, tensors)
    owners = {keys[name]: owner for name in tensors if (owner := name.rpartition(".")[0]) in full}
    found = {name: owners[key] for name, key in keys.items() if key in owners}
    return {**found, **_copies(model, tensors, found)}


def _copies(model: nn.Module, tensors: Tensors, trained: Mapping[str, str]) -> dict[str, str]:
    """The same of what only has the values of one that trains, where accelerate has offloaded one of them: on disk, and
    in memory if they came from a GPU, it keeps a copy for each name. Should such two not be tied, it does not matter
    that both are in the file. Nor are tensors, norms at their beginning, which are the same number all over."""
    if not any(t.is_meta for t in tensors.values()):
        return {}
    kinds: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name in trained:
        kinds.setdefault((tensors[name].shape, tensors[name].dtype), []).append(name)
    alike = {name: t for name, t in tensors.items() if name not in trained and (t.shape, t.dtype) in kinds}
    pairs = {name: [n for n in kinds[t.shape, t.dtype] if t.is_meta or tensors[n].is_meta] for name, t in alike.items()}
    values = stored(model, {n: tensors[n] for others in pairs.values() for n in others})
    found: dict[str, str] = {}
    for name, value in one_by_one(model, {name: tensors[name] for name, others in pairs.items() if others}):
        same = [other for other in pairs[name] if not value.is_meta and _same(values[other], value)]
        if same and not (value == value.flatten()[:1]).all():
            found[name] = trained[same[0]]
    return found


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name != other and _within(name, [other]) for other in names)]


def _within(name: str, places: Collection[str]) -> bool:
    return any(not place or name == place or name.startswith(f"{place}.") for place in places)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and not a.is_meta and torch.equal(a, b.to(a.device)))
