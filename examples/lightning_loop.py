"""Fine-tune a PEFT model with Lightning, with the fused layers."""

import common
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import lora_fast


class FineTune(lightning.LightningModule):
    def __init__(self, model, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, index):
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(common.trainable(self.model), self.lr)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    lightning.seed_everything(args.seed)
    model = common.load(args)
    print(lora_fast.patch_peft(model))  # the one line

    train, held_out = common.rows(args, common.load_tokenizer(args))
    before = common.loss_on(model, held_out)
    data = DataLoader(TensorDataset(train), batch_size=args.batch, shuffle=True)
    trainer = lightning.Trainer(max_steps=args.steps, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(FineTune(model, args.lr), data)
    return common.finish(args, model.to(args.device), before, held_out)


if __name__ == "__main__":
    main()
