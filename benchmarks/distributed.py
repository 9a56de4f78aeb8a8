"""Models on several GPUs, for bench_distributed and check_distributed: the modes, their steps, the processes."""

import datetime
import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks import models
from benchmarks.models import Size
from lora_fast import SlowPathWarning, set_backend


class Mode(NamedTuple):
    """A way to train on several GPUs. FSDP2: each block is a unit, and the rest another."""

    fsdp2: bool = True
    checkpointing: int = 0
    offload: bool = False
    accumulate: int = 1  # steps of forward and backward before the gradients are exchanged


MODES = {
    "ddp": Mode(fsdp2=False),
    "fsdp2": Mode(),
    "fsdp2_checkpointing": Mode(checkpointing=1),
    "fsdp2_accumulation": Mode(accumulate=4),
    "fsdp2_offload": Mode(offload=True),
}


def group_of(gpus: int, device: str) -> DeviceMesh:
    """This process's group, of so many: all processes fall into such groups, which know nothing of each other."""
    groups = dist.get_world_size() // gpus
    return init_device_mesh(device, (groups, gpus), mesh_dim_names=("groups", "gpus"))["gpus"]


def wrap(model: nn.Module, mode: Mode, mesh: DeviceMesh) -> nn.Module:
    """The model, patched or not, as the mode trains it (checkpointing is switched on before)."""
    if not mode.fsdp2:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, process_group=mesh.get_group())
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if mode.offload else OffloadPolicy()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def sharded(case: models.Case, size: Size, mesh: DeviceMesh) -> nn.Module:
    """A Llama that no card holds whole, with LoRA, as ``wrap`` would give it with FSDP2: block by block it gets random
    weights, equal ones for every candidate, is patched, which packs its base, and sharded, before the next one is
    there."""
    from torch.distributed.fsdp import fully_shard

    model = models.with_adapters(case, models.copy_of(case, models.base_model(size._replace(device="meta"))))
    torch.manual_seed(0)
    for block in blocks_of(model):
        fully_shard(models.patched(case, materialised(block, size.device)), mesh=mesh)
    llama = model.get_base_model()
    with torch.device(size.device):  # what a checkpoint does not hold
        llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)
    for rest in (llama.model.embed_tokens, llama.model.norm, llama.lm_head):
        materialised(rest, size.device)
    return fully_shard(model, mesh=mesh).train()


@torch.no_grad()
def materialised(module: nn.Module, device: str) -> nn.Module:
    """Random weights in the place of none."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return module


def step_of(model: nn.Module, batches: list[Tensor], lr: float) -> Callable[[], Tensor]:
    """A step of the optimiser on all batches together; it returns their mean loss."""
    from torch.distributed.fsdp import FSDPModule

    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr, fused=True)

    def step() -> Tensor:
        losses = []
        for i, ids in enumerate(batches, 1):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == len(batches))
            loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    return step


def processes(count: int, device: str, backend: str, worker: Callable[..., Any], *args: Any) -> Any:
    """Run ``worker(*args)`` in so many processes, each with a GPU of its own; what the first returns (of what JSON
    carries). If one fails, all end, and its error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        common = (count, device, backend, Path(folder), worker, args)
        torch.multiprocessing.spawn(_process, common, nprocs=count)
        return json.loads((Path(folder) / "result.json").read_text())


def _process(
    rank: int, count: int, device: str, backend: str, folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # the modules; a collection before each model would look at them all
    torch.set_num_threads(1)  # as torchrun does: with a thread a core in each process, they wait for each other
    if device == "cuda":
        torch.cuda.set_device(rank)
    set_backend(backend)
    if backend == "triton":
        warnings.simplefilter("error", SlowPathWarning)  # of a layer that is left to stock PEFT
    # With gloo beside NCCL for what FSDP2 keeps on the CPU. No device_id: groups are then split from the NCCL one.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(minutes=3),
    )
    result = worker(*args)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def of_all(value: Any) -> list[Any]:
    """Every process's value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
