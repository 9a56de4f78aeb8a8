"""PEFT models on several GPUs, stock and patched: a training step's time and peak memory, and what more GPUs gain.

Run from the repository root, on a machine with NVIDIA GPUs: python -m benchmarks.bench_distributed
with the checks of check_distributed instead of timing:      python -m benchmarks.bench_distributed --check
or two processes on any machine's CPU, a tiny model:         python -m benchmarks.bench_distributed --tiny

The processes, one for each GPU, are started here. The models are bench_model's, with random weights in bf16, adapters
at r=16 on all linears; each GPU has 4096 tokens. A step is forward, loss, backward and AdamW on the adapters.

--size large  the widths of Llama-3-8B, a quarter of its layers (8) and of its vocabulary
       8b     Llama-3-8B whole: 32 layers, and its vocabulary
       30b    Qwen3-30B-A3B whole, 48 layers: LoRA on attention and experts, with FSDP2 and checkpointing alone
       70b    the widths and the 80 layers of Llama-3-70B: LoRA, with FSDP2 and checkpointing alone, each model made and
              sharded block by block. Over bf16 two of them are 280 GB: for fewer than four cards see --only

ddp                  DistributedDataParallel
fsdp2                fully_shard of each block and of the rest
fsdp2_checkpointing  with gradient checkpointing, not reentrant
fsdp2_accumulation   four batches of 4096 tokens a step, whose gradients are exchanged once
fsdp2_offload        the shards of the parameters, and with them the optimiser, live on the CPU

With ddp and fsdp2_checkpointing ours also run over a base in 8 bits (lora_fast_fp8_lora and so on) and in 4 (nf4).

Everything runs on all GPUs together and, for the scaling, on each alone, in a group of one. The models of a mode and a
dropout run in random order each round. Times are the slowest GPU's. Peak memory is the fullest GPU's, all that the
model needs there: weights, gradients, optimiser and activations. scaling is tokens/s a GPU as a part of those on one.
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import arguments, check_distributed, common, models
from benchmarks.arguments import positive
from benchmarks.distributed import MODES, group_of, of_all, processes, sharded, step_of, wrap
from benchmarks.models import EXPERTS, LARGE, TINY, Size
from lora_fast import timing

COLUMNS = (
    "gpu torch triton commit gpus dtype size layers tokens r p mode what impl median_us p20_us p80_us tokens_per_s "
    "scaling peak_mib"
).split()
SIZES = {
    "large": LARGE._replace(batch=1),
    "8b": LARGE._replace(batch=1, layers=32, vocabulary=128256),
    "30b": EXPERTS._replace(layers=48),
    "70b": LARGE._replace(batch=1, layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128256),
}
SHARDED = ("70b",)  # no card holds it whole
PLAIN = ("peft_lora", "lora_fast_lora", "peft_dora", "lora_fast_dora")
PACKED = ("lora_fast_fp8_lora", "lora_fast_nf4_lora", "lora_fast_fp8_dora", "lora_fast_nf4_dora")
IMPLS = (*PLAIN, *PACKED)
LORA_ALONE = {"30b": PLAIN[:2], "70b": PLAIN[:2] + PACKED[:2]}  # sizes of one mode, without dropout
OVER_PACKED = ("ddp", "fsdp2_checkpointing")  # the modes that are measured over packed bases, too
GROUP = ("size", "layers", "mode", "p", "gpus")  # what rows that are measured together share
KINDS: dict[str, Callable[[str], Any]] = {"gpus": int, "mode": str, "p": float, "impl": str}
LR = 1e-4


class Case(NamedTuple):
    mode: str
    p: float
    gpus: int
    impl: str

    def __str__(self) -> str:
        return f"{self.mode} p={self.p} on {self.gpus}: {self.impl}"

    def of_model(self) -> models.Case:
        return models.Case(MODES[self.mode].checkpointing, self.impl, self.p)


def all_cases(gpus: int, size: str = "large") -> list[Case]:
    """Those that are measured together stand together."""
    part = size in LORA_ALONE
    modes = ["fsdp2_checkpointing"] if part else list(MODES)
    counts = (gpus,) if size in SHARDED else sorted({gpus, 1})[::-1]
    return [
        Case(mode, p, count, impl)
        for mode, p, count in itertools.product(modes, common.PS[: 2 - part], counts)
        for impl in LORA_ALONE.get(size, PLAIN + PACKED * (mode in OVER_PACKED))
    ]


class Ready(NamedTuple):
    """A candidate that is warm, what a step of it took and its peak memory."""

    step: Callable[[], Tensor]
    seconds: float
    peak_mib: float | str


def ready(case: Case, base: torch.nn.Module | None, size: Size, mesh: DeviceMesh) -> Ready:
    """``base``: None: each model is made sharded."""
    gc.collect()  # nothing may be freed between before and the peak
    cuda, mode = size.device == "cuda", MODES[case.mode]
    before = torch.cuda.memory_allocated() if cuda else 0
    if base is None:
        model = sharded(case.of_model(), size, mesh)
    else:
        model = wrap(models.model_of(case.of_model(), base), mode, mesh)
    if base is not None and not mode.fsdp2:  # it runs on the base's own weights, and FSDP2 on shards that it copied
        before -= sum(parameter.nbytes for parameter in base.parameters())
    torch.manual_seed(dist.get_rank())  # for the tokens, and dropout
    batches = torch.randint(size.vocabulary, (mode.accumulate, size.batch, size.length), device=size.device)
    step = step_of(model, list(batches), LR)
    step().item()  # compiles, makes the optimiser's state
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step().item()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return Ready(step, seconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else "")


def measured(
    cases: list[Case],
    base: torch.nn.Module | None,
    size: Size,
    mesh: DeviceMesh,
    rounds: int,
    limit: float,
    about: common.Row,
) -> list[common.Row]:
    """A row for each case; they share all but impl. Fewer rounds, though two, where all would take over ``limit``
    seconds."""
    gc.collect()  # the models before these, which are rings
    if size.device == "cuda":
        torch.cuda.empty_cache()
    found = {case: ready(case, base, size, mesh) for case in cases}
    slowest = max(of_all(sum(candidate.seconds for candidate in found.values())))
    rounds = min(rounds, max(2, int(limit / (2 * slowest))))
    times = models.measure({str(case): candidate.step for case, candidate in found.items()}, rounds, size.device)
    everywhere = of_all((times, {str(case): candidate.peak_mib for case, candidate in found.items()}))
    rows = []
    for case in cases:
        slowest_times = [max(step) for step in zip(*(times[str(case)] for times, _ in everywhere), strict=True)]
        median, p20, p80 = timing.summary(slowest_times)
        tokens = size.batch * size.length * MODES[case.mode].accumulate
        peak = max(peaks[str(case)] for _, peaks in everywhere)
        rows.append(
            {
                **about,
                "gpus": case.gpus,
                "dtype": size.dtype,
                "layers": size.layers,
                "tokens": tokens,
                "r": models.R,
                "p": case.p,
                "mode": case.mode,
                "what": "step",
                "impl": case.impl,
                "median_us": round(median),
                "p20_us": round(p20),
                "p80_us": round(p80),
                "tokens_per_s": round(tokens / median * 1e6),
                "scaling": "",
                "peak_mib": round(peak) if size.device == "cuda" else "",
            }
        )
    return rows


def scaled(rows: list[common.Row]) -> list[common.Row]:
    """The rows with the scaling, where it was measured on one GPU too."""
    alone = {(row["mode"], row["p"], row["impl"]): row["tokens_per_s"] for row in rows if row["gpus"] == 1}

    def scaling(row: common.Row) -> float | str:
        one = alone.get((row["mode"], row["p"], row["impl"]))
        return "" if one is None else round(row["tokens_per_s"] / one, 4)

    return [{**row, "scaling": scaling(row)} for row in rows]


def measure(
    cases: list[Case], size: Size, whole: bool, rounds: int, limit: float, about: common.Row, path: Path
) -> list[common.Row]:
    """In each process: all rows; ``whole``: each has the base on its card. The first process writes them after every
    group, so that a run cut short leaves its part."""
    first = dist.get_rank() == 0
    meshes = {gpus: group_of(gpus, size.device) for gpus in dict.fromkeys(case.gpus for case in cases)}
    base = models.base_model(size) if whole else None
    if size.device == "cuda":
        x = torch.ones(64, 64, device="cuda", requires_grad=True)
        (x @ x).sum().backward()  # cuBLAS's workspaces, so that they are nobody's peak
    rows: list[common.Row] = []
    groups = [list(group) for _, group in itertools.groupby(cases, lambda case: case[:3])]
    titles = [str(group[0]).partition(":")[0] for group in groups]
    walk = iter(common.progress(titles, "bench_distributed")) if first else iter(titles)
    for group, _ in zip(groups, walk, strict=True):
        rows = scaled(rows + measured(group, base, size, meshes[group[0].gpus], rounds, limit, about))
        if first:
            common.write_csv(path, COLUMNS, common.others(path, rows, GROUP) + rows)
    return rows


def summarise(rows: list[common.Row]) -> str:
    """All rows as a table, ours also as parts of stock PEFT's time and peak memory."""
    found = {(row["mode"], row["p"], row["gpus"], row["impl"]): row for row in rows}
    table = []
    for (*where, impl), row in found.items():
        stock = found.get((*where, models.stock_of(impl)), row)
        of_stock = [
            f"{row[column] / stock[column]:.3f}" if row is not stock and row[column] else ""
            for column in ("median_us", "peak_mib")
        ]
        table.append(
            [
                *where,
                impl,
                f"{row['median_us'] / 1000:.1f}",
                row["tokens_per_s"],
                row["scaling"],
                row["peak_mib"],
                *of_stock,
            ]
        )
    return common.markdown(
        [
            "mode",
            "p",
            "GPUs",
            "step",
            "ms",
            "tokens/s a GPU",
            "scaling",
            "peak MiB",
            "time of stock's",
            "peak of stock's",
        ],
        table,
    )


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """(arguments, the cases to run)."""
    parser = arguments.parser_of("bench_distributed", __doc__)
    parser.add_argument("--gpus", type=positive, help="default: all that there are; 2 processes with --tiny")
    parser.add_argument(
        "--check",
        action="store_true",
        help="losses, adapters, checkpoints and reports instead of times; the exit status is 1 if anything is wrong",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny model in fp32 on the CPU, processes that talk by "
        "gloo; the file is bench_distributed_cpu_xGPUS.csv",
    )
    parser.add_argument("--size", choices=SIZES, default="large", help="default large")
    parser.add_argument("--rounds", type=positive, default=4, help="at most (default 4)")
    parser.add_argument(
        "--limit",
        type=positive,
        default=6,
        metavar="SECONDS",
        help="fewer rounds, though two, where they would take a group longer (default 6)",
    )
    parser.add_argument("--steps", type=positive, default=20, help="of --check (default 20)")
    parser.add_argument(
        "--layers",
        type=positive,
        help=f"default {LARGE.layers}; {check_distributed.LAYERS} with --check; 1 with --tiny",
    )
    arguments.add_only(parser, KINDS, "--check goes by mode and, for LoRA or DoRA, impl")
    arguments.add_files(parser, "bench_distributed_CARD_xGPUS.csv is; rows that are not measured stay in it")
    args = parser.parse_args(argv)
    if args.check and args.size in SHARDED:
        parser.error(f"--check: got --size {args.size}, expected one that a card holds whole")
    args.gpus = args.gpus or (2 if args.tiny else max(1, torch.cuda.device_count()))
    for key, there in ("impl", IMPLS), ("mode", tuple(MODES)):
        unknown = {value for k, values in args.only if k == key for value in values - set(there)}
        if unknown:
            parser.error(f"--only {key}: got {', '.join(sorted(unknown))}, expected {key}s among {', '.join(there)}")
    cases = [c for c in all_cases(args.gpus, args.size) if all(getattr(c, key) in values for key, values in args.only)]
    if not cases:
        parser.error("--only leaves nothing to measure")
    return args, cases


def why_not(args: argparse.Namespace) -> str | None:
    """Why the run cannot start, in words."""
    if args.tiny:
        return None
    if (reason := common.why_no_gpu()) is not None:
        return f"{reason} --tiny runs on the CPU."
    there = torch.cuda.device_count()
    return None if args.gpus <= there else f"--gpus: got {args.gpus}, expected at most {there}: so many are there"


def main(argv: list[str] | None = None) -> int:
    args, cases = parse(argv)
    if (reason := why_not(args)) is not None:
        print(reason, file=sys.stderr)
        return 1
    size = (
        TINY._replace(hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=64, layers=1, length=8)
        if args.tiny
        else SIZES[args.size]
    )
    layers = min(size.layers, check_distributed.LAYERS) if args.check else size.layers
    size = size._replace(layers=args.layers or layers)
    if args.check:
        kinds, modes = (
            list(dict.fromkeys(names))
            for names in zip(*((case.impl.rpartition("_")[2], case.mode) for case in cases), strict=True)
        )
        return check_distributed.main(args.gpus, size, kinds, modes, args.steps)
    about, start = common.run_columns(args.commit, size.device), time.monotonic()
    about["size"] = "tiny" if args.tiny else args.size
    path = args.out / f"bench_distributed_{common.card(about['gpu'])}_x{args.gpus}.csv"
    backend = "auto" if args.tiny else "triton"  # on a GPU never the slow path unawares
    whole = args.size not in SHARDED
    rows = processes(args.gpus, size.device, backend, measure, cases, size, whole, args.rounds, args.limit, about, path)
    print(
        f"\n{args.gpus} x {about['gpu']}, torch {about['torch']}, triton {about['triton']}, "
        f"commit {about['commit']}, {time.monotonic() - start:.0f} s\n"
    )
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
