"""Fine-tune with TRL's SFTTrainer, which makes the PEFT model of a peft_config, with the fused layers."""

from typing import Any

import common
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    tokenizer = common.load_tokenizer(args)
    settings = SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        max_length=args.length,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        bf16=common.GPU,
        logging_steps=10,
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=args.seed,
    )
    texts = [text for text in common.paragraphs()[0] if len(text) > 100]
    data = Dataset.from_dict({"text": texts[: args.steps * args.batch]})
    model: Any = common.base_model(args, common.DTYPE).to(args.device)
    trainer: Any = SFTTrainer(
        model, settings, train_dataset=data, processing_class=tokenizer, peft_config=common.adapter(args)
    )
    print(lora_fast.patch_peft(trainer.model))  # the one line: there are no LoRA layers before the trainer is made

    before = common.loss_on(trainer.model, held_out := common.rows(args, tokenizer)[1])
    trainer.train()
    return common.finish(args, trainer.model, before, held_out)


if __name__ == "__main__":
    main()
