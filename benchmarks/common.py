"""What the benchmark scripts share: shapes, the description of the run, files, tables, progress."""

import csv
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_fast.dispatch import why_not_triton

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PS = (0, 0.1)  # dropout

# (M, K, N): rows of x, in_features, out_features. The first five are those whose geometric mean is quoted.
SHAPES = [
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (4096, 8192, 8192),
    (16384, 4096, 4096),
    (8192, 4096, 1024),
    (2048, 4096, 4096),
    (1024, 4096, 4096),
]
TARGETS = SHAPES[:5]

Row = dict[str, Any]


def why_no_gpu() -> str | None:
    """Why nothing can be measured here, in words; None where it can."""
    if not torch.cuda.is_available():
        return "This benchmark measures the fused kernels on an NVIDIA GPU, and torch sees none on this machine."
    reason = why_not_triton(torch.device("cuda"), torch.float32)
    return reason and f"This benchmark measures the fused kernels, and they cannot run here: {reason}."


def card(name: str) -> str:
    """The card's part of a file name: ``NVIDIA H100 80GB HBM3`` -> ``h100``."""
    known = re.search(r"\b[HB]\d00\b", name)
    short = known.group() if known else re.sub(r"NVIDIA|GeForce", "", name)
    return re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")


def commit() -> str:
    """The checkout's short commit, with ``-dirty`` after changes to tracked files; ``unknown`` outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def run_columns(commit_given: str | None, device: str = "cuda") -> Row:
    """The columns that say what was measured on: the first four of every results file."""
    import triton

    return {
        "gpu": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit_given or commit(),
    }


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """(Re)write a results file. Raises ValueError if a row has a column too many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def others(path: Path, rows: Iterable[Row], same: Sequence[str]) -> list[Row]:
    """The rows of a results file, if it is there, that agree with none of these in the columns ``same``."""
    if not path.exists():
        return []
    again = {tuple(str(row[name]) for name in same) for row in rows}
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if tuple(row[name] for name in same) not in again]


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def progress(items: Sequence[Any], title: str) -> Iterator[Any]:
    """Walk over items with rich's progress bar on a terminal that has it, else with a line per item."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.progress import track

        yield from track(items, title)
        return
    for i, item in enumerate(items, 1):
        print(f"{title} {i}/{len(items)}: {item}", flush=True)
        yield item
