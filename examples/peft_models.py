"""Train the models of PEFT's own documentation from scaled-down configurations: T5, OPT, GPT-2, BLOOM; generate."""

import argparse
import builtins
from pathlib import Path
from typing import Any

import torch
from common import GPU, trainable
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
from torch import nn
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

DEVICE = torch.device("cuda" if GPU else "cpu")
TOKENIZER = ByT5Tokenizer(extra_ids=0)
IDS: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MT0_LARGE = MT5Config(vocab_size=250112, d_model=1024, d_ff=2816, num_layers=24, num_heads=16)
T5 = T5Config(**IDS, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
OPT = OPTConfig(
    **IDS, bos_token_id=0, hidden_size=128, word_embed_proj_dim=64, num_hidden_layers=2, ffn_dim=256,
    num_attention_heads=4, max_position_embeddings=256, do_layer_norm_before=False, init_std=0.1,
)  # fmt: skip
GPT2 = GPT2Config(**IDS, bos_token_id=0, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1)
BLOOM = BloomConfig(**IDS, bos_token_id=0, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
FRENCH = {
    "Monday": "lundi", "Tuesday": "mardi", "Wednesday": "mercredi", "Thursday": "jeudi", "Friday": "vendredi",
    "Saturday": "samedi", "Sunday": "dimanche", "good morning": "bonjour", "good evening": "bonsoir",
    "thank you": "merci", "yes": "oui", "no": "non",
}  # fmt: skip


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
    """The loss of every step, of several ``parts``; with float16 as dtype, in autocast and with a GradScaler."""
    model.train()
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW(trainable(model), args.lr)
    collator, order = DataCollatorForSeq2Seq(TOKENIZER, padding=True), torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in (progress := tqdm(range(args.steps), desc=name)):
        losses.append(0.0)
        for _ in range(parts):
            chosen = torch.randint(len(data), (args.batch,), generator=order).tolist()
            batch = collator([data[i] for i in chosen]).to(DEVICE)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
                loss = model(**batch).loss / parts
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def generate(model, text: str) -> str:
    """From the whole sentence for an encoder; to be gone on with for the others."""
    asked = TOKENIZER(text, add_special_tokens=model.config.is_encoder_decoder, return_tensors="pt").to(DEVICE)
    ids = model.eval().generate(**asked, max_new_tokens=24, do_sample=False)
    return str(TOKENIZER.decode(ids[0], skip_special_tokens=True))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser, a model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the folder (default: %(default)s)")
    args = parser.parse_args(argv)
    seen: dict = {}

    print("mt0-large, its head tied to the embedding, as transformers 5 has it:")
    seen["tied"] = mt0_large(tied=True)
    print("mt0-large, with a head of its own, as it was published:")
    seen["untied"] = mt0_large(tied=False)
    size = f"{MT0_LARGE.vocab_size:,} x {MT0_LARGE.d_model:,} = {seen['untied'][1] - seen['tied'][1]:,}"
    print(f"The same adapters. The head, vocabulary x width, has {size} parameters; tied, they are the embedding's and "
          "count once, and so the share that trains is larger.")  # fmt: skip

    def start(name: str, auto, config, lora: LoraConfig):
        set_seed(args.seed)
        model = get_peft_model(auto.from_config(config).to(DEVICE), lora)
        print(f"\n{name}\n{lora_fast.patch_peft(model)}")  # the one line
        model.print_trainable_parameters()
        return model

    def told(name: str, losses: list[float], model, text: str) -> str:
        seen[name] = losses, (said := generate(model, text))
        print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {text!r} gives {said!r}")
        return said

    model = start("T5", AutoModelForSeq2SeqLM, T5, seq2seq_lora())
    losses = train(args, "T5", model, translations())
    told("T5", losses, model, "Translate English to French: thank you")

    model = start("OPT", AutoModelForCausalLM, OPT, causal_lora(r=8, target_modules="all-linear"))
    losses = train(args, "OPT", model, sentences())
    said = told("OPT", losses, model, "Return ")
    set_seed(args.seed)
    base = Path(args.out) / "base"
    AutoModelForCausalLM.from_config(OPT).save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)  # that of a model from the hub
    model.save_pretrained(Path(args.out) / "opt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(Path(args.out) / "opt").to(DEVICE)
    lora_fast.patch_peft(loaded)
    seen["loaded"] = generate(loaded, "Return ")
    print(f"AutoPeftModelForCausalLM reads it: it says {'the same' if seen['loaded'] == said else 'SOMETHING ELSE'}")

    model = start("GPT-2", AutoModelForCausalLM, GPT2, causal_lora(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    seen["GPT-2 report"] = lora_fast.peft_report(model)
    told("GPT-2", train(args, "GPT-2", model, sentences()), model, "Return ")

    model = start("BLOOM", AutoModelForCausalLM, BLOOM, causal_lora(r=8, lora_alpha=16, lora_dropout=0.05))
    losses = train(args, "BLOOM", model, sentences(), parts=16, dtype=torch.float16 if GPU else None)
    told("BLOOM", losses, model, "Return ")
    return seen


if __name__ == "__main__":
    main()
