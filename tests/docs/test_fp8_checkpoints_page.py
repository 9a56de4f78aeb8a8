"""The page on fp8 checkpoints: its snippet runs."""

import re
import sys

import pytest
import torch
from checkout import ROOT

from lora_fast import DoRALinear
from lora_fast.bases import ScaledFp8Weight

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
PAGE = (ROOT / "docs" / "fp8_checkpoints.md").read_text(encoding="utf-8")


def test_its_snippet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests" / "files")])
    from test_fp8_checkpoint import config_of, write

    config = config_of("qwen3")
    config.architectures = ["Qwen3ForCausalLM"]
    write(tmp_path / "checkpoint", config, "blocks")
    names: dict = {}
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(snippet, names)
    layer = names["model"].model.layers[0].self_attn.q_proj
    assert type(layer) is DoRALinear and type(layer.weight) is ScaledFp8Weight and layer.weight.dtype == torch.bfloat16
    assert torch.isfinite(names["model"](input_ids=torch.arange(8)[None]).logits).all()
