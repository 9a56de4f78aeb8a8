"""PEFT's own tests, stock and with every LoRA model patched by lora_fast, and what differs.

    python tools/peft_suite.py PEFT [--out FOLDER] [-- PYTEST_ARGUMENT ...]

PEFT is a folder with PEFT's ``tests/``, of the version that is installed: a checkout, or the source distribution of
PyPI (``pip download --no-deps --no-binary=:all: peft==VERSION``). Nothing is written there. The tests also want
``parameterized`` and, for some files, ``diffusers``. The hub is not asked: random models stand in for its tiny ones
(:mod:`hub_stand_ins`), and what has none fails in both runs alike.

    python tools/peft_suite.py peft-0.21.0 -- tests/test_custom_models.py -k "lora and not conv"

The two runs go side by side. Exit codes: 0 no outcome differs, 1 some do, 2 wrong arguments or a run without tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(__file__).resolve().parent
WORST_LAST = ("passed", "xfailed", "skipped", "xpassed", "failed", "error")


class Outcome(NamedTuple):
    """How a test ended: the worst of its set-up, call and clean-up, with pytest's last words on it; how many times a
    model was patched in it, and how many forwards of its layers were fused."""

    outcome: str
    message: str
    patched: int
    fused: int


NOT_RUN = Outcome("not run", "the run ended before it, or did not collect it", 0, 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", metavar="PEFT", type=Path, help="the folder with PEFT's tests/")
    parser.add_argument("--out", type=Path, help="keep the logs and outcomes here, and the random models for next time")
    parser.usage = "%(prog)s PEFT [--out FOLDER] [-- PYTEST_ARGUMENT ...]"
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args, arguments = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not (args.peft / "tests").is_dir():
        parser.error(f"{args.peft}: has no folder tests, expected PEFT's sources")
    if args.out is not None:
        return compare(args.peft.resolve(), args.out.resolve(), arguments)
    with tempfile.TemporaryDirectory() as out:
        return compare(args.peft.resolve(), Path(out), arguments)


def compare(peft: Path, out: Path, arguments: list[str]) -> int:
    """Run the tests both ways, print what differs, return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted((peft / "tests").glob("*.py"))
    stand_in = [sys.executable, *map(str, [TOOLS / "hub_stand_ins.py", out / "hub", *files])]
    with (out / "hub.log").open("w") as log:
        subprocess.run(stand_in, check=True, env=environment(out), stderr=log)
    running = [start(peft, out, mode, arguments) for mode in ("stock", "patched")]
    stock, patched = (
        outcomes_of(out, mode, process) for mode, process in zip(("stock", "patched"), running, strict=True)
    )
    if not stock or not patched:
        print(f"a run had no tests; see {out}/*.log (kept with --out)", file=sys.stderr)
        return 2
    for line in table(stock, patched):
        print(line)
    different = [test for test in stock | patched if outcome_of(stock, test) != outcome_of(patched, test)]
    print(f"\n{len(different)} of {len(stock | patched)} outcomes differ")
    for test in different:
        print(f"\n{test}")
        for mode, results in (("stock", stock), ("patched", patched)):
            outcome, message, *_ = results.get(test, NOT_RUN)
            print(f"  {mode:8} {outcome}{': ' if message else ''}{' '.join(message.split())[:400]}")
    return 1 if different else 0


def start(peft: Path, out: Path, mode: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """pytest, at work."""
    outcomes = out / f"{mode}.jsonl"
    outcomes.unlink(missing_ok=True)
    # Their pyproject.toml asks for a coverage plugin; the source distribution has no tests/__init__.py.
    settings = [
        "-o",
        "addopts=",
        "-o",
        "consider_namespace_packages=true",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
    ]
    plugin = ["-p", "peft_suite_plugin", "--lora-fast-mode", mode, "--lora-fast-outcomes", str(outcomes)]
    command = [sys.executable, "-m", "pytest", *settings, *plugin, "--continue-on-collection-errors", *arguments]
    with (out / f"{mode}.log").open("w") as log:
        return subprocess.Popen(command, cwd=peft, env=environment(out), stdout=log, stderr=subprocess.STDOUT)


def outcomes_of(out: Path, mode: str, process: subprocess.Popen[bytes]) -> dict[str, Outcome]:
    """{test: its outcome}, once pytest is done."""
    process.wait()
    print(f"{mode}: {(out / f'{mode}.log').read_text().strip().rpartition(chr(10))[2].strip('= ')}", flush=True)
    return read(out / f"{mode}.jsonl")


def environment(out: Path) -> dict[str, str]:
    path = os.pathsep.join([str(TOOLS.parent), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "HF_HUB_CACHE": str(out / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | own


def read(outcomes: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for line in outcomes.read_text().splitlines() if outcomes.exists() else ():
        record = json.loads(line)
        test, new = record.pop("test"), Outcome(**record)
        found[test] = max(found.get(test, new), new, key=lambda outcome: WORST_LAST.index(outcome.outcome))
    return found


def outcome_of(results: dict[str, Outcome], test: str) -> str:
    return results.get(test, NOT_RUN).outcome


def table(stock: dict[str, Outcome], patched: dict[str, Outcome]) -> Iterator[str]:
    """A line for each file: what its tests did."""
    for file in dict.fromkeys(test.partition("::")[0] for test in stock | patched):
        here = [test for test in stock | patched if test.partition("::")[0] == file]
        runs = [patched.get(test, NOT_RUN) for test in here]
        counts = Counter(outcome_of(stock, test) for test in here)
        ended = ", ".join(f"{counts[outcome]} {outcome}" for outcome in WORST_LAST if counts[outcome])
        models, fused = sum(run.patched > 0 for run in runs), sum(run.fused > 0 for run in runs)
        yield f"{file}: stock {ended}; {models} tests patched a model, {fused} ran a fused layer"


if __name__ == "__main__":
    sys.exit(main())
