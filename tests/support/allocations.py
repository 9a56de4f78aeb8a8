"""Memory of the CPU, as its allocator reports it to torch's profiler."""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch


class Allocated(NamedTuple):
    """Bytes beyond what was there: the most at a time, and what is left."""

    peak: int
    left: int


def allocated(step: Callable[[], object]) -> Allocated:
    """What a step allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del kept
    return Allocated(max(accumulate(sizes), default=0), sum(sizes))
