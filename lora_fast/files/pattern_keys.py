"""Keys of rank_pattern and alpha_pattern, which are regexes to PEFT: written so that each means one layer, read as far
as they are names.

PEFT asks ``re.match(rf"(.*\\.)?({key})$", layer)``, and takes the first key that matches. Until 0.14 it asked
``re.match(rf".*\\.{key}$", layer)``, and then for the very name. No key from a file is run as a regex here: one that is
a name, whether escaped or not, is compared letter by letter, an unescaped "." with any letter.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_LETTER = r"(?:[^\\.^$*+?{}\[\]|()]|\\[^\w.])"
_KEY = re.compile(rf"(\^|\(\?<=\^({_LETTER}+)\\\.\))?({_LETTER}+(?:\\?\.{_LETTER}+)*)\$?", re.DOTALL)


class _Key(NamedTuple):
    """A key as a name: ``any`` has the places of the dots in ``text`` that stand for any letter; ``full`` says that
    it stands for a full name, not also for the last parts of one."""

    text: str
    any: tuple[int, ...]
    full: bool


def _read(key: str) -> _Key | None:
    if (found := _KEY.fullmatch(key)) is None:
        return None
    letters = re.findall(r"\\?.", found[3], re.DOTALL)
    head = re.sub(r"\\(.)", r"\1", found[2], flags=re.DOTALL) + "." if found[2] else ""
    dots = tuple(len(head) + i for i, letter in enumerate(letters) if letter == ".")
    return _Key(head + "".join(letter[-1] for letter in letters), dots, bool(found[1]))


def is_name(key: str) -> bool:
    """Whether a key is the name of a layer, escaped or not, rather than a pattern for several."""
    return _read(key) is not None


class Pattern(dict[str, Any]):
    """A rank_pattern or alpha_pattern whose keys are names (see :func:`is_name`)."""

    def keys_of(self, layer: str) -> list[str]:
        """The keys that stand for a layer, in order: to PEFT the first one counts."""
        starts = [0, *(i + 1 for i, letter in enumerate(layer) if letter == ".")]
        return [key for _, key in sorted(hit for start in starts for hit in self._hits(layer[start:], start == 0))]

    def _hits(self, tail: str, full: bool) -> Iterator[tuple[int, str]]:
        for dots, keys in self._by_form.get(len(tail), {}).items():
            letters = list(tail)
            for i in dots:
                letters[i] = "."
            yield from ((at, key) for at, key, only_full in keys.get("".join(letters), ()) if full or not only_full)

    @property
    def _by_form(self) -> dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, str, bool]]]]]:
        """The keys by length, places of any letter, and text: found without a look at each."""
        forms = vars(self).get("_forms")
        if forms is None:
            forms = vars(self)["_forms"] = {}
            for at, key in enumerate(self):
                if (read := _read(key)) is not None:
                    texts = forms.setdefault(len(read.text), {}).setdefault(read.any, {})
                    texts.setdefault(read.text, []).append((at, key, read.full))
        return forms


def pattern_of(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """{key: value} for the layers whose value is not the default, by keys that mean that one layer to any PEFT.

    A key is the layer's name where PEFT takes that for no other layer, else escaped and tied to the name's start. A
    name without a dot must stay as it is for the older PEFT, so that layers which end in one come before it.
    """
    names = Pattern(dict.fromkeys(values))
    taken = {key for layer in values for key in names.keys_of(layer) if key != layer}
    given = {layer for layer, value in values.items() if value != default}
    before = {layer for layer in values if "." in layer and layer.rpartition(".")[2] in given}
    listed = (layer for layer in values if layer in given or layer in before)
    ordered = sorted(listed, key=lambda layer: "." not in layer)
    return {_key(layer, layer in taken or layer in before): values[layer] for layer in ordered}


def _key(layer: str, tied: bool) -> str:
    head, dot, rest = layer.partition(".")
    if _read(layer) != _Key(layer, tuple(i for i, letter in enumerate(layer) if letter == "."), False):
        tied = True  # as a regex it is not even its own
    if not tied or (not dot and is_name(layer)):
        return layer
    return rf"(?<=^{re.escape(head)}\.){re.escape(rest)}" if dot else re.escape(layer)
