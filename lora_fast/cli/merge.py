"""``lora-fast merge``: an adapter folded into the weights of a checkpoint on disk, one tensor in memory at a time.

A weight becomes ``W + scaling * B A`` (DoRA: ``m / n`` times that), summed in float32 and rounded once to the weight's
dtype, as :meth:`lora_fast.LoRALinear.merge` does. Each file of the base is copied and the changed tensors are written
over their old bytes: dtypes, shapes, order and metadata stay.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from lora_fast.files.adapter import open_adapter, read_adapter
from lora_fast.files.checkpoint import Base, folders_beside, open_base
from lora_fast.files.checkpoint_ties import check_tied, twins
from lora_fast.files.fitting import fit_adapter
from lora_fast.files.format import CONFIG, PREFIX
from lora_fast.files.hub_names import in_memory_of
from lora_fast.files.skeleton import like, skeleton
from lora_fast.layers.lora import LoRALinear
from lora_fast.models.adapters import lora_layers
from lora_fast.models.targets import some

EPILOG = """\
examples:
  lora-fast merge Llama-3.1-8B my-adapter Llama-3.1-8B-merged
  lora-fast merge model.safetensors my-adapter merged.safetensors --force

OUT appears when it is complete: a run that is killed leaves at most a hidden .OUT.PID.part beside it.
Exit codes: 0 merged, 1 refused or failed (nothing was changed), 2 wrong arguments."""

FLOATS = ("F64", "F32", "F16", "BF16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fold an adapter (LoRA, DoRA, rsLoRA, in PEFT's format) into the weights of a checkpoint."
    parser.epilog = EPILOG
    parser.add_argument(
        "base",
        metavar="BASE",
        type=Path,
        help="the checkpoint: a safetensors file, or a directory with one or with shards",
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="the adapter's directory")
    parser.add_argument("out", metavar="OUT", type=Path, help="the merged checkpoint: a file if BASE is one")
    parser.add_argument("--force", action="store_true", help="replace an OUT that is there")
    parser.add_argument(
        "--safe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse a merged weight that has NaN or infinite elements",
    )


def run(args: argparse.Namespace) -> int:
    """Merge and say what was done. Raises as :func:`merge`."""
    from rich.console import Console
    from rich.progress import Progress, TaskID, TextColumn

    console = Console(highlight=False, markup=False, soft_wrap=True)
    progress = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console)
    tasks: list[TaskID] = []

    def note(total: int, done: int, what: str) -> None:
        if not tasks:  # now that all is checked
            progress.start()
            tasks.append(progress.add_task("merging", total=total, note=""))
        progress.update(tasks[0], advance=done, note=what)

    try:
        said = merge(args.base, args.adapter, args.out, args.force, args.safe, note)
    finally:
        progress.stop()
    console.print(said)
    return 0


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    force: bool = False,
    safe: bool = True,
    note: Callable[[int, int, str], object] = lambda total, done, what: None,
) -> str:
    """Write the merged checkpoint and return what was done, in words; ``note(bytes in all, bytes done, what)`` is
    called on the way.

    Raises:
        FileNotFoundError: no base, adapter or parent of ``out``.
        ValueError: a file is not what it should be; the adapter does not fit the base; ``out`` is there already (and
            ``force`` is not set, or it is no checkpoint); with ``safe``, a merged weight is not finite. Nothing is
            left at ``out``, or what was there.
    """
    files = open_base(base)
    if base.is_dir():
        others, left = folders_beside(base)
        files.others |= others
        files.left += left
    out = _checked_out(base, adapter, out, force)
    _name_as_in_memory(files, base if base.is_dir() else base.parent, adapter)
    tied, config = twins(files, adapter), files.config()
    turned = _turned(files, adapter)
    layers, state, replaced = _fitted(files, adapter, tied, turned)
    changed = {f"{name}.weight": layer for name, layer in layers.items()}
    check_tied(files, config, [*changed, *replaced], tied)
    total = sum(path.stat().st_size for path in files.shards.values())
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if base.is_dir():
            part.mkdir()
            for name, path in files.others.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, part / name)
        for shard, path in files.shards.items():
            here = [name for name in (*changed, *replaced) if files.tensors[name].shard == shard]
            target = part / shard if base.is_dir() else part
            note(total, 0, f"copying {shard}")
            shutil.copyfile(path, target)
            note(total, path.stat().st_size - sum(files.tensors[name].size for name in here), shard)
            with open(target, "rb+") as file:
                for name in here:
                    old = files.read(name)
                    if name in turned:
                        new = _merged(changed[name], old.t(), state, name).t()
                    else:
                        new = _merged(changed[name], old, state, name) if name in changed else state[name].to(old.dtype)
                    if safe and new.is_floating_point() and not torch.isfinite(new).all():
                        raise ValueError(
                            f"{name}: the merged weight has NaN or infinite elements in {old.dtype} "
                            "(--no-safe lets them pass)"
                        )
                    file.seek(files.tensors[name].start)
                    file.write(new.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                    note(total, files.tensors[name].size, name)
                file.flush()
                os.fsync(file.fileno())
        _install(part, out)
    finally:
        _remove(part)
    return _summary(files, out, changed, replaced)


def _name_as_in_memory(files: Base, folder: Path, adapter: Path) -> None:
    """Give the base's tensors the names that they have in transformers' model, if the adapter needs some of these: that
    of the config.json in ``folder``."""
    with open_adapter(adapter) as (_, file):
        keys = [key.removeprefix(PREFIX) for key in file.keys()]  # noqa: SIM118 (not a dict)
    layers = {f"{key.removesuffix('.lora_A.weight')}.weight" for key in keys if key.endswith(".lora_A.weight")}
    if layers - files.tensors.keys():
        names = in_memory_of(folder, files.tensors)
        if layers & set(names.values()):
            files.rename(names)


def _turned(files: Base, adapter: Path) -> set[str]:
    """Of an adapter for Conv1D: the base's weights that are stored as [in, out], by their shapes or, where they are
    square, as the others.

    Raises:
        ValueError: square ones beside layers of both kinds.
    """
    shapes: dict[str, tuple[list[int], list[int]]] = {}  # {weight: (in the base, of B A)}
    with open_adapter(adapter) as (settings, file):
        for key in file.keys() if settings.fan_in_fan_out else ():
            layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            if key.endswith(".lora_A.weight") and (name := f"{layer}.weight") in files.tensors:
                up, down = file.get_slice(key.replace(".lora_A.", ".lora_B.")), file.get_slice(key)
                shapes[name] = list(files.tensors[name].shape), [up.get_shape()[0], down.get_shape()[-1]]
    others = {name for name, (there, own) in shapes.items() if there == own != own[::-1]}
    square = [name for name, (_, own) in shapes.items() if own == own[::-1]]
    if others and square:
        raise ValueError(
            f"{CONFIG}: fan_in_fan_out: {some(sorted(others))} are stored as nn.Linear stores them, so that "
            f"{some(square)} may be stored either way; load_adapter into the model and merge_lora tell"
        )
    return shapes.keys() - others


def _fitted(
    files: Base, adapter: Path, tied: dict[str, str], turned: Collection[str]
) -> tuple[dict[str, LoRALinear], dict[str, torch.Tensor], list[str]]:
    """(the adapter's layers in a skeleton of the base, its tensors, names of those that replace the base's)"""
    places = files.tensors | {name: files.tensors[other] for name, other in tied.items()}
    shapes = {name: place.shape[::-1] if name in turned else place.shape for name, place in places.items()}
    model = skeleton({name: like(shapes[name], place.dtype) for name, place in places.items()})
    found = read_adapter(model, adapter)
    fit_adapter(model, found)
    layers = {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, LoRALinear)}
    own = {f"{name}.{part}" for name, layer in layers.items() for part in layer.adapter_names}
    replaced = [name for name in found.state if name not in own and name not in tied]
    for name in (*(f"{layer}.weight" for layer in layers), *replaced):
        dtype = files.tensors[name].dtype
        if dtype not in FLOATS and found.state.get(name, torch.empty(0)).is_floating_point():
            raise ValueError(f"{name}: has dtype {dtype} in the base (quantised?), expected one of {', '.join(FLOATS)}")
    return layers, found.state, replaced


def _merged(layer: LoRALinear, weight: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    owner = name.removesuffix("weight")
    tensors = {part: state[owner + part] for part in layer.adapter_names}
    layer.load_state_dict({"weight": weight, **tensors}, strict=False, assign=True)
    try:
        return layer.merged_weight().to(weight.dtype)
    finally:
        layer.to("meta")  # gives the memory back


def _checked_out(base: Path, adapter: Path, out: Path, force: bool) -> Path:
    out = out.resolve()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}, where {out.name} should be, is no directory")
    for what in (base.resolve(), adapter.resolve()):
        if out == what or out in what.parents:
            raise ValueError(f"OUT {out} is or contains {what}, which is read")
    if base.is_file() and out.suffix != ".safetensors":
        raise ValueError(f"OUT {out}: BASE is a file, expected a name that ends in .safetensors")
    if not out.exists():
        return out
    if not force:
        raise ValueError(f"OUT {out} exists already (--force replaces it)")
    if out.is_dir() != base.is_dir():
        raise ValueError(f"OUT {out} exists, and one of BASE and OUT is a file, the other one a directory")
    if out.is_dir() and any(out.iterdir()) and not list(out.glob("*.safetensors")):
        raise ValueError(f"OUT {out} exists and holds no checkpoint, so --force does not replace it")
    return out


def _install(part: Path, out: Path) -> None:
    if not out.is_dir():
        os.replace(part, out)
        return
    old = part.with_suffix(".old")
    os.rename(out, old)
    try:
        os.rename(part, out)
    except BaseException:
        os.rename(old, out)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _summary(files: Base, out: Path, changed: dict[str, LoRALinear], replaced: list[str]) -> str:
    ranks = ", ".join(map(str, sorted({layer.r for layer in changed.values()})))
    kind = type(next(iter(changed.values()))).__name__.removesuffix("Linear")
    lines = [
        f"Merged {len(changed)} {kind} layers (r = {ranks}) into {out}: {len(files.tensors)} tensors, "
        f"{len(files.shards)} safetensors file(s)"
    ]
    for what, names in (("replaced by trained ones", replaced), ("copied", [*files.others]), ("left out", files.left)):
        lines += [f"{what}: {', '.join(names)}"] if names else []
    return "\n".join(lines)
