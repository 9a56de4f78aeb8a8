"""A model that transformers splits by its plan over two processes: tests/peft/test_tensor_parallel.py starts this
script twice, ``RANK FOLDER``; what was seen of stock PEFT and of a patched model goes to ``FOLDER/RANK.json``.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from loops import tiny_llama, token_ids, trainable, watched
from torch import distributed as dist
from torch import nn

from lora_fast import LoRAConfig, add_lora, patch_peft, set_backend


def split(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder / "model", tp_plan="auto")


def train(model: nn.Module) -> dict[str, Any]:
    ids, losses, grads = token_ids(), [], {}
    with watched() as seen:
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            for name, p in model.named_parameters():
                if p.grad is not None:
                    grads[name] = p.grad.norm().item()
            with torch.no_grad():
                for p in trainable(model):
                    p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
                    p.grad = None
    return {"losses": losses, "grads": grads, "calls": seen.calls}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    set_backend("triton")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    if rank == 0:
        whole: Any = tiny_llama(kv_heads=2)
        whole.unload().save_pretrained(folder / "model")
    dist.barrier()
    seen = []
    for patched in (False, True):
        torch.manual_seed(1)
        kind = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(split(folder), kind)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            report = patch_peft(model) if patched else None
            seen.append(train(model) | {"report": str(report), "warned": [str(one.message) for one in warned]})
    try:
        add_lora(split(folder), LoRAConfig(target_modules="all-linear"))
    except ValueError as error:
        seen[1]["own layers"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
