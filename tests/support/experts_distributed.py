"""Two processes over experts that FSDP2 shards. tests/models/test_experts_shards.py starts this script twice: ``RANK
FOLDER BACKEND DEVICE``.

Each has its half of the rows, so that the mean of their losses, and their adapters, are those of one process with all;
what was not goes to ``FOLDER/RANK.json``.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from expert_nets import BOTH, eagerly, ids, moe_model, moe_peft
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from lora_fast import (
    LoRAConfig,
    SlowPathWarning,
    add_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    patch_peft,
    peft_report,
    save_adapter,
    set_backend,
)

STEPS = 3
MODES: dict[str, dict[str, Any]] = {
    "gathered in each pass": {},
    "kept after the forward": {"reshard_after_forward": False},
    "on the CPU": {"offload_policy": CPUOffloadPolicy(torch.cuda.is_available())},
}


def ours(kind: str) -> Any:
    """Adapters on experts, attention and, of Qwen, routers."""
    parameters = BOTH if kind == "gpt_oss" else None
    model = moe_model(kind)
    model.set_experts_implementation("eager")
    add_lora(model, LoRAConfig(r=3, lora_alpha=5, target_modules="all-linear", target_parameters=parameters))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def patched(kind: str) -> Any:
    model = eagerly(moe_peft(kind, target_modules=["q_proj", "v_proj"]))
    patch_peft(model)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("model.layers")]


def train(model: Any, tokens: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def mean(losses: list[float], device: str) -> list[float]:
    total = torch.tensor(losses, device=device)
    dist.all_reduce(total)
    return (total / 2).tolist()


def near(found: Any, expected: Any) -> bool:
    return torch.allclose(torch.as_tensor(found).float().cpu(), torch.as_tensor(expected).float().cpu(), 1e-4, 1e-5)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole in each process."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    return {name: torch.as_tensor(t) for name, t in state.items()}


def wrong(make: Any, kind: str, options: dict[str, Any], rank: int, folder: Path, device: str) -> list[str]:
    """What of a sharded model is not as one process has it."""
    tokens = ids(4, 9).to(device)
    alone, model = make(kind).to(device), make(kind).to(device)
    expected = train(alone, tokens)
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    sharded = [p for p in model.parameters() if p.dim() == 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        found = mean(train(model, tokens.chunk(2)[rank]), device)
    state, whole = state_of(model), state_of(alone)
    right = {
        "blocks": len(blocks_of(model)) == 2 and len(sharded) == 4,
        "shards": all(p.to_local().numel() * 2 == p.numel() for p in sharded),  # type: ignore[attr-defined]
        "losses": near(found, expected) and expected[-1] < expected[0],
        "names": state.keys() == whole.keys(),
        "state": all(type(t) is torch.Tensor and near(t, whole[name]) for name, t in state.items()),
    }
    if make is ours:
        save_adapter(model, folder / f"adapter {rank}")
        again = lora_state_dict(load_adapter(moe_model(kind), folder / f"adapter {rank}"))
        right["saved"] = all(near(again[name], t) for name, t in lora_state_dict(alone).items())
    else:
        reasons = {layer.reason for layer in peft_report(model).layers if "experts" in layer.name}
        right["report"] = len(reasons) == 1 and "DTensor" not in reasons.pop()
    return [name for name, well in right.items() if not well]


def main() -> None:
    rank, folder, backend, device = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    if device == "cuda":
        torch.cuda.set_device(rank)
    set_backend(backend)
    name = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(name, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    seen = {}
    for make in (ours, patched):
        for kind in ("qwen3_moe", "gpt_oss"):
            for mode, options in MODES.items():
                if kind == "qwen3_moe" or not options:
                    seen[f"{make.__name__}, {kind}, {mode}"] = wrong(make, kind, options, rank, folder, device)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
