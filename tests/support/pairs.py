"""Pairs of processes that are forked from one with everything imported: without a GPU, which no forked process can use.

A started Python with torch, transformers and PEFT takes eight seconds, and a pair of them two cores meanwhile. The one
that they are forked from (multiprocessing's forkserver) has run none of the tests.
"""

import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import checkout
import torch
from checkout import ROOT
from torch.multiprocessing import start_processes

Run = tuple[Path, list[str], dict[str, str]]  # a script, its arguments and its environment
HONEST = multiprocessing.get_context
LIMIT = 300  # seconds
IMPORTED = [  # where something is missing, what is left
    "devices",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "accelerate",
    "peft.tuners.lora",
    "transformers.models.llama.modeling_llama",
    "lora_fast.kernels.program",
    "lora_fast.peft.layers",
    "benchmarks.bench_distributed",
]


def two_processes(script: str, *arguments: object) -> None:
    """As ``checkout.two_processes``: a script of tests/support, ``RANK ARGUMENT ...``."""
    if torch.cuda.is_available():
        return checkout.two_processes(script, *arguments)
    runs: list[Run] = [
        (ROOT / "tests" / "support" / script, [str(rank), *map(str, arguments)], {}) for rank in range(2)
    ]
    told(_script, runs)


def as_torchrun(script: Path, arguments: list[str]) -> str:
    """What a script tells that torchrun starts in two processes of this machine; without a GPU it has torchrun's
    environment alone."""
    if torch.cuda.is_available():
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        env = checkout.environment()
        done = subprocess.run([*launch, *arguments], env=env, capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return told(_script, [(script, arguments, where | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"])


def forkserver() -> Any:
    """multiprocessing's context, with its server started."""
    context: Any = HONEST("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, checkout.environment()):
        multiprocessing.forkserver.ensure_running()
    return context


def told(fn: Callable[..., None], of_each: list[Any]) -> str:
    """What ``fn(rank, of_each)`` tells in so many processes, one after the other. If one fails, all end, and its error
    is raised with what they told."""
    forkserver()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(len(of_each))]
        running = start_processes(_telling, (files, fn, of_each), len(files), join=False, start_method="forkserver")
        end = time.monotonic() + LIMIT
        try:
            while not running.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"a pair of processes takes more than {LIMIT} s")
        except Exception as error:
            error.add_note("".join(file.read_text() for file in files if file.exists()))
            raise
        finally:
            for process in running.processes:
                if process.is_alive():
                    process.kill()
        return "".join(file.read_text() for file in files)


def spawn(fn: Callable[..., None], args: tuple, nprocs: int) -> None:
    """As torch's, whose processes import everything anew."""
    print(told(_called, [(fn, args)] * nprocs), end="")


def _telling(rank: int, files: list[Path], fn: Callable[..., None], of_each: list[Any]) -> None:
    file = os.open(files[rank], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        fn(rank, of_each)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _script(rank: int, runs: list[Run]) -> None:
    script, arguments, env = runs[rank]
    os.environ |= env
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _called(rank: int, calls: list[tuple[Callable[..., None], tuple]]) -> None:
    fn, args = calls[rank]
    fn(rank, *args)
