"""The benchmark of several GPUs: arguments, rows, and both of its runs, on two CPU processes or on two GPUs."""

import csv

import pairs
import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

for package in ("peft", "transformers"):
    pytest.importorskip(package)

from benchmarks import bench_distributed, check_distributed, distributed  # noqa: E402
from benchmarks.bench_distributed import Case  # noqa: E402
from benchmarks.distributed import MODES  # noqa: E402
from benchmarks.models import TINY  # noqa: E402
from lora_fast import set_backend  # noqa: E402
from lora_fast.peft.layers import FastLinear  # noqa: E402

SIZE = TINY._replace(hidden=16, intermediate=24, heads=2, kv_heads=1, vocabulary=64, layers=1, length=8)
NONE = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def as_shell(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if NONE else "0")  # --check sets it


def test_all_cases():
    cases = bench_distributed.all_cases(8)
    assert len(cases) == len(set(map(str, cases))) == (len(MODES) + len(bench_distributed.OVER_PACKED)) * 2 * 2 * 4
    assert len(bench_distributed.all_cases(1)) == len(cases) / 2
    of_experts = bench_distributed.all_cases(4, "30b")
    assert {(case.mode, case.p) for case in of_experts} == {("fsdp2_checkpointing", 0)} and len(of_experts) == 4
    sharded = bench_distributed.all_cases(4, "70b")
    assert {(case.mode, case.p, case.gpus) for case in sharded} == {("fsdp2_checkpointing", 0, 4)} and len(sharded) == 4


def test_arguments_choose_the_cases():
    args, cases = bench_distributed.parse("--gpus 4 --only mode=ddp --only p=0.1 --only impl=peft_lora".split())
    assert (args.gpus, cases) == (4, [Case("ddp", 0.1, 4, "peft_lora"), Case("ddp", 0.1, 1, "peft_lora")])
    args, cases = bench_distributed.parse("--tiny --only gpus=2".split())
    assert args.gpus == 2 and len(cases) == (len(MODES) + len(bench_distributed.OVER_PACKED)) * 2 * 4


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--only layers=1", "KEY=VALUE"),
        ("--only mode=ddp,fsdp", "--only mode: got fsdp, expected modes among ddp, fsdp2,"),
        ("--only impl=frozen", "expected impls"),
        ("--gpus 2 --only gpus=4", "leaves nothing"),
        ("--gpus 0", ">= 1"),
        ("--check --size 70b", "--check: got --size 70b, expected one that a card holds whole"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as done:
        bench_distributed.main(argv.split())
    assert done.value.code == 2 and message in capsys.readouterr().err


def test_says_what_is_missing(capsys):
    assert bench_distributed.main(["--gpus", "1000"]) == 1
    assert ("torch sees none" if NONE else "--gpus: got 1000, expected at most") in capsys.readouterr().err


def test_scaling_and_table():
    about = {"mode": "ddp", "p": 0, "peak_mib": 100}
    ours = {"gpus": 2, "impl": "lora_fast_lora", "median_us": 3000, "tokens_per_s": 120, "peak_mib": 75}
    rows = [{**about, "gpus": 2, "impl": "peft_lora", "median_us": 4000, "tokens_per_s": 90}, {**about, **ours}]
    assert [row["scaling"] for row in bench_distributed.scaled(rows)] == ["", ""]
    rows.append({**about, "gpus": 1, "impl": "peft_lora", "median_us": 3600, "tokens_per_s": 100})
    rows = bench_distributed.scaled(rows)
    assert [row["scaling"] for row in rows] == [0.9, "", 1]
    assert bench_distributed.summarise(rows).splitlines()[2:4] == [
        "| ddp | 0 | 2 | peft_lora | 4.0 | 90 | 0.9 | 100 |  |  |",
        "| ddp | 0 | 2 | lora_fast_lora | 3.0 | 120 |  | 75 | 0.750 | 0.750 |",
    ]


@pytest.fixture
def alone():
    """In this process alone, in plain torch."""
    set_backend("reference")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_models_that_are_made_sharded(alone):
    """All candidates of a seed are one model: a step's loss is stock's, or near where the base is packed. No weight is
    left without its values, and each is a shard."""
    losses = {}
    for impl in bench_distributed.LORA_ALONE["70b"]:
        model = distributed.sharded(
            Case("fsdp2_checkpointing", 0, 1, impl).of_model(), SIZE, distributed.group_of(1, "cpu")
        )
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        ids = torch.arange(8).reshape(2, 4)
        losses[impl] = distributed.step_of(model, [ids], 1e-3)().item()
    stock = losses.pop("peft_lora")
    assert losses.pop("lora_fast_lora") == pytest.approx(stock, rel=1e-6)
    assert all(loss != stock and abs(loss - stock) < 1e-2 for loss in losses.values())


@pytest.mark.medium
@pytest.mark.parametrize("fault", [False, True])
def test_checks_find_faults(fault, monkeypatch, tmp_path, capsys, alone):
    """The layers are named as not fused, with the reason. And with ours spoiled
    on the way to many GPUs, losses and files are wrong too."""
    wrap = check_distributed.wrap

    @torch.no_grad()
    def spoil(model, *args):
        for module in model.modules():
            if isinstance(module, FastLinear):
                module.lora_B["default"].weight *= 1.5
        return wrap(model, *args)

    if fault:
        monkeypatch.setattr(check_distributed, "wrap", spoil)
    wrong = check_distributed.checked(SIZE, ["lora"], ["fsdp2"], 3, tmp_path)
    assert len(wrong) == (3 if fault else 1), wrong
    assert "0 layers fused, 7 not" in (wrong[1] if fault else wrong[0])
    assert 'set_backend("reference") is on' in capsys.readouterr().out
    if fault:
        assert "losses on 1 differ" in wrong[0] and "adapter of one GPU on all" in wrong[2]


WHERE = [
    pytest.param("--tiny --gpus 2", id="cpu", marks=pytest.mark.interpreted),
    pytest.param("--gpus 2 --layers 1", id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=WHERE)
def where(request):
    if "tiny" not in request.param and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param


@pytest.fixture
def forked(monkeypatch):
    """On a CPU; a process that has a GPU cannot be."""
    if NONE:
        monkeypatch.setattr(torch.multiprocessing, "spawn", pairs.spawn)


@pytest.mark.slow
def test_timed_run(where, forked, tmp_path):
    argv = f"{where} --rounds 2 --only p=0.1 --only mode=ddp,fsdp2_accumulation --commit c0 --out {tmp_path}"
    only = " --only impl=peft_dora,lora_fast_dora"
    assert bench_distributed.main((argv + only).split()) == 0
    (path,) = tmp_path.glob("bench_distributed_*_x2.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench_distributed.COLUMNS and {row["commit"] for row in rows} == {"c0"}
    assert [(row["mode"], row["gpus"], row["impl"]) for row in rows] == [
        (mode, gpus, impl)
        for mode in ("ddp", "fsdp2_accumulation")
        for gpus in "21"
        for impl in ("peft_dora", "lora_fast_dora")
    ]
    for row in rows:
        length = 8 if "tiny" in where else 4096
        batch = 2 if "tiny" in where else 1
        assert int(row["tokens"]) == length * batch * (4 if row["mode"] == "fsdp2_accumulation" else 1)
        assert int(row["p20_us"]) <= int(row["median_us"]) <= int(row["p80_us"])
        assert float(row["tokens_per_s"]) == pytest.approx(1e6 * int(row["tokens"]) / int(row["median_us"]), rel=1e-2)
        assert (float(row["scaling"]) == 1) == (row["gpus"] == "1") and (row["peak_mib"] == "") == ("tiny" in where)


@pytest.mark.slow
def test_checked_run(where, forked, capfd):
    """Interpreted kernels on the CPU, DoRA, which has all tensors, in the mode that moves them most."""
    argv = f"{where} --check --steps {2 if 'tiny' in where else 20} --only mode=fsdp2_offload --only impl=peft_dora"
    assert bench_distributed.main(argv.split()) == 0, capfd.readouterr()
    out = capfd.readouterr().out
    assert out.count("ok    dora") == 8 and "WRONG" not in out and "all as it must be" in out
    assert "7 layers fused, 0 not" in out and "1 version of them in all processes" in out
