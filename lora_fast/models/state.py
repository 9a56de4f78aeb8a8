"""The adapter's part of a model's state dict, wherever the model keeps it: gather it, put it back."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_fast.layers.magnitude import KeepsMagnitude
from lora_fast.models.adapters import adapter_tensors, lora_layers
from lora_fast.models.targets import some
from lora_fast.wrappers.gather import at_hand, on_disk, put, stored, whole
from lora_fast.wrappers.names import plain_name, prefix


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """The adapter's part of ``model.state_dict()``, detached but not copied: of several that of the one of this name,
    or of the active one, as if it were alone. ValueError without LoRA layers or such an adapter, and of shards that are
    no DTensors (FSDP1's without its outermost wrapper).

    Keys ``<module>.lora_A``, ``<module>.lora_B`` and, of DoRA layers, ``<module>.lora_magnitude_vector`` (of experts
    ``<experts>.lora_gate_up_proj.lora_A`` and so on), and the tensors of modules_to_save and of the biases that train;
    modules under the names that they have without wrappers (torch.compile's, DistributedDataParallel's, ...), inside
    the model or around it.

    Under FSDP2 and tensor parallelism the tensors are DTensors, as in ``model.state_dict()``: the ``full_tensor()`` of
    each, called by all processes, is the whole one (:func:`lora_fast.save_adapter` calls it itself). Under FSDP1 and
    DeepSpeed's ZeRO-3 they are whole copies, made by all processes together. Of an offloaded model they are
    accelerate's own from the CPU, and copies from disk.
    """
    lora_layers(model, name=name)
    with at_hand(model) as lent:
        return {key: tensor.clone() if lent else tensor for key, tensor in state_at_hand(model, name).items()}


def state_at_hand(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """:func:`lora_state_dict` where the tensors are :func:`at_hand`."""
    return {key: tensor.detach() for key, tensor in stored(model, _whole_tensors(model, name)).items()}


def load_lora_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor], name: str | None = None) -> None:
    """Copy what :func:`lora_state_dict` gave into ``model``, cast to the dtypes and devices there: into its adapter of
    this name, or the active one.

    A sharded model takes whole tensors and DTensors, as does any other, all processes together and the same in each;
    an offloaded one takes them where accelerate keeps them, if that is the CPU.

    Raises:
        TypeError: not a mapping of tensors.
        ValueError: no LoRA layer, no adapter of this name; a merged one (its weight would keep the old adapter);
            missing or unexpected keys, another shape or kind of number; a model in shards that are no DTensors, or
            without data to copy into (on the meta device), or whose data accelerate keeps on disk. All is checked
            first: the model is then untouched.
    """
    lora_layers(model, name=name)
    with at_hand(model, write=True):
        load_into(model, places_to_load(model, name), state_dict, name)


def places_to_load(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors that :func:`load_lora_state_dict` writes into. ValueError without data, or if they are on disk."""
    own = _whole_tensors(model, name)
    disk = on_disk(model, own)
    places = stored(model, {name: tensor for name, tensor in own.items() if name not in disk})
    if missing := [name for name, tensor in places.items() if tensor.is_meta]:
        raise ValueError(
            f"model: {some(missing)}: on the meta device, without data; give the model its data "
            "first (to_empty and load_state_dict), then load the adapter"
        )
    if disk:
        raise ValueError(
            f"model: {some(disk)}: offloaded to disk, where accelerate does not let it change; "
            "load the adapter first, then offload the model"
        )
    return places


def _whole_tensors(model: nn.Module, name: str | None) -> dict[str, torch.Tensor]:
    """The adapter's tensors. ValueError for bare shards, of which only what sharded them knows the whole."""
    for place, layer in lora_layers(model, name=name).items():
        for part, shape in zip(layer.adapter_names, layer.adapter_shapes, strict=True):
            if (found := getattr(layer, part).shape) != shape:
                raise ValueError(
                    f"model: {place or 'itself'}: {part} has shape {tuple(found)}, expected {shape}: something shards "
                    "it. Under FSDP1 give the outermost wrapper; under others gather first"
                )
    return adapter_tensors(model, name)


@torch.no_grad()
def load_into(
    model: nn.Module,
    own: Mapping[str, torch.Tensor],
    state_dict: Mapping[str, torch.Tensor],
    adapter: str | None = None,
) -> None:
    """:func:`load_lora_state_dict` into the tensors ``own`` of the model's adapter, be they without data."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected a mapping of names to tensors")
    layers = lora_layers(model, name=adapter)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(f"model: has merged LoRA layers ({some(merged)}); call unmerge_lora before loading")
    around = prefix(model)  # dicts of versions that kept it in the names are taken, too
    state_dict = {n if n in own else plain_name(n.removeprefix(around)): tensor for n, tensor in state_dict.items()}
    problems = [f"missing {name}" for name in own if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in own]
    for name, old in own.items():
        new = state_dict.get(name, old)
        if not isinstance(new, torch.Tensor):
            raise TypeError(f"state_dict[{name!r}]: got {type(new).__name__}, expected a tensor")
        if new.shape != old.shape:
            problems.append(f"{name} has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
        if new.is_floating_point() != old.is_floating_point() or new.is_complex():
            problems.append(f"{name} has dtype {new.dtype}, expected {old.dtype}")
        if new.is_meta and not old.is_meta:
            problems.append(f"{name} is on the meta device, without data")
        elif name.endswith("lora_magnitude_vector") and not torch.isfinite(whole(new)).all():
            problems.append(f"{name} has elements that are not finite")
    if problems:
        raise ValueError("state_dict: does not fit the model: " + "; ".join(problems))
    for name, tensor in own.items():
        put(tensor, whole(state_dict[name]))
    for layer in layers.values():
        if isinstance(layer, KeepsMagnitude) and not layer.weight.is_meta:
            layer._magnitude_is_set = True  # if it was put off: the layer was on the meta device
