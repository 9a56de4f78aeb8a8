"""What must hold on several GPUs: python -m benchmarks.bench_distributed --check

For LoRA and DoRA, without dropout (with it every process drops its own) and with the whole batch the same everywhere:

losses      of our steps on all GPUs, in each mode, are those of ours on one: they differ by at most twice what stock
            PEFT's do, which is rounding alone; that is at most a tenth of what the loss falls by, or nothing is shown
adapters    are bit for bit the same in every process after the run, and no longer what they were
report      calls every layer fused, and no layer was left to stock PEFT in the run
checkpoint  PEFT's own files: saved by FSDP2 on all GPUs they load on one, and the other way round, bit for bit; the
            model's loss is the same there, and trains on
"""

import gc
import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import bench_model, common
from benchmarks.bench_model import Size
from benchmarks.distributed import MODES, group_of, of_all, processes, step_of, wrap
from lora_fast import PeftReport, SlowPathWarning, patch_peft, peft_report

ROWS, LENGTH, WORDS = 4, 256, 64  # rows of a process, at most so long; of a few words, so that the loss falls fast
LR = 1e-3
MORE = 2  # times stock's spread
EXACT = 1e-6  # of a loss: where stock's spread is less than float32's rounding
FALL = 0.1


class Run(NamedTuple):
    losses: list[float]  # of the whole batch, step by step
    adapters: dict[str, Tensor]
    report: PeftReport


class Checks:
    """Collects what is wrong; the first process tells everything at once."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def check(self, right: bool, what: str) -> None:
        told = f"{'ok   ' if right else 'WRONG'} {what}"
        if not all(of_all(right)):
            self.wrong.append(what)
            told = told.replace("ok   ", "WRONG")
        if dist.get_rank() == 0:
            print(told, flush=True)


def differ(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """All adapters, whole, in every process."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    return {name: tensor.cpu() for name, tensor in get_model_state_dict(model, options=options).items()}


def digest(adapters: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(adapters.items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def same(adapters: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return adapters.keys() == others.keys() and all(torch.equal(adapters[name], others[name]) for name in adapters)


def trained(model: nn.Module, batches: list[Tensor], steps: int, together: bool) -> Run:
    """``together``: the batches are this process's part of the whole batch, else the whole."""
    step = step_of(model, batches, LR)
    losses = [step().item() for _ in range(steps)]
    return Run(everywhere(losses) if together else losses, adapters_of(model), peft_report(model))


def everywhere(losses: list[float]) -> list[float]:
    """The mean of all processes."""
    return [sum(step) / len(step) for step in zip(*of_all(losses), strict=True)]


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Tensor]) -> float:
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in batches]
    model.train()
    return sum(losses) / len(losses)


def loaded(folder: Path, base: nn.Module) -> nn.Module:
    """Ours, with the adapter that lies in the folder."""
    from peft import PeftModel

    model: Any = bench_model.model_of(bench_model.Case(0, "frozen", 0), base)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False)
    patch_peft(model)
    return model.train()


def save(model: Any, adapters: dict[str, Tensor], folder: Path) -> None:
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=adapters)
    dist.barrier()


class Bench:
    """One kind of adapter in all modes."""

    def __init__(self, kind: str, base: nn.Module, size: Size, steps: int, mesh: DeviceMesh, checks: Checks) -> None:
        self.kind, self.base, self.steps, self.mesh, self.checks = kind, base, steps, mesh, checks
        generator = torch.Generator().manual_seed(2)
        shape = mesh.size(), ROWS, min(size.length, LENGTH)
        self.whole = list(torch.randint(min(size.vocabulary, WORDS), shape, generator=generator).to(size.device))
        self.mine = self.whole[dist.get_rank()]

    def model(self, impl: str, checkpointing: int = 0) -> nn.Module:
        gc.collect()  # the models before this one, which are rings
        return bench_model.model_of(bench_model.Case(checkpointing, f"{impl}_{self.kind}", 0), self.base)

    def alone(self, impl: str) -> tuple[nn.Module, Run]:
        model = self.model(impl)
        return model, trained(model, self.whole, self.steps, False)

    def on_all(self, impl: str, mode: str) -> tuple[nn.Module, Run]:
        settings = MODES[mode]
        model = self.model(impl, settings.checkpointing)
        batches = list(self.mine.chunk(settings.accumulate))
        return model, trained(wrap(model, settings, self.mesh), batches, self.steps, True)

    def check(self, modes: list[str], folder: Path) -> None:
        _, stock = self.alone("peft")
        _, again = self.alone("peft")
        spreads = {"one GPU, again": differ(again.losses, stock.losses)}
        for mode in modes:
            spreads[mode] = differ(self.on_all("peft", mode)[1].losses, stock.losses)
        spread, fall = max(spreads.values()), stock.losses[0] - min(stock.losses)
        bound = max(MORE * spread, EXACT * stock.losses[0])
        told = ", ".join(f"{name} {value:.2e}" for name, value in spreads.items())
        self.checks.check(bound <= FALL * fall, f"{self.kind}: stock's losses fall by {fall:.3f}, differ by {told}")
        model, ours = self.alone("lora_fast")
        apart = differ(ours.losses, stock.losses)
        self.checks.check(apart <= bound, f"{self.kind}: ours on one GPU differs from stock's by {apart:.2e}, {bound=:.2e}")
        start = adapters_of(self.model("lora_fast"))
        for mode in modes:
            self.check_mode(mode, ours, bound, start)
        self.from_one(model, ours, folder / f"{self.kind}_one", bound)
        del model
        self.from_all(folder / f"{self.kind}_all", bound)

    def check_mode(self, mode: str, one: Run, bound: float, start: dict[str, Tensor]) -> None:
        what = f"{self.kind} {mode}:"
        _, run = self.on_all("lora_fast", mode)
        apart = differ(run.losses, one.losses)
        self.checks.check(apart <= bound, f"{what} losses on {self.mesh.size()} differ from one GPU's by {apart:.2e}, "
                          f"{bound=:.2e}, the last is {run.losses[-1]:.4f}")  # fmt: skip
        alike, moved = len(set(of_all(digest(run.adapters)))), sum(not torch.equal(run.adapters[n], start[n]) for n in start)
        self.checks.check(alike == 1 and moved == len(start) == len(run.adapters),
                          f"{what} {moved} of {len(start)} adapters moved, {alike} version of them in all processes")  # fmt: skip
        self.checks.check(run.report.not_fused == 0, f"{what} {run.report.fused} layers fused, {run.report.not_fused} not"
                          + f"\n{run.report}" * (run.report.not_fused > 0))  # fmt: skip

    def from_all(self, folder: Path, bound: float) -> None:
        model, run = self.on_all("lora_fast", "fsdp2")
        loss = everywhere([loss_of(model, [self.mine])])[0]
        save(model, run.adapters, folder)
        one = loaded(folder, self.base)
        apart = abs(loss_of(one, self.whole) - loss)
        self.checks.check(same(adapters_of(one), run.adapters) and apart <= bound,
                          f"{self.kind}: FSDP2's adapter on one GPU, loss {loss:.4f} differs by {apart:.2e}")  # fmt: skip
        self.trains_on(trained(one, self.whole, 2, False), loss, "FSDP2's adapter on one GPU")

    def from_one(self, one: nn.Module, run: Run, folder: Path, bound: float) -> None:
        loss = loss_of(one, self.whole)
        save(one, run.adapters, folder)
        model = wrap(loaded(folder, self.base), MODES["fsdp2"], self.mesh)
        apart = abs(everywhere([loss_of(model, [self.mine])])[0] - loss)
        self.checks.check(same(adapters_of(model), run.adapters) and apart <= bound,
                          f"{self.kind}: one GPU's adapter in FSDP2, loss {loss:.4f} differs by {apart:.2e}")  # fmt: skip
        self.trains_on(trained(model, [self.mine], 2, True), loss, "one GPU's adapter in FSDP2")

    def trains_on(self, run: Run, loss: float, what: str) -> None:
        self.checks.check(run.losses[-1] < loss, f"{self.kind}: {what} trains on, {loss:.4f} to {run.losses[-1]:.4f}")


def checked(size: Size, modes: list[str], steps: int, folder: Path) -> list[str]:
    """In each process: what is wrong."""
    warnings.simplefilter("error", SlowPathWarning)  # of a layer that is left to stock PEFT
    checks, mesh, base = Checks(), group_of(dist.get_world_size(), size.device), bench_model.base_model(size)
    for kind in ("lora", "dora"):
        Bench(kind, base, size, steps, mesh, checks).check(modes, folder)
    return checks.wrong


def main(gpus: int, size: Size, modes: list[str], steps: int) -> int:
    """The exit status. On a CPU the kernels are interpreted."""
    if size.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # of the processes that are started
    with tempfile.TemporaryDirectory() as folder:
        wrong = processes(gpus, size.device, "triton", checked, size, modes, steps, Path(folder))
    print("\nall as it must be" if not wrong else "\n".join(["", f"{len(wrong)} wrong:", *wrong]))
    return 1 if wrong else 0
