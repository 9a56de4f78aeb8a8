"""What a merge keeps, and what may happen to a layer before it is put back: files of PEFT's, assignments, modes."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_merged_state import KIND, made, merge, mesh, unmerge, weights  # noqa: F401
from test_patch_peft import stir
from tied import IDS, llama

from lora_fast import patch_peft

peft = pytest.importorskip("peft")

BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@BOTH
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_pefts_file_of_a_merged_model_with_an_adapted_head(fp8, dora, tmp_path):
    """PEFT takes the head's base weight along, which is not to be the merged one."""
    base = llama(tie_word_embeddings=False).eval()
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], use_dora=dora)
    model = stir(peft.get_peft_model(copy.deepcopy(base), config))
    patch_peft(model, base_dtype="float8_e4m3" if fp8 else None)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "merged"))
    assert any(name.endswith("lm_head.base_layer.weight") for name in before)
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
    live = model.state_dict()["base_model.model.lm_head.base_layer.weight"]
    assert torch.equal(live, model.base_model.model.lm_head.base_layer.weight)
    model.unmerge_adapter()
    if not fp8:  # stock's base would be another
        found = peft.PeftModel.from_pretrained(base, tmp_path / "merged").eval()
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits)
