"""The benchmark of few rows as far as a machine without a GPU can tell: candidates, rows, what is compiled ahead."""

import contextlib

import pytest
import torch

from benchmarks import bench_lora, bench_small


@pytest.mark.parametrize("what, layers", [("fwd+bwd", 1), ("fwd", 3)])
def test_rows_of_small_layers(monkeypatch, what, layers):
    """Training takes one weight again and again; decoding takes several in turn, and its times are of one layer."""
    pytest.importorskip("peft")
    monkeypatch.setattr(bench_small, "ROTATING", 3 * 2 * 32 * 24)
    impls = tuple(impl for impl in bench_small.IMPLS if "compiled" not in impl)
    monkeypatch.setattr(
        bench_small.timing,
        "measure",
        lambda steps, *_, **__: {impl: [step() or (6.0 if "lora" in impl else 3.0)] for impl, step in steps.items()},
    )
    rows = bench_small.measured(what, bench_lora.Case("fp32", 8, 32, 24, 4, 0), impls, 3, {"gpu": "g"}, "cpu")
    assert [row["impl"] for row in rows] == list(impls)
    ours = rows[impls.index("lora_fast_lora")]
    assert (ours["median_us"], ours["ratio_to_frozen"]) == (6 / layers, 2)
    assert ours["weights"] == ("hot" if layers == 1 else "rotating")
    table = bench_small.summarise(rows)
    assert "| lora_fast_dora | 2.0 | 2.0 | 1 |" in table


def test_cases_of_small_layers():
    found = bench_small.cases()
    assert len(found) == len(set(found)) == 4 * 8 * 2 + 4 * 9
    assert {case.M for what, case in found if what == "fwd"} == {1, 8, 64, 128}


@pytest.mark.medium
@pytest.mark.parametrize("what", ["fwd+bwd", "fwd"])
def test_compiled_small_layers(what, compiler):
    """They are there, LoRA and DoRA, one compiled function each, and compute what the eager ones do."""
    case = bench_lora.Case("fp32", 8, 32, 24, 4, 0)
    pairs = [("eager", "eager_compiled"), ("lora_fast_dora", "eager_compiled_dora")]
    built = bench_small.build(case, tuple(impl for pair in pairs for impl in pair), "cpu")
    assert compiler == [{"fullgraph": True, "dynamic": False}] * 2
    for impl, compiled in pairs:
        torch.testing.assert_close(built[compiled].forward(), built[impl].forward(), rtol=1e-4, atol=1e-4)
        bench_small.step_of([built[compiled]], what)()
    assert bench_small.compile_one(what, case, "eager_compiled_dora", "cpu") is None


def test_what_cannot_be_compiled_is_named(monkeypatch):
    def cannot(*args, **kwargs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", cannot)
    case = bench_lora.Case("fp32", 8, 32, 24, 4, 0)
    assert bench_small.compile_one("fwd", case, "eager_compiled", "cpu") == "RuntimeError: no compiler"
    monkeypatch.setattr(bench_small, "ProcessPoolExecutor", lambda *_: contextlib.nullcontext(pool))
    wanted = [("fwd", case), ("fwd+bwd", case)]
    assert bench_small.compile_ahead(wanted, ("frozen", "eager")) == {}
    failed = bench_small.compile_ahead(wanted, ("frozen", "eager_compiled", "eager_compiled_dora"))
    assert failed == {("fwd", case, "eager_compiled"): "why"}


class pool:
    """A process pool in which the first job fails."""

    @staticmethod
    def map(job, *given):
        assert job is bench_small.compile_one
        return ["why", *[None] * (len(given[0]) - 1)]
