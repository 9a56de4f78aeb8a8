"""Train Llama-2-7B with LoRA beside PEFT's: parameters, tokens/s, memory; save the adapter, resume from it."""

import argparse
import copy
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import GPU, paragraphs, trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, set_seed

import lora_fast

LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
SMALL = LlamaConfig(
    vocab_size=259, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
TARGETS: dict[str, str | list[str]] = {"q,v": ["q_proj", "v_proj"], "all": "all-linear"}
DEVICE = torch.device("cuda" if GPU else "cpu")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which speaks at every start and stop


def lora(base: nn.Module, targets: str = "q,v", r: int = 8, kind: str = "lora_fast") -> nn.Module:
    """A copy of ``base`` that shares its weights, with adapters of its own."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
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
    for text in paragraphs()[0]:
        tokens = ByT5Tokenizer(extra_ids=0)(text)["input_ids"]
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


def compare(args: argparse.Namespace, base: nn.Module, rows: list[dict], targets: str, r: int) -> dict:
    """{kind: (trainable parameters, tokens/s, peak bytes, last loss)}: they take turns, in another order each round."""
    models = {kind: lora(base, targets, r, kind) for kind in ("lora_fast", "PEFT, patched", "PEFT")}
    for model in models.values():  # all start from the same adapters
        for mine, first in zip(trainable(model), trainable(models["lora_fast"]), strict=True):
            mine.data.copy_(first)
    optimizers = {kind: torch.optim.AdamW(trainable(m), args.lr, fused=True) for kind, m in models.items()}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    losses = {}
    turns = random.Random(args.seed)
    for row in tqdm(rows[: args.steps + 1], desc=f"{targets}, r={r}"):
        for kind in turns.sample(list(models), len(models)):
            start = time.perf_counter()
            losses[kind] = step(models[kind], optimizers[kind], row)
            times[kind].append(time.perf_counter() - start)
    return {
        kind: (
            sum(p.numel() for p in trainable(model)),
            args.length / statistics.median(times[kind][1:]),  # the first warms up
            peak(model, optimizers[kind], rows[-1]),
            losses[kind],
        )
        for kind, model in models.items()
    }


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


def refusal() -> str:
    """What a layer says to a base of four bits, two weights a byte, as QLoRA's."""
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    try:
        lora_fast.LoRALinear.from_linear(linear)
    except TypeError as error:
        return str(error)
    raise AssertionError("a quantised base was taken")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", default=not GPU, help="scaled down (always without a GPU)")
    parser.add_argument("--steps", type=int, default=10, help="timed, of each setting (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and adapters (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the adapter's folder (default: %(default)s)")
    args = parser.parse_args(argv)

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LLAMA_2_7B)
    print("Llama-2-7B, LoRA on q and v, r=8:")
    counts = lora_fast.print_trainable_parameters(converted := lora(base))
    keys = converted.load_state_dict(base.state_dict(), strict=False)
    new = {key.rsplit(".", 1)[1] for key in keys.missing_keys}
    print(f"its own state dict fits: {len(keys.unexpected_keys)} unexpected keys, missing only {sorted(new)}")

    set_seed(args.seed)
    with DEVICE:
        config = SMALL if args.small else LLAMA_2_7B
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32)
    rows = packed(args.length)
    starts = sum(int((row["position_ids"] == 0).sum()) for row in rows)
    print(f"{'scaled down' if args.small else 'whole'}, on {DEVICE}: {len(rows)} rows of {args.length} tokens, "
          f"{starts / len(rows):.1f} documents begin in each")  # fmt: skip
    table = {f"{on}, r={r}": compare(args, base, rows, on, r) for on in TARGETS for r in (8, 64)}
    print(f"{'':12}{'':16}{'trainable':>12}{'tokens/s':>12}{'peak MiB':>12}{'last loss':>12}")
    for setting, kinds in table.items():
        for kind, (count, speed, memory, loss) in kinds.items():
            print(f"{setting:12}{kind:16}{count:12,}{speed:12,.0f}{memory / 2**20:12.1f}{loss:12.4f}")

    straight, resumed = resume(args, base, rows[: 2 * args.steps])
    apart = max(abs(a - b) for a, b in zip(straight, resumed, strict=True))
    end = f"losses differ by {apart:g}, the last {resumed[-1]:.4f}"
    print(f"adapter saved in {args.out}, {len(resumed)} steps resumed: {end}")
    print(f"a 4-bit base, as QLoRA's, does not run: {(refused := refusal())}")
    return {"counts": counts, "keys": keys, "table": table, "resume": (straight, resumed), "refusal": refused}


if __name__ == "__main__":
    main()
