"""What the demo reports: its runs as a table, a CSV and a plot."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


@dataclass
class Run:
    """One fine-tuning run, a row of results.csv. Accuracies are from 0 to 1."""

    rank: int  # 0: the full fine-tune
    seed: int
    trainable_parameters: int
    share_of_full_model: float
    validation_accuracy: float
    test_accuracy: float
    epochs: int
    seconds: float


def _mean_std(group: list[Run]) -> tuple[float, float]:
    scores = [run.test_accuracy for run in group]
    return fmean(scores), stdev(scores) if len(scores) > 1 else 0.0


def table(methods: dict[str, list[list[Run]]], full: list[Run]) -> Any:
    """A rich table: of each method ("LoRA") a group of runs for each rank, then those of the full fine-tune."""
    from rich.table import Table

    caption = f"seeds: {len(full)}; mean and std of the accuracy, mean seconds"
    result = Table(title="Fine-tuned on the digits 5-9", caption=caption)
    result.add_column()
    for heading in ("\nrank", "trainable\nparameters", "share of\nfull model", "test\naccuracy", "\nstd", "\nseconds"):
        result.add_column(heading, justify="right")
    for method, groups in {**methods, "": [full]}.items():
        for group in groups:
            mean, std = _mean_std(group)
            result.add_row(
                method,
                str(group[0].rank or "full"),
                str(group[0].trainable_parameters),
                f"{group[0].share_of_full_model:.1%}",
                f"{mean:.3f}",
                f"{std:.3f}" if len(group) > 1 else "-",
                f"{fmean(run.seconds for run in group):.2f}",
            )
        result.add_section()
    return result


def write_csv(path: Path, runs: list[Run]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)])
        writer.writeheader()
        writer.writerows(asdict(run) | {"rank": run.rank or "full"} for run in runs)


def plot(methods: dict[str, list[list[Run]]], full: list[Run]) -> Any:
    """A matplotlib figure of accuracy against trainable parameters, from the same groups."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display needed
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="trainable parameters", ylabel="test accuracy on 5-9")
    count, (mean, std) = full[0].trainable_parameters, _mean_std(full)
    axes.axhline(mean, color="tab:gray", linestyle="--", linewidth=1)
    axes.axhspan(mean - std, mean + std, color="tab:gray", alpha=0.15, linewidth=0)
    label = f"full fine-tune ({count:,} parameters)"
    axes.errorbar(count, mean, std, fmt="s", color="tab:gray", capsize=3, label=label)
    for (method, groups), color in zip(methods.items(), ("tab:blue", "tab:orange"), strict=False):
        counts = [group[0].trainable_parameters for group in groups]
        means, stds = zip(*map(_mean_std, groups), strict=True)
        axes.errorbar(counts, means, stds, fmt="o-", color=color, capsize=3, label=f"{method}, base frozen")
    ticks = {group[0].trainable_parameters: group[0].rank for group in next(iter(methods.values()))}
    axes.set_xticks(list(ticks), [f"{count:,}\nr = {rank}" for count, rank in ticks.items()])
    axes.minorticks_off()
    axes.set_title(f"MNIST digits 5-9 on a network pretrained on 0-4; mean and std, seeds: {len(full)}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure
