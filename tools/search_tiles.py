"""Search for better tiles of one kernel: on the GPU that is there, beside what is chosen now.

    python tools/search_tiles.py product --shape 1024,4096,4096 --shape 256,4096,4096
    python tools/search_tiles.py down --ways masked --shape 8192,4096,4096 --cold

(PYTHONPATH=. in front where the package is not installed.) For every shape (M,K,N: rows of x, in_features,
out_features) all candidates are compiled, by as many processes as there are cores, held against plain torch, and timed
in CUDA graphs, in each round all of them in a new random order. Printed are the fastest, what is chosen now ("now",
measured by itself: where its tile is a candidate, too, the two show the noise), for products cuBLAS without the
low-rank term, and which of them spill registers. A tile that wins goes into kernels/tiles.py or pass_tiles.py, with
what it gained; then compile it for the other chips (tools/compile_kernels.py), for what fits one may spill on another.

product         fwd y = x W^T + S B^T; dx dX = dY W + dS A; masked the same under dropout
product_with_s  the same where the launch makes S, or dS, too; "apart" are the two launches that do it otherwise
down            s S = x A^T; masked under dropout; ds dS = dY B
pair            plain dA and dB; masked under dropout
decode          y y without a backward
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from tile_work import FIELDS, TOLERANCE, WAYS, Shape, Work, candidates, named, refused, tile_of, work

from lora_fast import timing
from lora_fast.dispatch import why_not_triton
from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.tiles import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLD = 2**28  # bytes of inputs in turn, five times an H100's cache


def compile_part(args: argparse.Namespace, part: int, parts: int) -> None:
    """Launch this part of the candidates once: so they come into Triton's cache."""
    for shape, way in itertools.product(args.shape, args.ways):
        found = candidates(args.kernel, shape, args.rank, Chip.of(torch.device("cuda")))
        one = work(args.kernel, way, shape, args.rank, DTYPES[args.dtype], "cuda")
        for tile in found[part::parts]:
            try:
                with tiles.override(**{args.kernel: tile}):
                    one.run(one.program(), 0)
                torch.cuda.synchronize()
            except Exception as error:
                print(way, named(args.kernel, tile), type(error).__name__, flush=True)


class Row(NamedTuple):
    us: float
    name: str
    now: bool
    spills: int


def search(kernel: str, one: Work, found: list[Tile | None], rounds: int, chip: Chip) -> tuple[list[Row], int]:
    """(a row for each candidate that is right, for what is chosen now and for cuBLAS, by time; how many were not)."""
    made, failed = {"now": one.program()}, 0
    for tile in found:
        with tiles.override(**{kernel: tile}):
            made[named(kernel, tile)] = one.program()
    spills, runs = {}, {}
    for name, each in list(made.items()):
        try:
            right = one.error(each) <= TOLERANCE
        except Exception as error:  # too much shared memory, mostly
            right = False
            print(f"  {name}: {type(error).__name__}: {str(error)[:80]}")
        if not right:
            failed += 1
            continue
        spills[name] = max(getattr(compiled, "n_spills", 0) or 0 for compiled in each.compiled)
        runs[name] = graph(lambda i, each=each: one.run(each, i), len(one.given))  # type: ignore[misc]
    if one.library is not None:
        runs["cuBLAS"] = graph(one.library, len(one.given))
    launches = max(8, len(one.given))
    times = {name: timing.summary(us)[0] / launches for name, us in timing.measure(runs, rounds, target_ms=2.0).items()}
    now = named(kernel, tile_of(kernel, made["now"], chip))
    rows = [
        Row(us, f"{now}, now" if name == "now" else name, name == "now", spills.get(name, 0))
        for name, us in times.items()
    ]
    return sorted(rows), failed


def graph(launch: Callable[[int], object], copies: int) -> Callable[[], object]:
    def several() -> None:
        for i in range(max(8, copies)):
            launch(i % copies)

    return timing.graphed(several)


def table(rows: list[Row], top: int) -> list[str]:
    """The fastest, and those that one compares with wherever they stand."""
    now = next((row.us for row in rows if row.now), None)
    lines = []
    for place, row in enumerate(rows, 1):
        if place <= top or row.now or row.name == "cuBLAS":
            beside = "" if now is None else f"{row.us / now:6.3f}"
            spilled = f"  spills {row.spills}" if row.spills else ""
            lines.append(f"  {place:3} {row.us:9.2f} us {beside}  {row.name}{spilled}")
    return lines


def shape_of(text: str) -> Shape:
    parts = [int(part) for part in text.split(",")]
    if len(parts) != 3 or min(parts) < 1:
        raise ValueError
    return Shape(*parts)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=FIELDS)
    parser.add_argument("--shape", type=shape_of, action="append", required=True, metavar="M,K,N")
    parser.add_argument("--ways", type=lambda text: text.split(","), metavar="WAY[,WAY]", help="some of them only")
    parser.add_argument("--rank", type=int, default=16, help="a multiple of 8 (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="inputs of 256 MiB in turn, so that none is in the cache; decode always does",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--top", type=int, default=5, help="how many to print (default 5)")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="that compile (default: as many as cores, 16 at most)",
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of the candidates, in one of these processes
    args = parser.parse_args(argv)
    args.ways = args.ways or WAYS[args.kernel]
    if unknown := set(args.ways) - set(WAYS[args.kernel]):
        parser.error(f"{args.kernel} has no way {', '.join(sorted(unknown))}; it has {', '.join(WAYS[args.kernel])}")
    if args.rank < 8 or args.rank % 8:
        parser.error("--rank must be a multiple of 8")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    reason = "torch sees none here"
    if not torch.cuda.is_available() or (reason := why_not_triton(torch.device("cuda"), torch.bfloat16) or ""):
        print(f"A search for tiles needs a GPU that runs the kernels: {reason}.", file=sys.stderr)
        return 1
    chip, dtype = Chip.of(torch.device("cuda")), DTYPES[args.dtype]
    for shape in args.shape:
        if (why := refused(args.kernel, shape, args.rank, dtype, chip)) is not None:
            print(f"{args.kernel} is not for {','.join(map(str, shape))}: {why}.", file=sys.stderr)
            return 1
    if args.part is not None:
        compile_part(args, args.part, args.processes)
        return 0
    began = time.monotonic()
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--processes", str(args.processes)]
    parts = [subprocess.Popen([*command, "--part", str(i)], stdout=subprocess.DEVNULL) for i in range(args.processes)]
    for process in parts:
        process.wait()
    print(f"{torch.cuda.get_device_name()}; compiled in {time.monotonic() - began:.0f} s\n")
    winners = []
    for shape, way in itertools.product(args.shape, args.ways):
        what = f"{args.kernel} {way} {','.join(map(str, shape))}"
        size = dtype.itemsize * (shape.m * (shape.k + shape.n) + shape.k * shape.n)
        copies = -(-COLD // size) if args.cold or args.kernel == "decode" else 1
        one = work(args.kernel, way, shape, args.rank, dtype, "cuda", copies)
        found = candidates(args.kernel, shape, args.rank, chip)
        rows, failed = search(args.kernel, one, found, args.rounds, chip)
        print(f"{what}: {len(found)} candidates, of which {failed} did not run or were wrong")
        print("\n".join(table(rows, args.top)), flush=True)
        best = next((f"{row.us:.2f} us, {row.name}" for row in rows if row.name != "cuBLAS"), "none")
        winners.append(f"  {what}: {best}")
        del one
        torch.cuda.empty_cache()
    print("\nWinners\n" + "\n".join(winners))
    return 0


if __name__ == "__main__":
    sys.exit(main())
