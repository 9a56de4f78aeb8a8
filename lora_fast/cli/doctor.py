"""``lora-fast doctor``: what is installed, whether the fused kernels run here and are right, what uses them."""

import argparse
import importlib
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from lora_fast import dispatch, patch_peft
from lora_fast.cli.doctor_layers import Layer, examine
from lora_fast.cli.machine import as_if, devices, has_triton, versions
from lora_fast.cli.selfcheck import Shape, check
from lora_fast.files.adapter import open_adapter, read_adapter
from lora_fast.files.fitting import fit_adapter
from lora_fast.files.format import TENSORS
from lora_fast.files.skeleton import skeleton_of_adapter
from lora_fast.models.adapters import lora_layers
from lora_fast.peft.report import NOT_PATCHED
from lora_fast.tables import aligned, grouped, shared, told_once

EPILOG = """\
examples:
  lora-fast doctor                       versions, GPUs, self-check
  lora-fast doctor my_pkg.my_model:build what of the model that build() returns is fused, and why not
  lora-fast doctor path/to/adapter       what the adapter holds, and whether load_adapter takes it
  lora-fast doctor my_pkg:model --require-fused && python train.py
  lora-fast doctor my_pkg:build --as-if sm_90    the same as a Hopper GPU would have it, told without one

TARGET is looked at first. With TRITON_INTERPRET=1 in the environment, a machine without a GPU checks the kernels in
Triton's interpreter. Exit codes: 0 all right, 1 something is wrong, 2 wrong arguments (a TARGET that names nothing is
one)."""

GPU_SHAPES = [Shape(256, 512, 384, 16), Shape(77, 130, 66, 5)]
TINY = [Shape(24, 40, 24, 4)]


CHIPS = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}
PATCH = "PEFT's layers are stock as yet: call lora_fast.patch_peft(model) after get_peft_model"

MARKS = {True: "fused", False: "not fused", None: "plain"}


class Wrong(Exception):
    """Something is wrong with the target. ``code``: what the command exits with."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what is installed, whether the fused kernels run here and are right, and what uses them."
    parser.epilog = EPILOG
    model_or_adapter = "pkg.module:name of a model or a function that makes one, or an adapter's directory"
    parser.add_argument("target", metavar="TARGET", nargs="?", help=model_or_adapter)
    parser.add_argument(
        "--require-fused", action="store_true", help="exit with 1 if a layer of TARGET with an adapter is not fused"
    )
    chips = "tell what a GPU of this kind would run, and run no checks"
    parser.add_argument("--as-if", metavar="CHIP", type=_chip, help=f"{chips}: {', '.join(CHIPS)} (or 90)")


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code."""
    target, is_path = args.target, args.target is not None and _is_path(args.target)
    if target is not None and (problem := _names_nothing(target, is_path)):
        print(f"lora-fast doctor: error: {problem}", file=sys.stderr)
        return 2
    if args.require_fused and (target is None or is_path):
        print("lora-fast doctor: error: --require-fused needs a TARGET that is a model", file=sys.stderr)
        return 2
    good = True
    try:
        if target is not None:
            good &= adapter(Path(target)) if is_path else model(target, args.require_fused, args.as_if)
            print()
    except Wrong as error:
        print(f"lora-fast doctor: error: {error}", file=sys.stderr)
        return error.code
    good &= versions()
    print()
    if args.as_if is not None:
        as_if(args.as_if, CHIPS[args.as_if])
        return 0 if good else 1
    devices()
    print()
    good &= self_check()
    return 0 if good else 1


def self_check() -> bool:
    """Print each check and whether all passed."""
    half = [torch.bfloat16, torch.float16]
    plain = "the reference alone"
    if torch.cuda.is_available() and dispatch.why_not_triton(torch.device("cuda"), torch.bfloat16) is None:
        what, checks = "the fused kernels", check(torch.device("cuda"), [*half, torch.float32], GPU_SHAPES, "triton")
    elif dispatch.interpreted():
        what = "the fused kernels in Triton's interpreter, which has no right bfloat16 (a GPU has)"
        checks = check(torch.device("cpu"), [torch.float16, torch.float32], TINY, "triton")
    else:
        hint = " (TRITON_INTERPRET=1 in the environment: also the kernels, interpreted)" if has_triton() else ""
        what = f"{plain}, plain torch on the CPU{hint}"
        checks = check(torch.device("cpu"), [*half, torch.float32], TINY, "reference")
    print(f"self-check of {what}: forward and gradients against float64")
    results = []
    for result in checks:
        results.append(result.passed)
        print(f"  {result}", flush=True)
    print(f"  {sum(results)} of {len(results)} passed")
    return all(results)


def adapter(folder: Path) -> bool:
    """Print what an adapter's directory holds; whether load_adapter takes it."""
    print(f"adapter {folder}")
    try:
        with open_adapter(folder) as (settings, file):
            dtypes = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 (not a dict)
        kind = ("rank-stabilised " if settings.use_rslora else "") + ("DoRA" if settings.use_dora else "LoRA")
        size = (folder / TENSORS).stat().st_size
        print(f"  {kind}, r = {settings.r}, lora_alpha = {settings.lora_alpha:g}, bias = {settings.bias!r}")
        tensors = ", ".join(f"{count} of {dtype}" for dtype, count in sorted(dtypes.items()))
        print(f"  tensors: {tensors}; {size / 2**20:.2f} MiB")
        if settings.target_parameters:
            print(
                f"  of experts: {', '.join(settings.target_parameters)}; only load_adapter can compare it with a model"
            )
            return True
        bare = skeleton_of_adapter(folder)
        fit_adapter(bare, read_adapter(bare, folder))
    except (OSError, ValueError, ImportError) as error:
        print(f"  load_adapter refuses it: {error}")
        return False
    layers = lora_layers(bare)
    ranks = Counter(layer.r for layer in layers.values())
    print(f"  layers: {len(layers)}: " + ", ".join(f"{count} of r = {r}" for r, count in sorted(ranks.items())))
    for last, count in sorted(Counter(name.rpartition(".")[2] for name in layers).items()):
        print(f"    {count:4} x {last}")
    if settings.modules_to_save:
        print(f"  trained in full: {', '.join(settings.modules_to_save)}")
    print("  load_adapter takes it, into a model that has these layers")
    return True


def model(target: str, require_fused: bool, chip: str | None = None) -> bool:
    """Print what of the model is fused, layers that are alike as one; whether that is as required.

    ``chip``: the one that is assumed. A stock PEFT model is then told as it is once patched.

    Raises:
        Wrong: the target cannot be imported or made, or is no module.
    """
    found = _load(target)
    print(f"model {target}: {type(found).__name__}{'' if chip is None else f', as if on a GPU of {chip}'}")
    layers, note = list(examine(found)), ""
    if any(layer.why == NOT_PATCHED for layer in layers):
        note = PATCH
        if chip is not None:
            note = "as after lora_fast.patch_peft(model), which is yet to be called"
            patch_peft(found)
    if chip is not None:
        with dispatch.assume_capability(*CHIPS[chip]):
            layers = list(examine(found))
    counts = Counter(layer.fused for layer in layers)
    rows = grouped((layer.name, MARKS[layer.fused], _what(layer), layer.why) for layer in layers)
    reasons = [why for *_, mark, _, why in rows if mark == MARKS[False]]
    often = shared(reasons)
    lines = aligned([(*row, what if why in ("", often) else f"{what}: {why}") for *row, what, why in rows])
    if often:
        lines.append(told_once(often, reasons))
    print("\n".join(f"  {line}" for line in lines))
    print(f"  {counts[True]} fused, {counts[False]} not fused, {counts[None]} without an adapter")
    if note:
        print(f"  {note}")
    return not (require_fused and counts[False])


def _what(layer: Layer) -> str:
    return f"{layer.what} ({layer.remark})" if layer.remark else layer.what


def _chip(word: str) -> str:
    name = word if word.startswith("sm_") else f"sm_{word}"
    if name not in CHIPS:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected one of {', '.join(CHIPS)}")
    return name


def _is_path(target: str) -> bool:
    return os.path.exists(target) or "/" in target or os.sep in target


def _names_nothing(target: str, is_path: bool) -> str | None:
    if is_path:
        return None if os.path.isdir(target) else f"{target} is no directory"
    words = target.replace(":", ".").split(".")
    if len(words) < 2 or target.count(":") > 1 or not all(word.isidentifier() for word in words):
        return f"{target!r} is no directory and not of the form pkg.module:name"
    return None


def _load(target: str) -> nn.Module:
    module, _, path = target.partition(":") if ":" in target else target.rpartition(".")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        raise Wrong(f"{target}: ModuleNotFoundError: {error}", 2 if absent else 1) from error
    except Exception as error:  # whatever the user's code raises
        raise Wrong(f"{target}: {type(error).__name__}: {error}") from error
    try:
        for word in path.split("."):
            found = getattr(found, word)
    except AttributeError as error:
        raise Wrong(f"{target}: AttributeError: {error}", 2) from error
    try:
        made = found if isinstance(found, nn.Module) else found()  # type: ignore[operator]
    except Exception as error:  # whatever the user's code raises
        raise Wrong(f"{target}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise Wrong(f"{target}: gives a {type(made).__name__}, expected an nn.Module")
    return made
