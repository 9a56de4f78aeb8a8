"""Keys of rank_pattern and alpha_pattern: ours mean one layer to PEFT, and PEFT's mean the same to us."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("safetensors")
from lora_fast import LoRAConfig, LoRALinear, add_lora, load_adapter, save_adapter
from lora_fast.files.format import CONFIG, TENSORS
from lora_fast.files.pattern_keys import Pattern, is_name, pattern_of


def model_of(names):
    """Layers under these names, one after the other."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        owner = root
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())
        owner.add_module(last, nn.Linear(4, 4))

    def forward(x):
        for name in names:
            x = torch.tanh(root.get_submodule(name)(x))
        return x

    root.forward = forward
    return root


def adapted(names, **patterns):
    torch.manual_seed(0)
    model = add_lora(model_of(names), LoRAConfig(target_modules="|".join(map(re.escape, names)), **patterns))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    return model


def bare(names, model):
    """The same layers without adapters."""
    plain = model_of(names)
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


NAMES = {
    "a dot and a letter": ["attn_q", "attn.q", "attnxq", "block.attn.q", "block.attn_q"],
    "the ends of others": ["0", "1.0", "2.1.0", "1.00"],
    "signs": ["m.a+b", "m.aab", "m.ab", "m.a(b", "m.[ab]", "m.a|b", "m.a$", "m.a^b", "m.a b", "m.a\\d", "m.a1"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
def test_each_layer_keeps_its_own(names, backwards, tmp_path):
    """Ranks and alphas in a file of ours, read by PEFT and by ourselves."""
    peft = pytest.importorskip("peft")
    names = names[::-1] if backwards else names
    model = adapted(names)
    for i, name in enumerate(names):
        layer = model.get_submodule(name)
        layer.lora_alpha = i + 1
        if i % 2:
            layer.r, layer.lora_A, layer.lora_B = 3, nn.Parameter(layer.lora_A[:3]), nn.Parameter(layer.lora_B[:, :3])
    save_adapter(model, tmp_path)
    x = torch.randn(5, 4)
    again = load_adapter(bare(names, model), tmp_path)
    assert {name: again.get_submodule(name).scaling for name in names} == {
        name: model.get_submodule(name).scaling for name in names
    }
    theirs = peft.PeftModel.from_pretrained(bare(names, model), tmp_path).base_model.model
    for name in names:
        assert theirs.get_submodule(name).scaling["default"] == model.get_submodule(name).scaling, name
        torch.testing.assert_close(theirs.get_submodule(name)(x), model.get_submodule(name)(x))


def rule_today(keys, layer):
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", layer)), layer)


def rule_of_peft_0_13(keys, layer):
    return next((key for key in keys if re.match(rf".*\.{key}$", layer)), layer)


part = st.text("ab+_", min_size=1, max_size=3)
layers = st.lists(st.lists(part, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True)


@pytest.mark.versions
@pytest.mark.medium
@settings(max_examples=300, deadline=None)
@given(layers, st.data())
def test_patterns_by_either_rule_of_pefts(names, data):
    """Of layers by themselves ("+" and no dot) the older PEFT knows the plain names alone."""
    values = {name: data.draw(st.integers(1, 3)) for name in names}
    pattern = pattern_of(values, 1)
    read = Pattern(pattern)
    for name, value in values.items():
        assert pattern.get(rule_today(pattern, name), 1) == value
        assert next((pattern[key] for key in read.keys_of(name)), 1) == value
        if "." in name or "+" not in name:
            assert pattern.get(rule_of_peft_0_13(pattern, name), 1) == value


def test_usual_names_stay_as_they_are():
    values = {f"model.layers.{i}.self_attn.{name}_proj": i for i in range(12) for name in "qv"}
    assert pattern_of(values, 0) == {name: value for name, value in values.items() if value}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4), st.lists(part, min_size=1, max_size=3))
def test_reads_as_peft_does(keys, layer):
    keys, layer = [key for key in keys if is_name(key)], ".".join(layer)
    assert Pattern(dict.fromkeys(keys, 1)).keys_of(layer) == [
        key for key in dict.fromkeys(keys) if re.match(rf"(.*\.)?({key})$", layer)
    ]


@pytest.mark.parametrize("key", [r"attn\.q", r"^attn\.q", r"attn\.q$", r"(?<=^attn\.)q", "attn.q", r"m\.a\+b", "q"])
def test_names_from_peft_mean_the_same(key, tmp_path):
    peft = pytest.importorskip("peft")
    if not hasattr(peft.utils.other, "get_pattern_key"):
        pytest.skip("until 0.14 PEFT took these keys in another way")
    names = ["attn_q", "attn.q", "m.a+b", "m.attn.q"]
    model = adapted(names)
    config = peft.LoraConfig(target_modules="|".join(map(re.escape, names)), alpha_pattern={key: 30})
    theirs = peft.get_peft_model(bare(names, model), config)
    theirs.save_pretrained(tmp_path)
    found = load_adapter(bare(names, model), tmp_path)
    for name in names:
        wanted = theirs.base_model.model.get_submodule(name).scaling["default"]
        assert found.get_submodule(name).scaling == wanted, name


def test_a_name_that_an_earlier_key_takes(tmp_path):
    """PEFT gives attn_q the value of "attn.q", an older file of ours meant its own: neither is guessed at."""
    names = ["attn_q", "attn.q"]
    model = adapted(names)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    write_config(tmp_path, {**config, "alpha_pattern": {"attn.q": 5, "attn_q": 30}})
    with pytest.raises(ValueError, match=r"'attn\.q' comes before 'attn_q' .* write it as 'attn\\\\.q'"):
        load_adapter(bare(names, model), tmp_path)
    write_config(tmp_path, {**config, "alpha_pattern": {r"attn\.q": 5, "attn_q": 30}})
    found = load_adapter(bare(names, model), tmp_path)
    assert [found.get_submodule(name).lora_alpha for name in names] == [30, 5]


def write_config(folder, config):
    """Another config, without our copy of it in the tensors' file."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))


PATTERNS = [r".*attn.*", "attn_[qk]", "q|k", r"\d+\.q", "a{2}", "q?", "(q)", "(?=q)q", r"\bq", "a..b"]


@pytest.mark.parametrize("key", PATTERNS)
def test_patterns_are_refused_with_a_way_out(key, tmp_path):
    peft = pytest.importorskip("peft")
    names = ["attn_q", "attn.q"]
    model = adapted(names)
    config = peft.LoraConfig(target_modules="attn.q", alpha_pattern={key: 30, "attn_q": 5})
    theirs = peft.get_peft_model(bare(names, model), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"alpha_pattern: the key .* regexes are refused \(load .* re\.escape"):
        load_adapter(bare(names, model), tmp_path)
    alphas = {re.escape(name): theirs.base_model.model.get_submodule(name).lora_alpha["default"] for name in names}
    theirs.peft_config["default"].alpha_pattern = alphas
    theirs.save_pretrained(tmp_path)
    found = load_adapter(copy.deepcopy(bare(names, model)), tmp_path)
    for name in names:
        wanted = theirs.base_model.model.get_submodule(name).scaling["default"]
        assert found.get_submodule(name).scaling == wanted
