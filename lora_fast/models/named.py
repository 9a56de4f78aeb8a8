"""Several adapters in a model, under names: another one comes or goes, which is active, which each sample has."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from lora_fast.batch.names import BASE, BatchNames, Choice, may_checkpoint
from lora_fast.blocks.gated import hooked
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.embedding import LoRAEmbedding
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.named import CHILD, NamedLinear
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.layers.replacing import note_adapted
from lora_fast.models.adapters import (
    BEFORE,
    DEFAULT,
    SAVED,
    TRAINED,
    check_adapted,
    lora_layers,
    named_linears,
    names_in,
    standing,
)
from lora_fast.models.config import LoRAConfig
from lora_fast.models.targets import some
from lora_fast.wrappers.names import compiled_alone, plain_modules, unwrapped
from lora_fast.wrappers.placement import keeper


def use_adapters(model: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """Within ``with use_adapters(model, names):`` each sample of a batch has an adapter of its own: ``names`` has one
    for each, in the order of x's first dimension in every layer; "__base__" is none. All rows run in one step
    (:func:`lora_fast.lora_linear_batch`), and the gradients of each adapter are those of its samples alone.

    In a layer that an adapter was not meant for its samples have the base's output. The names hold in this thread, and
    for this model; they may be nested, and outlive the context where a checkpoint recomputes (docs/batch.md). What it
    returns may be kept and entered again, which takes the host less time than to look for a large model's layers, until
    an :func:`lora_fast.add_lora` or :func:`lora_fast.remove_lora` changes which layers have adapters.

    Raises:
        TypeError: not a module; names that are no list of strings.
        ValueError: no adapters with names, an unknown one, a merged one, DoRA beside LoRA. Within, a layer whose x has
            another number of samples. Entered again, layers that have changed since.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: got {names!r:.200}, expected a list of adapters' names, one for each sample")
    return _Using(model, names)


class _Using(AbstractContextManager[None]):
    """What holds within, and the layers in which it does."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.changes = model, Choice.changes
        found = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        self.layers = {place: module for place, module in found.items() if isinstance(module, NamedLinear)}
        if not self.layers:
            _named_or_raise(model)
        self.choices = _choices(self.layers)
        self.checkpointing = [module for module in found.values() if may_checkpoint(module)]
        self.names, self.open = BatchNames(tuple(names)), threading.local()
        self._check()

    def _check(self) -> None:
        if self.changes != (now := Choice.changes):
            if {m for m in self.model.modules() if isinstance(m, NamedLinear)} != set(self.layers.values()):
                raise ValueError(
                    "names: got those of a use_adapters from before adapters came to other layers of the model, or "
                    "went, expected use_adapters called after that"
                )
            self.changes = now
        there = dict.fromkeys(name for layer in self.layers.values() for name in layer.adapters)
        if unknown := self.names.occur - there.keys() - {BASE}:
            got = some(list(map(repr, sorted(unknown))))
            raise ValueError(f"names: got {got}, expected {_one_of([*there, BASE])}")
        _check_unmerged(self.layers, "names")
        for place, layer in self.layers.items():
            dora = {one.name: isinstance(one, DoRALinear) for one in layer.named_in(self.names.occur)}
            if len(set(dora.values())) > 1:
                own = some([name for name, is_dora in dora.items() if is_dora])
                raise ValueError(
                    f"names: got DoRA ({own}) beside LoRA in {place}, expected adapters of one kind in a batch"
                )
            self.names.which(tuple(dora), layer.weight.device)

    def __enter__(self) -> None:
        self._check()
        with ExitStack() as stack:
            for choice in self.choices:
                stack.enter_context(choice.holding(self.names))
                stack.enter_context(choice.remembered(self.checkpointing, self.names))
            vars(self.open).setdefault("stacks", []).append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.open.stacks.pop().__exit__(*error)


def set_adapter(model: nn.Module, name: str) -> None:
    """Let the adapter of this name be the active one, which runs where :func:`use_adapters` says nothing else. All
    train as before: nothing is frozen. A layer that it was not meant for gives its base's output.

    Raises:
        TypeError: not a module.
        ValueError: no adapters with names, no adapter of this name; a merged one.
    """
    layers = _named_or_raise(model)
    if name not in (there := names_in(model)):
        raise ValueError(f"name: got {name!r}, expected {_one_of(there)}")
    if any(choice.active != name for choice in _choices(layers)):
        _check_unmerged(layers, "name")
    for choice in _choices(layers):
        choice.active = name


@contextmanager
def activating(model: nn.Module, name: str) -> Iterator[None]:
    """:func:`set_adapter`, but after an error within the adapter is active that was."""
    before = {choice: choice.active for choice in _choices(named_linears(model))}
    set_adapter(model, name)
    try:
        yield
    except BaseException:
        for choice, active in before.items():
            choice.active = active
        raise


def _one_of(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _named_or_raise(model: nn.Module) -> dict[str, NamedLinear]:
    check_adapted(model)
    layers = named_linears(model)
    if not layers:
        raise ValueError("model: its adapter has no name, expected adapters that add_lora was given a name for")
    return layers


def _choices(layers: Mapping[str, NamedLinear]) -> list[Choice]:
    return list({id(layer.choice): layer.choice for layer in layers.values()}.values())


def _check_unmerged(layers: Mapping[str, Any], argument: str) -> None:
    if merged := [place for place, layer in layers.items() if layer.merged]:
        raise ValueError(f"{argument}: an adapter is merged ({some(merged)}), expected none; call unmerge_lora first")


def check_addition(model: nn.Module, config: LoRAConfig, name: Any) -> None:
    """Raise where no adapter of this name can come beside those that are there.

    Raises:
        TypeError: a name that is no string. ValueError: all others.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected a string")
    if not name or name == BASE or "." in name or "lora_" in name:  # by which readers know tensors
        raise ValueError(f"name: got {name!r}, expected one with neither a dot nor 'lora_' in it, not '' or {BASE!r}")
    layers = standing(model)
    if name in names_in(model):
        raise ValueError(f"name: {name!r} is there already; remove_lora it first, or give another name")
    for field, given in (("bias", config.bias != "none"), ("modules_to_save", config.modules_to_save)):
        if given:
            got = getattr(config, field)
            raise ValueError(f"{field}: got {got!r}, expected none with a name: adapters share all else of the model")
    if config.target_parameters:
        raise ValueError("target_parameters: got some, expected none with a name: only nn.Linear layers take several")
    if layers and (config.base_dtype is not None or config.base_compute is not None):
        raise ValueError("base_dtype, base_compute: expected None beside other adapters, of which the first decides")
    if any(isinstance(layer, (ParameterLoRA, LoRAEmbedding)) for layer in layers.values()):
        raise ValueError("model: has adapters of parameters or embeddings, beside which none can have a name")
    if trained := [place for place, module in plain_modules(model) if vars(module).get(TRAINED)]:
        raise ValueError(f"model: trains biases or modules_to_save ({some(trained)}), which adapters cannot share")
    _check_unmerged(layers, "model")
    if kept := [f"{place} (by {who})" for place, layer in layers.items() if (who := keeper(layer))]:
        raise ValueError(f"model: has weights that a wrapper keeps: {some(kept)}; add all adapters before wrapping it")
    bare = {place: layer for place, layer in layers.items() if isinstance(layer, LoRALinear)}
    if isinstance(unwrapped(model), LoRALinear):
        raise ValueError("model: got a LoRALinear, which cannot be replaced in place; put it into a module first")
    if compiled := compiled_alone(model, LoRALinear):
        raise ValueError(f"model: torch.compile was given {some(compiled)} by itself; add all adapters before")
    if seen := [place for place, layer in bare.items() if hooked(layer)]:
        raise ValueError(f"model: {some(seen)}: hooks would be lost; register them after the last add_lora")


@contextmanager
def taken_out(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within, plain layers stand where layers have adapters, so that another one comes as the first did. Gives the
    layers by their names; they come back after an error, else :func:`under_name` brings them."""
    layers = standing(model)
    plain = {layer: layer.plain() for layer in layers.values()}
    for layer, linear in plain.items():
        if BEFORE in vars(layer):
            vars(linear)[BEFORE] = vars(layer)[BEFORE]
    swap(model, plain)
    try:
        yield layers
    except BaseException:
        swap(model, {linear: layer for layer, linear in plain.items()})
        raise


def under_name(model: nn.Module, name: str, layers: Mapping[str, Any]) -> None:
    """Give the LoRA layers that came while ``layers`` were taken out this name, in these and others."""
    there = [layer for layer in layers.values() if isinstance(layer, NamedLinear)]
    choice = there[0].choice if there else Choice(DEFAULT if layers else name)
    homes = {place: layer if layer in there else _home(layer, choice, DEFAULT) for place, layer in layers.items()}
    new: dict[nn.Module, nn.Module] = {}
    for place, module in plain_modules(model):
        home = homes.get(place)
        if isinstance(module, LoRALinear):
            if home is None:
                home = _home(module, choice, name)
            else:
                _take_notes(module)
                home.adopt(module, name)
        if home is not None:
            new[module] = home
    swap(model, new)
    note_adapted(model)


def _home(layer: LoRALinear, choice: Choice, name: str) -> NamedLinear:
    home = NamedLinear(layer, choice)
    vars(home).update(_take_notes(layer))
    home.adopt(layer, name)
    return home


def _take_notes(layer: nn.Module) -> dict[str, Any]:
    """What add_lora noted on the layer, which has it no longer."""
    return {note: vars(layer).pop(note) for note in (BEFORE, TRAINED, SAVED) if note in vars(layer)}


def remove_named(model: nn.Module, name: str) -> None:
    """Take the adapter of this name out of a model that has others. A layer that has no other is plain again.

    Raises:
        ValueError: no such adapter, a merged one, or the layers are in the keeping of FSDP or accelerate.
    """
    layers, found = _named_or_raise(model), lora_layers(model, complete=False, name=name)
    _check_unmerged(layers, "name")
    if kept := [f"{place} (by {who})" for place, one in found.items() if (who := keeper(layers[place]))]:
        raise ValueError(f"model: has weights that a wrapper keeps: {some(kept)}; remove_lora before wrapping it")
    plain = {}
    for place in found:
        home = layers[place]
        del home._modules[CHILD + name]
        if not home.adapters:
            plain[home] = home.plain()
            vars(plain[home]).update(_take_notes(home))
    swap(model, plain)
    note_adapted(model)
    for choice in _choices(layers):
        if choice.active == name:
            choice.active = names_in(model)[0]


def swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Put modules in the places of others, whose hooks do not come along."""
    Choice.changes += 1
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
