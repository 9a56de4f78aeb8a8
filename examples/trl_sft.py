"""Fine-tune a PEFT model with TRL's SFTTrainer, with the fused layers."""

import common
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    model = common.load(args)
    print(lora_fast.patch_peft(model))  # the one line

    tokenizer = common.load_tokenizer(args)
    before = common.loss_on(model, held_out := common.rows(args, tokenizer)[1])
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
    SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer).train()
    return common.finish(args, model, before, held_out)


if __name__ == "__main__":
    main()
