"""``lora-fast doctor``: what is installed, whether the fused kernels run here and are right, what uses them."""

import argparse
import importlib
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from lora_fast import dispatch
from lora_fast.cli.doctor_layers import examine
from lora_fast.cli.machine import devices, versions
from lora_fast.cli.selfcheck import Shape, check
from lora_fast.files.adapter import open_adapter, read_adapter
from lora_fast.files.fitting import fit_adapter
from lora_fast.files.format import TENSORS
from lora_fast.files.skeleton import skeleton_of_adapter
from lora_fast.models.adapt import lora_layers

EPILOG = """\
examples:
  lora-fast doctor                       versions, GPUs, self-check
  lora-fast doctor my_pkg.my_model:build what of the model that build() returns is fused, and why not
  lora-fast doctor path/to/adapter       what the adapter holds, and whether load_adapter takes it
  lora-fast doctor my_pkg:model --require-fused && python train.py

With TRITON_INTERPRET=1 in the environment, a machine without a GPU checks the kernels in Triton's interpreter.
Exit codes: 0 all right, 1 something is wrong, 2 wrong arguments (a TARGET that names nothing is one)."""

GPU_SHAPES = [Shape(256, 512, 384, 16), Shape(77, 130, 66, 5)]
TINY = [Shape(24, 40, 24, 4)]


class Wrong(Exception):
    """Something is wrong with the target."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what is installed, whether the fused kernels run here and are right, and what uses them."
    parser.epilog = EPILOG
    model_or_adapter = "pkg.module:name of a model or a function that makes one, or an adapter's directory"
    parser.add_argument("target", metavar="TARGET", nargs="?", help=model_or_adapter)
    parser.add_argument(
        "--require-fused", action="store_true", help="exit with 1 if a layer of TARGET with an adapter is not fused"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code."""
    target, is_path = args.target, args.target is not None and _is_path(args.target)
    if target is not None and (problem := _names_nothing(target, is_path)):
        print(f"lora-fast doctor: error: {problem}", file=sys.stderr)
        return 2
    if args.require_fused and (target is None or is_path):
        print("lora-fast doctor: error: --require-fused needs a TARGET that is a model", file=sys.stderr)
        return 2
    good = versions()
    print()
    devices()
    print()
    good &= self_check()
    try:
        if target is not None:
            print()
            good &= adapter(Path(target)) if is_path else model(target, args.require_fused)
    except Wrong as error:
        print(f"lora-fast doctor: error: {error}", file=sys.stderr)
        good = False
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
        what = f"{plain}, plain torch on the CPU (TRITON_INTERPRET=1 in the environment: also the kernels, interpreted)"
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


def model(target: str, require_fused: bool) -> bool:
    """Print layer by layer what is fused; whether that is as required.

    Raises:
        Wrong: the target cannot be imported or made, or is no module.
    """
    found = _load(target)
    print(f"model {target}: {type(found).__name__}")
    layers = list(examine(found))
    width = max((len(layer.name) for layer in layers), default=0)
    for layer in layers:
        mark = {True: "fused    ", False: "not fused", None: "plain    "}[layer.fused]
        print(f"  {layer.name:{width}}  {mark}  {layer.what}{': ' if layer.why else ''}{layer.why}")
    counts = Counter(layer.fused for layer in layers)
    print(f"  {counts[True]} fused, {counts[False]} not fused, {counts[None]} without an adapter")
    return not (require_fused and counts[False])


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
        for word in path.split("."):
            found = getattr(found, word)
        made = found if isinstance(found, nn.Module) else found()  # type: ignore[operator]
    except Exception as error:  # whatever the user's code raises
        raise Wrong(f"{target}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise Wrong(f"{target}: gives a {type(made).__name__}, expected an nn.Module")
    return made
