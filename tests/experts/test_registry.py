"""register_experts, and which of transformers' experts it knows."""

import subprocess
import sys

import pytest
import torch
from checkout import ROOT
from expert_nets import ids, loss_and_gradients, moe_model, transformers
from peft_nets import same

from lora_fast import SlowPathWarning, dispatch, register_experts, set_backend

from_moe = pytest.importorskip("transformers.integrations.moe")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    set_backend("reference")
    yield
    from_moe.ExpertsInterface._global_mapping.pop("lora_fast", None)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_numbers_are_stocks(kind):
    register_experts()
    model = moe_model(kind)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "router" in name or "mlp.gate" in name)
    expected = loss_and_gradients(model)
    model.set_experts_implementation("lora_fast")
    ours = loss_and_gradients(model)
    same(ours, expected, 1e-6)
    assert len(ours) > 4


def test_from_pretrained(tmp_path):
    model = moe_model()
    model.save_pretrained(tmp_path)
    register_experts()
    kind = type(model)
    ours = kind.from_pretrained(tmp_path, experts_implementation="lora_fast").requires_grad_(False)
    assert ours.config._experts_implementation == "lora_fast"
    torch.testing.assert_close(ours(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_know_runs_grouped_mm_and_says_so_once():
    register_experts()
    model = moe_model(hidden_act="gelu")
    expected = loss_and_gradients(model)
    model.set_experts_implementation("lora_fast")
    with pytest.warns(SlowPathWarning, match="leaves experts to transformers' grouped_mm: .*GELU") as caught:
        ours = loss_and_gradients(model)
    same(ours, expected, 0)
    assert len(caught) == 1


def test_experts_that_train_run_grouped_mm():
    register_experts()
    model = moe_model()
    expected = loss_and_gradients(model)
    model.set_experts_implementation("lora_fast")
    with pytest.warns(SlowPathWarning, match="gate_up_proj requires grad"):
        same(loss_and_gradients(model), expected, 0)


def test_a_transformers_with_a_list_of_its_own_is_refused(monkeypatch):
    def refuse(self, requested):
        raise ValueError(requested)

    monkeypatch.setattr(transformers.PreTrainedModel, "get_correct_experts_implementation", refuse)
    with pytest.raises(RuntimeError, match=r"transformers .* has a fixed list of experts implementations"):
        register_experts()
    assert "lora_fast" not in from_moe.ExpertsInterface._global_mapping


@pytest.mark.medium
def test_without_a_model_nothing_is_imported():
    code = "import sys, lora_fast; assert 'transformers' not in sys.modules; lora_fast.register_experts"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
