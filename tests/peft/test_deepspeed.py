"""DeepSpeed's ZeRO around patched PEFT models and own layers: the losses and gradients are stock PEFT's in an engine of
the same kind, and no kernel is given an empty weight."""

import json

import pytest
import torch
from checkout import two_processes
from torch import nn

from lora_fast import LoRAConfig, add_lora, dispatch, patch_peft, peft_report
from lora_fast.wrappers import zero3

for package in ("peft", "transformers"):
    pytest.importorskip(package)
from loops import LAYERS, tiny_llama, token_ids  # noqa: E402


def close(a, b, rtol=1e-4):
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=1e-5)


@pytest.mark.slow
@pytest.mark.interpreted
def test_zero(tmp_path):
    """ZeRO-2 as DDP; ZeRO-3 layer by layer."""
    pytest.importorskip("deepspeed")
    two_processes("zero_distributed.py", tmp_path)
    for rank in range(2):
        for mode, (expected, found) in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            own, three = "own" in mode, "ZeRO-3" in mode
            close(found["losses"], expected["losses"])
            assert found["losses"][-1] < found["losses"][0] - 0.1, mode
            for one, two in zip(found["grads"], expected["grads"], strict=True):
                assert one.keys() == two.keys() and len(one) >= 2 * LAYERS
                close(list(one.values()), list(two.values()))
            forwards = 6 if "checkpointing" in mode else 3
            assert found["left"] == [] and found["calls"] == forwards * LAYERS and found["launches"] > found["calls"]
            if own:
                *same, half, halved = found["files"]
                close(same, same[:1] * 3, 1e-5)
                close(half, halved, 1e-5)
                assert abs(half - same[0]) > 0.01
                continue
            assert expected["calls"] == 0 and (found["fused"], found["not_fused"]) == (LAYERS, 0), found["report"]
            assert (zero3.APART in found["report"]) == (zero3.GATHERED in found["report"]) == three
            assert bool(found["groups"]) != three
            if after := found.get("afterwards"):
                disabled = after["disabled"]
                assert after["disabled, merged"] == disabled and abs(disabled - after["plain"]) > 0.1
                close([loss for name, loss in after.items() if "disabled" not in name], [after["plain"]] * 6, 1e-5)


def partition(model):
    """What DeepSpeed leaves of a model that it has partitioned, as far as one can see it here."""
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_numel = i, p.numel()
        p.data = torch.empty(0)
    return model


def test_partitioned_before_there_is_an_engine(monkeypatch):
    """As transformers loads a model under a configuration of ZeRO-3."""
    monkeypatch.setattr(dispatch, "why_slow", lambda *_: None)
    model = partition(tiny_llama())
    report = patch_peft(model)
    assert report.fused == LAYERS and not report.blocks and not report.groups
    assert all(layer.remark == zero3.GATHERED for layer in report.layers) and zero3.APART in str(report)
    with pytest.raises(ValueError, match="base_dtype: .*q_proj: its weight is partitioned by DeepSpeed's ZeRO-3"):
        patch_peft(model, base_dtype="float8_e4m3")
    own = partition(tiny_llama().unload())
    with pytest.raises(ValueError, match="q_proj, which is partitioned by DeepSpeed's ZeRO-3: add or load"):
        add_lora(own, LoRAConfig(target_modules="all-linear"))
    layer = partition(add_lora(nn.Sequential(nn.Linear(3, 4)), LoRAConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match=r"weight: got shape \(0,\) \(DeepSpeed's ZeRO-3 has partitioned it\)"):
        layer(torch.randn(2, 3))


def test_an_empty_weight_is_left_to_stock():
    """Where an engine's hooks are in the modules and nobody gathers: then stock PEFT fails, not a kernel."""
    model = tiny_llama()
    patch_peft(model, blocks=False)
    partition(model)
    for i, module in enumerate(model.modules()):
        module.ds_id = i
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.warns(dispatch.SlowPathWarning, match="not gathered in this call"), pytest.raises(RuntimeError):
        layer(torch.randn(2, 16))


def test_hooks_of_others_are_honoured():
    """In a module that DeepSpeed's hooks are in."""
    model = tiny_llama()
    patch_peft(model)
    seen = []
    for i, module in enumerate(model.modules()):
        module.ds_id = i
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def deepspeeds(module, args):
        seen.append(module)

    deepspeeds.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layer.base_layer.register_forward_pre_hook(deepspeeds)
    assert "hooks" not in str(peft_report(model))
    model(input_ids=token_ids())
    assert not seen
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(module))
    assert "the base layer has hooks" in str(peft_report(model))
    model(input_ids=token_ids())
    assert seen == [layer.base_layer] * 2
