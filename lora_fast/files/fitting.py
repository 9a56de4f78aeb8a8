"""An adapter that was read, with all that its files say, into a model: converted for it, or converted already."""

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fast.files.format import CONFIG, TENSORS, Settings
from lora_fast.files.parameters import layer_of, parameter_of, targeted
from lora_fast.models.adapt import add_lora, remove_lora
from lora_fast.models.adapters import adapter_tensors, lora_layers, names_in
from lora_fast.models.config import LoRAConfig
from lora_fast.models.state import load_into, places_to_load
from lora_fast.models.targets import some
from lora_fast.models.ties import cut, places, refuse_shared, ties_to_cut, under_first_names


class Adapter(NamedTuple):
    """What an adapter's two files hold, checked."""

    settings: Settings
    ranks: dict[str, int]  # by layer, as
    alphas: dict[str, float]
    state: dict[str, torch.Tensor]  # by keys of lora_state_dict


def fit_adapter(model: nn.Module, adapter: Adapter, with_data: bool = False, name: str | None = None) -> None:
    """Put what :func:`read_adapter` gave into the same model, which is converted first if it has no LoRA layers, or no
    adapter of this name. Into one on the meta device go the shapes alone, or it is refused (``with_data``).

    Raises:
        ValueError: as :func:`load_adapter`, about the fit. The model is then as it was.
    """
    settings, ranks, alphas, state = adapter
    refuse_shared(model, ranks)
    full = [key for key in state if key.rpartition(".")[0] not in ranks]
    saved = places(model, settings.modules_to_save, full)
    if settings.ensure_weight_tying:  # PEFT ties the copies again; modules_to_save names one of them
        saved = places(model, [*saved, *(key.removesuffix(".weight") for key in full)])
    ties = ties_to_cut(model, saved, state)

    def load() -> None:
        own = places_to_load(model, name) if with_data else adapter_tensors(model, name)
        load_into(model, own, under_first_names(model, state, name), name)

    there = names_in(model)
    if there and (name is None or name in there):
        layers = lora_layers(model, complete=False, name=name)
        _check_converted(layers, ranks, settings)
        if ties:
            raise ValueError(
                f"{TENSORS}: {ties[0]} in the model, but not in the adapter, which holds its values "
                "alone; load it into a model without LoRA layers, where that unties it"
            )
        load()
        for place, layer in layers.items():
            layer.lora_alpha, layer.use_rslora = alphas[place], settings.use_rslora
        return
    parameters = targeted(model, settings.target_parameters)
    experts = {layer_of(parameter) for parameter in parameters}
    others = [place for place in ranks if place in experts or f"{place}.lora_embedding_A" in state]
    if name is not None and others:
        raise ValueError(
            f"{TENSORS}: has adapters of embeddings or parameters ({some(others)}), expected of nn.Linear layers alone "
            "with a name; load it without one, into a model without LoRA layers"
        )
    linears = [place for place in ranks if place not in experts]
    # A name may be the last part of another.
    longest_first = sorted(((at, parameter_of(at) if at in experts else at) for at in ranks), key=_length)
    config = LoRAConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias=settings.bias,  # type: ignore[arg-type]
        target_modules="|".join(map(re.escape, linears)) or None,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        rank_pattern={re.escape(written): ranks[place] for place, written in longest_first},
        alpha_pattern={re.escape(written): alphas[place] for place, written in longest_first},
    )
    replaced = [entry for tie in ties for entry in cut(model, tie.place)]
    try:
        add_lora(model, config, name=name)
        try:
            load()
        except BaseException:
            remove_lora(model, name)
            raise
    except BaseException:
        for entries, key, old in reversed(replaced):
            entries[key] = old
        raise
    if ties:
        warnings.warn(
            f"load_adapter: {some(list(map(str, ties)))}, but no longer: the adapter holds its values alone. "
            "Where a reader of the model's files ties by config.tie_word_embeddings, set that to False.",
            stacklevel=3,
        )


def _length(names: tuple[str, str]) -> int:
    return -len(names[1])


def _check_converted(layers: dict[str, Any], ranks: dict[str, int], settings: Settings) -> None:
    if layers.keys() != ranks.keys():
        apart = sorted(layers.keys() ^ ranks.keys())
        raise ValueError(f"{TENSORS}: {some(apart)}: either the adapter or the model's LoRA layers lack them")
    for name, layer in layers.items():
        if layer.use_dora != settings.use_dora:
            kinds = ("DoRA", "LoRA") if settings.use_dora else ("LoRA", "DoRA")
            raise ValueError(f"{CONFIG}: is a {kinds[0]} adapter, but {name} is a {kinds[1]} layer")
        if layer.r != ranks[name]:
            raise ValueError(f"{CONFIG}: the adapter of {name} has r = {ranks[name]}, but the model's has {layer.r}")
