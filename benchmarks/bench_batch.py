"""Several adapters in one batch against the frozen ``nn.Linear``: time and peak memory of forward and forward +
backward.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_batch

Rows are split evenly among the adapters, those of one lie together. All candidates of a shape run in random order each
round, eager, and then in CUDA graphs, where the GPU's time counts and not the host's. Ranks, rates and what a step does
are as in bench_lora.

frozen            nn.Linear whose weight asks for no gradient; frozen_again is the same once more, to show the noise
lora_fast_one     LoRALinear: one adapter for all rows; lora_fast_one_dora: DoRALinear
separate          LoRALinear's function for each adapter's rows, one after the other, outputs joined
peft              PEFT's layer with adapter_names, in inference, the one way that it has: what = fwd, without gradients
lora_fast_lora    lora_linear_batch
lora_fast_dora    dora_linear_batch
"""

import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import arguments, common
from benchmarks.arguments import positive
from lora_fast import Adapter, dora_linear_batch, lora_linear_batch, set_backend, timing
from lora_fast.functional import dora_linear, lora_linear
from lora_fast.timing import Candidate

FROZEN = "frozen", "frozen_again"
IMPLS = *FROZEN, "lora_fast_one", "lora_fast_one_dora", "separate", "peft", "lora_fast_lora", "lora_fast_dora"
COLUMNS = (
    "gpu torch triton commit dtype M K N r p adapters what impl median_us p20_us p80_us ratio_to_frozen peak_mib"
).split()
FEW = 2048, 4096, 4096
MODES = "eager", "graph"
Step = Callable[[], object]


class Case(NamedTuple):
    dtype: str
    M: int
    K: int
    N: int
    r: int
    p: float
    adapters: int


def all_cases() -> list[Case]:
    found = [Case("bf16", *shape, 16, 0.0, count) for shape in common.TARGETS for count in (4, 16, 64)]
    found += [Case("bf16", *FEW, 16, 0.0, 4), Case("bf16", *common.TARGETS[0], 16, 0.1, 4)]
    return found


def steps(case: Case, impls: tuple[str, ...], device: str) -> dict[tuple[str, str], Step]:
    """What is timed, by (what, impl); peft is left out where it is not installed."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": common.DTYPES[case.dtype]}
    x = torch.randn(case.M, case.K, **kind).requires_grad_()
    dy = torch.randn(case.M, case.N, **kind)
    frozen = nn.Linear(case.K, case.N, bias=False, **kind).requires_grad_(False)
    weight, count = frozen.weight, case.adapters
    adapters = [
        Adapter(
            (torch.randn(case.r, case.K, **kind) * case.K**-0.5).requires_grad_(),
            (torch.randn(case.N, case.r, **kind) * 0.1).requires_grad_(),
            2.0,
            case.p,
        )
        for _ in range(count)
    ]
    magnitude = weight.float().norm(dim=1)
    doras = [one._replace(lora_magnitude_vector=magnitude.clone().requires_grad_()) for one in adapters]
    which = torch.arange(case.M, device=device) * count // case.M
    rows = torch.bincount(which, minlength=count).tolist()

    def one(x: Tensor) -> Tensor:
        a, b, scaling, p, _ = adapters[0]
        return lora_linear(x, weight, a, b, scaling, dropout_p=p)

    def one_dora(x: Tensor) -> Tensor:
        a, b, scaling, p, own = doras[0]
        assert own is not None
        return dora_linear(x, weight, a, b, own, scaling, dropout_p=p)

    def separate(x: Tensor) -> Tensor:
        parts = zip(x.split(rows), adapters, strict=True)
        return torch.cat([lora_linear(own, weight, a, b, s, dropout_p=p) for own, (a, b, s, p, _) in parts])

    calls: dict[str, tuple[Callable[[Tensor], Tensor], list[Adapter]]] = {
        "frozen": (frozen, []),
        "frozen_again": (frozen, []),
        "lora_fast_one": (one, adapters[:1]),
        "lora_fast_one_dora": (one_dora, doras[:1]),
        "separate": (separate, adapters),
        "lora_fast_lora": (lambda x: lora_linear_batch(x, weight, adapters, which), adapters),
        "lora_fast_dora": (lambda x: dora_linear_batch(x, weight, doras, which), doras),
    }
    made: dict[tuple[str, str], Step] = {}
    for impl in impls:
        if impl == "peft":
            if importlib.util.find_spec("peft"):
                made["fwd", impl] = peft_step(case, frozen, adapters, which, x)
            continue
        call, trained = calls[impl]
        leaves = [x, *(t for one in trained for t in one.tensors if t is not None)]
        made |= {(what, impl): step for what, step in Candidate(call, x, dy, leaves).calls().items()}
    return made


def peft_step(case: Case, frozen: nn.Linear, adapters: list[Adapter], which: Tensor, x: Tensor) -> Step:
    """PEFT's own way: the loop over adapters of its layer in evaluation."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(frozen), config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, len(adapters)):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].eval()
    with torch.no_grad():
        for i, one in enumerate(adapters):
            layer.lora_A[f"a{i}"].weight.copy_(one.lora_A)
            layer.lora_B[f"a{i}"].weight.copy_(one.lora_B)
    names = [f"a{i}" for i in which.tolist()]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x, adapter_names=names)

    return forward


def measured(
    case: Case, impls: tuple[str, ...], rounds: int, graph: bool, about: common.Row, device: str = "cuda"
) -> list[common.Row]:
    """A row for each candidate and what it does; under CUDA graphs peak_mib stays empty."""
    calls = made = steps(case, impls, device)  # which hold the tensors that graphs read
    peaks: dict[tuple[str, str], Any] = dict.fromkeys(made, "")
    if graph:
        calls = {key: timing.graphed(call) for key, call in made.items() if key[1] != "peft"}
    elif device != "cpu":
        peaks = {key: round(timing.peak_mib(call), 2) for key, call in calls.items()}
    times = timing.measure({" ".join(key): call for key, call in calls.items()}, rounds, device=device)
    rows = []
    for what, impl in calls:
        median, p20, p80 = timing.summary(times[f"{what} {impl}"])
        ratio = median / timing.summary(times[f"{what} frozen"])[0]
        rows.append(
            {
                **about,
                **case._asdict(),
                "what": what,
                "impl": impl,
                "median_us": round(median, 2),
                "p20_us": round(p20, 2),
                "p80_us": round(p80, 2),
                "ratio_to_frozen": round(ratio, 4),
                "peak_mib": peaks[what, impl],
            }
        )
    return rows


def summarise(rows: list[common.Row]) -> str:
    """Ratios to the frozen layer, forward + backward: the geometric mean of the target shapes, by adapters."""
    lines = []
    for count in sorted({row["adapters"] for row in rows}):
        for impl in IMPLS:
            found = torch.tensor(
                [
                    row["ratio_to_frozen"]
                    for row in rows
                    if (row["adapters"], row["impl"], row["what"], row["p"]) == (count, impl, "fwd+bwd", 0)
                    and (row["M"], row["K"], row["N"]) in common.TARGETS
                ]
            )
            if len(found):
                lines.append((count, impl, len(found), f"{found.log().mean().exp():.3f}"))
    return common.markdown(("adapters", "impl", "shapes", "fwd+bwd / frozen"), lines)


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_batch", __doc__)
    parser.add_argument("--rounds", type=positive, default=24)
    parser.add_argument("--quick", action="store_true", help="the first shape and few rows, a third of the rounds")
    parser.add_argument("--impls", default=",".join(IMPLS), help="some of them, by commas; frozen always runs")
    parser.add_argument("--adapters", default="4,16,64", help="how many, by commas (default 4,16,64)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default both")
    arguments.add_files(parser, "bench_batch_CARD.csv and bench_batch_graph_CARD.csv are rewritten")
    args = parser.parse_args(argv)
    wanted = {"frozen", *args.impls.split(",")}
    if unknown := wanted - {*IMPLS}:
        parser.error(f"--impls: got {', '.join(sorted(unknown))}, expected some of {', '.join(IMPLS)}")
    impls = tuple(impl for impl in IMPLS if impl in wanted)
    if (reason := common.why_no_gpu()) is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about, start = common.run_columns(args.commit), time.monotonic()
    card, rounds = common.card(about["gpu"]), max(3, args.rounds // 3) if args.quick else args.rounds
    shapes = {common.TARGETS[0], FEW}
    counts = {int(count) for count in args.adapters.split(",")}
    cases = [case for case in all_cases() if case.adapters in counts and (not args.quick or case[1:4] in shapes)]
    rows: dict[str, list[common.Row]] = {mode: [] for mode in args.mode}
    for case in common.progress(cases, "bench_batch"):
        for mode, found in rows.items():
            found += measured(case, impls, rounds, mode == "graph", about)
            common.write_csv(args.out / f"bench_batch{'_graph' * (mode == 'graph')}_{card}.csv", COLUMNS, found)
            gc.collect()
            torch.cuda.empty_cache()
    print(f"\n{about['gpu']}, torch {about['torch']}, commit {about['commit']}, {time.monotonic() - start:.0f} s\n")
    for mode, found in rows.items():
        print(f"{mode}\n\n{summarise(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
