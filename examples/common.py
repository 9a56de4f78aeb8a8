"""What the examples share: options, a model with PEFT's adapter, real text, the loss on held-out text, and the end."""

import argparse
import os
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

GPU = torch.cuda.is_available()
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun and accelerate launch


def options(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", metavar="PATH", help="a causal language model's folder (default: tiny, random)")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, in each process (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (default: 1e-2, with --model 2e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the adapter's folder (default: %(default)s)")
    args = parser.parse_args(argv)
    args.lr = args.lr or (2e-4 if args.model else 1e-2)
    args.device = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
    return args


def base_model(args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """The model that ``--model`` names, or a tiny Llama of random weights that reads bytes."""
    set_seed(args.seed)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype)


DTYPE = torch.bfloat16 if GPU else torch.float32


def adapter(args: argparse.Namespace) -> LoraConfig:
    """PEFT's, on all linear layers."""
    return LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_dora=args.dora, task_type="CAUSAL_LM"
    )


def load(args: argparse.Namespace, dtype: torch.dtype = DTYPE) -> PeftModel:
    """The model with its adapter."""
    return get_peft_model(base_model(args, dtype), adapter(args)).to(args.device)


def load_tokenizer(args: argparse.Namespace):
    return AutoTokenizer.from_pretrained(args.model) if args.model else ByT5Tokenizer(extra_ids=0)


def paragraphs() -> tuple[list[str], list[str]]:
    """Of Python's own documentation: to train on, and those of every tenth topic, which are held out."""
    texts = [topics[name] for name in sorted(topics)]
    train = [text for i, text in enumerate(texts) if i % 10]
    return "\n\n".join(train).split("\n\n"), "\n\n".join(texts[::10]).split("\n\n")


def rows(args: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] to train on and [32, length] held out."""
    parts = []
    for texts in paragraphs():
        ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
        parts.append(ids[: len(ids) // args.length * args.length].view(-1, args.length))
    return parts[0], parts[1][:32]


def batches(args: argparse.Namespace, train: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Random rows for each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        yield train[torch.randint(len(train), (args.batch,), generator=generator)].to(args.device)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def loss_on(model: nn.Module, ids: torch.Tensor) -> float:
    ids = ids.to(next(model.parameters()).device)
    model.eval()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    model.train()
    return loss


def finish(
    args: argparse.Namespace, model: PeftModel, before: float, held_out: torch.Tensor, state_dict: dict | None = None
) -> tuple[float, float]:
    """Returns the loss before and after; the first process tells it and saves the adapter."""
    after = loss_on(model, held_out)
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(args.out, state_dict=state_dict)
        print(f"loss on held-out text: {before:.3f} at the start, {after:.3f} at the end; adapter saved in {args.out}")
    return before, after
