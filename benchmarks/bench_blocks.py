"""Blocks against the same of frozen ``nn.Linear``: time and peak memory of forward + backward.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_blocks

mlp: down(silu(gate(x)) * up(x)), gate and up from ``hidden`` to ``other`` features, down back. gate_up: the same with
one layer for both, in halves. fc: fc2(gelu(fc1(x))), from ``hidden`` to ``other`` features and back. qkv: three
projections of one x from ``hidden`` features, to ``hidden`` and twice to ``other``. A step drops the gradients, then
runs the block and its backward from given gradients of its outputs; x asks for a gradient. bf16, no bias, no autocast.

All candidates of a shape hold equal values. They run in random order each round, with dropout and without, beside one
frozen block (see bench_lora).

frozen                  nn.Linear whose weight asks for no gradient; frozen_again is the same once more: the noise
peft_lora, peft_dora    PEFT's layers, where PEFT is installed; adapters in x's dtype
lora_fast_layers_lora, lora_fast_layers_dora  LoRALinear and DoRALinear, a layer at a time
lora_fast_lora, lora_fast_dora                lora_glu, lora_mlp and lora_group over the same
"""

import argparse
import gc
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import arguments, common
from benchmarks.arguments import positive
from benchmarks.bench_lora import peft_layer
from lora_fast import DoRALinear, Layer, LoRALinear, lora_glu, lora_group, lora_mlp, set_backend, timing

FROZEN = ("frozen", "frozen_again")
IMPLS = (
    *FROZEN,
    "peft_lora",
    "peft_dora",
    "lora_fast_layers_lora",
    "lora_fast_layers_dora",
    "lora_fast_lora",
    "lora_fast_dora",
)
COLUMNS = (
    "gpu torch triton commit dtype block M hidden other r p impl median_us p20_us p80_us ratio_to_frozen peak_mib"
).split()
KINDS: dict[str, Callable[[str], Any]] = {"block": str, "M": int, "p": float, "impl": str}


class Case(NamedTuple):
    dtype: str
    block: str
    M: int
    hidden: int
    other: int
    r: int
    p: float


SHAPES = [
    ("mlp", 8192, 4096, 14336),
    ("mlp", 2048, 2048, 8192),
    ("gate_up", 8192, 4096, 14336),
    ("fc", 8192, 4096, 14336),
    ("fc", 8192, 1024, 4096),
    ("qkv", 8192, 4096, 1024),
    ("qkv", 2048, 2048, 512),
]
CASES = [Case("bf16", *shape, 16, p) for shape in SHAPES for p in common.PS]


class Candidate(NamedTuple):
    """A block with what a step needs."""

    forward: Callable[[], Sequence[Tensor]]
    dys: list[Tensor]
    leaves: list[Tensor]

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        ys = self.forward()
        torch.autograd.backward(ys, self.dys)


def sizes(case: Case) -> list[tuple[int, int]]:
    """(columns of x, columns of y) of each layer."""
    hidden, other = case.hidden, case.other
    inner = {"mlp": [other, other], "gate_up": [2 * other], "fc": [other]}.get(case.block)
    if inner is None:
        return [(hidden, hidden), (hidden, other), (hidden, other)]
    return [*((hidden, n) for n in inner), (other, hidden)]


def in_turn(block: str, layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Sequence[Tensor]:
    """The outputs of the block, a layer at a time."""
    if block == "qkv":
        return [layer(x) for layer in layers]
    *inner, down = layers
    if block == "fc":
        return [down(F.gelu(inner[0](x)))]
    gate, up = inner[0](x).chunk(2, -1) if block == "gate_up" else (layer(x) for layer in inner)
    return [down(F.silu(gate) * up)]


def as_one(block: str, layers: Sequence[LoRALinear], x: Tensor) -> Sequence[Tensor]:
    """The same as one step."""
    given = [
        Layer(
            layer.weight,
            layer.lora_A,
            layer.lora_B,
            layer.scaling,
            None,
            layer.lora_dropout,
            getattr(layer, "lora_magnitude_vector", None),
        )
        for layer in layers
    ]
    if block == "qkv":
        return lora_group(x, given)
    *inner, down = given
    if block == "mlp":
        return [lora_glu(x, inner[0], inner[1], down, "silu")]
    act, gate = ("gelu", None) if block == "fc" else ("silu", "first")
    return [lora_mlp(x, inner[0], down, act, gate=gate)]


def build(case: Case, impls: Sequence[str], device: str) -> dict[str, Candidate]:
    """The candidates by name; PEFT's are left out where it is not installed."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": common.DTYPES[case.dtype]}
    x = torch.randn(case.M, case.hidden, **kind).requires_grad_()
    frozen = [nn.Linear(k, n, bias=False, **kind).requires_grad_(False) for k, n in sizes(case)]
    widths = [n for _, n in sizes(case)] if case.block == "qkv" else [case.hidden]
    dys = [torch.randn(case.M, n, **kind) for n in widths]
    options = case.r, 2 * case.r, case.p
    layers: dict[str, list[LoRALinear]] = {}
    for form, made in (("lora", LoRALinear), ("dora", DoRALinear)):
        layers[form] = [made.from_linear(one, *options, init_lora_weights=False) for one in frozen]
    for lora, dora in zip(layers["lora"], layers["dora"], strict=True):  # equal adapters
        dora.load_state_dict({"lora_A": lora.lora_A, "lora_B": lora.lora_B}, strict=False)

    def candidate(block: Callable[..., Sequence[Tensor]], modules: Sequence[Any]) -> Candidate:
        leaves = [p for module in modules for p in module.parameters() if p.requires_grad]
        return Candidate(lambda: block(case.block, modules, x), dys, [x, *leaves])

    found: dict[str, Candidate] = {}
    for impl in impls:
        form = impl.rpartition("_")[2]
        if impl in FROZEN:
            found[impl] = candidate(in_turn, frozen)
        elif impl.startswith("peft"):
            if importlib.util.find_spec("peft"):
                found[impl] = candidate(in_turn, [peft_layer(layer) for layer in layers[form]])
        else:
            found[impl] = candidate(in_turn if "layers" in impl else as_one, layers[form])
    return found


def measured(built: dict[Case, dict[str, Candidate]], rounds: int, about: common.Row) -> list[common.Row]:
    """A row for each case and candidate, from cases that differ in p alone; the first's frozen block serves all."""
    first = next(iter(built))
    steps: dict[str, Callable[[], object]] = {
        f"{impl} {case.p}": candidate.step
        for case, candidates in built.items()
        for impl, candidate in candidates.items()
        if case is first or impl not in FROZEN
    }
    peaks = {name: round(timing.peak_mib(step), 2) for name, step in steps.items()}
    times = {name: timing.summary(found) for name, found in timing.measure(steps, rounds).items()}
    rows = []
    for case, candidates in built.items():
        for impl in candidates:
            name = f"{impl} {(first if impl in FROZEN else case).p}"
            median, p20, p80 = times[name]
            rows.append(
                {
                    **about,
                    **case._asdict(),
                    "impl": impl,
                    "median_us": round(median, 2),
                    "p20_us": round(p20, 2),
                    "p80_us": round(p80, 2),
                    "ratio_to_frozen": round(median / times[f"frozen {first.p}"][0], 4),
                    "peak_mib": peaks[name],
                }
            )
    return rows


def table(rows: Sequence[common.Row]) -> str:
    """Ratios to frozen, and MiB, a line for each case."""
    lines = []
    for case, of_case in itertools.groupby(rows, lambda row: tuple(row[name] for name in Case._fields)):
        found = {row["impl"]: f"{row['ratio_to_frozen']:.3f} ({row['peak_mib']:.0f})" for row in of_case}
        lines.append((*case[1:5], case[6], *(found.get(impl, "") for impl in IMPLS)))
    return common.markdown(("block", "M", "hidden", "other", "p", *IMPLS), lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case], list[str]]:
    """(arguments, the cases to run, the impls to run)."""
    parser = arguments.parser_of("bench_blocks", __doc__)
    parser.add_argument("--rounds", type=positive, default=24, help="default 24")
    arguments.add_only(parser, KINDS)
    arguments.add_files(parser, "bench_blocks_CARD.csv is rewritten")
    args = parser.parse_args(argv)
    impls, cases = list(IMPLS), CASES
    for key, values in args.only:
        if key == "impl":
            if not values <= set(IMPLS):
                parser.error(f"--only impl: got {', '.join(values)}, expected impls among {', '.join(IMPLS)}")
            impls = [impl for impl in impls if impl in values | {"frozen"}]
        else:
            cases = [case for case in cases if getattr(case, key) in values]
    if not cases:
        parser.error("--only leaves nothing to measure")
    return args, cases, impls


def main(argv: list[str] | None = None) -> int:
    args, cases, impls = parse(argv)
    reason = common.why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about, start = common.run_columns(args.commit), time.monotonic()
    path = args.out / f"bench_blocks_{common.card(about['gpu'])}.csv"
    rows: list[common.Row] = []
    groups = [list(group) for _, group in itertools.groupby(cases, lambda case: case._replace(p=0))]
    for group in common.progress(groups, "bench_blocks"):
        built = {case: build(case, impls, "cuda") for case in group}
        rows += measured(built, args.rounds, about)
        common.write_csv(path, COLUMNS, rows)  # after each shape, so that a run cut short leaves its part
        del built
        gc.collect()
        torch.cuda.empty_cache()
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, "
        f"{time.monotonic() - start:.0f} s\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
