"""Training loops of others after ``patch_peft``: real steps, whose losses are those of stock PEFT, on the kernels."""

import copy
import json
import re
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from checkout import ROOT
from pairs import two_processes

from lora_fast import dispatch, patch_peft, set_backend

for package in ("peft", "transformers", "accelerate", "triton"):
    pytest.importorskip(package)
from loops import (  # noqa: E402
    KINDS,
    LAYERS,
    LR,
    STEPS,
    WAYS,
    Seen,
    arguments,
    by_ways,
    tiny_llama,
    token_ids,
    trainable,
    trained,
)

LIGHTNING = [name for name in ("lightning", "pytorch_lightning") if find_spec(name)]  # the same under two names


@pytest.fixture(params=WAYS)
def way(request):
    """(backend, device): plain torch on the CPU, the kernels in the interpreter, the kernels."""
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps a device and a precision for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def check_losses(found, expected, tol=1e-4, micro=1):
    """Those of the first and the second model, step by step; they fell, and the first model's without our kernels."""
    assert len(found.losses) == STEPS * micro and expected.losses[-micro] < expected.losses[0] - 0.2, expected.losses
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=tol, atol=0)
    assert expected.calls == expected.launches == 0


def check_fused(found, forwards=STEPS):
    """Each layer ran through the fused operator in each forward, and the kernels were launched."""
    assert found.report.not_fused == 0 and len(found.report.layers) == LAYERS, found.report
    assert found.calls == forwards * LAYERS and found.launches >= 2 * STEPS * LAYERS, found


def check_plain(found, why):
    """No layer did, and the report says why."""
    assert len(found.report.layers) == LAYERS and all(why in layer.reason for layer in found.report.layers)
    assert found.report.fused == found.calls == found.launches == 0


def check(way, loop, model=None, tol=1e-4, forwards=STEPS):
    """The loop gives both models the same losses, and all that the kernels can run they did run."""
    stock = tiny_llama() if model is None else model
    ours = copy.deepcopy(stock)
    set_backend(way[0])
    patch_peft(ours)
    expected, found = trained(stock, loop), trained(ours, loop)
    check_losses(found, expected, tol)
    if way == ("auto", "cpu"):
        check_plain(found, dispatch.why_not_triton(torch.device("cpu"), torch.float32))
    else:
        check_fused(found, forwards)


@pytest.mark.medium
@KINDS
def test_plain_loop(way, kind):
    def loop(model):
        model.to(way[1])
        optimizer, ids = torch.optim.AdamW(trainable(model), LR), token_ids().to(way[1])
        for _ in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    check(way, loop, tiny_llama(**kind))


@pytest.mark.medium
@pytest.mark.parametrize("way, reentrant", by_ways({"": None, "reentrant": True, "non-reentrant": False}))
def test_trainer(way, reentrant, tmp_path):
    from transformers import Trainer, TrainingArguments

    ids = token_ids()[0]  # alone: the rows come in random order
    data = [{"input_ids": ids, "labels": ids}] * (2 * STEPS)
    more = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def loop(model):
        args = arguments(way, TrainingArguments, tmp_path, gradient_checkpointing=reentrant is not None, **more)
        Trainer(model, args, train_dataset=data).train()

    check(way, loop, forwards=STEPS * (1 if reentrant is None else 2))


@pytest.mark.medium
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
def test_trl(way, tmp_path):
    from datasets import Dataset
    from transformers import ByT5Tokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": "W x + B A x"}] * (2 * STEPS))

    def loop(model):
        args = arguments(way, SFTConfig, tmp_path, bf16=False)
        SFTTrainer(model, args, train_dataset=data, processing_class=ByT5Tokenizer(extra_ids=0)).train()

    check(way, loop, tiny_llama(vocab=259), forwards=2 * STEPS)  # TRL checkpoints unless told otherwise


@pytest.mark.medium
@pytest.mark.skipif(not LIGHTNING, reason="needs Lightning")
def test_lightning(way, tmp_path):
    lightning = import_module(LIGHTNING[0])

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, ids, index):
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(trainable(self.model), LR)

    def loop(model):
        data = torch.utils.data.DataLoader(token_ids().repeat(STEPS, 1), batch_size=2)
        lightning.Trainer(
            accelerator="gpu" if way[1] == "cuda" else "cpu",
            devices=1,
            max_steps=STEPS,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(model), data)

    check(way, loop)


@pytest.mark.medium
def test_accelerate(way):
    """In bf16 autocast; in float16 where the kernels are interpreted (Accelerate itself has none on a CPU)."""
    from accelerate import Accelerator

    interpreted = way == ("triton", "cpu")

    def loop(model):
        accelerator = Accelerator(mixed_precision="no" if interpreted else "bf16", cpu=way[1] == "cpu")
        data = torch.utils.data.DataLoader(token_ids().repeat(STEPS, 1), batch_size=2)
        model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(trainable(model), LR), data)
        for ids in data:
            with torch.autocast("cpu", torch.float16, enabled=interpreted):
                loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    check(way, loop, tol=1e-3 if interpreted else 1e-2)


@pytest.mark.medium
def test_regional_compilation(device):
    """Each decoder layer by itself: one graph for all, whose inputs all need a gradient, after a step and with new
    scalings too."""
    from peft.tuners.lora import LoraLayer
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    stock = tiny_llama(layers=2, use_dora=True).to(device)
    ours, losses = copy.deepcopy(stock), []
    set_backend("triton")
    patch_peft(ours)
    for block in ours.base_model.model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for model in (ours, stock):
        model.enable_input_require_grads()
        optimizer, ids = torch.optim.AdamW(trainable(model), LR), token_ids().to(device)
        for step in range(2):
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] = 2.0 + step
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(losses[:2]), torch.tensor(losses[2:]), rtol=1e-4, atol=0)
    assert abs(losses[0] - losses[1]) > 0.02 and counter.frame_count == 1


def test_the_page_in_the_docs():
    """Each row of its table names tests that there are."""
    text = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][2:]  # without head and rule
    there = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in ROOT.glob("tests/**/test_*.py")), re.M))
    assert len(rows) == 20 and all(len(row) == 6 for row in rows), rows
    named = [set(re.findall(r"`(\w+)`", row[4])) for row in rows]
    assert all(names and names <= there for names in named), named


@pytest.mark.slow
def test_two_processes(device, tmp_path):
    """DDP and FSDP2, each with the interpreted kernels or on two GPUs."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    two_processes("loops_distributed.py", tmp_path, "triton" if device == "cpu" else "auto", device)
    for rank in range(2):
        for mode, both in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            expected, found = (Seen.read(seen) for seen in both)
            micro = 2 if "accumulation" in mode else 1
            check_losses(found, expected, micro=micro)
            if mode.endswith("too late"):
                check_plain(found, "patch before fully_shard")
            else:
                check_fused(found, STEPS * micro * (2 if "checkpointing" in mode else 1))
