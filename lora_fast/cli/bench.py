"""``lora-fast bench``: what LoRA costs beside the frozen ``nn.Linear``, for shapes of one's own, on this machine.

The candidates of a shape share the weight, x and the adapters' values (not zero: zeros draw less power), and run in
random order each round. A step drops the gradients, then runs ``y = layer(x)`` and ``y.backward(dy)``; no bias, no
autocast, adapters in float32 as LoRALinear has them.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fast import dispatch, reference, timing
from lora_fast.cli import bench_model
from lora_fast.cli.arguments import whole_number
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.lora import LoRALinear
from lora_fast.timing import Candidate

EPILOG = """\
examples:
  lora-fast bench                                        a few large layers, rank 16, bf16
  lora-fast bench --shape 8192,4096,14336 --rank 32 --dropout 0.1
  lora-fast bench --shape 4096 8192 --dora --dtype fp16  two sizes: M = K = N
  lora-fast bench --model Llama-3.1-8B/config.json       a whole model's step, stock PEFT beside patched

frozen        nn.Linear whose weight asks for no gradient; frozen again is the same once more, to show the noise
eager LoRA    plain torch in its best form; LoRALinear is ours; likewise DoRA
us, 20-80%    median time of a step, and between which times the middle 60% of the rounds were
ratio         of the median to frozen's
MiB           peak memory of a step above what was allocated before it
--model       random weights, adapters on all linear layers; each without and with gradient checkpointing; in ms

Exit codes: 0 measured, 1 a shape or the model did not fit into memory or is not there, 2 wrong arguments."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """Rows of x, in_features, out_features."""

    M: int
    K: int
    N: int


LARGE = [Shape(8192, 4096, 4096), Shape(8192, 4096, 14336), Shape(8192, 14336, 4096)]
SMALL = [Shape(128, 512, 512)]  # for a CPU: seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure forward + backward of LoRA layers beside the frozen nn.Linear, on this machine."
    parser.epilog = EPILOG
    parser.add_argument(
        "--shape",
        type=shape,
        action="extend",
        nargs="+",
        metavar="M,K,N",
        default=argparse.SUPPRESS,
        help="rows of x, in_features, out_features, or one size for all three; may be repeated "
        "(default: " + ", ".join("x".join(map(str, each)) for each in LARGE) + "; on a CPU a small "
        "one)",
    )
    parser.add_argument("--rank", type=whole_number, default=16, help="rank of the adapters")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=argparse.SUPPRESS,
        help="of x and the weight (default: bf16; on a CPU fp32, for few of them have bf16)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_CONFIG.json",
        help="a causal language model's configuration: its file, its folder, or its name on the hub",
    )
    parser.add_argument("--tokens", type=_tokens, default="1x2048", metavar="BxL", help="of --model's batch")
    parser.add_argument("--dropout", type=_probability, default=0.0, help="dropout in the low-rank branch")
    parser.add_argument("--dora", action="store_true", help="DoRA as well")
    parser.add_argument(
        "--rounds",
        type=whole_number,
        default=argparse.SUPPRESS,
        help="how often each is timed; the median counts (default: 24, on a CPU 5, with --model 8)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and return the exit code."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(args, "dtype", "bf16" if device == "cuda" else "fp32")
    rounds = getattr(args, "rounds", 8 if args.model else 24 if device == "cuda" else 5)
    console = Console(highlight=False, markup=False)
    why = dispatch.why_not_triton(torch.device(device), DTYPES[dtype])
    console.print(_about(device, why), soft_wrap=True)
    settings = f"forward + backward, {dtype}, r = {args.rank}, dropout {args.dropout:g}"
    console.print(f"{settings}; medians of {rounds} rounds in random order", soft_wrap=True)
    first, unit = ("tokens", "ms") if args.model else ("M,K,N", "us")
    table = Table()
    for heading in (first, "layer" if first == "M,K,N" else "model", unit, "20-80%", "ratio", "MiB"):
        table.add_column(heading, justify="left" if heading in ("layer", "model") else "right", no_wrap=True)
    before, failed = dispatch.get_backend(), False
    dispatch.set_backend("reference" if why else "triton")  # never one for the other unawares
    works = _works(args, DTYPES[dtype], rounds, device)
    try:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("measuring", total=len(works) * rounds)
            for number, (name, work) in enumerate(works.items(), 1):
                try:
                    rows = work(lambda: progress.advance(bar))
                except RuntimeError as error:
                    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                        raise
                    rows, failed = [("does not fit into memory", "", "", "", "")], True
                progress.update(bar, completed=number * rounds)
                for i, row in enumerate(rows):
                    table.add_row("" if i else name, *row)
                table.add_section()
    except ImportError as error:
        print(f"lora-fast bench: error: --model: {error}: pip install peft", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        if not args.model:
            raise
        print(f"lora-fast bench: error: --model {args.model}: {error}", file=sys.stderr)
        return 1
    finally:
        dispatch.set_backend(before)
    console.print(table)
    return int(failed)


def _works(
    args: argparse.Namespace, dtype: torch.dtype, rounds: int, device: str
) -> dict[str, Callable[[timing.Told], list[bench_model.Row]]]:
    """What is to be measured: {first column: what gives the rest, given what to call after each round}."""
    if not args.model:
        shapes = getattr(args, "shape", LARGE if device == "cuda" else SMALL)
        settings = args.rank, dtype, args.dropout, args.dora, rounds, device
        return {",".join(map(str, each)): partial(measured, each, *settings) for each in shapes}

    def model(each_round: timing.Told) -> list[bench_model.Row]:
        base = bench_model.base_model(args.model, dtype, device)
        ids = torch.randint(base.config.get_text_config().vocab_size, args.tokens, device=device)
        steps = bench_model.build(base, ids, args.rank, args.dropout, args.dora)
        return bench_model.measured(steps, rounds, device, each_round)

    return {"x".join(map(str, args.tokens)): model}


def measured(
    shape: Shape, r: int, dtype: torch.dtype, p: float, dora: bool, rounds: int, device: str, each_round: timing.Told
) -> list[bench_model.Row]:
    """The cells of the table for one shape."""
    made = build(shape, r, dtype, p, dora, device)
    peaks = {name: f"{timing.peak_mib(c.step):.1f}" if device == "cuda" else "-" for name, c in made.items()}
    steps: dict[str, Callable[[], object]] = {name: candidate.step for name, candidate in made.items()}
    found = timing.measure(steps, rounds, device=device, each_round=each_round)
    frozen = timing.summary(found["frozen"])[0]
    rows = []
    for name in made:
        median, p20, p80 = timing.summary(found[name])
        rows.append((name, _us(median), f"{_us(p20)}-{_us(p80)}", f"{median / frozen:.3f}", peaks[name]))
    return rows


def build(shape: Shape, r: int, dtype: torch.dtype, p: float, dora: bool, device: str) -> dict[str, Candidate]:
    """The candidates by name; all compute the same where ``p`` is 0, but for the frozen ones."""
    torch.manual_seed(0)
    m, k, n = shape
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    x, dy = torch.randn(m, k, **kind).requires_grad_(), torch.randn(m, n, **kind)
    frozen = nn.Linear(k, n, bias=False, **kind).requires_grad_(False)
    made = {name: Candidate(frozen, x, dy, [x]) for name in ("frozen", "frozen again")}
    ours = LoRALinear.from_linear(frozen, r, 2 * r, p, init_lora_weights=False)
    a, b, scaling = ours.lora_A, ours.lora_B, ours.scaling
    made["eager LoRA"] = Candidate(
        lambda x: reference.lora_linear(x, frozen.weight, a, b, scaling, None, p), x, dy, [x, a, b]
    )
    made["LoRALinear"] = Candidate(ours, x, dy, [x, a, b])
    if dora:
        with_m = DoRALinear.from_linear(frozen, r, 2 * r, p)
        with_m.lora_A, with_m.lora_B = a, b
        with_m.reset_magnitude()
        magnitude = with_m.lora_magnitude_vector
        leaves = [x, a, b, magnitude]
        made["eager DoRA"] = Candidate(
            lambda x: reference.dora_linear(x, frozen.weight, a, b, magnitude, scaling, None, p), x, dy, leaves
        )
        made["DoRALinear"] = Candidate(with_m, x, dy, leaves)
    return made


def shape(text: str) -> Shape:
    """``8192,4096,14336``, or ``4096`` for a cube."""
    words = text.split(",")
    if len(words) not in (1, 3) or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected M,K,N or one size, in whole numbers of 1 or more")
    return Shape(*map(int, words * 3 if len(words) == 1 else words))


def _tokens(text: str) -> tuple[int, int]:
    words = text.split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected rows x tokens, as 1x2048")
    return int(words[0]), int(words[1])


def _us(time: float) -> str:
    return f"{time:.0f}" if time >= 1000 else f"{time:.1f}"


def _about(device: str, why: str | None) -> str:
    versions = f"torch {torch.__version__}"
    if device == "cpu":
        return (
            f"CPU, {torch.get_num_threads()} threads, {versions}. These are CPU numbers of the plain torch path; "
            f"they say nothing about the fused kernels: {why}."
        )
    path = f"plain torch for every layer: {why}" if why else "LoRALinear and DoRALinear on the fused kernels"
    return f"{torch.cuda.get_device_name()}, {versions}; {path}."


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a probability in [0, 1)")
    return value
