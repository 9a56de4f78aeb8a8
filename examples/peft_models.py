"""Train the models of PEFT's own documentation from scaled-down configurations: T5, OPT, GPT-2, BLOOM; generate.

BLOOM trains under DDP: in this process alone, or in several if torchrun starts them with --only BLOOM.
"""

import argparse
import builtins
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import GPU, LOCAL_RANK, trainable
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    GenerationMixin,
    GPT2Config,
    MT5Config,
    OPTConfig,
    T5Config,
    set_seed,
)

import lora_fast

RENAMED = "_prepare_encoder_decoder_kwargs_for_generation"  # in transformers 5.22; PEFT 0.21 looks for the old name
if not hasattr(GenerationMixin, RENAMED):
    setattr(GenerationMixin, RENAMED, GenerationMixin._prepare_text_encoder_decoder_kwargs_for_generation)

DEVICE = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
TOKENIZER = ByT5Tokenizer(extra_ids=0)
IDS: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MT0_LARGE = MT5Config(vocab_size=250112, d_model=1024, d_ff=2816, num_layers=24, num_heads=16)
T5 = T5Config(**IDS, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
OPT = OPTConfig(
    **IDS,
    bos_token_id=0,
    hidden_size=128,
    word_embed_proj_dim=64,
    num_hidden_layers=2,
    ffn_dim=256,
    num_attention_heads=4,
    max_position_embeddings=256,
    do_layer_norm_before=False,
    init_std=0.1,
)
GPT2 = GPT2Config(**IDS, bos_token_id=0, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1)
BLOOM = BloomConfig(**IDS, bos_token_id=0, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
FRENCH = {
    "Monday": "lundi",
    "Tuesday": "mardi",
    "Wednesday": "mercredi",
    "Thursday": "jeudi",
    "Friday": "vendredi",
    "Saturday": "samedi",
    "Sunday": "dimanche",
    "good morning": "bonjour",
    "good evening": "bonsoir",
    "thank you": "merci",
    "yes": "oui",
    "no": "non",
}


def mt0_large(tied: bool) -> tuple[int, int]:
    """(trainable, all) parameters of bigscience/mt0-large under PEFT's adapter, its head tied or not."""
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(MT0_LARGE)
        if not tied:
            model.lm_head = nn.Linear(MT0_LARGE.d_model, MT0_LARGE.vocab_size, bias=False)
        model = get_peft_model(model, seq2seq_lora())
    model.print_trainable_parameters()
    return model.get_nb_trainable_parameters()


def seq2seq_lora() -> LoraConfig:
    return LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)


def causal_lora(**settings) -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **settings)


def translations() -> list[dict]:
    asked = TOKENIZER([f"Translate English to French: {word}" for word in FRENCH])["input_ids"]
    answers = TOKENIZER(list(FRENCH.values()))["input_ids"]
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(asked, answers, strict=True)]


def sentences() -> list[dict]:
    """What the functions of Python do, in the first line of their documentation."""
    lines = [str(f.__doc__).splitlines()[0] for f in vars(builtins).values() if callable(f) and f.__doc__]
    return [{"input_ids": ids, "labels": ids} for ids in TOKENIZER([line[:60] for line in lines])["input_ids"]]


def train(args: argparse.Namespace, name: str, model, data: list[dict], parts: int = 1, dtype=None) -> list[float]:
    """The loss of every step, of several ``parts``, after the last of which DDP's processes exchange gradients; with
    float16 as dtype, in autocast and with a GradScaler."""
    model.train()
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW(trainable(model), args.lr)
    collator, order = DataCollatorForSeq2Seq(TOKENIZER, padding=True), torch.Generator().manual_seed(args.seed + RANK)
    losses = []
    for _ in (progress := tqdm(range(args.steps), desc=name, disable=RANK > 0)):
        losses.append(0.0)
        for part in range(parts):
            chosen = torch.randint(len(data), (args.batch,), generator=order).tolist()
            batch = collator([data[i] for i in chosen]).to(DEVICE)
            alone = isinstance(model, DistributedDataParallel) and part < parts - 1
            with model.no_sync() if alone else contextlib.nullcontext():
                with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
                    loss = model(**batch).loss / parts
                scaler.scale(loss).backward()
            losses[-1] += loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """torchrun's, or a group of this process alone."""
    backend = "nccl" if GPU else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def alike(model) -> bool:
    """Whether all processes have the same adapter, to the last bit."""
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, [p.detach().double().sum().item() for p in trainable(model)])
    return all(other == sums[0] for other in sums)


def generate(model, text: str) -> str:
    """From the whole sentence for an encoder; to be gone on with for the others."""
    asked = TOKENIZER(text, add_special_tokens=model.config.is_encoder_decoder, return_tensors="pt").to(DEVICE)
    ids = model.eval().generate(**asked, max_new_tokens=24, do_sample=False)
    return str(TOKENIZER.decode(ids[0], skip_special_tokens=True))


def start(args: argparse.Namespace, name: str, auto, config, lora: LoraConfig):
    set_seed(args.seed)
    model = get_peft_model(auto.from_config(config).to(DEVICE), lora)
    report = lora_fast.patch_peft(model)  # the one line
    if RANK == 0:
        print(f"\n{name}\n{report}")
        model.print_trainable_parameters()
    return model


def told(seen: dict, name: str, losses: list[float], model, text: str) -> str:
    seen[name] = losses, (said := generate(model, text))
    if RANK == 0:
        print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {text!r} gives {said!r}")
    return said


def t5(args: argparse.Namespace, seen: dict) -> None:

    print("mt0-large, its head tied to the embedding, as transformers 5 has it:")
    seen["tied"] = mt0_large(tied=True)
    print("mt0-large, with a head of its own, as it was published:")
    seen["untied"] = mt0_large(tied=False)
    size = f"{MT0_LARGE.vocab_size:,} x {MT0_LARGE.d_model:,} = {seen['untied'][1] - seen['tied'][1]:,}"
    print(
        f"The same adapters. The head, vocabulary x width, has {size} parameters; tied, they are the embedding's and "
        "count once, and so the share that trains is larger."
    )

    model = start(args, "T5", AutoModelForSeq2SeqLM, T5, seq2seq_lora())
    losses = train(args, "T5", model, translations())
    told(seen, "T5", losses, model, "Translate English to French: thank you")


def opt(args: argparse.Namespace, seen: dict) -> None:
    model = start(args, "OPT", AutoModelForCausalLM, OPT, causal_lora(r=8, target_modules="all-linear"))
    losses = train(args, "OPT", model, sentences())
    said = told(seen, "OPT", losses, model, "Return ")
    set_seed(args.seed)
    base = Path(args.out) / "base"
    AutoModelForCausalLM.from_config(OPT).save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)  # that of a model from the hub
    model.save_pretrained(Path(args.out) / "opt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(Path(args.out) / "opt").to(DEVICE)
    lora_fast.patch_peft(loaded)
    seen["loaded"] = generate(loaded, "Return ")
    print(f"AutoPeftModelForCausalLM reads it: it says {'the same' if seen['loaded'] == said else 'SOMETHING ELSE'}")


def gpt2(args: argparse.Namespace, seen: dict) -> None:
    lora = causal_lora(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model = start(args, "GPT-2", AutoModelForCausalLM, GPT2, lora)
    told(seen, "GPT-2", train(args, "GPT-2", model, sentences()), model, "Return ")


def bloom(args: argparse.Namespace, seen: dict) -> None:
    lora = causal_lora(r=8, lora_alpha=16, lora_dropout=0.05)
    with processes():
        model = start(args, "BLOOM", AutoModelForCausalLM, BLOOM, lora)
        torch.manual_seed(args.seed + RANK)  # dropout of its own
        ddp = DistributedDataParallel(model)
        losses = train(args, "BLOOM", ddp, sentences(), parts=16, dtype=torch.float16 if GPU else None)
        del ddp  # the last to go would take the group along, which can hang: its thread may wait for the interpreter
        told(seen, "BLOOM", losses, model, "Return ")
        seen["alike"] = alike(model), dist.get_world_size()
    if RANK == 0:
        print(f"processes under DDP: {seen['alike'][1]}; adapters {'' if seen['alike'][0] else 'NOT '}the same in all")


RUNS = {"T5": t5, "OPT": opt, "GPT-2": gpt2, "BLOOM": bloom}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser, a model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the folder (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="MODEL", help=f"some of {', '.join(RUNS)}"
    )
    args = parser.parse_args(argv)
    if "RANK" in os.environ and args.only != ["BLOOM"]:
        parser.error("torchrun: only BLOOM trains in several processes: --only BLOOM")
    if GPU:
        torch.cuda.set_device(LOCAL_RANK)
    seen: dict = {}
    for name in args.only:
        RUNS[name](args, seen)
    return seen


if __name__ == "__main__":
    main()
