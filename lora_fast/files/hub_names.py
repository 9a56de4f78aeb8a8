"""Names of a model's tensors on disk and in memory, which transformers 5 translates as it loads and saves a model.

Of some classes (Qwen2-VL's, ViT's) modules are called otherwise than in their checkpoints and in transformers 4.
Adapters bear the names in memory of the version that trained them. The maps are transformers' own, as PEFT uses them.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fast.wrappers.names import plain_name, unwrapped


def in_memory(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name on disk: name in the model} of the tensors that transformers loads unchanged under another name; empty for
    a model that is none of transformers 5's. Tensors that it fuses, splits or reorders are not among them."""
    names = sorted(names)
    model = unwrapped(model)
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if not names or base is None or not isinstance(model, base):
        return {}
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # transformers 4
        return {}
    found = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in found if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in found if isinstance(each, core_model_loading.WeightConverter)]
    own: dict[str, Any] = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    result = {}
    for name in names:
        new, fused = core_model_loading.rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if not fused and new != name and new in own:
            result[name] = new
    return result


def in_memory_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """:func:`in_memory` for the checkpoint in ``folder`` and the class that its config.json names; empty if that, or
    transformers 5, is not there, or the class is not transformers' own."""
    try:
        import transformers
    except ImportError:
        return {}
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
    except Exception:  # whatever is wrong: it only means that nothing is known about the names
        return {}
    return in_memory(model, names)
