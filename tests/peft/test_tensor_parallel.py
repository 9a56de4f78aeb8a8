"""transformers' tensor parallelism (``tp_plan``) under PEFT's layers: left to stock PEFT, and named."""

import json

import pytest
from pairs import two_processes

from lora_fast.wrappers.gather import TENSOR_PARALLEL

for package in ("peft", "transformers", "accelerate", "triton"):
    pytest.importorskip(package)
from loops import LAYERS  # noqa: E402


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_plan(tmp_path):
    """The numbers are stock PEFT's, bit for bit; what could have run together comes apart."""
    two_processes("tensor_parallel.py", tmp_path)
    for rank in range(2):
        stock, ours = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ours["losses"] == stock["losses"] and ours["grads"] == stock["grads"], (stock, ours)
        assert len(ours["grads"]) == 2 * LAYERS and ours["losses"][1] < ours["losses"][0] and ours["calls"] == 0
        assert f"not fused: {TENSOR_PARALLEL}" in ours["report"] and f"0 fused, {LAYERS} not fused" in ours["report"]
        assert (
            ours["report"].count("no block") == ours["report"].count("no group") == 1 and "step" not in ours["report"]
        )
        assert any(TENSOR_PARALLEL in said for said in ours["warned"])
        assert "is sharded (by FSDP or tensor parallelism)" in ours["own layers"]
