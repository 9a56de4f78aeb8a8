"""Parameters whose values are not where the module holds them: sharded by FSDP or tensor parallelism, or offloaded by
accelerate, which puts them there for the length of a forward."""

import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fast.wrappers import zero3

TENSOR_PARALLEL = "its weight is split by tensor parallelism"


@contextmanager
def at_hand(model: nn.Module, write: bool = False) -> Iterator[bool]:
    """Within, FSDP2's parameters are the DTensors that it keeps, also where a forward has left them gathered, and
    FSDP1's are whole, as are those of ZeRO-3's that train or are an adapter's: with ``write``, what is written into
    them stays. All processes enter together. Gives whether FSDP1 or ZeRO-3 takes the tensors back at the end."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nobody uses it
    modules = list(model.modules()) if fsdp is not None else []
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        with fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=write):
            yield True
    else:
        small = [p for name, p in model.named_parameters() if p.requires_grad or "lora_" in name]
        with zero3.written(small):
            yield any(map(zero3.is_split, small))


def is_sharded(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, which all of its processes ask for together; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value, the same in all processes, into a tensor that may be a DTensor."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    tensor.copy_(value)


def stored(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model, by any names; in place of those that accelerate has offloaded what it keeps of them:
    from memory the tensor itself, from disk a copy."""
    return dict(one_by_one(model, tensors))


def one_by_one(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The items of :func:`stored`, each read from disk when it is asked for."""
    kept = _kept(model, tensors)
    for name, tensor in tensors.items():
        place = kept.get(id(tensor)) if tensor.is_meta else None
        yield name, tensor if place is None else place[0][place[1]]


def identities(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Hashable]:
    """For each tensor of a model, by any names, a key that two of them share if they are one tensor: also where
    accelerate has offloaded it to memory, where each module has a tensor without data of its own for it. Copies on disk
    are apart."""
    if not (kept := _kept(model, tensors)):
        return {name: id(tensor) for name, tensor in tensors.items()}
    found = {name: in_memory(*kept[id(t)]) if id(t) in kept else t for name, t in tensors.items()}
    return {name: id(tensors[name]) if t is None else _memory(t) for name, t in found.items()}


def _kept(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[int, tuple[Mapping[str, torch.Tensor], str]]:
    """{id of a tensor without data: where accelerate keeps its values}, if one of these may be such."""
    return dict((id(t), p) for t, p in _offloaded(model)) if any(t.is_meta for t in tensors.values()) else {}


def on_disk(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those tensors of a model that accelerate has offloaded to disk."""
    kept = _kept(model, tensors)
    return [name for name, t in tensors.items() if id(t) in kept and in_memory(*kept[id(t)]) is None]


def all_in_memory(values: Any) -> Mapping[str, torch.Tensor]:
    """What accelerate keeps in memory where the mapping ``values`` of one module comes from, of all modules."""
    everything = getattr(values, "dataset", values)
    return getattr(everything, "state_dict", everything)


def in_memory(values: Any, name: str) -> torch.Tensor | None:
    """What the mapping holds in memory under this name; None for what it would read from disk."""
    return all_in_memory(values).get(getattr(values, "prefix", "") + name)


def _memory(tensor: torch.Tensor) -> Hashable:
    """Where the values are, if that can be told."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel()
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if plain else id(tensor)


def _offloaded(model: nn.Module) -> Iterator[tuple[torch.Tensor, tuple[Mapping[str, torch.Tensor], str]]]:
    """(tensor without data, (mapping of the values, its name there)) of all that accelerate's hooks bring in."""
    for module in model.modules():
        hook: Any = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            values = getattr(one, "weights_map", None)
            if values is None or not one.offload:
                continue
            recurse = one.place_submodules
            own = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
            yield from ((tensor, (values, name)) for name, tensor in own if tensor.is_meta)
