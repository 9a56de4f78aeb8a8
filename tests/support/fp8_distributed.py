"""Two processes over an fp8 base. tests/test_fp8.py starts this script twice: ``RANK FOLDER DEVICE BACKEND ...``.

Each mode trains what a process alone trains with the rows of both; what came of it goes to ``FOLDER/RANK.json``.
"""

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sharding_modes
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_fast import LoRAConfig, add_lora, patch_peft, peft_report, set_backend
from lora_fast.fp8 import Fp8Shard, Fp8Weight

STEPS, ROWS = 3, 8
KINDS = ["LoRA", "DoRA", "PEFT's DoRA"] if find_spec("peft") else ["LoRA", "DoRA"]


def network(kind: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).to(device)
    if kind.startswith("PEFT"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True))
        patch_peft(model, base_dtype="float8_e4m3")
    else:
        config = LoRAConfig(r=4, target_modules=["0", "2"], use_dora=kind == "DoRA", base_dtype="float8_e4m3")
        add_lora(model, config)
    for parameter in trainable(model):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def bases(model: nn.Module) -> list[Any]:
    return [p.detach() for name, p in model.named_parameters() if name.endswith("weight") and not p.requires_grad]


def train(model: nn.Module, x: torch.Tensor, average: bool) -> list[float]:
    optimizer, losses = torch.optim.SGD(trainable(model), 1.0), []
    for _ in range(STEPS):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = loss.detach()
        if average:
            dist.all_reduce(seen)
            seen /= 2
        losses.append(seen.item())
    return losses


def from_the_first(model: nn.Module) -> nn.Module:
    for weight in bases(model) if dist.get_rank() else ():
        weight.copy_(torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device))
    return DistributedDataParallel(model)


MODES = sharding_modes.MODES | {"ddp, bases from the first process": (from_the_first, {})}
INTERPRETED = [("LoRA", "ddp"), (KINDS[-1], "fsdp2, by layers")]  # the interpreter is slow


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Of a shard on the CPU, too, where NCCL gathers nothing."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def loads(model: nn.Module) -> bool:
    """A whole state dict where it is what is there already; one with another base is refused."""
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(model, state, options=options)
    (name,) = [key for key in state if key.endswith(("0.weight", "0.base_layer.weight"))]
    state[name] = torch.ones_like(state[name])  # type: ignore[arg-type]
    try:
        set_model_state_dict(model, state, options=options)
    except RuntimeError as error:
        return "load it before fully_shard" in str(error)
    return False


def refused() -> list[str]:
    """What is said where two processes do not divide a dimension, or one has no rows."""
    said = []
    for k, n in ((15, 16), (16, 15), (16, 1)):
        model = add_lora(nn.Sequential(nn.Linear(k, n)), LoRAConfig(target_modules=["0"], base_dtype="float8_e4m3"))
        try:
            fully_shard(model)
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    rank, folder, device, *backends = int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    if device == "cuda":
        torch.cuda.set_device(rank)
    name = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(name, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    seen = {backend: trainings(rank, backend, device) for backend in backends}
    (folder / f"{rank}.json").write_text(json.dumps([seen, refused() if device == "cpu" else []]))
    dist.destroy_process_group()


def trainings(rank: int, backend: str, device: str) -> dict[str, list]:
    """By kind and mode: the losses alone and found, how far the adapters are apart, whether the bases stayed."""
    set_backend(backend)
    rows = torch.randn(2 * ROWS, 16, generator=torch.Generator().manual_seed(1)).to(device)
    seen: dict[str, list] = {}
    interpreted = device == "cpu" and backend == "triton"
    for kind in KINDS:
        modes = [mode for mode in MODES if not interpreted or (kind, mode) in INTERPRETED]
        if not modes:
            continue
        alone = network(kind, device)
        start = copy.deepcopy(bases(alone))
        expected = train(alone, rows, average=False)
        for mode in modes:
            wrap, options = MODES[mode]
            model = network(kind, device)
            wrapped = wrap(model, **options)
            held = Fp8Shard if mode.startswith("fsdp2") and "whole" not in mode else Fp8Weight
            assert [type(getattr(base, "_local_tensor", base)) for base in bases(model)] == 2 * [held]
            found = train(wrapped, rows.chunk(2)[rank], average=True)
            if kind.startswith("PEFT"):
                for layer in peft_report(model).layers:
                    assert "fp8 base" in layer.remark and layer.fused == (backend != "reference"), layer
            else:
                assert repr(model).count("base_dtype='float8_e4m3'") == 2
            trained = zip(trainable(model), trainable(alone), strict=True)
            apart = max((full(a) - full(b)).abs().max().item() for a, b in trained)
            same = [torch.equal(full(a), full(b)) for a, b in zip(bases(model), start, strict=True)]
            if mode == "fsdp2":
                same.append(loads(model))
            if mode == "ddp":
                same += [
                    torch.equal(a.columns.float(), b.columns.float()) for a, b in zip(bases(model), start, strict=True)
                ]
            seen[f"{kind}, {mode}"] = [expected, found, apart, all(same)]
    return seen


if __name__ == "__main__":
    main()
