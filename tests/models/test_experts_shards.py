"""Experts of which each process keeps a part: FSDP2 gathers them by blocks; expert parallelism is left to others."""

import json

import pytest
import torch
from devices import CUDA
from expert_nets import BOTH, ids, moe_model
from pairs import two_processes
from peft_nets import peft
from torch.distributed.tensor import Shard

from lora_fast import LoRAConfig, SlowPathWarning, add_lora, patch_peft, peft_report, register_experts


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, backend", [pytest.param("cpu", "reference"), pytest.param("cuda", "auto", marks=CUDA.marks)]
)
def test_fsdp2_on_two_processes(device, backend, tmp_path):
    """Losses, adapters, whole state dicts and files are one process's, of ours and of a patched PEFT model."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    two_processes("experts_distributed.py", tmp_path, backend, device)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(seen) == 8 and not any(seen.values()), {mode: wrong for mode, wrong in seen.items() if wrong}


def marked(experts, mesh):
    """As transformers shards experts by their number: its own class does it, and its forward has the process's part."""
    parallel = pytest.importorskip("transformers.distributed.expert_parallel")

    class Style(parallel.MoEParamShard):
        def should_use_local_tensors(self, module):
            return True

    style = Style(Shard(0), shards_expert_dim=True)
    for parameter in ("gate_up_proj", "down_proj"):
        style.shard_param(experts, parameter, mesh)
    assert experts._is_expert_parallel
    return style.install_forward(experts, mesh)


def test_expert_parallelism_is_left_to_transformers(mesh):
    """Marked by transformers itself: frozen experts run through its function, adapters are refused; both say why."""
    model, before = moe_model(), moe_model()(ids()).logits
    register_experts()
    model.set_experts_implementation("lora_fast")
    for layer in model.model.layers:
        marked(layer.mlp.experts, mesh)
    said = "leaves experts to transformers' grouped_mm: expert parallelism: the module says so"
    with pytest.warns(SlowPathWarning, match=said):
        found = model(ids()).logits
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)
    refusal = "experts.down_proj: .*(expert parallelism: the module says so|forward was replaced)"
    with pytest.raises(ValueError, match=refusal):
        add_lora(model, LoRAConfig(target_parameters=BOTH))


def test_expert_parallelism_is_left_to_peft(mesh):
    """Marked before the adapters came, and after."""
    model = moe_model()
    marked(model.model.layers[0].mlp.experts, mesh)
    stock = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    report = patch_peft(stock)
    reasons = {layer.name.split("layers.")[1]: layer.reason for layer in report.layers}
    for parameter in BOTH:
        assert "forward" in reasons[f"0.{parameter}"] or "parallel" in reasons[f"0.{parameter}"], reasons
        assert "forward" not in reasons[f"1.{parameter}"]
    marked(stock.base_model.model.model.layers[1].mlp.experts.get_base_layer(), mesh)
    assert all("forward" in layer.reason or "parallel" in layer.reason for layer in peft_report(stock).layers)
