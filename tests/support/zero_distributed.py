"""DeepSpeed's ZeRO over two processes: tests/peft/test_deepspeed.py starts this script twice, ``RANK FOLDER``.

Each mode trains stock PEFT and a patched copy in engines of one kind; what was seen goes to ``FOLDER/RANK.json``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1]}

import deepspeed
from deepspeed.utils import safe_get_full_grad
from loops import LR, tiny_llama, token_ids, trainable, watched
from torch import distributed as dist
from torch import nn

from lora_fast import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    patch_peft,
    peft_report,
    save_adapter,
    set_backend,
    unmerge_lora,
    unpatch_peft,
)


class Mode(NamedTuple):
    stage: int
    patched: str = "before"  # or "after" the engine is made, or with own layers "never"
    dora: bool = False
    checkpointing: bool = False


MODES = {
    "ZeRO-2": Mode(2),
    "ZeRO-3, DoRA, checkpointing": Mode(3, dora=True, checkpointing=True),
    "ZeRO-3, patched after": Mode(3, "after"),
    "ZeRO-3, own layers": Mode(3, "never", dora=True),
}


def engine_of(model: nn.Module, stage: int) -> Any:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # or else layers as small as these stay whole
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trainable(model), LR), config=config)[0]


def own_layers(dora: bool) -> nn.Module:
    base: Any = tiny_llama()
    base = base.unload()
    torch.manual_seed(1)
    return add_lora(base, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora))


def left_gathered(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if getattr(p, "ds_id", None) is not None and p.numel()]


def run(model: nn.Module, stage: int, mode: Mode, patched: str) -> tuple[dict[str, Any], Any]:
    """What three steps gave, and the engine."""
    if mode.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if patched == "before":
        patch_peft(model)
    engine = engine_of(model, stage)
    seen: dict[str, Any] = {"losses": [], "grads": []}
    if patched in ("before", "after"):
        report = patch_peft(model) if patched == "after" else peft_report(model)
        seen |= {"fused": report.fused, "not_fused": report.not_fused, "report": str(report), "groups": report.groups}
    ids = token_ids(seed=engine.global_rank)
    with watched() as counts:
        for _ in range(3):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            seen["losses"].append(loss.item())
            seen["grads"].append({name: grad_of(p) for name, p in model.named_parameters() if p.requires_grad})
            engine.step()
    return seen | {"calls": counts.calls, "launches": counts.launches, "left": left_gathered(model)}, engine


def grad_of(p: nn.Parameter) -> list[float]:
    grad = safe_get_full_grad(p)
    return [grad.norm().item(), grad.flatten()[0].item()]


def afterwards(model: nn.Module, engine: Any) -> dict[str, float]:
    """Losses of a patched model that ZeRO-3 has trained, in evaluation: as it is, merged, and without lora_fast."""
    ids, found = token_ids(), {}

    @torch.no_grad()
    def loss(run: Any = engine) -> float:
        return run(input_ids=ids, labels=ids).loss.item()

    model.eval()
    found["plain"], found["not by the engine"] = loss(), loss(model)
    with model.disable_adapter():  # type: ignore[operator]
        found["disabled"] = loss()
    model.merge_adapter()  # type: ignore[operator]
    found["merged"] = loss()
    with model.disable_adapter():  # type: ignore[operator]
        found["disabled, merged"] = loss()
    model.unmerge_adapter()  # type: ignore[operator]
    found["unmerged"] = loss()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.merge_adapter()  # type: ignore[operator]
    found["merged by hand"] = loss()
    model.unmerge_adapter()  # type: ignore[operator]
    unpatch_peft(model)
    found["unpatched"] = loss()
    return found


@torch.no_grad()
def files(model: nn.Module, engine: Any, path: Path) -> list[float]:
    """Losses of own layers under ZeRO-3: as they are, merged, as a file has them in a model that is whole, and with all
    adapters halved, written into the engine's."""
    ids = token_ids()

    def loss(run: Any = engine) -> float:
        return run(input_ids=ids, labels=ids).loss.item()

    model.eval()
    losses = [loss()]
    merge_lora(model)
    losses.append(loss())
    unmerge_lora(model)
    save_adapter(model, path)
    other = own_layers(dora=True).eval()
    load_adapter(other, path)
    losses.append(loss(other))
    half = {name: t * 0.5 for name, t in lora_state_dict(other).items()}
    for one in (model, other):
        load_lora_state_dict(one, half)
    return [*losses, loss(other), loss()]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    set_backend("triton")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", verbose=False)
    seen = {}
    for name, mode in MODES.items():
        kind = {"use_dora": True} if mode.dora else {}
        if mode.patched == "never":
            expected, _ = run(own_layers(mode.dora), 2, mode, "never")
            model = own_layers(mode.dora)
            found, engine = run(model, 3, mode, "never")
            found["files"] = files(model, engine, folder / f"adapter of {rank}")
        else:
            expected, _ = run(tiny_llama(**kind), mode.stage, mode, "never")
            model = tiny_llama(**kind)
            found, engine = run(model, mode.stage, mode, mode.patched)
            if mode.patched == "after":
                found["afterwards"] = afterwards(model, engine)
        seen[name] = expected, found
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
