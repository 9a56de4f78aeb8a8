"""Every class of experts that transformers decorates: known with the right gate, or left alone for a reason."""

import importlib
from pathlib import Path

import pytest
import torch
from expert_nets import moe_model, transformers

from lora_fast.experts import known
from lora_fast.experts.form import ExpertsForm, Gate
from lora_fast.experts.known import form_of
from lora_fast.experts.reference import apply_gate

LEFT = {
    "BeamExperts": "gate of its own",
    "MuseSparkExperts": "norm behind each expert",
    "NemotronHExperts": "no gate",
}


def decorated():
    """One module of each class that the decorator made, with attributes as a small config would give them."""
    from transformers.integrations import moe

    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "@use_experts_implementation" in file.read_text(encoding="utf-8"):
            name = f"transformers.models.{file.parent.name}.{file.stem}"
            for kind in vars(importlib.import_module(name)).values():
                if isinstance(kind, type) and kind.__module__ == name and hasattr(kind, "_apply_gate"):
                    assert kind.forward.__globals__ is vars(moe)
                    yield kind


class Config:
    """Whatever is asked for, as a small number; SiLU, and no dropout."""

    hidden_act = hidden_activation = activation_function = "silu"
    mlp_hidden_act = "relu2"
    swiglu_alpha, swiglu_limit = 1.702, 7.0

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 2


@pytest.mark.medium
def test_all_of_transformers_experts():
    left = {}
    for kind in decorated():
        module = kind(Config())
        form = form_of(module)
        if isinstance(form, str):
            left[kind.__name__] = form
            continue
        h = 9 * torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module._apply_gate(h), apply_gate(h, form))
    assert left.keys() <= LEFT.keys()  # not every version has all of these
    assert all(LEFT[name] in why for name, why in left.items())


def test_a_formula_that_changed_is_seen(monkeypatch):
    module = moe_model("gpt_oss").model.layers[0].mlp.experts
    assert form_of(module) == ExpertsForm(True, True, Gate("gpt_oss", 1.702, 7.0))
    monkeypatch.setattr(known, "_tried", {})
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, h: h[:, ::2] * h[:, 1::2])
    assert form_of(module) == "GptOssExperts computes its gate otherwise than we know"
