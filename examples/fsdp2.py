"""Fine-tune a PEFT model that FSDP2 shards over several processes, with the fused layers: start it with torchrun."""

import os

import common
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import lora_fast


def main(argv: list[str] | None = None) -> tuple[float, float]:
    args = common.options(__doc__, argv)
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node 2 examples/fsdp2.py")
    if common.GPU:
        torch.cuda.set_device(common.LOCAL_RANK)
    dist.init_process_group("nccl" if common.GPU else "gloo")
    rank = dist.get_rank()

    model = common.load(args, torch.float32)
    lora_fast.patch_peft(model)  # the one line, before fully_shard
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if common.GPU else MixedPrecisionPolicy()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # the blocks of any model of transformers'
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if rank == 0:
        print(lora_fast.peft_report(model))

    train, held_out = common.rows(args, common.load_tokenizer(args))
    before = common.loss_on(model, held_out)
    optimizer = torch.optim.AdamW(common.trainable(model), args.lr)
    with tqdm(common.batches(args, train, args.seed + rank), total=args.steps, disable=rank > 0) as progress:
        for ids in progress:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole = get_model_state_dict(model, options=options)  # the adapter's tensors
    losses = common.finish(args, model, before, held_out, whole)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
