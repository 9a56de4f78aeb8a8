"""The page on experts: its snippets run, one after the other; what it names is there."""

import re
from functools import partial

import torch
from checkout import ROOT
from expert_nets import ids, moe_model

import lora_fast
from lora_fast.bases.stack import PackedStack
from lora_fast.experts import form, functional, reference
from lora_fast.peft.experts import FastExperts

PAGE = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")


def test_its_snippets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"build": partial(moe_model, hidden_size=32)}
    patched, plain, frozen, packed = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(patched, names)
    assert sum(isinstance(module, FastExperts) for module in names["peft_model"].modules()) == 2
    exec(plain, names)
    assert torch.equal(names["again"](ids()).logits, names["model"](ids()).logits)
    assert {path.name for path in tmp_path.glob("*/*")} == {"adapter_config.json", "adapter_model.safetensors"}
    exec(frozen, names)
    assert names["model"].config._experts_implementation == "lora_fast"
    exec(packed, names)
    kinds = [
        p.base_dtype for name in ("model", "frozen") for p in names[name].parameters() if isinstance(p, PackedStack)
    ]
    assert kinds == ["nf4"] * 4 + ["mxfp4"] * 4


def test_what_it_names():
    assert "`lora_fast.lora_experts`" in PAGE and lora_fast.lora_experts is functional.lora_experts
    assert all(hasattr(form, name) for name in ("Adapter", "ExpertsForm", "Gate"))
    assert "`lora_fast.experts.reference`" in PAGE and callable(reference.lora_experts)
