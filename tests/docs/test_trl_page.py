"""docs/trl.md: its snippet trains."""

import re

import pytest
import torch
from checkout import ROOT

for package in ("peft", "transformers", "trl"):
    pytest.importorskip(package)


@pytest.mark.medium
@pytest.mark.usefixtures("as_scripts")
def test_its_snippet(capsys):
    from datasets import Dataset
    from loops import tiny_llama
    from transformers import ByT5Tokenizer

    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    data = Dataset.from_list([{"text": "W x + B A x"}] * 16)
    names = {"model": tiny_llama(vocab=259).unload(), "data": data, "tokenizer": ByT5Tokenizer(extra_ids=0)}
    if torch.cuda.is_available():
        snippet = snippet.replace("use_cpu=True", "use_cpu=False")
    exec(snippet, names)
    assert names["trainer"].state.global_step == 2 and "7 " in capsys.readouterr().out
