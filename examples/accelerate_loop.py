"""Fine-tune a PEFT model in a loop with Accelerate, in bf16 autocast on a GPU, with the fused layers."""

import common
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    model = common.load(args, torch.float32)
    print(lora_fast.patch_peft(model))  # the one line

    train, held_out = common.rows(args, common.load_tokenizer(args))
    before = common.loss_on(model, held_out)
    accelerator = Accelerator(mixed_precision="bf16" if common.GPU else "no")
    optimizer = torch.optim.AdamW(common.trainable(model), args.lr)
    sampler = RandomSampler(train, replacement=True, num_samples=args.steps * args.batch)
    data = DataLoader(TensorDataset(train), args.batch, sampler=sampler)
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
    with tqdm(data, disable=not accelerator.is_main_process) as progress:
        for (ids,) in progress:
            loss = prepared(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return common.finish(args, accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), before, held_out)


if __name__ == "__main__":
    main()
