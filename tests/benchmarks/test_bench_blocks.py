"""bench_blocks as far as a machine without a GPU can tell: arguments, candidates, rows."""

import importlib.util

import pytest
import torch

from benchmarks import bench_blocks
from lora_fast import timing


def small(block, p=0.0, dtype="fp32"):
    return bench_blocks.Case(dtype, block, 12, 16, 24, 4, p)


def test_cases():
    cases = bench_blocks.CASES
    assert len(cases) == len(set(cases)) == 14
    assert {(case.block, case.M, case.hidden, case.other) for case in cases} == set(bench_blocks.SHAPES)


def test_arguments_choose():
    _, cases, impls = bench_blocks.parse(["--only", "block=mlp", "--only", "p=0", "--only", "impl=lora_fast_lora"])
    assert [case[1:3] for case in cases] == [("mlp", 8192), ("mlp", 2048)] and impls == ["frozen", "lora_fast_lora"]


@pytest.mark.parametrize(
    "argv, message",
    [("--only q=1", "KEY=VALUE"), ("--only impl=unsloth", "expected impls"), ("--only M=3", "leaves nothing")],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as done:
        bench_blocks.main(argv.split())
    assert done.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("block", ["mlp", "gate_up", "fc", "qkv"])
def test_candidates_compute_the_same(block):
    candidates = bench_blocks.build(small(block), bench_blocks.IMPLS, "cpu")
    peft = importlib.util.find_spec("peft")
    assert list(candidates) == [impl for impl in bench_blocks.IMPLS if peft or "peft" not in impl]
    found = {}
    for impl, candidate in candidates.items():
        candidate.step()
        candidate.step()  # gradients are dropped, not added up
        grads = [leaf.grad for leaf in candidate.leaves]
        assert len(grads) == 1 + len(bench_blocks.sizes(small(block))) * (
            0 if "frozen" in impl else 3 if "dora" in impl else 2
        )
        found[impl] = [t.detach().clone() for t in (*candidate.forward(), *grads)]
    for form in ("lora", "dora"):
        ours = found[f"lora_fast_{form}"]
        assert (ours[0] - found["frozen"][0]).norm() > 0.1 * ours[0].norm()
        for impl in (impl for impl in found if impl.endswith(form)):
            for a, b in zip(found[impl], ours, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_rows(monkeypatch):
    built = {
        small("qkv", p): bench_blocks.build(small("qkv", p), ("frozen", "lora_fast_lora"), "cpu") for p in (0, 0.1)
    }

    def measure(steps, rounds):
        assert list(steps) == ["frozen 0", "lora_fast_lora 0", "lora_fast_lora 0.1"] and rounds == 3
        return {name: [2.0 + i] for i, name in enumerate(steps)}

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "peak_mib", lambda step: 7.125)
    about = {"gpu": "g", "torch": "t", "triton": "3", "commit": "c"}
    rows = bench_blocks.measured(built, 3, about)
    assert [list(row) for row in rows] == [bench_blocks.COLUMNS] * 4
    assert [row["ratio_to_frozen"] for row in rows] == [1.0, 1.5, 1.0, 2.0]
    assert "| qkv | 12 | 16 | 24 | 0.1 | 1.000 (7) |" in bench_blocks.table(rows)
