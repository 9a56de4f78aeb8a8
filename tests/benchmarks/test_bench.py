"""The benchmark scripts as far as a machine without a GPU can tell: arguments, candidates, kernels, rows."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

from benchmarks import bench_dora, bench_host, bench_kernels, bench_lora, bench_small, common, plot
from lora_fast import DoRALinear, LoRALinear

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@NO_GPU
@pytest.mark.parametrize("bench", [bench_dora, bench_kernels, bench_host, bench_small])
def test_says_that_there_is_no_gpu(bench, capsys):
    assert bench.main([]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
    assert 'if __name__ == "__main__":\n    sys.exit(main())' in Path(bench.__file__).read_text()


@pytest.mark.parametrize(
    "main", [bench_lora.main, bench_dora.main, bench_kernels.main, bench_host.main, bench_small.main, plot.main]
)
def test_help_says_how_to_run(main, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0 and "python -m benchmarks." in capsys.readouterr().out


def test_all_cases():
    cases = bench_lora.LORA.cases
    assert len(cases) == len(set(cases)) == 8 * 4 * 2 + 2 * 2
    assert {(c.r, c.p) for c in cases if c.dtype == "bf16"} == {(r, p) for r in (8, 16, 64, 256) for p in (0, 0.1)}
    assert {c[1:5] for c in cases if c.dtype != "bf16"} == {(8192, 4096, 4096, 16)}


def test_arguments_choose_the_cases():
    args, cases, impls = bench_lora.parse([], bench_lora.LORA)
    assert (args.rounds, len(cases), impls) == (24, 68, bench_lora.IMPLS)
    _, cases, impls = bench_lora.parse(
        ["--only", "r=8,64", "--only", "p=0", "--only", "M=1024", "--only", "impl=peft"], bench_lora.LORA
    )
    assert cases == [bench_lora.Case("bf16", 1024, 4096, 4096, r, 0) for r in (8, 64)]
    assert impls == ("frozen", "peft")
    _, cases, _ = bench_lora.parse(["--quick"], bench_lora.LORA)
    assert len(cases) == 16 and all(c.is_main() for c in cases)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--only q=1", "KEY=VALUE"),
        ("--only r=", "KEY=VALUE"),
        ("--only r=many", "expected numbers"),
        ("--only impl=unsloth", "expected impls"),
        ("--only r=3", "leaves nothing"),
        ("--rounds 0", ">= 1"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as done:
        bench_lora.main(argv.split())
    assert done.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.medium
@pytest.mark.parametrize("suite", [bench_lora.LORA, bench_dora.DORA], ids=lambda suite: suite.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_candidates_compute_the_same(dtype, suite, monkeypatch):
    """All candidates agree at p = 0, in the output and every gradient, and differ from the frozen layer."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    case = bench_lora.Case(dtype, 32, 24, 40, 8, 0)
    candidates = suite.build(case, suite.impls, "cpu")
    has_peft = importlib.util.find_spec("peft") is not None
    fits = {"peft": has_peft} | dict.fromkeys((i for i in suite.impls if "fp8" in i), dtype != "fp32")
    assert list(candidates) == [impl for impl in suite.impls if fits.get(impl, True)]
    if suite is bench_dora.DORA:
        assert isinstance(candidates["lora_fast_dora"].layer, DoRALinear)
        (lora,) = (candidates.pop(impl) for impl in ("lora_fast_lora",))
        assert torch.allclose(lora.forward(), candidates["lora_fast_dora"].forward(), atol=0.05, rtol=0.02)
    found = {}
    for impl, candidate in candidates.items():
        calls = candidate.calls()
        assert list(calls) == ["fwd", "fwd+bwd"]
        calls["fwd+bwd"]()
        calls["fwd+bwd"]()  # gradients are dropped, not added up
        grads = [leaf.grad for leaf in candidate.leaves if leaf.grad is not None]
        adapters = 2 if suite is bench_lora.LORA else 3
        assert len(grads) == len(candidate.leaves) == 1 + (0 if impl.startswith("frozen") else adapters)
        found[impl] = [t.detach().double() for t in (candidate.forward(), *grads)]
    frozen, again, ours = found.pop("frozen"), found.pop("frozen_again"), found[suite.impls[-1]]
    assert all(torch.equal(a, b) for a, b in zip(frozen, again, strict=True))
    assert (ours[0] - frozen[0]).norm() > 0.1 * frozen[0].norm()
    for impl, tensors in found.items():
        near = 0.08 if "fp8" in impl else 0.01 if dtype == "bf16" else 1e-5
        for a, b in zip(tensors, ours, strict=True):
            assert (a - b).norm() <= near * b.norm()


@pytest.mark.parametrize("suite", [bench_lora.LORA, bench_dora.DORA], ids=lambda suite: suite.name)
def test_candidates_drop_inputs(suite):
    """With dropout, every candidate with an adapter gives another output at each call."""
    impls = tuple(impl for impl in suite.impls if impl != "eager_compiled")
    candidates = suite.build(bench_lora.Case("fp32", 32, 24, 40, 8, 0.5), impls, "cpu")
    for impl, candidate in candidates.items():
        assert torch.equal(candidate.forward(), candidate.forward()) == impl.startswith("frozen")


def test_adapters_are_as_the_layer_makes_them():
    case = bench_lora.Case("bf16", 4, 8, 8, 2, 0.1)
    layer = bench_lora.build(case, ("lora_fast_lora",), "cpu")["lora_fast_lora"].layer
    assert isinstance(layer, LoRALinear) and layer.weight.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.lora_B.any()
    assert layer.lora_dropout == 0.1 and layer.training and not layer.weight.requires_grad


KERNELS = """
import torch
from benchmarks import bench_kernels
from lora_fast.bases.four_bits import Nf4Weight
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.fp8 import Fp8Weight
from lora_fast.kernels import mask
case = bench_kernels.Case("fp32", 48, 64, 96, 16)
t = bench_kernels.inputs(case, "cpu", 2)
kernels, products = bench_kernels.build(case, t)
kept = mask.unpack(t.bits, 64)
keep = kept * mask.keep_scale(bench_kernels.P)
assert 0.8 < kept.float().mean() < 0.97
for i in range(2):
    x, dy = t.x[i], t.dy[i]
    up, dx = x @ t.ws[0].T, dy @ t.ws[0]
    m, g, n, _ = t.columns
    v = torch.linalg.vector_norm(t.ws[i] + t.b @ t.a, dim=1)
    assert torch.equal(products["cublas_up"](i), up) and torch.equal(products["cublas_dx"](i), dx)
    want = {
        ("mask_bits", 0.1): t.bits, ("down", 0): x @ t.a.T, ("down", 0.1): (x * keep) @ t.a.T,
        ("up_gemm", 0): up + t.s @ t.b.T, ("dy_pass", 0): dy @ t.b, ("d_a", 0): t.ds.T @ x,
        ("d_a", 0.1): t.ds.T @ (x * kept), ("dx_gemm", 0): dx + t.ds @ t.a, ("dx_gemm", 0.1): dx + (t.ds @ t.a) * kept,
        ("norm", 0): (v, m / v), ("dora_pass", 0): (dy * g) @ t.b,
    }
    assert list(want) == [(k.name, k.p) for k in kernels]
    for kernel in kernels:
        t.grad_a.fill_(torch.nan), t.grad_b.fill_(torch.nan)
        got = kernel.run(i)
        torch.testing.assert_close(t.grad_a if kernel.name == "d_a" else got, want[kernel.name, kernel.p], **close)
        if kernel.name == "dy_pass":
            torch.testing.assert_close(t.grad_b, dy.T @ t.s, **close)
        if kernel.name == "dora_pass":
            torch.testing.assert_close(t.grad_b, (dy * g).T @ t.s, **close)
            torch.testing.assert_close(t.dz[i], dy * g, **close)
            torch.testing.assert_close(t.columns[3], (dy * t.dy[i - 1]).sum(0) / n, **close)
ws = torch.randn(2, 32, 128, dtype=torch.bfloat16)
kernels, floors = bench_kernels.fills(ws)
assert {k.floor for k in kernels} == floors.keys()
assert floors["fill_16"](0).nbytes == 2 * floors["fill_8"](0).nbytes == ws[0].nbytes
for kernel in kernels:
    kind = Nf4Weight if "nf4" in kernel.name else ScaledFp8Weight
    dense = kind.quantise(ws[1]).dequantise()
    eight = Fp8Weight.quantise(dense)
    want = {"whole": dense, "rows": eight.rows, "columns": eight.columns}[kernel.name.rpartition("_")[2]]
    assert torch.equal(kernel.run(1).view(torch.uint8), want.view(torch.uint8)), kernel.name
print("all right")
""".replace("**close", "atol=1e-3, rtol=1e-4")


@pytest.mark.medium
def test_kernels_do_what_they_are_named_after():
    """Each of bench_kernels' launches, interpreted, against plain torch."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():  # they are interpreted here
        exec(KERNELS, {"__name__": "__main__"})
        return
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0 and done.stdout == "all right\n", done.stderr


def test_copies_exceed_the_cache():
    for case in bench_kernels.all_cases(common.SHAPES):
        smaller = case.M * min(case.K, case.N) * common.DTYPES[case.dtype].itemsize
        assert bench_kernels.n_copies(case) * smaller >= 2**28


def test_kernel_table():
    row = dict(zip(bench_kernels.COLUMNS[4:9], ("bf16", 8, 16, 16, 4), strict=True))
    rows = [
        {**row, "p": 0, "kernel": "down", "median_us": 30.04, "floor_us": 20.0, "ratio": 1.502, "bound": 1.3},
        {**row, "p": 0.1, "kernel": "mask_bits", "median_us": 5.0, "floor_us": 1.0, "ratio": 5.0, "bound": ""},
    ]
    assert bench_kernels.table(rows).splitlines() == [
        "| dtype | M | K | N | r | down | mask_bits p=0.1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| at most |  |  |  |  | 1.3 |  |",
        "| bf16 | 8 | 16 | 16 | 4 | 30.0 (**1.50**) | 5.0 (5.00) |",
    ]


def test_card():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"]
    assert [common.card(name) for name in names] == ["h100", "h200", "rtx-4090", "a100-sxm4-80gb"]


@pytest.mark.parametrize("graph", [False, True])
def test_rows_of_a_case(graph, monkeypatch):
    """The timing harness replaced: ratios are to frozen of the same kind, columns are complete."""
    cases = [bench_lora.Case("bf16", 4, 8, 8, r, p) for r, p in ((2, 0), (2, 0.1), (3, 0))]
    built = {case: bench_lora.build(case, ("frozen", "eager"), "cpu") for case in cases}
    fake = {
        "fwd frozen 2 0": [1.0, 2.0, 3.0],
        "fwd eager 2 0": [4.0],
        "fwd eager 2 0.1": [5.0],
        "fwd eager 3 0": [6.0],
        "fwd+bwd frozen 2 0": [5.0],
        "fwd+bwd eager 2 0": [6.0],
        "fwd+bwd eager 2 0.1": [7.0],
        "fwd+bwd eager 3 0": [8.0],
    }

    def measure(calls, rounds):
        assert calls.keys() == fake.keys()
        return fake

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_lora.timing, "graphed", lambda call: call)
    monkeypatch.setattr(bench_lora.timing, "peak_mib", lambda call: 7.125)
    monkeypatch.setattr(bench_lora.timing, "measure", measure)
    about = {"gpu": "g", "torch": "t", "triton": "t", "commit": "c"}
    rows = bench_lora.measured(built, 3, graph, about)
    assert all(list(row) == bench_lora.COLUMNS for row in rows)
    found = {(row["r"], row["p"], row["what"], row["impl"]): (row["median_us"], row["ratio_to_frozen"]) for row in rows}
    assert found == {
        (2, 0, "fwd", "frozen"): (2, 1),
        (2, 0, "fwd", "eager"): (4, 2),
        (2, 0, "fwd+bwd", "frozen"): (5, 1),
        (2, 0, "fwd+bwd", "eager"): (6, 1.2),
        (2, 0.1, "fwd", "frozen"): (2, 1),
        (2, 0.1, "fwd", "eager"): (5, 2.5),
        (2, 0.1, "fwd+bwd", "frozen"): (5, 1),
        (2, 0.1, "fwd+bwd", "eager"): (7, 1.4),
        (3, 0, "fwd", "frozen"): (2, 1),
        (3, 0, "fwd", "eager"): (6, 3),
        (3, 0, "fwd+bwd", "frozen"): (5, 1),
        (3, 0, "fwd+bwd", "eager"): (8, 1.6),
    }
    assert {row["peak_mib"] for row in rows} == {"" if graph else 7.12}


def test_host_candidates_and_rows(monkeypatch, tmp_path):
    """Candidates step; a run whose frozen layers differ is measured again; rows of other Tritons stay in the file."""
    pytest.importorskip("peft")
    case = bench_lora.Case("fp32", 8, 32, 24, 4, 0)
    built = bench_host.build(case, "cpu")
    assert tuple(built) == bench_host.IMPLS
    for candidate in built.values():
        candidate.step()
        assert all(leaf.grad is not None for leaf in candidate.leaves)
    assert "Fast" in type(built["lora_fast_patched"].layer).__qualname__

    runs = iter([1.2, 1.04])

    def measure(steps, rounds, device):
        return {**dict.fromkeys(steps, [4.0]), "frozen": [1.0], "frozen_again": [next(runs)]}

    monkeypatch.setattr(bench_host.timing, "measure", measure)
    rows, apart = bench_host.measured(case, 3, {"gpu": "g", "torch": "t", "triton": "3.7.1", "commit": "c"}, "cpu")
    assert apart == pytest.approx(1 - 1 / 1.04) and [row["impl"] for row in rows] == list(built)
    assert rows[-1]["ratio_to_frozen"] == pytest.approx(4 / 1.02, rel=1e-3) and list(rows[0]) == bench_lora.COLUMNS
    path = tmp_path / "rows.csv"
    assert bench_host.of_other_versions(path, "3.6.0") == []
    common.write_csv(path, bench_lora.COLUMNS, rows)
    assert len(bench_host.of_other_versions(path, "3.6.0")) == len(rows)
    assert bench_host.of_other_versions(path, "3.7.1") == []
