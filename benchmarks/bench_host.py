"""What a step of a small layer costs, where the host decides: forward + backward, eager, r = 16, bf16.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_host

Measured as bench_lora does, with its columns, beside the frozen layer; its two measurements are pooled, and a shape
counts where they differ by at most 5% (else it is measured again, three times at most). Rows of other versions of
Triton stay in the file, since the launches are Triton's: the column triton tells them apart.

frozen, frozen_again, eager, peft, lora_fast_lora  as in bench_lora
lora_fast_dora     DoRALinear
lora_fast_patched  the PEFT layer under patch_peft
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import arguments, bench_dora, bench_lora, common
from benchmarks.arguments import positive
from benchmarks.bench_lora import COLUMNS, FROZEN, Case
from lora_fast import patch_peft, set_backend, timing
from lora_fast.timing import Candidate

SHAPES = [(1024, 4096, 4096), (512, 2048, 2048)]
IMPLS = (*FROZEN, "eager", "peft", "lora_fast_lora", "lora_fast_dora", "lora_fast_patched")
SPREAD = 0.05  # of the two frozen layers


def build(case: Case, device: str) -> dict[str, Candidate]:
    made = bench_lora.build(case, ("frozen", "frozen_again", "eager", "peft", "lora_fast_lora"), device)
    made |= bench_dora.build(case, ("lora_fast_dora",), device)
    if "peft" in made:
        layer = bench_lora.peft_layer(made["lora_fast_lora"].layer)  # type: ignore[arg-type]
        holder = nn.Sequential(layer)
        assert patch_peft(holder).fused == (device != "cpu")
        leaves = [p for p in layer.parameters() if p.requires_grad]
        made["lora_fast_patched"] = made["peft"]._replace(layer=holder[0], leaves=[made["peft"].x, *leaves])
    return {impl: made[impl] for impl in IMPLS if impl in made}


def measured(case: Case, rounds: int, about: common.Row, device: str = "cuda") -> tuple[list[common.Row], float]:
    """A row for each candidate, and how far the two frozen ones are apart."""
    steps: dict[str, Callable[[], object]] = {name: made.step for name, made in build(case, device).items()}
    for again in (True, True, False):
        times = timing.measure(steps, rounds, device=device)
        one, other = (timing.summary(times[impl])[0] for impl in FROZEN)
        if (apart := abs(one / other - 1)) <= SPREAD or not again:
            break
    frozen = timing.summary(times["frozen"] + times["frozen_again"])[0]
    rows = []
    for impl in steps:
        median, p20, p80 = timing.summary(times[impl])
        rows.append(
            {
                **about,
                **case._asdict(),
                "what": "fwd+bwd",
                "impl": impl,
                "median_us": round(median, 2),
                "p20_us": round(p20, 2),
                "p80_us": round(p80, 2),
                "ratio_to_frozen": round(median / frozen, 4),
                "peak_mib": "",
            }
        )
    return rows, apart


def of_other_versions(path: Path, triton: str) -> list[common.Row]:
    """The rows of a results file that were measured with other versions of Triton."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["triton"] != triton]


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_host", __doc__)
    parser.add_argument("--rounds", type=positive, default=48)
    arguments.add_files(parser, "bench_host_CARD.csv is written")
    args = parser.parse_args(argv)
    if (reason := common.why_no_gpu()) is not None:
        print(reason, file=sys.stderr)
        return 1
    set_backend("triton")  # never the slow path unawares
    about = common.run_columns(args.commit)
    path = args.out / f"bench_host_{common.card(about['gpu'])}.csv"
    rows = of_other_versions(path, about["triton"])
    for shape in common.progress(SHAPES, "bench_host"):
        m, k, n = shape
        found, apart = measured(Case("bf16", m, k, n, 16, 0), args.rounds, about)
        rows += found
        common.write_csv(path, COLUMNS, rows)
        print(
            f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {shape}: the frozen layers differ "
            f"by {apart:.1%}{'' if apart <= SPREAD else ', too much'}"
        )
        print(
            common.markdown(
                ("impl", "us a step", "times frozen"),
                [(row["impl"], row["median_us"], row["ratio_to_frozen"]) for row in found],
            )
        )
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
