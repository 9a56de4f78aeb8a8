"""What must hold on several GPUs: python -m benchmarks.bench_distributed --check

For LoRA and DoRA, without dropout (with it every process drops its own) and with the whole batch the same everywhere:

losses      of our steps on all GPUs, in each mode, are those of ours on one: they differ by at most twice what stock
            PEFT's do, in that mode or on one GPU that takes the batch row by row, which is rounding alone; that, and
            what ours differ from stock's by, is at most a tenth of what the loss falls by
adapters    are bit for bit the same in every process after the run, and no longer what they were (but for DoRA's
            magnitudes in 16 bits, where such steps are less than rounding)
report      calls every layer fused, and no layer was left to stock PEFT in the run
checkpoint  PEFT's own files: saved by FSDP2 on all GPUs they load on one, and the other way round, bit for bit, and
            give the loss that they gave
"""

import gc
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import models
from benchmarks.distributed import MODES, group_of, of_all, processes, step_of, wrap
from benchmarks.models import Size
from lora_fast import PeftReport, patch_peft, peft_report

ROWS, LENGTH, WORDS = 4, 256, 64  # rows of a process, at most so long; of a few words, so that the loss falls fast
LR = 1e-4  # at 1e-3 rounding alone, in bf16 adapters, moved losses by 6% of their fall, stock's too
LAYERS = 4  # more of the same would add only time
MORE = 2  # times stock's spread
EXACT = 1e-6  # of a loss: where stock's spread is less than float32's rounding
FALL = 0.1


class Run(NamedTuple):
    losses: list[float]  # of the whole batch, step by step
    adapters: dict[str, Tensor]
    report: PeftReport


def differ(losses: list[float], others: list[float]) -> float:
    a, b = torch.tensor([losses, others], dtype=torch.float64)
    return (a - b).abs().max().item()  # NaN too


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """All adapters, whole, in every process."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: tensor.cpu() for name, tensor in whole.items()}


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

    model: Any = models.model_of(models.Case(0, "frozen", 0), base)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False)
    patch_peft(model)
    return model.train()


def save(model: Any, adapters: dict[str, Tensor], folder: Path) -> None:
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=adapters)
    dist.barrier()


class Bench:
    """One kind of adapter in all modes."""

    def __init__(self, kind: str, base: nn.Module, size: Size, steps: int, mesh: DeviceMesh) -> None:
        self.kind, self.base, self.steps, self.mesh = kind, base, steps, mesh
        self.wrong: list[str] = []
        generator = torch.Generator().manual_seed(2)
        shape = mesh.size(), ROWS, min(size.length, LENGTH)
        self.whole = list(torch.randint(min(size.vocabulary, WORDS), shape, generator=generator).to(size.device))
        self.mine = self.whole[dist.get_rank()]

    def say(self, right: bool, what: str) -> None:
        """The first process tells each check; it is right if it is in all of them."""
        right, what = all(of_all(right)), f"{self.kind} {what}"
        if not right:
            self.wrong.append(what)
        if dist.get_rank() == 0:
            print("ok   " if right else "WRONG", what, flush=True)

    def model(self, impl: str, checkpointing: int = 0) -> nn.Module:
        gc.collect()  # the models before this one, which are rings
        return models.model_of(models.Case(checkpointing, f"{impl}_{self.kind}", 0), self.base)

    def alone(self, impl: str, rows: int = ROWS) -> tuple[nn.Module, Run]:
        model = self.model(impl)
        batches = [part for ids in self.whole for part in ids.split(rows)]
        return model, trained(model, batches, self.steps, False)

    def on_all(self, impl: str, mode: str) -> tuple[nn.Module, Run]:
        settings = MODES[mode]
        model = wrap(self.model(impl, settings.checkpointing), settings, self.mesh)
        return model, trained(model, list(self.mine.chunk(settings.accumulate)), self.steps, True)

    def check(self, modes: list[str], folder: Path) -> None:
        _, stock = self.alone("peft")
        fall = stock.losses[0] - min(stock.losses)
        rounding = differ(self.alone("peft", 1)[1].losses, stock.losses)
        self.say(
            MORE * rounding <= FALL * fall,
            f"stock's losses on one GPU fall by {fall:.3f}, differ row by row by {rounding:.2e}",
        )
        model, ours = self.alone("lora_fast")
        apart = differ(ours.losses, stock.losses)
        self.say(apart <= FALL * fall, f"ours on one GPU differs from stock's by {apart:.2e}")
        start, loss = adapters_of(self.model("lora_fast")), loss_of(model, self.whole)
        save(model, ours.adapters, folder / "one")
        for mode in modes:
            apart = differ(self.on_all("peft", mode)[1].losses, stock.losses)
            bound = max(MORE * max(apart, rounding), EXACT * stock.losses[0])
            self.say(bound <= FALL * fall, f"{mode}: stock's losses differ from one GPU's by {apart:.2e}")
            wrapped, run = self.on_all("lora_fast", mode)
            self.check_run(mode, run, ours, bound, start)
            if MODES[mode].fsdp2:
                self.check_files(mode, wrapped, run, folder, bound)
                again = wrap(loaded(folder / "one", self.base), MODES[mode], self.mesh)
                apart = abs(everywhere([loss_of(again, [self.mine])])[0] - loss)
                self.say(
                    same(adapters_of(again), ours.adapters) and apart <= bound,
                    f"{mode}: the adapter of one GPU on all, loss {loss:.4f} differs by {apart:.2e}",
                )

    def check_run(self, mode: str, run: Run, one: Run, bound: float, start: dict[str, Tensor]) -> None:
        apart = differ(run.losses, one.losses)
        self.say(
            apart <= bound,
            f"{mode}: losses on {self.mesh.size()} differ from one GPU's by {apart:.2e}, "
            f"{bound=:.2e}, the last is {run.losses[-1]:.4f}",
        )
        still = [
            name
            for name, tensor in start.items()
            if torch.equal(run.adapters[name], tensor) and not ("magnitude" in name and tensor.dtype != torch.float32)
        ]
        alike = len(set(of_all(digest(run.adapters))))
        self.say(
            alike == 1 and not still and run.adapters.keys() == start.keys(),
            f"{mode}: {len(still)} of {len(start)} adapters did not move, {alike} version of them in all processes",
        )
        fused, slow = run.report.fused, run.report.not_fused
        self.say(not slow, f"{mode}: {fused} layers fused, {slow} not" + f"\n{run.report}" * (slow > 0))

    def check_files(self, mode: str, wrapped: nn.Module, run: Run, folder: Path, bound: float) -> None:
        loss = everywhere([loss_of(wrapped, [self.mine])])[0]
        save(wrapped, run.adapters, folder / mode)
        one = loaded(folder / mode, self.base)
        apart = abs(loss_of(one, self.whole) - loss)
        self.say(
            same(adapters_of(one), run.adapters) and apart <= bound,
            f"{mode}: the adapter of all GPUs on one, loss {loss:.4f} differs by {apart:.2e}",
        )


def checked(size: Size, kinds: list[str], modes: list[str], steps: int, folder: Path) -> list[str]:
    """In each process: what is wrong."""
    mesh, base = group_of(dist.get_world_size(), size.device), models.base_model(size)
    wrong: list[str] = []
    for kind in kinds:
        bench = Bench(kind, base, size, steps, mesh)
        bench.check(modes, folder / kind)
        wrong += bench.wrong
    return wrong


def main(gpus: int, size: Size, kinds: list[str], modes: list[str], steps: int) -> int:
    """The exit status. On a CPU the kernels are interpreted."""
    if size.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # of the processes that are started
    with tempfile.TemporaryDirectory() as folder:
        wrong = processes(gpus, size.device, "triton", checked, size, kinds, modes, steps, Path(folder))
    print("\nall as it must be" if not wrong else "\n".join(["", f"{len(wrong)} wrong:", *wrong]))
    return 1 if wrong else 0
