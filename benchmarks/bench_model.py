"""Whole models, frozen, under stock PEFT, patched, with our layers: a training step's time and peak memory.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_model
or small batches, in CUDA graphs:            python -m benchmarks.bench_model --size 1b --mode reduce-overhead
or on any machine, a tiny model on the CPU:  python -m benchmarks.bench_model --tiny

Random weights in bf16, LoRA at r=16 on all linears of a layer, adapters not zero. A step is forward, loss and
backward; the embeddings ask for a gradient (enable_input_require_grads), so that every layer, the frozen model's too,
makes its dX. Models of one size, batch, mode and checkpointing share one set of base weights and run in random order
each round; their rows in the file are replaced together, all others stay. Compiling many models takes minutes: with
--apart each is built and compiled in a process of its own, all at once, and only then they are measured, in turns.

--size large   Llama-3-8B's widths, a quarter of its layers (8), and of its vocabulary, so that the head has the share
               that it has there; 2 x 4096 tokens
       8b      the same with 1 x 512 and 1 x 2048 tokens
       1b      Llama-3.2-1B: 16 layers, all of its vocabulary, tied embeddings; 1 x 512, 2 x 1024, 8 x 1024 tokens
       30b     Qwen3-30B-A3B: 4 of its 48 layers; LoRA on q, k, v, o and all experts; 1 x 4096 tokens
       small   its widths, 4 layers, a quarter of its vocabulary; 1 x 512 tokens
       tiny    on the CPU, in fp32

--mode eager            not compiled
       default          torch.compile of the whole model
       reduce-overhead  the same in CUDA graphs, forward and backward

frozen          the model without adapters; frozen_again is the same once more, to show the noise
peft_lora       stock PEFT, adapters in the model's dtype (autocast_adapter_dtype=False)
lora_fast_lora  the same model after lora_fast.patch_peft
lora_fast_own_lora  our own layers (add_lora), adapters in float32, as it makes them
peft_dora, lora_fast_dora, lora_fast_own_dora  the same with DoRA
lora_fast_layers_lora, lora_fast_layers_dora  ours with every layer by itself (blocks=False)
lora_fast_lora_x8  that of LoRA where the down projections, whose x nothing else keeps, keep it in 8 bits (save_x)
lora_fast_fp8_lora, lora_fast_fp8_dora  ours over an fp8 base (patch_peft with base_dtype)
lora_fast_nf4_lora, lora_fast_nf4_dora  over one of 4 bits, with nf4_fp8 by products of 8-bit operands (base_compute)
lora_fast_frozen  without adapters, the experts' products by our kernels (register_experts); of 30b alone

The lines from lora_fast_layers_lora on, and checkpointing, are for large and tiny in eager mode. There our peak memory
must not exceed stock's, nor, without checkpointing, the frozen model's. Compiled, a step of ours must not take longer
than stock's.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters

from benchmarks import apart, arguments, common, models
from benchmarks.arguments import positive
from benchmarks.bench_lora import FROZEN
from benchmarks.models import IMPLS, MODES, SIZES, Case, R, Size, all_cases, build, measure, stock_of
from lora_fast import timing

COLUMNS = (
    "gpu torch triton commit dtype size layers tokens r p checkpointing what mode impl median_us p20_us p80_us "
    "ratio_to_frozen peak_mib"
).split()
GROUP = ("size", "mode", "layers", "tokens", "checkpointing")  # what rows that are measured together share
KINDS: dict[str, Callable[[str], Any]] = {"p": float, "checkpointing": int, "impl": str, "tokens": int}
MUST = {  # with large, in eager mode
    ("lora_fast_lora", 0): "1.02",
    ("lora_fast_lora", 0.1): "0.03 more than p=0",
    ("lora_fast_dora", 0): "1.05",
    ("lora_fast_dora", 0.1): "1.05",
    ("lora_fast_layers_lora", 0): "1.07 / 1.08",
    ("lora_fast_layers_dora", 0): "1.12 / 1.15",
    ("lora_fast_fp8_lora", 0): "0.80",
    ("lora_fast_nf4_lora", 0): "1.08",
    ("lora_fast_nf4_fp8_lora", 0): "0.84",
}


class Group(NamedTuple):
    """Cases that are measured together; they share their checkpointing, and frozen is among them."""

    name: str
    size: Size
    mode: str
    cases: Sequence[Case]

    def __str__(self) -> str:
        checkpointing = ", checkpointing" * self.cases[0].checkpointing
        return f"{self.name}, {self.size.batch} x {self.size.length} tokens, {self.mode}{checkpointing}"


def warmed(steps: dict[str, Callable[[], Any]], mode: str, device: str) -> dict[str, Any]:
    """The peak memory of each step, "" where that cannot be told."""
    peaks: dict[str, Any] = dict.fromkeys(steps, "")
    if mode == "reduce-overhead":  # compiled, then warm, then captured; all graphs share their memory
        for name, step in steps.items():
            skipped = counters["inductor"]["cudagraph_skips"]
            for _ in range(4):
                step()
            if skipped := counters["inductor"]["cudagraph_skips"] - skipped:
                print(f"{name}: {skipped} of its parts are in no CUDA graph", file=sys.stderr)
    elif device != "cpu":
        peaks = {name: round(timing.peak_mib(step), 1) for name, step in steps.items()}
    return peaks


def in_a_row(group: Group) -> int:
    """How many steps are timed together. Compiled, the host looks at thousands of things of the model before a step,
    which after another model's step it has not in its caches: in a loop it has."""
    return 1 if group.mode == "eager" else 5


def measured(group: Group, rounds: int, about: common.Row) -> list[common.Row]:
    """A row for each case."""
    steps = build(group.cases, group.size, group.mode)
    peaks = warmed(steps, group.mode, group.size.device)
    return rows_of(group, measure(steps, rounds, group.size.device, in_a_row(group)), peaks, about)


def one_apart(group: Group) -> apart.Made:
    """The only case of a group, in a process of its own."""
    models.prepare(group.size.device)
    device, (case,) = group.size.device, group.cases
    steps = build([case], group.size, group.mode)
    return (
        lambda: measure(steps, 1, device, in_a_row(group))[str(case)][0],
        warmed(steps, group.mode, device)[str(case)],
    )


def rows_of(group: Group, times: dict[str, list[float]], peaks: dict[str, Any], about: common.Row) -> list[common.Row]:
    """A row for each case that has times."""
    size = group.size
    frozen = next((str(case) for case in group.cases if case.impl == "frozen"), "")
    base = timing.summary(times[frozen])[0] if frozen in times else None
    rows = []
    for case in group.cases:
        if str(case) not in times:
            continue
        median, p20, p80 = timing.summary(times[str(case)])
        rows.append(
            {
                **about,
                "dtype": size.dtype,
                "size": group.name,
                "layers": size.layers,
                "tokens": size.batch * size.length,
                "r": R,
                "p": case.p,
                "checkpointing": case.checkpointing,
                "what": "fwd+bwd",
                "mode": group.mode,
                "impl": case.impl,
                "median_us": round(median),
                "p20_us": round(p20),
                "p80_us": round(p80),
                "ratio_to_frozen": "" if base is None else round(median / base, 4),
                "peak_mib": peaks[str(case)],
            }
        )
    return rows


def summarise(rows: list[common.Row]) -> str:
    """All rows as a table, ours also as parts of stock PEFT's time and peak memory."""

    def key(row: common.Row, impl: str) -> tuple[Any, ...]:
        return *(row[name] for name in GROUP), impl, row["p"]

    found = {key(row, row["impl"]): row for row in rows}
    table = []
    for row in rows:
        stock = found.get(key(row, stock_of(row["impl"])), row)
        of_stock = [
            f"{row[column] / stock[column]:.3f}" if row is not stock and row[column] else ""
            for column in ("median_us", "peak_mib")
        ]
        bound = (row["size"], row["mode"]) == ("large", "eager")
        table.append(
            [
                row["size"],
                row["tokens"],
                row["mode"],
                row["impl"],
                row["p"],
                "yes" if row["checkpointing"] else "no",
                f"{row['median_us'] / 1000:.1f}",
                f"{row['ratio_to_frozen']:.3f}" if row["ratio_to_frozen"] else "",
                MUST.get((row["impl"], row["p"]), "") if bound else "",
                row["peak_mib"],
                *of_stock,
            ]
        )
    return common.markdown(
        "size,tokens,mode,fwd+bwd,p,checkpointing,ms,of frozen,must H200 / H100,peak MiB,time of stock's,"
        "peak of stock's".split(","),
        table,
    )


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Group]]:
    """(arguments, what to run)."""
    parser = arguments.parser_of("bench_model", __doc__)
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["large"], help="default large")
    add("--mode", nargs="+", choices=MODES, default=["eager"], help="default eager")
    add("--tiny", action="store_true", help="short for --size tiny; patched steps may cost at most 1.05 of stock's")
    add("--compiled", action="store_true", help="short for --size small --mode default --only p=0")
    add("--apart", action="store_true", help="each model in a process of its own")
    add("--rounds", type=positive, help="default 8 with large, else 60")
    add("--layers", type=positive, help="in place of the size's")
    arguments.add_only(parser, KINDS)
    arguments.add_files(parser, "bench_model_CARD.csv is")
    args = parser.parse_args(argv)
    if args.tiny:
        args.size = ["tiny"]
    if args.compiled:
        args.size, args.mode = ["small"], ["default"]
        args.only.append(("p", {0}))
    unknown = {impl for key, values in args.only if key == "impl" for impl in values - set(IMPLS)}
    if unknown:
        parser.error(f"--only impl: got {', '.join(sorted(unknown))}, expected impls among {', '.join(IMPLS)}")

    def wanted(case: Case, size: Size) -> bool:
        skipped = {"impl", "p"} if case.impl == "frozen" else {"p"} if case.impl in FROZEN else set()
        given = {**case._asdict(), "tokens": size.batch * size.length}
        return all(given[key] in values for key, values in args.only if key not in skipped)

    groups = []
    for name, mode, on in ((name, mode, on) for name in args.size for mode in args.mode for on in (0, 1)):
        for size in SIZES[name]:
            cases = [case for case in all_cases(name, mode) if case.checkpointing == on and wanted(case, size)]
            if cases:
                groups.append(Group(name, size._replace(layers=args.layers or size.layers), mode, cases))
    if not groups:
        parser.error("--only leaves nothing to measure")
    return args, groups


def main(argv: list[str] | None = None) -> int:
    args, groups = parse(argv)
    devices = {group.size.device for group in groups}
    reason = common.why_no_gpu() if "cuda" in devices else None
    if len(devices) > 1:
        reason = "The size tiny runs on the CPU, and others do not: in a run of its own."
    if reason is not None:
        print(f"{reason} --tiny runs on the CPU.", file=sys.stderr)
        return 1
    (device,) = devices
    models.prepare(device)
    about, start = common.run_columns(args.commit, device), time.monotonic()
    path, rows = args.out / f"bench_model_{common.card(about['gpu'])}.csv", list[common.Row]()
    makes: dict[Any, apart.Make] = {}
    if args.apart:
        makes = {(str(g), str(case)): (one_apart, g._replace(cases=[case])) for g in groups for case in g.cases}
    with apart.workers(makes) as workers:
        for group in common.progress(groups, "bench_model"):
            rounds = args.rounds or (8 if group.name == "large" else 60)
            if args.apart:
                own = {name: workers[str(group), name] for name in map(str, group.cases)}
                found = rows_of(group, *apart.measure(own, rounds), about)
            else:
                found = measured(group, rounds, about)
            common.write_csv(path, COLUMNS, common.others(path, found, GROUP) + found)
            rows += found
            torch.compiler.reset()
            gc.collect()  # models are rings
            torch.cuda.empty_cache()
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, "
        f"{time.monotonic() - start:.0f} s\n"
    )
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
