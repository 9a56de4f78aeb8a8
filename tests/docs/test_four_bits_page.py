"""The page on 4-bit bases: its snippets run, one after the other; what it names is there."""

import re

import smollm2_quality
import torch
from checkout import ROOT
from torch import nn

from lora_fast import DoRALinear
from lora_fast.bases import COMPUTE, PACKED
from lora_fast.bases.four_bit_files import NAMES
from lora_fast.bases.four_bits import Nf4Weight

PAGE = (ROOT / "docs" / "four_bits.md").read_text(encoding="utf-8")


def test_its_snippets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, large, files = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(first, names)
    assert repr(names["model"]).count("base_dtype='nf4'") == 1
    assert names["model"][0].lora_B.grad is not None
    exec(large, names)
    model, x = names["model"], torch.randn(3, 64, dtype=torch.bfloat16)
    for name, linear in names["linears"].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, DoRALinear) and isinstance(layer.weight, Nf4Weight)
        same = Nf4Weight.quantise(linear.weight.to(torch.bfloat16))
        assert torch.equal(layer.weight.dequantise(), same.dequantise())
        y = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), y, rtol=2**-6, atol=2**-6)
        x = y
    exec(files, names)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(names["other"](x), model(x))
    assert all(t.dtype in (torch.uint8, torch.float32, torch.bfloat16) for t in names["base"].values())


def test_its_perplexities():
    _, results = smollm2_quality.read([ROOT / "benchmarks" / "results" / "smollm2_quality_h200.csv"])
    assert smollm2_quality.table(results) in PAGE and len(results) == 41


def test_what_it_names():
    table = re.findall(r'^\| `"(\w+)"` \| `"?(\w+)"?` \| ([\d.]+) ', PAGE, re.MULTILINE)
    kinds = [base for base in PACKED if base != "float8_e4m3"]
    assert [row[:2] for row in table] == [(base, str(compute)) for base in kinds for compute in COMPUTE]
    n, k = 1024, 2048
    for base, compute, bits in table:
        packed = PACKED[base].for_compute(None if compute == "None" else compute).quantise(torch.randn(n, k))
        held = sum(getattr(packed, name).nbytes for name in ("packed", "absmax", "absmax2") if hasattr(packed, name))
        assert f"{8 * held / (n * k):.2f}" == bits
    assert all(f"`weight{key}`" in PAGE for key in NAMES if "fp4" not in key)
