"""The checkout, and processes that run in it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process that finds all that the tests find, and takes one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}


def two_processes(script: str, *arguments: object) -> None:
    """Run a script of tests/support twice at the same time: ``RANK ARGUMENT ...``."""
    commands = [[sys.executable, ROOT / "tests" / "support" / script, str(rank), *arguments] for rank in range(2)]
    running = [
        subprocess.Popen(list(map(str, c)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for c in commands
    ]
    said = [process.communicate(timeout=300)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
