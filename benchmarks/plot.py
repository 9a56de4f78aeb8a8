"""The gain at a glance: what LoRA costs beside the frozen layer, in time and in memory, from bench_lora's CSV.

Run from the repository root, on any machine with matplotlib:
python -m benchmarks.plot benchmarks/results/bench_lora_h100.csv
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import SHAPES

IMPLS = {  # from the CSV's name to (label, colour)
    "peft": ("PEFT", "#b8b8b8"),
    "eager": ("plain torch", "#8da9c4"),
    "eager_compiled": ("plain torch, compiled", "#4a7aa7"),
    "lora_fast_lora": ("lora_fast", "#d1495b"),
}
PANELS = [  # title, dropout, column
    ("time, no dropout", 0.0, "ratio_to_frozen"),
    ("time, dropout 0.1", 0.1, "ratio_to_frozen"),
    ("peak memory, dropout 0.1", 0.1, "peak_mib"),
]
SHOWN = SHAPES[:5]  # at the smaller ones the host's speed decides, not the GPU's


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that the plot shows: forward + backward, bf16, r = 16."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row["what"], row["dtype"], row["r"]) == ("fwd+bwd", "bf16", "16")]


def extra(rows: list[dict[str, str]], impl: str, p: float, column: str) -> dict[tuple[int, int, int], float]:
    """By shape, how many percent more than the frozen layer an implementation takes: in time than that of its own run,
    since the rows of a file may come from several."""
    values: dict[tuple[str, tuple[int, ...]], float] = {}
    for row in rows:
        if float(row["p"]) == p:
            values[row["impl"], (int(row["M"]), int(row["K"]), int(row["N"]))] = float(row[column])
    shapes = [shape for shape in SHOWN if (impl, shape) in values]
    frozen = {shape: 1.0 if column == "ratio_to_frozen" else values["frozen", shape] for shape in shapes}
    return {shape: 100 * (values[impl, shape] / frozen[shape] - 1) for shape in shapes}


def draw(rows: list[dict[str, str]]) -> Any:
    """The figure. Raises ValueError if the rows are none."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display needed

    if not rows:
        raise ValueError("the CSV has no rows with fwd+bwd, bf16 and r = 16")
    impls = [impl for impl in IMPLS if any(row["impl"] == impl for row in rows)]
    width = 0.8 / len(impls)
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    for number, (title, p, column) in enumerate(PANELS, 1):
        axes = figure.add_subplot(1, len(PANELS), number, title=title)
        for i, impl in enumerate(impls):
            label, colour = IMPLS[impl]
            values = extra(rows, impl, p, column)
            at = [SHOWN.index(shape) + (i - (len(impls) - 1) / 2) * width for shape in values]
            bars = axes.bar(at, list(values.values()), width, color=colour, label=label)
            if impl == "lora_fast_lora":
                axes.bar_label(bars, fmt="{:.0f}", padding=2, fontsize=8, color=colour)
        _cut(axes)
        names = [f"{m} rows\n{k}\nto {n}" for m, k, n in SHOWN]
        axes.set_xticks(range(len(SHOWN)), names, fontsize=7)
        axes.yaxis.set_major_formatter("{x:.0f}%")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("more than the frozen nn.Linear")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(impls), frameon=False)
    figure.suptitle(f"What LoRA adds to a training step of one linear layer (r = 16, bf16, {rows[0]['gpu']})")
    return figure


def _cut(axes: Any) -> None:
    """Bars so high that they would flatten the others end at the edge, with their number in them."""
    highest = [max(bar.get_height() for bar in group) for group in zip(*axes.containers, strict=False)]
    top = 2 * median(highest)
    if max(highest) < 1.5 * top:
        return
    axes.set_ylim(0, top)
    for bar in (bar for bars in axes.containers for bar in bars if bar.get_height() > top):
        middle = bar.get_x() + bar.get_width() / 2
        axes.text(middle, 0.98 * top, f"{bar.get_height():.0f}%", ha="center", va="top", fontsize=8, rotation=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="a file that bench_lora wrote")
    parser.add_argument("--out", type=Path, help="the picture (default: beside the CSV, ending in .png)")
    args = parser.parse_args(argv)
    try:
        figure = draw(read(args.csv))
    except (OSError, ValueError) as error:
        print(f"{args.csv}: {error}", file=sys.stderr)
        return 1
    out = args.out or args.csv.with_suffix(".png")
    figure.savefig(out, dpi=150)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
