"""Learn preferences with TRL's DPOTrainer, with the fused layers: how paragraphs go on, rather than how others do."""

from typing import Any

import common
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import lora_fast


def main(argv: list[str] | None = None) -> list[float]:
    """Returns DPO's loss at the steps that were logged."""
    args = common.options(__doc__, argv)
    settings = DPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        max_length=args.length,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr / 10,
        bf16=common.GPU,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=args.seed,
    )
    texts = [text for text in common.paragraphs()[0] if len(text) > 100][: args.steps * args.batch]
    half = args.length // 2
    data = Dataset.from_dict(
        {
            "prompt": [text[:half] for text in texts],
            "chosen": [text[half : 2 * half] for text in texts],
            "rejected": [text[half : 2 * half] for text in texts[1:] + texts[:1]],
        }
    )
    model: Any = common.base_model(args, common.DTYPE).to(args.device)
    trainer: Any = DPOTrainer(
        model,
        args=settings,
        train_dataset=data,
        processing_class=common.load_tokenizer(args),
        peft_config=common.adapter(args),
    )
    print(lora_fast.patch_peft(trainer.model))  # the one line; the reference is the same model, its adapter off
    trainer.train()
    trainer.save_model(args.out)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"DPO's loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end; adapter saved in {args.out}")
    return losses


if __name__ == "__main__":
    main()
