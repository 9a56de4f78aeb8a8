"""The page on several adapters in one batch: its snippet for models of one's own runs."""

import re

import torch
from checkout import ROOT
from torch import nn

from lora_fast import set_backend

PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")


def test_models_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_backend("reference")
    [snippet] = [text for text in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.DOTALL) if "name=" in text]
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model.forward = lambda x: model["other"](model["down"](model["up"](x)))
    names = {"torch": torch, "model": model, "x": torch.randn(4, 3, 8)}
    exec(snippet, names)
    assert (tmp_path / "large" / "adapter_model.safetensors").exists()
    assert all(p.grad is not None for name in ("small", "large") for p in names["lora_parameters"](model, name))
