"""Learn from a reward with TRL's GRPOTrainer, with the fused layers, also where it samples: to write small letters."""

from typing import Any

import common
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import lora_fast


def small_letters(completions: list[str], **_: object) -> list[float]:
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in completions]


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the mean reward at the steps that were logged."""
    args = common.options(__doc__, argv)
    settings = GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        max_completion_length=args.length // 4,
        per_device_train_batch_size=args.batch,
        num_generations=4,
        learning_rate=args.lr,
        bf16=common.GPU,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=args.seed,
    )
    texts = [text for text in common.paragraphs()[0] if len(text) > 100][: args.steps * args.batch]
    model: Any = common.base_model(args, common.DTYPE).to(args.device)
    reward: Any = small_letters
    trainer: Any = GRPOTrainer(
        model,
        reward,
        settings,
        Dataset.from_dict({"prompt": [text[: args.length // 4] for text in texts]}),
        processing_class=common.load_tokenizer(args),
        peft_config=common.adapter(args),
    )
    print(lora_fast.patch_peft(trainer.model))  # the one line
    trainer.train()
    trainer.save_model(args.out)
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    print(f"reward: {rewards[0]:.3f} at the start, {rewards[-1]:.3f} at the end; adapter saved in {args.out}")
    return rewards


if __name__ == "__main__":
    main()
