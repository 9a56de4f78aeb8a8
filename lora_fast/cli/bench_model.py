"""``lora-fast bench --model``: a whole model's training step, frozen, under stock PEFT and patched.

The model has its configuration's widths and layers and random weights, which the candidates share; all linear layers
but the head have adapters. A step drops the gradients, then runs the loss of one batch of random tokens and its
backward; each candidate runs without and with gradient checkpointing.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fast import patch_peft, timing

Row = tuple[str, str, str, str, str]


def base_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """A causal language model of random weights, frozen.

    Raises:
        OSError, ValueError: ``name`` is neither a configuration's file or folder nor a model's name on the hub.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def build(base: nn.Module, ids: torch.Tensor, r: int, p: float, dora: bool) -> dict[str, Callable[[], object]]:
    """The candidates' steps by name."""
    kinds = ["frozen", "PEFT LoRA", "patched LoRA", *(["PEFT DoRA", "patched DoRA"] if dora else [])]
    made = {}
    for checkpointing in (False, True):
        for kind in kinds:
            model = _candidate(kind, base, r, p)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            made[kind + ", checkpointing" * checkpointing] = _step(model.train(), ids)
    return made


def measured(steps: dict[str, Callable[[], object]], rounds: int, device: str, each_round: timing.Told) -> list[Row]:
    """The cells of the table."""
    peaks = {name: f"{timing.peak_mib(step):.0f}" if device == "cuda" else "-" for name, step in steps.items()}
    found = timing.measure(steps, rounds, least=1, device=device, each_round=each_round)
    rows = []
    for name, times in found.items():
        median, p20, p80 = (time / 1000 for time in timing.summary(times))
        frozen = timing.summary(found["frozen, checkpointing" if "check" in name else "frozen"])[0] / 1000
        rows.append((name, f"{median:.1f}", f"{p20:.1f}-{p80:.1f}", f"{median / frozen:.3f}", peaks[name]))
    return rows


def _candidate(kind: str, base: nn.Module, r: int, p: float) -> Any:
    """A model of its own on the base's weights; equal adapters in stock and patched ones."""
    model: Any = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
    model.enable_input_require_grads()  # as in training with checkpointing: all candidates make the same gradients
    if kind != "frozen":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        settings: dict[str, Any] = {"use_dora": kind.endswith("DoRA"), "init_lora_weights": False, "lora_dropout": p}
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", **settings)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if kind.startswith("patched"):
        patch_peft(model)
    return model


def _step(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> object:
        for leaf in leaves:
            leaf.grad = None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return step
