"""LoRA layers against the frozen ``nn.Linear``: time and peak memory of forward and forward + backward.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_lora

All candidates of a shape and rank hold equal values (adapters are not zero: zeros draw less power). Those of one shape
run in random order each round, all ranks, with dropout and without, beside one frozen layer: candidates that are bound
by memory let the chip cool, and frozen runs faster in their company. fwd records for a backward, as in training; a step
of fwd+bwd drops the gradients, then runs y = layer(x) and y.backward(dy). No bias, no autocast.

frozen          nn.Linear whose weight asks for no gradient; frozen_again is the same once more, to show the noise
eager           lora_fast.reference: plain torch in its best form (addmm), adapters in float32 as in LoRALinear
eager_compiled  torch.compile of the same
peft            PEFT's layer, where PEFT is installed; adapters in x's dtype (autocast_adapter_dtype=False): with its
                default of float32 ones it would upcast x outside autocast
lora_fast_lora  LoRALinear
eager_fp8       stock parts over an fp8 base: torch._scaled_mm both ways (benchmarks/fp8.py), addmm; 16-bit dtypes only,
                and shapes that it takes
lora_fast_fp8_lora  LoRALinear over the same base (base_dtype="float8_e4m3")
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import arguments, common, fp8
from benchmarks.summary import summarise
from lora_fast import DoRALinear, LoRALinear, reference, set_backend, timing
from lora_fast.timing import Candidate

FROZEN = ("frozen", "frozen_again")
IMPLS = (
    "frozen",
    "frozen_again",
    "eager",
    "eager_compiled",
    "peft",
    "eager_fp8",
    "lora_fast_fp8_lora",
    "lora_fast_lora",
)
COLUMNS = ("gpu torch triton commit dtype M K N r p what impl median_us p20_us p80_us ratio_to_frozen peak_mib").split()
KINDS: dict[str, Callable[[str], Any]] = {"dtype": str, "M": int, "K": int, "N": int, "r": int, "p": float, "impl": str}


class Case(NamedTuple):
    dtype: str
    M: int
    K: int
    N: int
    r: int
    p: float

    def is_main(self) -> bool:
        """Most targets speak of these points."""
        return self.r == 16 and self.dtype == "bf16"


def all_cases(ranks: tuple[int, ...]) -> list[Case]:
    return cases_of(common.SHAPES, ranks) + [
        Case(dtype, *common.SHAPES[0], 16, p) for dtype in ("fp16", "fp32") for p in common.PS
    ]


def cases_of(shapes: Iterable[tuple[int, int, int]], ranks: tuple[int, ...]) -> list[Case]:
    return [Case("bf16", *shape, r, p) for shape in shapes for r in ranks for p in common.PS]


class Suite(NamedTuple):
    """What one benchmark script measures."""

    name: str
    doc: str
    cases: list[Case]
    impls: tuple[str, ...]
    build: Callable[[Case, tuple[str, ...], str], dict[str, Candidate]]
    summarise: Callable[[list[common.Row], list[common.Row]], str]
    graphed: int = 1024  # rows of the cases that also run in CUDA graphs


def build(case: Case, impls: tuple[str, ...], device: str) -> dict[str, Candidate]:
    """The candidates by name; peft is left out where it is not installed."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": common.DTYPES[case.dtype]}
    x = torch.randn(case.M, case.K, **kind).requires_grad_()
    dy = torch.randn(case.M, case.N, **kind)
    frozen = nn.Linear(case.K, case.N, bias=False, **kind).requires_grad_(False)
    ours = LoRALinear.from_linear(frozen, case.r, 2 * case.r, case.p, init_lora_weights=False)

    def eager(linear: Callable[..., Tensor], over: LoRALinear = ours) -> Candidate:
        weight, a, b = over.weight, over.lora_A, over.lora_B
        return Candidate(lambda x: linear(x, weight, a, b, ours.scaling, None, case.p), x, dy, [x, a, b])

    made: dict[str, Candidate] = {}
    for impl in impls:
        if impl in FROZEN:
            made[impl] = Candidate(frozen, x, dy, [x])
        elif impl == "eager":
            made[impl] = eager(reference.lora_linear)
        elif impl == "eager_compiled":
            made[impl] = eager(torch.compile(reference.lora_linear, fullgraph=True, dynamic=False))
        elif impl == "peft" and importlib.util.find_spec("peft"):
            layer = peft_layer(ours)
            made[impl] = Candidate(layer, x, dy, [x, *(p for p in layer.parameters() if p.requires_grad)])
        elif impl == "lora_fast_lora":
            made[impl] = Candidate(ours, x, dy, [x, ours.lora_A, ours.lora_B])
        elif "fp8" in impl and case.dtype != "fp32":
            layer = over(ours, "float8_e4m3")
            made[impl] = Candidate(layer, x, dy, [x, layer.lora_A, layer.lora_B])
            if impl == "eager_fp8":
                made[impl] = eager(fp8.lora_linear, layer)
    return made


def over(
    ours: LoRALinear, base_dtype: str | None, base_compute: str | None = None, linear: nn.Linear | None = None
) -> LoRALinear:
    """The same layer over such a base; made from this one, where it is given."""
    options = ours.r, ours.lora_alpha, ours.lora_dropout
    linear = linear or ours.to_linear()
    layer = type(ours).from_linear(linear, *options, base_dtype=base_dtype, base_compute=base_compute)
    layer.load_state_dict({name: getattr(ours, name) for name in ours.adapter_names}, strict=False)
    return layer


def peft_layer(ours: LoRALinear, base: nn.Module | None = None) -> nn.Module:
    """PEFT's layer on the same base weight, or on another base, with equal adapters in the weight's dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=ours.r,
        lora_alpha=int(ours.lora_alpha),
        lora_dropout=ours.lora_dropout,
        target_modules=["0"],
        use_dora=isinstance(ours, DoRALinear),
    )
    model: Any = get_peft_model(nn.Sequential(base or ours.to_linear()), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A)
        layer.lora_B["default"].weight.copy_(ours.lora_B)
        if isinstance(ours, DoRALinear):
            layer.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    return layer


def measured(built: dict[Case, dict[str, Candidate]], rounds: int, graph: bool, about: common.Row) -> list[common.Row]:
    """A row for each case, candidate and each of fwd and fwd+bwd, from cases that differ in r and p alone; under CUDA
    graphs peak_mib stays empty. The frozen layer of the first case serves them all."""
    first = next(iter(built))
    calls = {
        (what, impl, case.r, case.p): call
        for case, candidates in built.items()
        for impl, candidate in candidates.items()
        if case is first or impl not in FROZEN
        for what, call in candidate.calls().items()
    }
    peaks: dict[tuple[str, str, int, float], Any] = {key: "" for key in calls}
    if graph:
        torch.cuda.synchronize()
        calls = {key: timing.graphed(call) for key, call in calls.items()}
    else:
        peaks = {key: round(timing.peak_mib(call), 2) for key, call in calls.items()}
    name = "{} {} {} {}".format
    times = timing.measure({name(*key): call for key, call in calls.items()}, rounds)
    rows = []
    for case, candidates in built.items():
        for what, impl in ((what, impl) for impl in candidates for what in ("fwd", "fwd+bwd")):
            of = first if impl in FROZEN else case
            key = what, impl, of.r, of.p
            median, p20, p80 = timing.summary(times[name(*key)])
            ratio = median / timing.summary(times[name(what, "frozen", first.r, first.p)])[0]
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
                    "peak_mib": peaks[key],
                }
            )
    return rows


def parse(argv: list[str] | None, suite: Suite) -> tuple[argparse.Namespace, list[Case], tuple[str, ...]]:
    """(arguments, the cases to run, the impls to run)."""
    parser = arguments.parser_of(suite.name, suite.doc)
    arguments.add_rounds_of_dtypes(parser)
    arguments.add_only(parser, KINDS)
    parser.add_argument("--quick", action="store_true", help="a first look: r=16 in bf16, a third of the rounds")
    graphs = f"for M={suite.graphed} under CUDA graphs, {suite.name}_graph_CARD.csv"
    arguments.add_files(parser, f"{suite.name}_CARD.csv and, {graphs} are rewritten")
    args = parser.parse_args(argv)
    wanted = [(key, values) for key, values in args.only if key != "impl"]
    cases = [c for c in suite.cases if all(getattr(c, key) in values for key, values in wanted)]
    for key, values in args.only:
        if key == "impl" and not values <= set(suite.impls):
            parser.error(f"--only impl: got {', '.join(values)}, expected impls among {', '.join(suite.impls)}")
    impls = [values | {"frozen"} for key, values in args.only if key == "impl"]
    cases = [c for c in cases if c.is_main()] if args.quick else cases
    if not cases:
        parser.error("--only leaves nothing to measure")
    return args, cases, tuple(impl for impl in suite.impls if all(impl in names for names in impls))


def run(argv: list[str] | None, suite: Suite) -> int:
    args, cases, impls = parse(argv, suite)
    reason = common.why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about, start = common.run_columns(args.commit), time.monotonic()
    card = common.card(about["gpu"])
    fewer = max(3, args.rounds // 3)
    rows: list[common.Row] = []
    graph_rows: list[common.Row] = []
    save = functools.partial(common.write_csv, columns=COLUMNS)
    groups = [list(group) for _, group in itertools.groupby(cases, lambda case: case._replace(r=0, p=0))]
    for group in common.progress(groups, suite.name):
        rounds = args.rounds if group[0].dtype == "bf16" and not args.quick else fewer
        built = {case: suite.build(case, impls, "cuda") for case in group}
        rows += measured(built, rounds, False, about)
        save(
            args.out / f"{suite.name}_{card}.csv", rows=rows
        )  # after each group, so that a run cut short leaves its part
        main = {case: candidates for case, candidates in built.items() if case.is_main()}
        if main and group[0].M == suite.graphed:
            graph_rows += measured(main, rounds, True, about)
            save(args.out / f"{suite.name}_graph_{card}.csv", rows=graph_rows)
        del built
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, "
        f"{time.monotonic() - start:.0f} s\n"
    )
    print(suite.summarise(rows, graph_rows))
    return 0


LORA = Suite("bench_lora", __doc__ or "", all_cases((16, 8, 64, 256)), IMPLS, build, summarise)


def main(argv: list[str] | None = None) -> int:
    return run(argv, LORA)


if __name__ == "__main__":
    sys.exit(main())
