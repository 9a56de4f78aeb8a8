"""Ties of a base checkpoint on disk, read off its files and config.json: a merged file must not change one end alone.

Files hold a tied weight once, under one of its names. transformers' classes have defaults of their own for
tie_word_embeddings and leave it out of config.json where it is the default, so that an output head that the files have
not is tied, whatever the config leaves unsaid.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_fast.files.adapter import open_adapter
from lora_fast.files.checkpoint import Base
from lora_fast.files.format import PREFIX
from lora_fast.files.header import HEADS, VOCABULARY

CUT = "so that a merged checkpoint cannot change one of them alone"
WAY_OUT = (
    "in memory it can: load_adapter (or PEFT), then merge and save the whole model, "
    "remove_lora(merge_lora(model)).save_pretrained(OUT)"
)
_HAS_HEAD = re.compile(r"(LM|LMHead\w*|DoubleHeadsModel|MTModel|ForConditionalGeneration|ForPreTraining)$")


def twins(files: Base, adapter: Path) -> dict[str, str]:
    """{a tensor that trained in full and that the base has not: the one tied to it that the base has}, of the same
    values in the adapter, so that the tie can stay. Biases that ``bias="all"`` trained are among them.

    Raises:
        ValueError: one without the other; an adapter for a head that the base has not.
        FileNotFoundError, ValueError, ImportError: as :func:`lora_fast.load_adapter`, about the files by themselves.
    """
    with open_adapter(adapter) as (settings, file):
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
        names = {key.removeprefix(PREFIX): key for key in shapes}
        for name in names:
            layer = name.removesuffix(".lora_B.weight")
            if layer == name or f"{layer}.weight" in files.tensors:
                continue
            shape = [*shapes[names[name]][:1], *shapes.get(names.get(f"{layer}.lora_A.weight", ""), [])[1:]]
            if other := _tied_head(files, layer, shape):
                raise ValueError(
                    f"{layer}: has an adapter, but the base's files have no weight of its own for it: it "
                    f"is tied to {other}, {CUT}; {WAY_OUT}"
                )
        entries = settings.modules_to_save
        full = {
            name: key
            for name, key in names.items()
            if ".lora_" not in name and (settings.ensure_weight_tying or any(f"{entry}." in name for entry in entries))
        }
        biases = {}  # that train where they are: of these the base may have one for several names, too
        if settings.bias == "all":
            biases = {name.replace(".base_layer.", "."): key for name, key in names.items() if _is_bias(name)}
        must = full.keys() if entries else set()
        full = biases | full
        found = {}
        for name in full.keys() - files.tensors.keys():
            value = file.get_tensor(full[name])
            alike = [other for other in full.keys() & files.tensors.keys() if shapes[full[other]] == list(value.shape)]
            same = [other for other in alike if torch.equal(value, file.get_tensor(full[other]))]
            if not same and name in must:
                raise ValueError(
                    f"{name}: trained in full (modules_to_save), but the base's files have no such "
                    f"tensor: it is new, or tied to another one, {CUT}; {WAY_OUT}"
                )
            found.update({name: same[0]} if same else {})
    return found


def check_tied(files: Base, config: Mapping[str, Any], changed: list[str], kept: Mapping[str, str]) -> None:
    """Refuse to change a tensor that serves twice: the model would take the change in both places. ``changed`` are
    names of tensors; ``kept``, of :func:`twins`, are ties both of whose ends change.

    Raises:
        ValueError: one of them is tied.
    """
    parts = list(_parts(config))
    sizes = _vocabularies(config)
    tied = {part.get("vocab_size") for part in parts if part.get("tie_word_embeddings")}
    for name in changed:
        ends = {alias for alias, other in files.aliases.items() if other == name} - kept.keys()
        if ends:
            raise ValueError(f"{name}: the base's files have it for {', '.join(sorted(ends))} too, {CUT}; {WAY_OUT}")
        rows = _rows(files, name)
        if rows is None or name in kept.values():
            continue
        if rows in (sizes if None in tied else tied):
            raise ValueError(
                f"{name.removesuffix('.weight')}: config.json ties the embeddings (tie_word_embeddings), "
                f"{CUT}; {WAY_OUT}"
            )
        if (rows in sizes or _last(name) in VOCABULARY) and (why := _why_tied(files, config, name)):
            raise ValueError(f"{name.removesuffix('.weight')}: {why}, {CUT}; {WAY_OUT}")


def _why_tied(files: Base, config: Mapping[str, Any], name: str) -> str | None:
    """Why the embedding or head of this name is tied although the config does not say so."""
    shape = files.tensors[name].shape
    others = [n for n, place in files.tensors.items() if place.shape == shape and n != name and _rows(files, n)]
    untied = any(part.get("tie_word_embeddings") is False for part in _parts(config))
    if same := [other for other in others if not untied and files.same_bytes(name, other)]:
        return f"the base has the same values for {same[0]}, which is tied to it"
    if _last(name) == "shared" and not any(other.endswith("encoder.embed_tokens.weight") for other in others):
        return "the encoder's and the decoder's embeddings are tied to it"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        has_head = _last(name) in VOCABULARY
    else:
        has_head = bool(config.get("is_encoder_decoder")) or any(_HAS_HEAD.search(str(each)) for each in architectures)
    if has_head and not others:
        return "the base's files have embeddings or an output head, not both, and what is absent is tied to it"
    return None


def _tied_head(files: Base, layer: str, shape: list[int]) -> str | None:
    """The tensor that an absent layer, whose weight has this shape, shares, if it does."""
    name = f"{layer}.weight"
    if name in files.aliases:
        return files.aliases[name]
    known = [n for n in files.tensors if _last(n) in VOCABULARY and _rows(files, n)]
    if any(_last(n) in HEADS for n in known):
        return None  # it is there by another name
    alike = [n for n, place in files.tensors.items() if place.shape == shape and _rows(files, n)]
    alike = [n for n in alike if _outside(name) and _last(n) != _last(name)]  # else the same one, by another prefix
    sizes = _vocabularies(files.config())  # heads have many names, embeddings do not
    alike = [n for n in alike if "embed" in n or n in known or shape[0] in sizes]
    found = [n for n in known if n in alike] or alike or (known if _last(name) in HEADS else [])
    return found[0] if found else None


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and those of the models within it."""
    yield config
    for part in config.values():
        if isinstance(part, dict):
            yield from _parts(part)


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    return {part["vocab_size"] for part in _parts(config) if isinstance(part.get("vocab_size"), int)}


def _rows(files: Base, name: str) -> int | None:
    """How many, if it is a matrix outside the layers, whose names have numbers."""
    shape = files.tensors[name].shape
    return shape[0] if len(shape) == 2 and _outside(name) else None


def _outside(name: str) -> bool:
    return not any(part.isdecimal() for part in name.split(".")[:-2])


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and not name.endswith((".modules_to_save.bias", ".original_module.bias"))


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
