"""For the tests of training loops: a tiny Llama under PEFT, its losses, and what the kernels were asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import peft
import pytest
import torch
import transformers
from devices import CPU, CUDA
from torch import nn

from lora_fast import PeftReport, peft_report
from lora_fast.blocks import gated
from lora_fast.blocks.form import Layer
from lora_fast.blocks.group import FusedGroup
from lora_fast.blocks.mlp import FusedMlp
from lora_fast.ops import linear as ops
from lora_fast.peft.report import PeftLayer

STEPS, LR = 3, 2e-2
LAYERS = 7  # of the tiny Llama that have adapters
WAYS = [
    pytest.param(("auto", "cpu"), id="plain"),
    pytest.param(("triton", "cpu"), id="interpreted", marks=CPU.marks),
    pytest.param(("auto", "cuda"), id="gpu", marks=CUDA.marks),
]


def by_ways(values: dict) -> list:
    """(way, value): all of the values on the kernels, the first one alone where the layers stay stock's."""
    return [
        pytest.param(*way.values, value, id=f"{way.id}-{name}", marks=way.marks)
        for way in WAYS
        for i, (name, value) in enumerate(values.items())
        if i == 0 or way.id != "plain"
    ]


KINDS = pytest.mark.parametrize("way, kind", by_ways({"lora": {}, "dora": {"use_dora": True}}))


def tiny_llama(layers: int = 1, vocab: int = 32, kv_heads: int = 1, **kwargs) -> nn.Module:
    """A Llama of random weights with LoRA (DoRA: ``use_dora=True``) on all linear layers, and none of it zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **kwargs)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), settings)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def token_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(seed))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def arguments(way, cls, path, **kwargs):
    """transformers' TrainingArguments, or a subclass, for a short run on one device that writes nothing."""
    kwargs = {"max_steps": STEPS, "per_device_train_batch_size": 2, **kwargs}
    args = cls(
        output_dir=str(path),
        learning_rate=LR,
        use_cpu=way[1] == "cpu",
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **kwargs,
    )
    assert args.device.type == way[1]
    args._n_gpu = min(args.n_gpu, 1)  # several of them would mean DataParallel
    return args


@dataclass
class Seen:
    """What happened while a loop ran: the model's losses, its report at the first of them, the layers that fused
    operators ran and the launches of kernels."""

    losses: list[float] = field(default_factory=list)
    report: PeftReport | None = None
    calls: int = 0
    launches: int = 0

    @classmethod
    def read(cls, fields: dict) -> "Seen":
        """Of what ``dataclasses.asdict`` made and JSON carried."""
        layers = tuple(PeftLayer(**layer) for layer in fields["report"]["layers"])
        return cls(**fields | {"report": PeftReport(layers)})


def layers_in(args: tuple) -> int:
    """Of a call of a fused operator: a block is given its layers, a layer none."""
    return sum(isinstance(one, Layer) for arg in args if type(arg) in (list, tuple) for one in arg) or 1


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts what the fused operators and the kernels' launcher are called for."""
    from lora_fast.kernels.program import Program

    seen, start, probe, inside = Seen(), Program.run, gated._same_numbers, [False]
    plain = {kind: kind.__call__ for kind in (ops.FusedLinear, FusedGroup, FusedMlp)}

    def counting(run):
        def operator(self, x, *args, **kwargs):
            if inside[0]:  # of another one, which counted
                return run(self, x, *args, **kwargs)
            seen.calls += layers_in(args)
            inside[0] = True
            try:
                return run(self, x, *args, **kwargs)
            finally:
                inside[0] = False

        return operator

    def not_counting(*args):
        inside[0] = True
        try:
            return probe(*args)
        finally:
            inside[0] = False

    def launch(program, bound, first=0, last=None):
        seen.launches += len(program.launches[first:last])
        return start(program, bound, first, last)

    for kind, run in plain.items():
        kind.__call__ = counting(run)  # type: ignore[method-assign]
    Program.run, gated._same_numbers = launch, not_counting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Program.run, gated._same_numbers = start, probe  # type: ignore[method-assign]
        for kind, run in plain.items():
            kind.__call__ = run  # type: ignore[method-assign]


def trained(model: nn.Module, loop: Callable[[nn.Module], object]) -> Seen:
    """What was seen while ``loop`` trained the model, whose output has a loss."""

    def look(module, args, output):
        seen.losses.append(output.loss.item())
        seen.report = seen.report or peft_report(model)

    handle = model.register_forward_hook(look)
    with watched() as seen:
        loop(model)
    handle.remove()
    return seen
