"""Fine-tune a PEFT model with transformers' Trainer and gradient checkpointing, with the fused layers."""

import common
from transformers import Trainer, TrainingArguments

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    model = common.load(args)
    print(lora_fast.patch_peft(model))  # the one line

    train, held_out = common.rows(args, common.load_tokenizer(args))
    before = common.loss_on(model, held_out)
    settings = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        optim="adamw_torch_fused",
        gradient_checkpointing=True,
        logging_steps=10,
        save_strategy="no",  # the adapter is saved at the end
        report_to="none",
        seed=args.seed,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in train]
    Trainer(model, settings, train_dataset=data).train()
    return common.finish(args, model, before, held_out)


if __name__ == "__main__":
    main()
