"""Timing that can be trusted on a power-capped chip: every candidate in each round, in a new random order, from the
same state of the chip: under full load for a while, then a warm-up of its own. Medians over the rounds."""

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Told = Callable[[], object]


class Candidate(NamedTuple):
    """A layer under test with what a step needs."""

    layer: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor
    leaves: list[Tensor]  # all that get a gradient

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        y = self.layer(self.x)
        y.backward(self.dy)

    def calls(self) -> dict[str, Callable[[], object]]:
        return {"fwd": self.forward, "fwd+bwd": self.step}


def measure(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 24,
    target_ms: float = 8.0,
    seed: int = 0,
    device: str = "cuda",
    least: int = 3,
    each_round: Told | None = None,
) -> dict[str, list[float]]:
    """Microseconds per call of each candidate, one number a round; ``each_round`` is called after each of them.

    A round runs every candidate once, in random order: a stretch of large products as long as the timed one, so that a
    candidate that is bound by memory does not leave the next one a cool chip, two warm-up calls, then as many timed
    calls as fill ``target_ms`` (at least ``least``), between two CUDA events. From the warm-up on nothing waits: the
    GPU stays busy while the host runs ahead, as in training, as far as it can (it waits for the products to end, or
    small calls would be launched while they run, for nothing). On the CPU there are no products, and the clock is the
    host's.
    """
    load: Callable[[], object] = _nothing if device == "cpu" else _products(target_ms, device)
    calls = {}
    for name, fn in candidates.items():
        for _ in range(least):
            fn()
        calls[name] = max(least, int(target_ms * 1000 / _time(fn, least, device)))
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            fn = candidates[name]
            load()
            fn()
            fn()
            times[name].append(_time(fn, calls[name], device))
        if each_round is not None:
            each_round()
    return times


def _nothing() -> None:
    pass


def _products(target_ms: float, device: str) -> Callable[[], object]:
    """A function that keeps the matrix units busy for about so long, and waits for them."""
    a = torch.randn(4096, 4096, dtype=torch.float16, device=device)
    out = torch.empty_like(a)

    def products(times: int) -> None:
        for _ in range(times):
            torch.mm(a, a, out=out)

    products(3)
    times = max(1, round(target_ms * 10_000 / _time(lambda: products(10), 1, device)))
    replay = graphed(lambda: products(times))

    def load() -> None:
        replay()
        torch.cuda.synchronize(device)

    return load


def _time(fn: Callable[[], object], calls: int, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - began) * 1e6 / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / calls


def summary(times: list[float]) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile)."""
    ordered = sorted(times)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return statistics.median(ordered), pick(0.2), pick(0.8)


def peak_mib(step: Callable[[], object]) -> float:
    """Peak memory allocated during a step above what was allocated before it, the last step's gradients in place."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graphed(fn: Callable[[], object]) -> Callable[[], object]:
    """The same work as one CUDA graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay
