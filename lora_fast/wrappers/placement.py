"""Weights that a wrapper keeps for a layer: FSDP2's shards, what accelerate offloads. Read whole, written in place.

A parameter that is put in such a layer is lost: the wrapper puts its own back. So a weight is changed in its storage.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lora_fast.bases.packed import is_packed, packed_in
from lora_fast.wrappers import zero3
from lora_fast.wrappers.gather import all_in_memory, in_memory, is_sharded, put, whole

AWAY = "weight: is on the meta device, without data; where accelerate brings it for a module around, merge before that"


def alike(t: torch.Tensor, place: Any) -> torch.Tensor:
    """The whole ``t``, the same in all processes, sharded as ``place`` is, if it is."""
    if not is_sharded(place) or is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(place.device), place.device_mesh, place.placements, src_data_rank=None)


@torch.no_grad()
def known_to_all(t: torch.Tensor | None, place: Any) -> torch.Tensor | None:
    """``t`` in every process that has a shard of ``place`` if one of them has it; all of them must ask.

    torch's ``broadcast_from_rank0`` leaves what a model has no place for to the first one.
    """
    if not is_sharded(place):
        return t
    from torch import distributed as dist

    mesh, kind = place.device_mesh, {"device": place.device_mesh.device_type}

    def largest(found: torch.Tensor) -> torch.Tensor:
        for group in mesh.get_all_groups():
            dist.all_reduce(found, dist.ReduceOp.MAX, group)
        return found

    have, lack = largest(torch.tensor([int(t is not None), int(t is None)], **kind)).tolist()
    if not have or not lack:
        return t
    dtype = torch.promote_types(place.dtype, torch.float32)
    mine = torch.full(place.shape, -torch.inf, dtype=dtype, **kind) if t is None else t.to(dtype=dtype, **kind)
    return largest(mine.contiguous()).to(place.dtype)


@torch.no_grad()
def write(place: torch.Tensor, t: torch.Tensor) -> None:
    """Copy ``t`` into the storage of ``place``, which may be sharded."""
    put(place.detach(), t)


def keeper(layer: nn.Module) -> str | None:
    """Who keeps the parameters of the layer, or of what is in it, in words; None where the layer itself does."""
    for module in layer.modules():
        if getattr(module, "_is_fsdp_managed_module", False) or any(map(is_sharded, module._parameters.values())):
            return "FSDP"
        if offloading(module) is not None:
            return "accelerate's offloading"
    return None


def settle(layer: nn.Module) -> None:
    """Have FSDP2 give gathered parameters of the layer up: what is written to them is lost. Not within a forward."""
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in layer.modules()):
        for module in layer.modules():
            for shard in list(module._state_dict_pre_hooks.values()):  # a state dict itself fails in inference mode
                shard(module, "", False)


def kind_of(t: torch.Tensor) -> torch.inference_mode:
    """A context in which new tensors are as ``t`` is: what is put in its place in inference mode can be trained over
    afterwards, too, and what was made there can be written to."""
    return torch.inference_mode(t.is_inference())


@contextmanager
def gathered(layer: nn.Module, changed: nn.Module | None = None) -> Iterator[None]:
    """Within, the sharded parameters of the layer and of what is in it are whole, plain and frozen, in every process;
    ``changed`` is the module among them whose own are written back at the end. :func:`settle` comes before."""
    owned = [(m, name, p) for m in layer.modules() for name, p in m._parameters.items() if is_sharded(p)]
    try:
        for module, name, p in owned:
            module._parameters[name] = nn.Parameter(whole(p), requires_grad=False)  # type: ignore[arg-type]
        yield
    finally:
        for module, name, p in owned:
            found, module._parameters[name] = module._parameters[name], p
            if module is changed and found is not p:
                write(p, found)  # type: ignore[arg-type]


@contextmanager
def present(layer: nn.Module) -> Iterator[None]:
    """Within, the parameters of the layer and of what is in it can be read: gathered, and where accelerate would put
    them for a forward."""
    hooks = [(module, hook) for module in layer.modules() if (hook := offloading(module)) is not None]
    with gathered(layer), ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(hook.post_forward, module, None)
            hook.pre_forward(module)
        yield


@contextmanager
def in_its_memory(module: nn.Module) -> Iterator[None]:
    """What is put into the module's own parameters within, as their ``data``, is in the end in the memory that they
    had: FSDP1 takes that back, and nothing else."""
    had = [(p, p.data) for p in module._parameters.values() if p is not None and not is_sharded(p) and not is_packed(p)]
    try:
        yield
    finally:
        for p, data in had:
            if p.data_ptr() != data.data_ptr():
                p.data = data.copy_(p.data)


def place_of_weight(layer: Any) -> torch.Tensor | None:
    """The tensor to write into if the weight of the ``nn.Linear`` is to change; None where a new parameter does.

    Raises:
        ValueError: it cannot be written to: an fp8 base in shards, a weight that is not whole (FSDP1), on disk, or tied
            to another one that is offloaded.
    """
    settle(layer)
    weight = layer.weight
    if is_sharded(weight):
        if (packed := packed_in(weight)) is not None:
            raise ValueError(
                f"weight: got an {packed.LABEL} base in FSDP2's shards, which only hold {packed.LABEL}; merge before "
                "fully_shard"
            )
        return weight
    if (hook := offloading(layer)) is not None:
        return _offloaded(hook)
    shape = _shape_of(layer)
    split = zero3.is_split(weight)  # and whole within ``zero3.written``
    if weight.shape != shape and not split:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected {shape}: merge and unmerge within FSDP1's "
            "summon_full_params(model, writeback=True)"
        )
    kept = split or getattr(layer, "_is_fsdp_managed_module", False)
    return weight if kept and not is_packed(weight) else None


def _shape_of(layer: Any) -> tuple[int, int]:
    """That of the whole weight, by the layer's own attributes: one of ours has, an ``nn.Linear``'s, transformers'
    Conv1D's, or an ``nn.Embedding``'s."""
    if (own := getattr(layer, "whole_shape", None)) is not None:
        return own
    names = ("out_features", "in_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")
    rows, columns = next(pair for pair in names if hasattr(layer, pair[0]))
    return getattr(layer, rows), getattr(layer, columns)


def offloading(module: nn.Module) -> Any:
    """accelerate's hook that puts the module's weights there for each forward and takes them away again, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)), None)


def stored(module: nn.Module, name: str) -> torch.Tensor:
    """The tensor that holds the module's parameter between forwards."""
    hook = offloading(module)
    return module._parameters[name] if hook is None else hook.weights_map[name]  # type: ignore[return-value]


def _offloaded(hook: Any) -> torch.Tensor:
    """The tensor that the hook copies the weight from."""
    weight = in_memory(hook.weights_map, "weight")
    if weight is None:
        raise ValueError("weight: is offloaded to disk, expected one in memory (accelerate.cpu_offload) to merge into")
    if (packed := packed_in(weight)) is not None:
        raise ValueError(
            f"weight: got an offloaded {packed.LABEL} base, expected one that is not; merge before offloading it"
        )
    others = all_in_memory(hook.weights_map).values()  # of those on disk none is the same
    if sum(t.data_ptr() == weight.data_ptr() for t in others) > 1:
        raise ValueError("weight: is offloaded and tied to another one, which would change with it; merge before that")
    return weight
