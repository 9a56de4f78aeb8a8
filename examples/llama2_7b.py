"""Train Llama-2-7B with LoRA beside PEFT's: parameters, tokens/s, memory; save the adapter, resume from it."""

import argparse
import copy
import csv
import gc
import os
import platform
import random
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import four_bits
import peft
import torch
import transformers
from common import GPU, paragraphs, trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, set_seed

import lora_fast
from lora_fast.cli.doctor_layers import examine

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
SMALL = LlamaConfig(
    vocab_size=259,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
TARGETS: dict[str, str | list[str]] = {"q,v": ["q_proj", "v_proj"], "all": "all-linear"}
KINDS = ("lora_fast", "PEFT, patched", "PEFT")
WARM_UP = 2  # steps: the first compiles the kernels
DEVICE = torch.device("cuda" if GPU else "cpu")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which speaks at every start and stop


class Row(NamedTuple):
    """What a kind needs for a setting."""

    trainable: int
    fused: str  # layers
    tokens_per_s: float
    peak: int  # bytes
    last_loss: float

    def __str__(self) -> str:
        mib = self.peak / 2**20
        return f"{self.trainable:12,}{self.fused:>12}{self.tokens_per_s:12,.0f}{mib:12,.1f}{self.last_loss:12.4f}"


def copy_of(base: nn.Module) -> Any:
    """The model again, with the same tensors."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def lora(
    base: nn.Module, targets: str = "q,v", r: int = 8, kind: str = "lora_fast", checkpointing: bool = False
) -> nn.Module:
    """A copy of ``base`` that shares its weights, with adapters of its own."""
    model = copy_of(base)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS[targets]}
    if kind == "lora_fast":
        return lora_fast.add_lora(model, lora_fast.LoRAConfig(**settings))
    model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    if kind == "PEFT, patched":
        lora_fast.patch_peft(model)
    return model


def packed(length: int) -> list[dict[str, torch.Tensor]]:
    """Rows [1, length] of whole paragraphs, one after the other.

    The positions start again with each: where they do, transformers' attention mask parts the documents, if it gets no
    mask from us and no cache. No document's first token is to be guessed from the one before it.
    """
    ids: list[int] = []
    positions: list[int] = []
    for tokens in ByT5Tokenizer(extra_ids=0)(paragraphs()[0])["input_ids"]:
        ids += tokens
        positions += range(len(tokens))
    parts = zip(torch.tensor(ids).split(length), torch.tensor(positions).split(length), strict=True)
    rows = [{"input_ids": i, "position_ids": p, "labels": i.where(p > 0, -100)} for i, p in parts]
    return [{name: t[None].to(DEVICE) for name, t in row.items()} for row in rows[:-1]]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, row: dict) -> float:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
        loss = model(**row, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def timed(model: nn.Module, optimizer: torch.optim.Optimizer, row: dict) -> tuple[float, float]:
    """(seconds, loss) of a step: to read its loss waits for all of it."""
    start = time.perf_counter()
    loss = step(model, optimizer, row)
    return time.perf_counter() - start, loss


def fused(model: nn.Module) -> str:
    """How many of the layers with an adapter the fused kernels run."""
    counts = Counter(layer.fused for layer in examine(model))
    return f"{counts[True]} of {counts[True] + counts[False]}"


def peak(model: nn.Module, optimizer: torch.optim.Optimizer, row: dict) -> int:
    """Bytes: the model, its optimiser, and the most that a step holds beyond them."""
    states = [t for state in optimizer.state.values() for t in state.values()]
    standing = sum(t.nbytes for t in [*model.parameters(), *states])
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, row)
        return standing + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, optimizer, row)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = high = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        high = max(high, held)
    return standing + high


def compare(args: argparse.Namespace, base: nn.Module, rows: list[dict], targets: str, r: int) -> dict[str, Row]:
    """{kind: what it needs}. They take turns, in another order each round."""
    models = {kind: lora(base, targets, r, kind, args.checkpointing) for kind in KINDS}
    for model in models.values():  # all start from the same adapters
        for mine, first in zip(trainable(model), trainable(models["lora_fast"]), strict=True):
            mine.data.copy_(first)
    optimizers = {kind: torch.optim.AdamW(trainable(m), args.lr, fused=True) for kind, m in models.items()}
    steps: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
    turns = random.Random(args.seed)
    for row in tqdm(rows[: args.steps + WARM_UP], desc=f"{targets}, r={r}"):
        for kind in turns.sample(list(models), len(models)):
            steps[kind].append(timed(models[kind], optimizers[kind], row))
    return {
        kind: Row(
            trainable=sum(p.numel() for p in trainable(model)),
            fused=fused(model),
            tokens_per_s=args.length / statistics.median(seconds for seconds, _ in steps[kind][WARM_UP:]),
            peak=peak(model, optimizers[kind], rows[-1]),
            last_loss=steps[kind][-1][1],
        )
        for kind, model in models.items()
    }


def write_csv(args: argparse.Namespace, table: dict[tuple[str, int], dict[str, Row]]) -> None:
    about = {
        "gpu": torch.cuda.get_device_name() if GPU else "cpu",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "model": "scaled down" if args.small else "Llama-2-7B",
        "length": args.length,
        "steps": args.steps,
        "checkpointing": int(args.checkpointing),
    }
    args.csv.mkdir(parents=True, exist_ok=True)
    with open(args.csv / "llama2_7b.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*about, *"targets r impl trainable fused tokens_per_s peak_mib last_loss".split()])
        for (targets, r), kinds in table.items():
            for kind, row in kinds.items():
                measured = round(row.tokens_per_s, 1), round(row.peak / 2**20, 1), round(row.last_loss, 4)
                writer.writerow([*about.values(), targets, r, kind, row.trainable, row.fused, *measured])


def resume(args: argparse.Namespace, base: nn.Module, rows: list[dict]) -> tuple[list[float], list[float]]:
    """The losses of the second half of a run, and of one that starts there from the files of the first."""
    model = lora(base)
    optimizer = torch.optim.AdamW(trainable(model), args.lr, fused=True)
    middle = len(rows) // 2
    for row in rows[:middle]:
        step(model, optimizer, row)
    lora_fast.save_adapter(model, args.out)
    torch.save(optimizer.state_dict(), Path(args.out) / "optimizer.pt")
    straight = [step(model, optimizer, row) for row in rows[middle:]]

    model = lora_fast.load_adapter(lora(base), args.out)
    optimizer = torch.optim.AdamW(trainable(model), args.lr, fused=True)
    optimizer.load_state_dict(torch.load(Path(args.out) / "optimizer.pt"))
    return straight, [step(model, optimizer, row) for row in rows[middle:]]


def qlora(args: argparse.Namespace, base: nn.Module, rows: list[dict], library: str) -> str:
    """What a patched PEFT model does over a base that this library quantised, in words."""
    if four_bits.missing(library):
        return "not installed"
    model = copy_of(base)
    four_bits.quantise(model, library)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    report = lora_fast.patch_peft(model)
    optimizer = torch.optim.AdamW(trainable(model), args.lr, fused=True)
    times = [timed(model, optimizer, row)[0] for row in rows[: WARM_UP + 3]]
    why = "; ".join(sorted({layer.reason for layer in report.layers if not layer.fused}))
    return (
        f"{report.fused} fused, {report.not_fused} stock PEFT's ({why}): "
        f"{args.length / statistics.median(times[WARM_UP:]):,.0f} tokens/s, "
        f"peak {peak(model, optimizer, rows[-1]) / 2**20:,.1f} MiB"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", default=not GPU, help="scaled down (always without a GPU)")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each setting (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of a packed row (default: 2048, scaled down 512)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for long rows")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and adapters (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the adapter's folder (default: %(default)s)")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="write the table to llama2_7b.csv in this folder, too")
    args = parser.parse_args(argv)
    args.length = args.length or (512 if args.small else 2048)
    return args


def main(argv: list[str] | None = None) -> dict:
    args, began = parse(argv), time.perf_counter()
    failed: list[str] = []

    def attempt(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives; None if it fails, which the end tells: the other steps still run."""
        try:
            return function(*arguments)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return None
        finally:
            gc.collect()  # models have cycles
            if GPU:
                torch.cuda.empty_cache()

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LLAMA_2_7B)
    print("Llama-2-7B, LoRA on q and v, r=8:")
    counts = lora_fast.print_trainable_parameters(converted := lora(base))
    keys = converted.load_state_dict(base.state_dict(), strict=False)
    new = {key.rsplit(".", 1)[1] for key in keys.missing_keys}
    print(f"its own state dict fits: {len(keys.unexpected_keys)} unexpected keys, missing only {sorted(new)}")

    set_seed(args.seed)
    with DEVICE:  # at once where and as they are to be
        config = SMALL if args.small else LLAMA_2_7B
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32)
    rows = packed(args.length)
    starts = sum(int((row["position_ids"] == 0).sum()) for row in rows)
    where = torch.cuda.get_device_name() if GPU else DEVICE.type
    print(
        f"{'scaled down' if args.small else 'whole'}, on {where}: {len(rows)} rows of {args.length} tokens, "
        f"{starts / len(rows):.1f} documents begin in each; "
        f"{time.perf_counter() - began:.0f} s so far"
    )
    print(f"{'':28}{'trainable':>12}{'fused':>12}{'tokens/s':>12}{'peak MiB':>12}{'last loss':>12}", flush=True)
    table: dict[tuple[str, int], dict[str, Row]] = {}
    for targets, r in ((on, r) for on in TARGETS for r in (8, 64)):
        if kinds := attempt(f"{targets}, r={r}", compare, args, base, rows, targets, r):
            table[targets, r] = kinds
            print(*(f"{f'{targets}, r={r}':12}{kind:16}{row}" for kind, row in kinds.items()), sep="\n", flush=True)
            if args.csv:
                attempt("csv", write_csv, args, table)

    straight, resumed = attempt("resume", resume, args, base, rows[: 2 * args.steps]) or ([], [])
    if resumed:
        apart = max(abs(a - b) for a, b in zip(straight, resumed, strict=True))
        end = f"losses differ by {apart:g}, the last {resumed[-1]:.4f}"
        print(f"adapter saved in {args.out}, {len(resumed)} steps resumed: {end}")
    print(
        f"others' 4-bit layers are not for add_lora, whose own are base_dtype='nf4': {(refused := four_bits.refusal())}"
    )
    four = {name: attempt(name, qlora, args, base, rows, name) or "failed" for name in four_bits.LIBRARIES}
    print(*(f"PEFT's, patched, over one of {name}: {what}" for name, what in four.items()), sep="\n")
    print(f"all this took {time.perf_counter() - began:.0f} s")
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))
    return {
        "counts": counts,
        "keys": keys,
        "table": table,
        "resume": (straight, resumed),
        "refusal": refused,
        "four bits": four,
    }


if __name__ == "__main__":
    main()
