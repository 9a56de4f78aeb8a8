"""The results of bench_lora against what they must reach, as markdown."""

from collections.abc import Callable
from statistics import geometric_mean

from benchmarks.common import DTYPES, PS, TARGETS, Row, markdown

OURS = "lora_fast_lora"
SMALL_N, SMALL_M = (8192, 4096, 1024), (1024, 4096, 4096)


def pick(rows: list[Row], **want: object) -> list[Row]:
    """The rows that have these values; shape=(M, K, N) is a column too."""
    return [r for r in rows if all(value == (shape(r) if key == "shape" else r[key]) for key, value in want.items())]


def shape(row: Row) -> tuple[int, int, int]:
    return row["M"], row["K"], row["N"]


def ratios(
    rows: list[Row], shapes: list[tuple[int, int, int]], impl: str, r: int, p: float, what: str = "fwd+bwd"
) -> list[float] | None:
    """ratio_to_frozen in bf16 at these shapes; None unless all of them were measured."""
    found = [pick(rows, dtype="bf16", shape=s, impl=impl, r=r, p=p, what=what) for s in shapes]
    return [f[0]["ratio_to_frozen"] for f in found] if all(found) else None


def mean(rows: list[Row], impl: str, r: int, p: float, what: str = "fwd+bwd") -> float | None:
    """The geometric mean over the target shapes."""
    found = ratios(rows, TARGETS, impl, r, p, what)
    return geometric_mean(found) if found else None


def memory_excess(rows: list[Row], p: float, main: bool) -> float | None:
    """Our peak over frozen's plus S (plus a bit per element of x), in percent, at the worst point measured."""
    worst = None
    for row in pick(rows, impl=OURS, what="fwd+bwd", p=p):
        if main and (row["r"], row["dtype"]) != (16, "bf16"):
            continue
        key = {k: row[k] for k in ("dtype", "M", "K", "N", "r", "p", "what")}
        frozen = pick(rows, impl="frozen", **key)[0]["peak_mib"]
        bits = row["M"] * row["K"] / 8 if p else 0
        allowed = frozen + (row["M"] * row["r"] * DTYPES[row["dtype"]].itemsize + bits) / 2**20
        excess = 100 * (row["peak_mib"] / allowed - 1)
        worst = excess if worst is None else max(worst, excess)
    return worst


def means(rows: list[Row], r: int) -> str:
    """A table of every impl's geometric means at this rank; "-" where it was not measured."""
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    header = [f"r={r}, bf16, geometric mean over five shapes", *(f"{w}, p={p}" for w in ("fwd", "fwd+bwd") for p in PS)]
    lines = [[i, *(_ratio(mean(rows, i, r, p, w)) for w in ("fwd", "fwd+bwd") for p in PS)] for i in impls]
    return markdown(header, lines)


def summarise(rows: list[Row], graph_rows: list[Row]) -> str:
    """Two tables: every impl's geometric means, and ours beside the bounds; "-" where it was not measured."""

    def both(
        label: str, value: Callable[[float], float | None], form: Callable[[float | None], str], bound: str
    ) -> list[str]:
        return [label, *(form(value(p)) for p in PS), bound]

    def at(shapes: list[tuple[int, int, int]], rows: list[Row] = rows) -> Callable[[float], float | None]:
        return lambda p: max(ratios(rows, shapes, OURS, 16, p) or [], default=None)

    plain, dropped = mean(rows, OURS, 16, 0), mean(rows, OURS, 16, 0.1)
    again = [abs(r["ratio_to_frozen"] - 1) for r in pick(rows, impl="frozen_again", r=16, what="fwd+bwd", dtype="bf16")]
    table = [
        both("geometric mean, r=16", lambda p: mean(rows, OURS, 16, p), _ratio, "1.09 / 1.11 at p=0"),
        both("worst of the five shapes", at(TARGETS), _ratio, "1.14 / 1.17 at p=0"),
        ["dropout adds", "", _ratio(_less(dropped, plain)), "0.04"],
        both("(8192, 4096, 1024)", at([SMALL_N]), _ratio, "1.35 / 1.42 at p=0"),
        both("r=64 minus r=16", lambda p: _less(mean(rows, OURS, 64, p), mean(rows, OURS, 16, p)), _ratio, "0.03"),
        both("M=1024, eager", at([SMALL_M]), _ratio, "2.0"),
        both("M=1024, CUDA graph", at([SMALL_M], graph_rows), _ratio, "1.35"),
        both(
            "peak memory over frozen + S (+ bits), worst at r=16 in bf16",
            lambda p: memory_excess(rows, p, True),
            _percent,
            "5%",
        ),
        both("the same, worst of all points", lambda p: memory_excess(rows, p, False), _percent, "5%"),
        ["frozen_again, farthest from 1 at r=16", _ratio(max(again, default=None)), "", "0.01"],
    ]
    ours = markdown(["lora_fast_lora, fwd+bwd", "p=0", "p=0.1", "must H200 / H100"], table)
    return f"{means(rows, 16)}\n\n{ours}"


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}%"
