"""Candidates in processes of their own."""

import os

import pytest

from benchmarks import apart


def made(own: float) -> apart.Made:
    """Where spawned processes find it."""
    if own < 0:
        raise ValueError(f"own: got {own}")
    return lambda: own, os.getpid()


@pytest.mark.medium
def test_turns(capsys):
    """Each has a process of its own; one that fails is named, and the others go on."""
    with apart.workers({"a": (made, 1.0), "b": (made, 2.0), "bad": (made, -1.0)}) as workers:
        times, about = apart.measure(workers, 3)
        processes = [worker.process for worker in workers.values()]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert about == {"a": processes[0].pid, "b": processes[1].pid}
    assert not any(process.is_alive() for process in processes)
    told = capsys.readouterr().err
    assert "bad could not be made" in told and "own: got -1.0" in told


@pytest.mark.medium
def test_a_process_that_ends():
    with apart.workers({"a": (os._exit, 3)}) as workers, pytest.raises(RuntimeError, match="exit code 3"):
        workers["a"].process.join()
        workers["a"].hear()
