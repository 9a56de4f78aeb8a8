"""What the demo reports: its runs as a table, a CSV and a plot."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev


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


def table(groups: list[list[Run]]):
    """A rich table; a group holds the runs of one rank, the last one those of the full fine-tune."""
    from rich.table import Table

    caption = f"seeds: {len(groups[0])}; mean and std of the accuracy, mean seconds"
    result = Table(title="Fine-tuned on the digits 5-9", caption=caption)
    for heading in ("\nrank", "trainable\nparameters", "share of\nfull model", "test\naccuracy", "\nstd", "\nseconds"):
        result.add_column(heading, justify="right")
    for group in groups:
        if not group[0].rank:
            result.add_section()
        mean, std = _mean_std(group)
        result.add_row(
            str(group[0].rank or "full"),
            str(group[0].trainable_parameters),
            f"{group[0].share_of_full_model:.1%}",
            f"{mean:.3f}",
            f"{std:.3f}" if len(group) > 1 else "-",
            f"{fmean(run.seconds for run in group):.2f}",
        )
    return result


def write_csv(path: Path, runs: list[Run]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)])
        writer.writeheader()
        writer.writerows(asdict(run) | {"rank": run.rank or "full"} for run in runs)


def plot(groups: list[list[Run]], method: str):
    """A matplotlib figure of accuracy against trainable parameters, from the same groups."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display needed
    from matplotlib.ticker import PercentFormatter

    counts = [group[0].trainable_parameters for group in groups]
    means, stds = zip(*map(_mean_std, groups), strict=True)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="trainable parameters", ylabel="test accuracy on 5-9")
    axes.axhline(means[-1], color="tab:gray", linestyle="--", linewidth=1)
    axes.axhspan(means[-1] - stds[-1], means[-1] + stds[-1], color="tab:gray", alpha=0.15, linewidth=0)
    full = f"full fine-tune ({counts[-1]:,} parameters)"
    axes.errorbar(counts[-1], means[-1], stds[-1], fmt="s", color="tab:gray", capsize=3, label=full)
    axes.errorbar(
        counts[:-1], means[:-1], stds[:-1], fmt="o-", color="tab:blue", capsize=3, label=f"{method}, base frozen"
    )
    axes.set_xticks(counts[:-1], [f"{group[0].trainable_parameters:,}\nr = {group[0].rank}" for group in groups[:-1]])
    axes.minorticks_off()
    axes.set_title(f"MNIST digits 5-9 on a network pretrained on 0-4; mean and std, seeds: {len(groups[0])}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure
