"""A base checkpoint on disk: one safetensors file, or a directory with one or with shards and their index."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_fast.bases.packed import PackedWeight
from lora_fast.files.format import PREFIX, inside
from lora_fast.files.writing import safetensors_or_raise

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
INDEX_BYTES = 1 << 26
CHUNK = 1 << 24  # bytes that are compared at once
# Files that hold weights in another way: beside merged ones they would be the unmerged ones.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".pte",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".index.json",
    ".ot",
    ".npz",
    ".npy",
    ".tflite",
    ".mlmodel",
    ".pkl",
    ".pickle",
    ".nemo",
    ".params",
    ".pdparams",
    ".engine",
    ".llamafile",
    ".tar",
    ".zip",
)


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    shard: str
    dtype: str  # as safetensors writes it: F32, BF16, ...
    shape: list[int]
    start: int  # in the file
    size: int


@dataclass
class Base:
    """The files of a checkpoint: ``shards`` hold tensors, ``others`` go with them, ``left`` would be stale copies."""

    shards: dict[str, Path]
    tensors: dict[str, Place] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # {name without a tensor: that of the tied one}: save_model's
    others: dict[str, Path] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # {name of a tensor: that in the files}, where they differ

    def read(self, name: str) -> torch.Tensor:
        with safetensors_or_raise("").safe_open(self.shards[self.tensors[name].shard], "pt") as file:
            return file.get_tensor(self.written.get(name, name))

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors otherwise: {name in the files: name from now on}, if no two then have one name."""
        new = {names.get(name, name): place for name, place in self.tensors.items()}
        if len(new) == len(self.tensors):
            self.tensors, self.written = new, {name: old for old, name in names.items()}
            self.aliases = {name: names.get(other, other) for name, other in self.aliases.items()}

    def same_bytes(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, without either in memory."""
        a, b = self.tensors[name], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with open(self.shards[a.shard], "rb") as one, open(self.shards[b.shard], "rb") as two:
            one.seek(a.start)
            two.seek(b.start)
            parts = range(0, a.size, CHUNK)
            return all(one.read(n) == two.read(n) for n in (min(CHUNK, a.size - start) for start in parts))

    def config(self) -> dict[str, Any]:
        """What config.json says, of a single file that beside it; empty without one. ValueError if it is no JSON."""
        path = self.others.get("config.json") or next(iter(self.shards.values())).parent / "config.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config.json: is no JSON: {error}") from None
        return found if isinstance(found, dict) else {}


def open_base(base: Path) -> Base:
    """The checkpoint at ``base``, headers read and data not.

    Raises:
        FileNotFoundError: nothing there, or no safetensors in the directory.
        ValueError: several safetensors files without an index; a file that is none; an index that does not fit.
    """
    if not base.exists():
        raise FileNotFoundError(f"{base} does not exist")
    if base.is_file():
        return _with_tensors(Base({base.name: base}))
    names = sorted(path.name for path in base.iterdir() if path.is_file())
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    wanted: dict[str, str] | None = None
    if INDEX in names:
        wanted = _weight_map(inside(base, INDEX))
        shards = sorted(set(wanted.values()))
    elif SINGLE in names or len(found) == 1:
        shards = [SINGLE if SINGLE in names else found[0]]
    elif found:
        raise ValueError(f"{base} has {', '.join(found)} and no {INDEX}, expected one file or an index")
    else:
        raise FileNotFoundError(f"{base} has no safetensors file")
    used = {*shards, INDEX} if wanted else set(shards)
    stale = {name for name in names if holds_weights(name) or name.startswith("adapter_")} - used
    result = _with_tensors(Base({name: inside(base, name) for name in shards}))
    result.others = {name: inside(base, name) for name in names if name not in stale | set(shards)}
    result.left = sorted(stale)
    for name, shard in (wanted or {}).items():
        if name not in result.tensors or result.tensors[name].shard != shard:
            raise ValueError(f"{INDEX}: says that {shard} has {name!r:.200}, which it has not")
    return result


def holds_weights(name: str) -> bool:
    """Whether a file so called holds weights in some way; TensorFlow's checkpoints have more behind their ending."""
    return name.lower().endswith(WEIGHTS) or ".ckpt." in name.lower()


def folders_beside(base: Path) -> tuple[dict[str, Path], list[str]]:
    """({name: path} of files in the base's subfolders that go with it, the subfolders that do not).

    Those go whose files hold no weights, and those of which sentence-transformers' modules.json makes the model
    (``1_Pooling``, ``2_Dense``). Weights anywhere else (``onnx``, ``original``, ``checkpoint-500``) would be unmerged
    copies; hidden folders and links to folders stay too.

    Raises:
        ValueError: modules.json is no JSON; a file is a link that leads out.
    """
    parts = {path.partition("/")[0] for path in _module_paths(base / "modules.json")}
    files: dict[str, Path] = {}
    left = []
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        inside_it = [] if folder.is_symlink() else sorted(folder.rglob("*"))
        found = [path for path in inside_it if not path.is_dir()]
        linked = any(path.is_dir() and path.is_symlink() for path in inside_it)
        stale = folder.name not in parts and any(holds_weights(path.name) for path in inside_it)
        if folder.name.startswith(".") or folder.is_symlink() or linked or stale:
            left.append(f"{folder.name}/")
        else:
            files |= {str(path.relative_to(base)): inside(path.parent, path.name) for path in found}
    return files, left


def _module_paths(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [part["path"] for part in json.loads(path.read_text(encoding="utf-8")) if part["path"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(
            "modules.json: expected a list of modules, each with its path, as sentence-transformers writes it"
        ) from None


def open_originals(
    original: str | os.PathLike[str], bases: Mapping[str, PackedWeight]
) -> Callable[[str], torch.Tensor]:
    """A reader of the weights, by name of layer, that the fp8 ``bases`` were made from, once a look at each in the
    checkpoint ``original`` has found that they were. A layer's name may have PEFT's prefix, a weight's has not.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_base`; a weight that is missing.
        TypeError, ValueError: one of another dtype or shape, or from which the base was not made.
    """
    files = open_base(Path(original))

    def name_of(layer: str) -> str:
        return f"{layer.removeprefix(PREFIX)}.weight".removeprefix(".")

    for layer, base in bases.items():
        if (name := name_of(layer)) not in files.tensors:
            raise ValueError(f"original: {original} has no {name!r}, expected the weight of the layer {layer!r}")
        try:
            base.check_original(files.read(name))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (of the layer {layer!r}, by {name!r} in {original})") from None
    return lambda layer: files.read(name_of(layer))


def _with_tensors(base: Base) -> Base:
    for shard, path in base.shards.items():
        start, header = _header(path, shard)
        base.aliases.update(header.pop("__metadata__", {}))
        for name, entry in header.items():
            if name in base.tensors:
                raise ValueError(f"{shard} has {name!r:.200}, which {base.tensors[name].shard} has too")
            begin, end = entry["data_offsets"]
            base.tensors[name] = Place(shard, entry["dtype"], entry["shape"], start + begin, end - begin)
    known = base.tensors.keys()  # the other entries of metadata say other things
    base.aliases = {name: other for name, other in base.aliases.items() if other in known and name not in known}
    return base


def _header(path: Path, shard: str) -> tuple[int, dict[str, Any]]:
    """(where the data begins, {name: dtype, shape, data_offsets}, metadata among them), after safetensors has found
    nothing wrong."""
    try:
        with safetensors_or_raise("").safe_open(path, "pt"), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except OSError:
        raise
    except Exception as error:  # safetensors has an error class of its own for each version
        raise ValueError(f"{shard}: is no safetensors file: {error}") from None
    return 8 + length, header


def _weight_map(path: Path) -> dict[str, str]:
    if path.stat().st_size > INDEX_BYTES:
        raise ValueError(f"{INDEX}: has {path.stat().st_size} bytes, expected at most {INDEX_BYTES}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if found and all(isinstance(shard, str) and Path(shard).name == shard for shard in found.values()):
            return found
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{INDEX}: expected an object whose weight_map gives each tensor's file in this directory")
