"""LoRA on the experts of a Mixture-of-Experts layer against frozen experts: time and peak memory of forward + backward.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_experts

Both projections of all experts are adapted, adapters in the weights' dtype; x and the routing weights ask for a
gradient, as behind other layers they do. Routing is random, with skew = 1 some experts are chosen more often. mode says
whether steps run in CUDA graphs, where the GPU's time counts and not the host's; peak_mib is an eager step's.

frozen        transformers' grouped_mm experts as of 5.22, restated here; with --installed the function of the
              transformers that is installed (before 5.22 it masks whole activations). The column
              transformers says which
frozen_again  the same once more, to show the noise
eager         the restated composition of grouped products (F.grouped_mm) with LoRA's
peft          PEFT's target_parameters, where PEFT is installed; not in graphs
lora_fast     the fused kernels, and lora_fast_frozen the same without adapters
"""

import gc
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks import arguments, common, experts
from benchmarks.arguments import positive
from lora_fast import set_backend, timing

IMPLS = ("frozen", "frozen_again", "eager", "peft", "lora_fast", "lora_fast_frozen")
COLUMNS = (
    "gpu torch triton transformers commit dtype model tokens r skew what mode impl median_us p20_us p80_us "
    "ratio_to_frozen peak_mib"
).split()
SAME = ("transformers", "dtype", "model", "tokens", "r", "skew", "what", "mode", "impl")  # of a row measured again
RESTATED = "5.22.2 restated"
MODES = ("graph", "eager")
TOKENS = (1024, 4096, 16384)


class Case(NamedTuple):
    dtype: str
    model: str
    tokens: int
    r: int
    skew: float


KINDS: dict[str, Callable[[str], Any]] = {
    "dtype": str,
    "model": str,
    "tokens": int,
    "r": int,
    "skew": float,
    "mode": str,
    "impl": str,
}


def cases() -> list[Case]:
    models = [model for model in experts.MODELS if model != "tiny"]
    plain = [Case("bf16", model, tokens, 16, 0.0) for model in models for tokens in TOKENS]
    skewed = [Case("bf16", model, 4096, 16, 1.0) for model in models]
    return plain + skewed + [Case("bf16", "qwen3-30b", 4096, r, 0.0) for r in (2, 64)]


def step_of(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], dout: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(dout)

    return step


def measured(
    case: Case,
    modes: tuple[str, ...],
    impls: tuple[str, ...],
    rounds: int,
    about: common.Row,
    device: str = "cuda",
    installed: bool = False,
) -> list[common.Row]:
    """A row for each mode and candidate."""
    size = experts.MODELS[case.model]
    at = experts.layer(size, case.tokens, case.r, case.skew, common.DTYPES[case.dtype], device)
    steps = {impl: step_of(*call, at.dout) for impl, call in experts.calls(at, impls, installed).items()}
    rows = []
    for mode in modes:
        timed: dict[str, Callable[[], object]] = dict(steps)
        peaks: dict[str, Any] = dict.fromkeys(steps, "")
        if mode == "graph":
            timed = {impl: timing.graphed(step) for impl, step in steps.items() if impl != "peft"}
        elif device != "cpu":
            peaks = {impl: round(timing.peak_mib(step), 2) for impl, step in steps.items()}
        times = timing.measure(timed, rounds, target_ms=20.0, device=device)
        frozen = timing.summary(times["frozen"])[0]
        for impl in timed:
            median, p20, p80 = timing.summary(times[impl])
            rows.append(
                {
                    **about,
                    **case._asdict(),
                    "what": "fwd+bwd",
                    "mode": mode,
                    "impl": impl,
                    "median_us": round(median, 2),
                    "p20_us": round(p20, 2),
                    "p80_us": round(p80, 2),
                    "ratio_to_frozen": round(median / frozen, 4),
                    "peak_mib": peaks[impl],
                }
            )
        timed.clear()
    return rows


def summarise(rows: list[common.Row]) -> str:
    table = [
        [
            row[name]
            for name in ("model", "tokens", "r", "skew", "mode", "impl", "median_us", "ratio_to_frozen", "peak_mib")
        ]
        for row in rows
    ]
    return common.markdown(("model", "tokens", "r", "skew", "mode", "impl", "us", "times frozen", "MiB"), table)


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_experts", __doc__)
    parser.add_argument("--rounds", type=positive, default=8)
    arguments.add_only(parser, KINDS)
    arguments.add_files(parser, "bench_experts_CARD.csv is; rows that are not measured stay in it")
    parser.add_argument("--installed", action="store_true", help="frozen is the installed transformers' own function")
    args = parser.parse_args(argv)
    wanted = cases()
    impls: tuple[str, ...] = IMPLS
    modes: tuple[str, ...] = MODES
    for name, values in args.only:
        if name == "impl":
            impls = tuple(impl for impl in impls if impl in {"frozen", *values})
        elif name == "mode":
            modes = tuple(mode for mode in modes if mode in values)
        else:
            wanted = [case for case in wanted if getattr(case, name) in values]
    if not wanted or not modes:
        parser.error("--only leaves nothing to measure")
    if (reason := common.why_no_gpu()) is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about = common.run_columns(args.commit)
    path, rows = args.out / f"bench_experts_{common.card(about['gpu'])}.csv", list[common.Row]()
    about = {**about, "transformers": importlib.metadata.version("transformers") if args.installed else RESTATED}
    for case in common.progress(wanted, "bench_experts"):
        found = measured(case, modes, impls, args.rounds, about, installed=args.installed)
        common.write_csv(path, COLUMNS, common.others(path, found, SAME) + found)
        rows += found
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}\n")
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
