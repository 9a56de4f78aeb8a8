"""Every example, one after the other, each in a process and a folder of its own: what `make examples` runs.

About ten minutes on two idle cores without a GPU. What an example prints goes to output.txt in its folder, its
progress and warnings to errors.txt; one that fails (an extra that is not installed, say) is shown, the rest still run,
and the exit status is 1.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NO_EXAMPLES = {"common", "four_bits", "run_all"}
# Every other script runs with its defaults; these would take longer than all may together.
ARGUMENTS = {
    "encoder": ["--steps", "10", "--layers", "3", "--packages", "asyncio,email,http,logging"],
    "glm4": ["--steps", "20"],
    "lightning_mnist": ["--ranks", "1,16"],
    "prompts": ["--method", "bottleneck", "prompt+lora", "--steps", "5", "--layers", "5"],
    "smollm2": ["--no-stock", "--steps", "3", "--layers", "10"],
    "smollm2_quality": [*"--layers 1 --steps 2 --seeds 1 --batch 2 --length 16 --bases".split(), "16 bits", "NF4"],
    "sweep": ["--steps", "4", "--layers", "6", "--lrs", "1e-3"],
    "trl_dpo": ["--steps", "30"],
    "trl_grpo": ["--steps", "30"],
}
LAUNCHERS = {"fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}


def command(script: Path, seed: int) -> list[str]:
    name = script.stem
    start = [sys.executable, *LAUNCHERS.get(name, []), str(script)]
    return [*start, *ARGUMENTS.get(name, []), "--seed", str(seed)]


def run(script: Path, seed: int, folder: Path) -> tuple[bool, float]:
    """(whether it ended well, seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(folder / "output.txt", "wb") as output, open(folder / "errors.txt", "wb") as errors:
        done = subprocess.run(command(script, seed), cwd=folder, stdout=output, stderr=errors)
    return done.returncode == 0, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    scripts = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem not in NO_EXAMPLES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=scripts, metavar="NAME", help=f"some of {', '.join(scripts)}")
    parser.add_argument("--seed", type=int, default=0, help="given to each (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("examples-out"),
        metavar="DIR",
        help="where the outputs go (default examples-out)",
    )
    args = parser.parse_args(argv)
    lines, failed = [], []
    for name in (progress := tqdm(args.only or scripts)):
        progress.set_description(name)
        good, seconds = run(scripts[name], args.seed, args.out / name)
        lines.append(f"{name:16} {seconds:5.0f} s  {'done' if good else 'FAILED'}")
        if not good:
            failed.append(name)
            said = [(args.out / name / f"{file}.txt").read_text(errors="replace") for file in ("output", "errors")]
            progress.write("\n".join([f"{name} failed:", *"".join(said).splitlines()[-15:]]))
    print("\n".join(lines))
    print(f"{len(lines) - len(failed)} of {len(lines)} done; their outputs are in {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
