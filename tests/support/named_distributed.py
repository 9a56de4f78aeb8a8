"""Adapters under names, sharded by FSDP2 in two processes. tests/models/test_named_shards.py starts this script twice:
``RANK FOLDER``.

What was wrong, by kind and step, goes to ``FOLDER/RANK.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lora_fast import (
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
    set_backend,
    unmerge_lora,
    use_adapters,
)

NAMES = ["a", "b", "__base__", "b", "a", "__base__"]  # in both processes the same ones occur, as FSDP2 needs it
WHOLE = StateDictOptions(full_state_dict=True)


def network(use_dora: bool, seed: int = 1) -> nn.Sequential:
    """Of rows that two processes do not share evenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 9, bias=False))
    for name, r in (("a", 3), ("b", 5)):
        add_lora(model, LoRAConfig(r=r, target_modules=["0", "2"], use_dora=use_dora), name=name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(0.3 * torch.rand_like(p))
    return model


def sharded(model: nn.Sequential) -> nn.Sequential:
    for part in (model[0], model):
        fully_shard(part)
    return model


def gradients(model: nn.Module, x: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    with use_adapters(model, names):
        y = model(x)
    y.square().sum().backward()
    return [p.grad for p in lora_parameters(model) if p.grad is not None]


def whole(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=WHOLE)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def steps(use_dora: bool, rank: int, folder: Path) -> dict[str, bool]:
    alone, model = network(use_dora), sharded(network(use_dora))
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(2))
    mine = slice(3 * rank, 3 * rank + 3)
    pairs = zip(gradients(model, x[mine], NAMES[mine]), gradients(alone, x, NAMES), strict=True)
    seen = {"gradients": all([near(2 * found.full_tensor(), expected) for found, expected in pairs])}  # type: ignore[attr-defined]
    bits: dict[str, Any] = {key: t.clone() for key, t in whole(model).items()}
    for one in (alone, model):
        set_adapter(one, "b")
    seen["active"] = near(model(x), y := alone(x))
    merge_lora(model)
    seen["merged"] = near(model(x), y)
    unmerge_lora(model)
    found = whole(model)
    seen["unmerged"] = found.keys() == bits.keys() and all(torch.equal(t, bits[key]) for key, t in found.items())
    save_adapter(model, folder / str(rank), name="a")
    fresh = sharded(network(use_dora, seed=5))
    set_model_state_dict(fresh, bits, options=WHOLE)
    set_adapter(fresh, "b")
    seen["checkpoint"] = near(fresh(x), y)
    other = sharded(network(use_dora, seed=5))
    load_adapter(other, folder / str(rank), name="a")
    set_adapter(alone, "a")
    seen["loaded"] = near(other(x), alone(x))
    return seen


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    set_backend("reference")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = {kind: steps(kind == "DoRA", rank, folder / kind) for kind in ("LoRA", "DoRA")}
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
