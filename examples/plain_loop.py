"""Fine-tune a PEFT model in a loop written by hand, with the fused layers."""

import common
import torch
from tqdm import tqdm

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    model = common.load(args)
    print(lora_fast.patch_peft(model))  # the one line

    train, held_out = common.rows(args, common.load_tokenizer(args))
    before = common.loss_on(model, held_out)
    optimizer = torch.optim.AdamW(common.trainable(model), args.lr, fused=True)
    with tqdm(common.batches(args, train, args.seed), total=args.steps) as progress:
        for ids in progress:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return common.finish(args, model, before, held_out)


if __name__ == "__main__":
    main()
