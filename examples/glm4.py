"""Train GLM-4-9B for chat: LoRA with one A for q, k and v, transformers' Trainer, gradient checkpointing, bf16."""

import argparse
import builtins
from itertools import accumulate

import torch
from common import GPU
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    GlmConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.glm.modeling_glm import GlmAttention

import lora_fast

GLM_4_9B = GlmConfig()
SMALL = GlmConfig(
    vocab_size=259,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.1,
    pad_token_id=0,
    eos_token_id=1,
)
R = 8
FUSED = ["query_key_value", "o_proj", "gate_up_proj", "down_proj"]  # the original calls the last three dense,
SPLIT = ["q_proj", "k_proj", "v_proj", *FUSED[1:]]  # dense_h_to_4h and dense_4h_to_h
SYSTEM = "<|system|>\nYou know Python.<|user|>\n"


class Part(nn.Module):
    """Columns of the fused projection's output, in the place of a projection."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return qkv[..., self.start : self.stop]


class FusedAttention(GlmAttention):
    """The same attention with q, k and v in one projection, as in the original: ``query_key_value``."""

    def __init__(self, split: GlmAttention) -> None:
        with torch.device("meta"):
            super().__init__(split.config, split.layer_idx)
        parts = split.q_proj, split.k_proj, split.v_proj
        stops = list(accumulate(part.out_features for part in parts))
        for name, start, stop in zip(("q_proj", "k_proj", "v_proj"), [0, *stops], stops, strict=False):
            setattr(self, name, Part(start, stop))
        self.query_key_value = nn.Linear(parts[0].in_features, stops[-1], device="meta")
        self.query_key_value.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
        self.query_key_value.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
        self.o_proj = split.o_proj

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return super().forward(self.query_key_value(hidden_states), *args, **kwargs)


def glm(config: GlmConfig, fused: bool = True) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers if fused else ():
        layer.self_attn = FusedAttention(layer.self_attn)
    return model


def lora(model: nn.Module, targets: list[str]) -> PeftModel:
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=targets, inference_mode=False, r=R, lora_alpha=32, lora_dropout=0.1
    )
    return get_peft_model(model, config)


def count(fused: bool) -> tuple[int, int]:
    """(trainable, all) parameters of the whole GLM-4-9B, which needs no memory on the meta device."""
    with torch.device("meta"):
        model = lora(glm(GLM_4_9B, fused), FUSED if fused else SPLIT)
    model.print_trainable_parameters()
    return model.get_nb_trainable_parameters()


def dialogues(tokenizer, length: int) -> list[dict[str, list[int]]]:
    """What the functions of Python do, in the first line of their documentation; only the answers are to be learnt."""
    data = []
    for name, function in sorted(vars(builtins).items()):
        if callable(function) and name.islower() and (text := function.__doc__):
            asked = tokenizer(f"{SYSTEM}What does {name} do?<|assistant|>\n", add_special_tokens=False)["input_ids"]
            answer = tokenizer(text.splitlines()[0])["input_ids"]
            row = {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}
            data.append({key: ids[:length] for key, ids in row.items()})
    return data


def chat(model: PeftModel, tokenizer, question: str) -> str:
    asked = tokenizer(f"{SYSTEM}{question}<|assistant|>\n", add_special_tokens=False, return_tensors="pt")
    asked = asked.to(model.device)
    ids = model.eval().generate(**asked, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of the optimiser (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of each of its 8 parts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=160, help="tokens of a row at most (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", metavar="PATH", default="adapter", help="the adapter's folder (default: %(default)s)")
    args = parser.parse_args(argv)

    print("GLM-4-9B, q, k and v in one projection, as in the original:")
    fused = count(fused=True)
    print("GLM-4-9B, q, k and v apart, as in transformers:")
    split = count(fused=False)
    layers, width = GLM_4_9B.num_hidden_layers, GLM_4_9B.hidden_size
    print(
        f"The difference, {split[0] - fused[0]:,}, is two more A of r x hidden in each layer: "
        f"{layers} x 2 x {R} x {width} = {layers * 2 * R * width:,}. Three projections have three A; the fused one "
        "has one, which they share, and its B is as tall as their three."
    )

    set_seed(args.seed)
    model = glm(SMALL)
    model.enable_input_require_grads()  # for the checkpoints: the embedding is frozen
    peft_model = lora(model, FUSED).to("cuda" if GPU else "cpu")
    print(lora_fast.patch_peft(peft_model))  # the one line
    peft_model.print_trainable_parameters()

    tokenizer = ByT5Tokenizer(extra_ids=0)
    data = dialogues(tokenizer, args.length)
    settings = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=not GPU,
        learning_rate=args.lr,
        logging_steps=5,
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=args.seed,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(peft_model, settings, train_dataset=data, eval_dataset=data, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    peft_model.save_pretrained(args.out)
    question = "What does len do?"
    said = chat(peft_model, tokenizer, question)

    set_seed(args.seed)
    again = PeftModel.from_pretrained(glm(SMALL), args.out).to(peft_model.device)
    lora_fast.patch_peft(again)
    reloaded = chat(again, tokenizer, question)
    print(f"loss on the {len(data)} dialogues: {before:.3f} at the start, {after:.3f} at the end; saved in {args.out}")
    print(f"{question}\n  trained:  {said!r}\n  reloaded: {reloaded!r}")
    return {"fused": fused, "split": split, "losses": (before, after), "chat": (said, reloaded)}


if __name__ == "__main__":
    main()
