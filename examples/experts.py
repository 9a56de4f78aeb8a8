"""LoRA on the experts of Mixture-of-Experts models with PEFT and transformers' Trainer: a small Qwen3-MoE and a small
gpt-oss; or Qwen3-30B-A3B's widths in four layers; or the whole of it (61 GB of bf16 on one card).

Weights are random, made where the model runs; the text is Python's own documentation, a byte a token. What lora_fast
adds is one line, patch_peft, and with ``--experts nf4`` another that keeps the experts in 4 bits. The same run with
stock PEFT stands beside it, loss for loss, and at small sizes on a GPU one in float32, from which both are as far as
bfloat16 takes them.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import common
import torch
from peft import LoraConfig, get_peft_model
from smollm2 import at_least_one, table
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import lora_fast

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 259,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}
QWEN3_30B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "Qwen3-MoE": Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=32),
        "gpt-oss": GptOssConfig(
            **SMALL, num_local_experts=8, intermediate_size=32, layer_types=["sliding_attention", "full_attention"]
        ),
    },
    "30b-widths": {"Qwen3-30B-A3B, 4 layers": Qwen3MoeConfig(**{**QWEN3_30B, "num_hidden_layers": 4})},
    "30b": {"Qwen3-30B-A3B": Qwen3MoeConfig(**QWEN3_30B)},
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OURS, STOCK, EXACT = "lora_fast", "stock PEFT", "stock PEFT, float32"
PACKED = f"{OURS}, experts in"
HEADER = (
    "",
    "trained parameters",
    "first loss",
    "last",
    "farthest off",
    "seconds a step (median)",
    "tokens/s",
    "peak GiB",
)


class Result(NamedTuple):
    """What became of a run; without losses it did not fit into memory."""

    name: str
    parameters: int
    losses: list[float]
    off: float  # from the losses of the most exact run, at most
    step_s: float
    tokens: int  # of a step
    peak: float  # GiB

    def row(self) -> tuple[str, ...]:
        if not self.losses:
            return self.name, f"{self.parameters:,}", *["out of memory"] * 2, *["-"] * 4
        losses = (f"{loss:.4f}" for loss in (self.losses[0], self.losses[-1]))
        speed = f"{self.step_s:.3f}", f"{self.tokens / self.step_s:,.0f}"
        return self.name, f"{self.parameters:,}", *losses, f"{self.off:.1e}", *speed, f"{self.peak:.1f}"


class Recorded(Trainer):
    """It keeps the loss of every step as it is, not rounded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.now() - self.began)

    @staticmethod
    def now() -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()


def peft_model(config: Any, way: str, args: argparse.Namespace) -> Any:
    """The model with PEFT's adapters on its experts and its attention: the same for every way."""
    set_seed(args.seed)
    dtype = torch.float32 if way == EXACT else DTYPE
    with DEVICE:  # the weights are never anywhere else
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if args.size == "small" else dtype)
        if way == EXACT:  # the weights that the others have
            base.to(DTYPE).to(dtype).set_experts_implementation("eager")
        base.to(dtype).config.use_cache = False
        if way.startswith(PACKED):
            lora_fast.pack_experts(base, args.experts)
        adapters = LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=TARGETS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, adapters)
    if way == EXACT:  # and the adapters
        for p in common.trainable(model):
            p.data = p.data.to(DTYPE).to(dtype)
    if way.startswith(OURS):
        print(lora_fast.patch_peft(model))  # this is all
    return model


def train(model: Any, way: str, data: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            seed=args.seed,
            gradient_checkpointing=args.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=GPU,
        )
        trainer = Recorded(model, settings, train_dataset=data)  # type: ignore[arg-type]
        trainer.add_callback(clock := Clock())
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        parameters = model.num_parameters(only_trainable=True)
        tokens = args.batch * args.length
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return Result(way, parameters, [], 0.0, 0.0, tokens, 0.0)
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    losses = [loss.item() for loss in trainer.losses]
    return Result(way, parameters, losses, 0.0, median(clock.steps[2:] or clock.steps), tokens, peak)


def ways(args: argparse.Namespace) -> Iterator[str]:
    if args.experts:
        yield f"{PACKED} {args.experts}"
    yield OURS
    if not args.no_stock:
        yield STOCK
        if GPU and args.size == "small":
            yield EXACT


def run(args: argparse.Namespace) -> dict[str, list[Result]]:
    """{model: its results, ours first}, told as they come."""
    rows = common.rows(args, common.load_tokenizer(args))[0]
    data = [{"input_ids": row, "labels": row} for row in rows]
    found = {}
    for name, config in SIZES[args.size].items():
        results = []
        for way in ways(args):
            print(f"\n== {name}, {way}, r={args.rank}, {args.steps} steps", flush=True)
            model = peft_model(config, way, args)
            results.append(train(model, way, data, args))
            del model
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
        truth = results[-1].losses
        found[name] = [result._replace(off=farthest(result.losses, truth)) for result in results]
        where = torch.cuda.get_device_name() if GPU else "cpu"
        print(f"\n{name}, {args.batch} x {args.length} tokens, on {where}")
        print(table(found[name], HEADER), flush=True)
    return found


def farthest(losses: list[float], truth: list[float]) -> float:
    return max((abs(a - b) for a, b in zip(losses, truth, strict=False)), default=0.0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models (default: %(default)s)")
    parser.add_argument("--steps", type=at_least_one, default=10, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--rank", type=at_least_one, default=8, help="of each expert's adapter (default: %(default)s)")
    parser.add_argument("--batch", type=at_least_one, help="rows of a step (default: 4; of the large sizes 1)")
    parser.add_argument("--length", type=at_least_one, help="tokens of a row (default: 64; of the large sizes 4096)")
    parser.add_argument("--lr", type=float, help="at the start; falls to 0 (default: 1e-2; of the large sizes 1e-4)")
    parser.add_argument("--checkpointing", action="store_true", help="of activations; always with --size 30b")
    parser.add_argument(
        "--experts", choices=("nf4", "mxfp4", "float8_e4m3"), help="a run whose experts are kept so, too"
    )
    parser.add_argument("--no-stock", action="store_true", help="leave out the runs with stock PEFT")
    parser.add_argument("--seed", type=int, default=0, help="of weights, adapters and order (default: %(default)s)")
    args = parser.parse_args(argv)
    small = args.size == "small"
    args.batch, args.length = args.batch or (4 if small else 1), args.length or (64 if small else 4096)
    args.lr, args.model = args.lr or (1e-2 if small else 1e-4), None
    args.checkpointing |= args.size == "30b"
    return args


def main(argv: list[str] | None = None) -> dict[str, list[Result]]:
    return run(parse(argv))


if __name__ == "__main__":
    main()
