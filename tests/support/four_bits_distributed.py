"""Two processes over bases that are written out for their products. tests/bases/test_four_bit_shards.py starts this
script twice: ``RANK FOLDER DEVICE BACKEND ...``.

Both have the same rows, so that each mode gives the bits of a process alone; what did not goes to ``FOLDER/RANK.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from base_calls import scaled
from sharding_modes import MODES
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lora_fast import LoRAConfig, add_lora, lora_parameters, set_backend
from lora_fast.bases.four_bit_shards import FourBitShard
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.bases.scaled_shards import ScaledFp8Shard
from lora_fast.fp8 import E4M3

STEPS, ROWS = {"cpu": 2, "cuda": 3}, 8
WIDTHS = {None: (16, 32, 20, 16), "float8_e4m3": (16, 32, 48, 16)}  # 16 x 20: half of it is no whole number of blocks
CHECKPOINT = 16, 32, 256, 16  # of layers as fp8 checkpoints hold them; half of 256 is a whole block
KINDS = "nf4", "mxfp4", "checkpoint"
CHOICES = [(kind, products, dora) for kind in KINDS for products in WIDTHS for dora in (False, True)]


def modes_of(choice: tuple[str, str | None, bool], device: str, interpreted: bool) -> list[str]:
    """All of them on a GPU; on a CPU every one with each kind and product, with DoRA and without in turn."""
    if interpreted:
        return [INTERPRETED[1]] * (choice in INTERPRETED[0])
    at = CHOICES.index(choice)
    return [mode for i, mode in enumerate(MODES) if device == "cuda" or (at // 2 + i) % 2 == at % 2]


def network(base_dtype: str, base_compute: str | None, dora: bool, device: str, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    widths: tuple[int, ...] = CHECKPOINT if base_dtype == "checkpoint" else WIDTHS[base_compute]
    widths = widths[:depth] + widths[-1:]
    pairs = zip(widths, widths[1:], strict=False)
    model = nn.Sequential(*(nn.Linear(k, n, bias=n == 32) for k, n in pairs)).to(device)
    options: dict[str, Any] = {"base_dtype": base_dtype, "base_compute": base_compute, "use_dora": dora}
    if base_dtype == "checkpoint":
        options["base_dtype"] = None
        for layer in model.children():
            n, k = layer.weight.shape  # type: ignore[misc]
            weight = scaled("float32" if n == 256 else "bf16 rows", n, k, device=device)
            weight.scale.mul_(0.1)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    add_lora(model, LoRAConfig(r=4, target_modules="all-linear", **options))
    for parameter in lora_parameters(model):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def bases(model: nn.Module) -> list[Any]:
    return [p.detach() for name, p in model.named_parameters() if name.endswith("weight")]


def full(tensor: Any) -> torch.Tensor:
    """Of a shard on the CPU, too, where NCCL gathers nothing."""
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return (found.dequantise() if isinstance(found, PackedWeight) else found).detach().cpu()


def train(model: nn.Module, rows: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Each step's output, and the gradient of what went in."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    seen = []
    for _ in range(steps):
        x = rows.clone().requires_grad_()
        y = model(x)
        (y - rows).square().mean().backward()
        seen += [y.detach().cpu(), x.grad.cpu()]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return seen


# In one mode, and for a step: the interpreter is slow, most of all where it writes e4m3: two layers, without DoRA.
INTERPRETED = [("nf4", None, True), ("mxfp4", "float8_e4m3", False), ("checkpoint", None, True)], "fsdp2, by layers"


def is_kept(model: nn.Module, mode: str) -> bool:
    """Whether each process holds what it should: the bytes of its rows, and scales where the blocks divide."""
    held = [getattr(base, "_local_tensor", base) for base in bases(model)]
    sharded = mode.startswith("fsdp2") and "whole" not in mode
    right = []
    for base, layer in zip(held, layers(model), strict=True):
        elements = layer.in_features * layer.out_features // (2 if sharded else 1)
        if isinstance(base, ScaledFp8Weight):
            right += [isinstance(base, ScaledFp8Shard) == sharded, base.stored.numel() == elements]
            continue
        right += [isinstance(base, FourBitShard) == sharded, base.packed.numel() * 2 == elements]
        right += [not sharded or base.has_own_scales == (elements % base.block == 0)]
    return all(right)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def loads(model: nn.Module) -> bool:
    """A whole state dict where it is what is there already; one with another base is refused."""
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    right = all(type(t) is torch.Tensor for t in state.values())
    set_model_state_dict(model, dict(state), options=options)
    if "0.weight" not in state or state["0.weight"].dtype in (torch.uint8, E4M3):  # type: ignore[union-attr]
        return right and state.keys() > {"0.lora_A", "0.lora_B"}  # whole in each process, in plain tensors
    try:
        set_model_state_dict(model, state | {"0.weight": torch.ones(32, 16)}, options=options)
    except RuntimeError as error:
        return right and "load it before fully_shard" in str(error)
    return False


def refused() -> list[str]:
    """What is said where two processes do not divide the rows, or one has none."""
    said = []
    for n in (15, 1):
        try:
            fully_shard(add_lora(nn.Sequential(nn.Linear(64, n)), LoRAConfig(target_modules=["0"], base_dtype="nf4")))
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    rank, folder, device, *backends = int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    if device == "cuda":
        torch.cuda.set_device(rank)
    name = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(name, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    wrong = {backend: faults(backend, device) for backend in backends}
    (folder / f"{rank}.json").write_text(json.dumps([wrong, refused() if device == "cpu" else []]))
    dist.destroy_process_group()


def faults(backend: str, device: str) -> dict[str, list[str]]:
    """By choice and mode what did not come as in a process alone."""
    set_backend(backend)
    rows = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1)).to(device)
    seen: dict[str, Any] = {}
    interpreted = device == "cpu" and backend == "triton"
    steps = 1 if interpreted else STEPS[device]
    for choice in CHOICES:
        if not (modes := modes_of(choice, device, interpreted)):
            continue
        depth = 2 if interpreted and choice[1] else 3
        alone = network(*choice, device, depth)
        start, expected = [full(base) for base in bases(alone)], train(alone, rows, steps)
        for mode in modes:
            wrap, options = MODES[mode]
            model = network(*choice, device, depth)
            found = train(wrap(model, **options), rows, steps)
            right = {
                "kept": is_kept(model, mode),
                "results": all(map(torch.equal, found, expected))
                and (interpreted or not torch.equal(found[0], found[-2])),
                "adapters": all(
                    torch.equal(full(a), full(b))
                    for a, b in zip(lora_parameters(model), lora_parameters(alone), strict=True)
                ),
                "bases": all(map(torch.equal, map(full, bases(model)), start)),
                "loads": mode not in ("fsdp2", "fsdp2, whole bases") or loads(model),
            }
            seen[f"{choice}, {mode}"] = [name for name, well in right.items() if not well]
    return seen


if __name__ == "__main__":
    main()
