"""Adapters of sharded models over two processes, for test_gather.py: ``RANK FOLDER``, or ``alone FOLDER`` first.

What went wrong goes to ``FOLDER/RANK.txt``; nothing else is written there.
"""

import copy
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lora_fast import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    save_adapter,
)

KINDS = {
    "tied": {"target_modules": ["0.0", "1.0"], "modules_to_save": ["2"]},
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["0.0", "1.0"], "use_dora": True, "bias": "all", "modules_to_save": ["2"]},
}


def plain():
    """Sizes that two processes cannot halve, and a layer that one of them may not hold at all."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Sequential(nn.Linear(7, 9), nn.ReLU()),
        nn.Linear(9, 9),
        nn.ReLU(),
        nn.Linear(9, 9),
        nn.Linear(9, 1),
    )
    model[4].weight = model[2].weight
    return model


def adapted(kind, seed=1):
    return stirred(add_lora(plain(), LoRAConfig(r=3, **KINDS[kind])), seed)


def stirred(model, seed):
    """The model with something added to all that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def fsdp2(model, **options):
    for block in (model[0], model[1], model[5]):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def rows(model):
    """As tensor parallelism does by hand: parameters in shards, without FSDP."""
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    shards = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                    module._parameters[name] = nn.Parameter(shards, requires_grad=parameter.requires_grad)
    return model


SHARDINGS = {
    "fsdp2": fsdp2,
    "fsdp2 after a forward": lambda model: run(fsdp2(model)),  # which leaves the root's parameters gathered
    "fsdp2 on the CPU": lambda model: fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "by hand": rows,
    "fsdp1": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
}


def run(model):
    with torch.no_grad():
        model(torch.ones(1, 8))
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(found, wanted):
    assert list(found) == list(wanted), (list(found), list(wanted))
    for name, tensor in wanted.items():
        assert torch.equal(whole(found[name]), tensor), name


def check(kind, shard, folder):
    model, other = adapted(kind), adapted(kind, seed=2)
    wanted, x = lora_state_dict(copy.deepcopy(model)), torch.randn(4, 8)
    y = model(x)
    sharded = shard(model)
    save_adapter(sharded, folder)
    assert torch.equal(load_adapter(plain(), folder)(x), y)
    same(lora_state_dict(sharded), wanted)

    again = shard(copy.deepcopy(other))
    load_lora_state_dict(again, wanted)
    same(lora_state_dict(again), wanted)
    again = shard(copy.deepcopy(other))
    load_lora_state_dict(again, lora_state_dict(sharded))
    same(lora_state_dict(again), wanted)
    load_lora_state_dict(other, lora_state_dict(again))
    same(lora_state_dict(other), wanted)
    again = shard(adapted(kind, seed=2))
    load_adapter(again, folder)
    same(lora_state_dict(again), wanted)
    if shard is fsdp2:
        torch.testing.assert_close(again(x), y)
    bad = {**wanted, "0.0.lora_A": torch.zeros(1)}
    for call, words in ((lambda: load_lora_state_dict(again, bad), "expected"), (late(shard, folder), "shard")):
        try:
            call()
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error with {words!r}")
    same(lora_state_dict(again), wanted)


def late(shard, folder):
    """Into a model without LoRA layers that is sharded already."""
    return lambda: load_adapter(fsdp2(plain()), folder)


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    failed = []
    for name, shard in SHARDINGS.items():
        for kind in KINDS:
            try:
                check(kind, shard, folder / f"{kind}, {name}")  # both write the same
            except Exception:
                failed.append(f"{name}, {kind}: {traceback.format_exc()}")
    (folder / f"{rank}.txt").write_text("\n".join(failed))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
