"""What must be reached beside what was measured: benchmarks/STATUS.md, made from the results.

Run from the repository root after a benchmark: python -m benchmarks.status

A row is the geometric mean over the shapes of a bound of the times beside the frozen layer, forward + backward, bf16,
rank 16, and names the commit, the card and the Triton that it was measured with.
"""

import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks import bench_experts, bench_four_bits, bench_host, bench_small, common

PATH = common.ROOT / "benchmarks" / "STATUS.md"
Shapes = Sequence[tuple[int | str, ...]]


@dataclass(frozen=True)
class Bound:
    """What must hold: a mean over shapes, or in each of them, of rows that agree with ``where``."""

    what: str
    file: str
    must: float
    shapes: Shapes
    where: dict[str, str] = field(default_factory=dict)
    each: bool = False  # must hold for each of the shapes: the worst counts
    columns: tuple[str, ...] = ("M", "K", "N")  # of which a shape is
    above: dict[str, str] | None = None  # what must hold is how far it is above the rows that agree with this


def of_few_rows(impl: str, p: str, musts: tuple[float, ...], name: str) -> list[Bound]:
    return [
        Bound(
            f"{name}, {m} rows, CUDA graphs",
            "bench_small_h200.csv",
            must,
            [(m, *shape) for shape in bench_small.SHAPES],
            {"impl": impl, "p": p},
        )
        for m, must in zip(bench_small.TRAINED, musts, strict=True)
    ]


def of_decoding(name: str, impl: str, must: float) -> list[Bound]:
    return [
        Bound(
            f"{name}, decoding, {m} rows, the worst of four layers",
            "bench_small_h200.csv",
            must,
            [(m, *shape) for shape in DECODED],
            {"impl": impl, "what": "fwd", "weights": "rotating"},
            each=True,
        )
        for m in (1, 8, 64)
    ]


def of_four_bits(m: int, musts: dict[str, float]) -> list[Bound]:
    graph = m == bench_four_bits.FOUR_BITS.graphed
    return [
        Bound(
            f"{impl.removeprefix('lora_fast_')}, {m} rows{', CUDA graphs' if graph else ''}",
            f"bench_four_bits{'_graph' if graph else ''}_h200.csv",
            must,
            [shape for shape in bench_four_bits.SHAPES if shape[0] == m],
            {"impl": impl, "p": "0"},
        )
        for impl, must in musts.items()
    ]


def of_blocks(shape: tuple[str, int, int, int], **musts: tuple[float, ...]) -> list[Bound]:
    """``musts``: without dropout, and with it."""
    return [
        Bound(
            f"{shape[0]} as a block {shape[1:]}, {kind}{' with dropout' if p != '0' else ''}",
            "bench_blocks_h200.csv",
            must,
            [shape],
            {"impl": f"lora_fast_{kind}", "p": p},
            columns=("block", "M", "hidden", "other"),
        )
        for kind, both in musts.items()
        for p, must in zip(("0", "0.1"), both, strict=False)
    ]


def of_experts(model: str, tokens: int, must: float, impl: str = "lora_fast") -> Bound:
    where = {"impl": impl, "mode": "graph", "skew": "0.0", "transformers": bench_experts.RESTATED}
    what = f"{impl.removeprefix('lora_fast_')} experts" if impl != "lora_fast" else "experts with LoRA"
    shape = f"{model}, {tokens} tokens"
    columns = ("model", "tokens")
    return Bound(
        f"{what}, {shape}, CUDA graphs", "bench_experts_h200.csv", must, [(model, tokens)], where, False, columns
    )


def of_batches(impl: str, musts: dict[int, float]) -> list[Bound]:
    one = f"lora_fast_one{'_dora' if impl == 'lora_fast_dora' else ''}"
    return [
        Bound(
            f"{count} adapters in one batch, {impl.removeprefix('lora_fast_')}, CUDA graphs: above one adapter",
            "bench_batch_graph_h200.csv",
            must,
            common.TARGETS,
            {"adapters": str(count), "p": "0.0", "impl": impl},
            above={"impl": one},
        )
        for count, must in musts.items()
    ]


DECODED = [(2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)]
BOUNDS = [
    Bound("LoRA, large layers", "bench_lora_h200.csv", 1.09, common.TARGETS, {"impl": "lora_fast_lora", "p": "0"}),
    Bound("with dropout", "bench_lora_h200.csv", 1.13, common.TARGETS, {"impl": "lora_fast_lora", "p": "0.1"}),
    Bound("DoRA, large layers", "bench_dora_h200.csv", 1.15, common.TARGETS, {"impl": "lora_fast_dora", "p": "0"}),
    Bound("with dropout", "bench_dora_h200.csv", 1.19, common.TARGETS, {"impl": "lora_fast_dora", "p": "0.1"}),
    *of_few_rows("lora_fast_lora", "0", (2.0, 1.9, 1.7, 1.45), "LoRA"),
    *of_few_rows("lora_fast_lora", "0.1", (2.4, 2.2, 1.9, 1.65), "LoRA with dropout"),
    *of_few_rows("lora_fast_dora", "0", (2.9, 2.5, 2.2, 1.7), "DoRA"),
    *(
        Bound(f"{name}, {shape}, eager", "bench_host_h200.csv", must, [shape], {"impl": impl, "triton": "3.7.1"})
        for name, impl, must in (("LoRA", "lora_fast_lora", 1.9), ("DoRA", "lora_fast_dora", 2.2))
        for shape in bench_host.SHAPES
    ),
    *of_decoding("LoRA", "lora_fast_lora", 1.4),
    *of_decoding("DoRA", "lora_fast_dora", 1.8),
    *of_four_bits(
        8192,
        {
            "lora_fast_nf4_fp8_lora": 0.74,
            "lora_fast_nf4_lora": 1.13,
            "lora_fast_nf4_fp8_dora": 0.82,
            "lora_fast_nf4_dora": 1.20,
        },
    ),
    *of_four_bits(2048, {"lora_fast_nf4_fp8_lora": 0.97, "lora_fast_nf4_lora": 1.28}),
    *of_blocks(("mlp", 8192, 4096, 14336), lora=(1.02, 1.04), dora=(1.05,)),
    *of_blocks(("qkv", 8192, 4096, 1024), lora=(1.08, 1.10), dora=(1.16,)),
    *of_blocks(("mlp", 2048, 2048, 8192), lora=(1.20,)),
    *of_blocks(("qkv", 2048, 2048, 512), lora=(1.30,)),
    *of_batches("lora_fast_lora", {4: 0.04, 16: 0.08, 64: 0.15}),
    *of_batches("lora_fast_dora", {4: 0.06, 16: 0.08, 64: 0.15}),
    of_experts("qwen3-30b", 4096, 0.58),
    of_experts("gpt-oss-20b", 4096, 0.53),
    of_experts("mixtral-8x7b", 4096, 0.88),
    of_experts("qwen3-30b", 4096, 0.52, "lora_fast_frozen"),
    Bound(
        "Qwen3-30B-A3B, 4 layers, attention and experts with LoRA",
        "bench_model_h200.csv",
        0.78,
        [("30b", 4096)],
        {"impl": "lora_fast_lora"},
        columns=("size", "tokens"),
    ),
]


def measured(bound: Bound) -> list[dict[str, str]]:
    """The rows that a bound speaks of."""
    wanted = {"dtype": "bf16", "r": "16", "what": "fwd+bwd", **bound.where}
    with (common.RESULTS / bound.file).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(k, value) == value for k, value in wanted.items())]
    shapes = [tuple(map(str, shape)) for shape in bound.shapes]
    rows = [row for row in rows if tuple(row[name] for name in bound.columns) in shapes]
    if len(rows) != len(bound.shapes):
        raise ValueError(f"{bound.file}: {len(rows)} rows for {bound.what}, expected one for each of {bound.shapes}")
    return rows


def line(bound: Bound) -> tuple[str | float, ...]:
    rows = measured(bound)
    ratios = [float(row["ratio_to_frozen"]) for row in rows]
    found = max(ratios) if bound.each else statistics.geometric_mean(ratios)
    if bound.above is not None:
        others = measured(replace(bound, where=bound.where | bound.above))
        found -= statistics.geometric_mean([float(row["ratio_to_frozen"]) for row in others])
    origin = {(row["commit"], row["gpu"], row["triton"]) for row in rows}
    return (
        bound.what,
        bound.must,
        f"{found:.3f}",
        "yes" if found <= bound.must else "**no**",
        "; ".join(", ".join(one) for one in sorted(origin)),
    )


def page() -> str:
    table = common.markdown(("times the frozen layer", "must", "is", "reached", "measured at"), map(line, BOUNDS))
    return (
        "# Where it stands\n\nMade from `benchmarks/results` by `python -m benchmarks.status`: geometric means over "
        f"shapes, forward and backward, bf16, rank 16.\n\n{table}\n"
    )


def main() -> int:
    PATH.write_text(page(), encoding="utf-8")
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
