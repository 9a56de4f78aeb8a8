"""Candidates that take minutes to compile, each in a process of its own: all are made at once, and then timed in turns,
in a new random order each round, while the others wait."""

import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

Made = tuple[Callable[[], float], Any]  # what gives a sample's time in microseconds, and what is told of the candidate
Make = tuple[Any, ...]  # a function of a module, which gives such, and its arguments


class Worker:
    """A candidate in a process that makes it, and then waits for its turns."""

    def __init__(self, make: Make, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # CUDA takes no forked ones
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(other, make, threads))
        self.process.start()
        other.close()

    def hear(self) -> Any:
        """What the process tells next: of the candidate, then a time for each ``turn``. Raises RuntimeError with its
        traceback if it failed."""
        try:
            went, told = self.pipe.recv()
        except EOFError:
            went, told = False, f"it ended with exit code {self.process.exitcode}"
        if not went:
            raise RuntimeError(told)
        return told

    def turn(self) -> float:
        """A sample's time."""
        self.pipe.send(True)
        found: float = self.hear()
        return found


def _serve(pipe: Connection, make: Make, threads: int) -> None:
    from torch._inductor import config  # here, as nothing else of this file needs torch

    config.compile_threads = threads
    try:
        function, *args = make
        sample, about = function(*args)
        pipe.send((True, about))
        while pipe.recv():
            pipe.send((True, sample()))
    except EOFError:  # nobody listens any more
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


@contextmanager
def workers(makes: dict[Any, Make]) -> Iterator[dict[Any, Worker]]:
    """Within, a worker for each candidate, whose process has made it, or has failed. Meanwhile they share the machine's
    processors."""
    threads, started = max(1, (os.cpu_count() or 1) // max(1, len(makes))), dict[Any, Worker]()
    try:
        for name, make in makes.items():
            started[name] = Worker(make, threads)
        for worker in started.values():
            worker.pipe.poll(None)
        yield started
    finally:
        for worker in started.values():
            worker.process.kill()  # it holds nothing but the candidate
            worker.process.join()


def measure(candidates: dict[str, Worker], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times of those that could be made, in microseconds, and what was told of each; the others are named."""
    about: dict[str, Any] = {}
    for name, worker in candidates.items():
        try:
            about[name] = worker.hear()
        except RuntimeError as error:
            print(f"{name} could not be made: {error}", file=sys.stderr)
    order, shuffle = list(about), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(candidates[name].turn())
    return times, about
