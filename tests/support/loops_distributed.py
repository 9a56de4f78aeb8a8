"""Loops over two processes: tests/peft/test_loops.py starts this script twice, ``RANK FOLDER BACKEND DEVICE``.

Each mode trains stock PEFT and a patched copy alike; what was seen of both goes to ``FOLDER/RANK.json``.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from loops import LR, STEPS, tiny_llama, token_ids, trainable, trained
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lora_fast import patch_peft, set_backend


def fsdp2(model, *, layers=False, checkpointing=False):
    """Each block is a unit (with ``layers`` each linear layer too), and the rest another."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in model.base_model.model.model.layers:
        for module in block.modules() if layers else ():
            if hasattr(module, "base_layer"):
                fully_shard(module)
        fully_shard(block)
    return fully_shard(model)


def fsdp1(model):
    """Each block is a unit, and the rest another."""
    policy = ModuleWrapPolicy({type(block) for block in model.base_model.model.model.layers})
    device = next(model.parameters()).device
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=device)


MODES: dict[str, tuple[Callable, int, dict]] = {
    "ddp": (DistributedDataParallel, 1, {}),
    "fsdp2": (fsdp2, 1, {"use_dora": True}),
    "fsdp2, checkpointing, accumulation": (partial(fsdp2, checkpointing=True), 2, {}),
    "fsdp1": (fsdp1, 1, {"use_dora": True}),
    "fsdp2 by layers, patched too late": (partial(fsdp2, layers=True), 1, {}),
}


def train(model, batches: list[torch.Tensor], _: object) -> None:
    """Steps of all batches together."""
    optimizer = torch.optim.AdamW(trainable(model), LR)
    for _ in range(STEPS):
        for i, ids in enumerate(batches):
            if len(batches) > 1:
                model.set_requires_gradient_sync(i == len(batches) - 1)
            (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    rank, folder, backend, device = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    if device == "cuda":
        torch.cuda.set_device(rank)
    set_backend(backend)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    seen = {}
    for mode, (wrap, accumulate, kind) in MODES.items():
        batches = [token_ids(seed=rank + 2 * i).to(device) for i in range(accumulate)]
        stock = tiny_llama(**kind).to(device)
        ours = copy.deepcopy(stock)
        if not mode.endswith("too late"):
            patch_peft(ours)
        both = []
        for model in (stock, ours):
            wrapped = wrap(model)
            if model is ours:
                patch_peft(ours)  # harmless the second time
            both.append(asdict(trained(model, partial(train, wrapped, batches))))
        seen[mode] = both
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
