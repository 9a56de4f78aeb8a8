"""Layers of few rows in CUDA graphs, so that the GPU's time counts and not the host's: bf16, r = 16.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_small

Training (what = fwd+bwd, 256 to 2048 rows) takes one weight again and again (weights = hot), which up to some 45 MB
stays in the cache. Decoding (what = fwd, without gradients, 1 to 128 rows, no dropout) takes different ones of 256 MB
in all in turn (weights = rotating), as a model does; its times are of one layer, in evaluation mode. Ours keeps there
what it makes of the weights alone (``keep_in_graphs``): DoRA's norm and copies of the adapters.

frozen, frozen_again  nn.Linear whose weight asks for no gradient, twice, to show the noise
eager                 plain torch in its best form (addmm); eager_compiled is torch.compile of the same
peft                  PEFT's layer, adapters in x's dtype, where PEFT is installed
lora_fast_lora        LoRALinear, adapters in float32, as it makes them
peft_dora, eager_compiled_dora, lora_fast_dora  the same with DoRA

What torch.compile makes is made first, for each shape, by a process for each core; inductor keeps it on disk, where the
measuring one finds it. What cannot be compiled is named and not measured. Rows that a run does not measure stay in the
file: the compiled ones may come later, with --only impl=eager_compiled,eager_compiled_dora.
"""

import gc
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from benchmarks import arguments, bench_dora, bench_lora, common
from benchmarks.arguments import positive
from benchmarks.bench_lora import COLUMNS, FROZEN, Case
from lora_fast import LoRALinear, set_backend, timing
from lora_fast.timing import Candidate

SHAPES = [(2048, 2048), (2048, 8192), (8192, 2048), (2048, 512), (896, 4864), (4096, 4096), (4096, 14336), (4096, 1024)]
TRAINED, DECODED = (256, 512, 1024, 2048), (1, 8, 64, 128)  # rows
IMPLS = (
    *FROZEN,
    "eager",
    "peft",
    "eager_compiled",
    "lora_fast_lora",
    "peft_dora",
    "eager_compiled_dora",
    "lora_fast_dora",
)
SAME = ("what", "M", "K", "N", "p", "impl")  # of a row that is measured again
ROTATING = 256 * 2**20  # bytes of weights in turn
KEYS: dict[str, Callable[[str], Any]] = {"M": int, "K": int, "N": int, "p": float, "impl": str}


def cases() -> list[tuple[str, Case]]:
    """(what, case) for all that is measured."""
    trained = [("fwd+bwd", Case("bf16", m, *shape, 16, p)) for m in TRAINED for shape in SHAPES for p in common.PS]
    shapes = sorted([*SHAPES, (14336, 4096)], key=math.prod, reverse=True)  # of small ones there must be many
    return trained + [("fwd", Case("bf16", m, *shape, 16, 0)) for shape in shapes for m in DECODED]


def build(case: Case, impls: tuple[str, ...], device: str) -> dict[str, Candidate]:
    lora = tuple(impl for impl in impls if not impl.endswith("_dora"))
    dora = tuple(impl if impl == "lora_fast_dora" else impl.removesuffix("_dora") for impl in impls if impl not in lora)
    made = bench_lora.build(case, lora, device)
    for impl, candidate in bench_dora.build(case, dora, device).items():
        made[impl if impl.endswith("_dora") else f"{impl}_dora"] = candidate
    return {impl: made[impl] for impl in impls if impl in made}


def step_of(candidates: list[Candidate], what: str) -> Callable[[], None]:
    """One call of each of them."""
    for candidate in candidates if what == "fwd" else ():
        if isinstance(candidate.layer, nn.Module):
            candidate.layer.eval()
        if isinstance(candidate.layer, LoRALinear):
            candidate.layer.keep_in_graphs = True

    def step() -> None:
        for candidate in candidates:
            candidate.calls()[what]()

    return torch.no_grad()(step) if what == "fwd" else step


def compile_one(what: str, case: Case, impl: str, device: str = "cuda") -> str | None:
    """Leaves what torch.compile makes of a step in inductor's cache; why it could not, in words."""
    torch._inductor.config.compile_threads = 1  # there are other processes
    try:
        step_of([build(case, (impl,), device)[impl]], what)()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        torch.compiler.reset()
    return None


def compile_ahead(wanted: list[tuple[str, Case]], impls: tuple[str, ...]) -> dict[tuple[str, Case, str], str]:
    """All that is to be compiled, by other processes; what cannot be, and why."""
    jobs = [(what, case, impl) for what, case in wanted for impl in impls if "compiled" in impl]
    if not jobs:
        return {}
    workers = min(16, os.cpu_count() or 1, len(jobs))
    print(f"bench_small: compiling {len(jobs)} steps in {workers} processes", flush=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failures = pool.map(compile_one, *zip(*jobs, strict=True))
        return {job: why for job, why in zip(jobs, failures, strict=True) if why is not None}


def measured(
    what: str,
    case: Case,
    impls: tuple[str, ...],
    rounds: int,
    about: common.Row,
    device: str = "cuda",
) -> list[common.Row]:
    """A row for each candidate."""
    layers = 1 if what == "fwd+bwd" else max(2, -(-ROTATING // (2 * case.K * case.N)))
    built = [build(case, impls, device) for _ in range(layers)]
    steps: dict[str, Callable[[], object]] = {}
    for impl in built[0]:
        step = step_of([one[impl] for one in built], what)
        steps[impl] = step if device == "cpu" else timing.graphed(step)
    times = timing.measure(steps, rounds, target_ms=3.0, device=device)
    frozen = timing.summary(times["frozen"])[0]
    rows = []
    for impl in steps:
        median, p20, p80 = timing.summary(times[impl])
        rows.append(
            {
                **about,
                **case._asdict(),
                "what": what,
                "weights": "hot" if layers == 1 else "rotating",
                "impl": impl,
                "median_us": round(median / layers, 2),
                "p20_us": round(p20 / layers, 2),
                "p80_us": round(p80 / layers, 2),
                "ratio_to_frozen": round(median / frozen, 4),
                "peak_mib": "",
            }
        )
    return rows


def summarise(rows: list[common.Row]) -> str:
    """Geometric means over the shapes of each number of rows."""

    def key(row: common.Row) -> tuple[Any, ...]:
        return row["what"], row["M"], row["p"], row["impl"]

    groups = [
        (*name, [row["ratio_to_frozen"] for row in found])
        for name, found in itertools.groupby(sorted(rows, key=key), key)
    ]
    table = [
        (what, m, p, impl, round(statistics.geometric_mean(ratios), 3), max(ratios), len(ratios))
        for what, m, p, impl, ratios in groups
        if impl != "frozen"
    ]
    return common.markdown(("what", "M", "p", "impl", "times frozen", "worst", "shapes"), table)


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_small", __doc__)
    parser.add_argument("--rounds", type=positive, default=12)
    arguments.add_only(parser, KEYS)
    arguments.add_files(parser, "bench_small_CARD.csv is")
    args = parser.parse_args(argv)
    impls: tuple[str, ...] = IMPLS
    wanted = cases()
    for name, values in args.only:
        if name == "impl":
            impls = tuple(impl for impl in impls if impl in {"frozen", *values})
        else:
            wanted = [(what, case) for what, case in wanted if getattr(case, name) in values]
    if not wanted:
        parser.error("--only leaves nothing to measure")
    if (reason := common.why_no_gpu()) is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about = common.run_columns(args.commit)
    columns = [*COLUMNS[: COLUMNS.index("impl")], "weights", *COLUMNS[COLUMNS.index("impl") :]]
    path, rows = args.out / f"bench_small_{common.card(about['gpu'])}.csv", list[common.Row]()
    failed = compile_ahead(wanted, impls)
    for what, case in common.progress(wanted, "bench_small"):
        found = measured(
            what, case, tuple(impl for impl in impls if (what, case, impl) not in failed), args.rounds, about
        )
        common.write_csv(path, columns, common.others(path, found, SAME) + found)
        rows += found
        torch.compiler.reset()
        gc.collect()
    print(f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}\n")
    print(summarise(rows))
    for (what, case, impl), why in failed.items():
        print(f"not measured: {impl}, {what}, {case}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
