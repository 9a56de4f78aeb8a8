"""merge_lora and merge_peft over fp8 bases: into the weights of the checkpoint that the bases were made from."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from lora_fast import LoRAConfig, add_lora, merge_lora, merge_peft, patch_peft, remove_lora, save_adapter, unmerge_lora
from lora_fast.files.checkpoint import INDEX
from lora_fast.fp8 import Fp8Weight
from lora_fast.layers.lora import LoRALinear
from lora_fast.reference import dora_gain

BF16 = torch.bfloat16
BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain(dtype=BF16):
    return nn.ModuleDict(
        {
            "up": nn.Linear(24, 40, dtype=dtype),
            "rest": nn.Sequential(nn.Linear(40, 24, dtype=dtype)),
            "head": nn.Linear(24, 8, dtype=dtype),
        }
    )


def stirred(model):
    """Adapters that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.rand_like(parameter) * 0.1)
    return model


def adapted(base, **options):
    config = LoRAConfig(r=4, target_modules="all-linear", base_dtype="float8_e4m3", base_dtype_exclude=["head"])
    return stirred(add_lora(copy.deepcopy(base), LoRAConfig(**{**vars(config), **options})))


def write(base, folder, sharded=False):
    folder.mkdir(exist_ok=True)
    tensors = base.state_dict()
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(where.values()):
        save_file({key: t for key, t in tensors.items() if where[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def inner(weight):
    return {name: getattr(weight, name).float().clone() for name in Fp8Weight.INNER}


@pytest.mark.medium
@BOTH
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["file", "folder", "shards"])
def test_into_the_original(where, dtype, dora, tmp_path):
    """The sum with the unrounded weight, rounded once, as the command writes it; unmerged the same fp8 base."""
    pytest.importorskip("rich")
    from lora_fast.cli import main

    base = plain(dtype)
    model = adapted(base, use_dora=dora)
    folder = write(base, tmp_path / "base", where == "shards")
    held, before = model["up"].weight, inner(model["up"].weight)
    path = folder / "model.safetensors" if where == "file" else str(folder)
    assert merge_lora(model, safe_merge=True, original=path) is model
    for name in ("up", "rest.0", "head"):
        layer, w = model.get_submodule(name), base.get_submodule(name).weight.detach().float()
        v = w + layer.delta_weight()
        if dora:
            v = v * dora_gain(layer.lora_magnitude_vector.detach(), v.norm(dim=1))[:, None]
        assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, v.to(dtype))
    assert not torch.equal(model["up"].weight, model["up"].merged_weight().to(dtype))  # what merge_lora gives without
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    written = {k: t for path in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(path).items()}
    merged = remove_lora(copy.deepcopy(model)).state_dict()
    assert merged.keys() == written.keys() and all(torch.equal(merged[key], written[key]) for key in written)
    unmerge_lora(model)
    assert model["up"].weight is held
    assert all(torch.equal(t, before[name]) for name, t in inner(held).items())


BREAKS = {
    "absent": (lambda t: t.pop("rest.0.weight"), ValueError, "has no 'rest.0.weight'.* of the layer 'rest.0'"),
    "shape": (
        lambda t: t.update({"rest.0.weight": torch.zeros(24, 41, dtype=BF16)}),
        ValueError,
        r"got shape \(24, 41\), expected the base's, \(24, 40\).*'rest.0'.*model.safetensors",
    ),
    "dtype": (
        lambda t: t.update({"rest.0.weight": t["rest.0.weight"].float()}),
        TypeError,
        "got torch.float32, expected the base's, torch.bfloat16.*'rest.0'",
    ),
    "other": (
        lambda t: t.update({"rest.0.weight": t["rest.0.weight"].roll(1, 0)}),
        ValueError,
        "another weight.*'rest.0'",
    ),
    "scale": (lambda t: t.update({"rest.0.weight": t["rest.0.weight"] * 2}), ValueError, "another weight.*'rest.0'"),
    "NaN": (lambda t: t["rest.0.weight"].fill_(float("nan")), ValueError, "another weight.*'rest.0'"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case, tmp_path, monkeypatch):
    base = plain()
    model, tensors = adapted(base), dict(base.state_dict())
    change, error, words = BREAKS[case]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    held = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    monkeypatch.setattr(LoRALinear, "merge", lambda *_: pytest.fail("merged before all were looked at"))
    with pytest.raises(error, match=f"(?s)^original: .*{words}"):
        merge_lora(model, original=tmp_path / "model.safetensors")
    assert all(model.get_submodule(name).weight is weight for name, weight in held.items())


def test_what_cannot_be_merged(tmp_path):
    base = plain()
    model, folder = adapted(base), write(base, tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        merge_lora(model, original=tmp_path / "absent")
    model["up"].merge()
    with pytest.raises(ValueError, match="original: up: merged already"):
        merge_lora(model, original=folder)
    assert not model["rest"][0].merged
    with pytest.raises(ValueError, match="expected None for a model without fp8 or nf4 or mxfp4 bases"):
        merge_lora(adapted(base, base_dtype=None, base_dtype_exclude=None), original=folder)
    with pytest.raises(ValueError, match=r"a base that is not fp8 or nf4 or mxfp4 \(torch.bfloat16\)"):
        model["head"].merge(original=base["head"].weight)
    with pytest.raises(TypeError, match="original: got str, expected a tensor"):
        model["rest"][0].merge(original="base")


def test_a_merge_that_fails_is_taken_back(tmp_path):
    base = plain()
    model, folder = adapted(base), write(base, tmp_path / "base")
    with torch.no_grad():
        model["head"].lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match="(?s)safe_merge.*'head'"):
        merge_lora(model, safe_merge=True, original=folder)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoRALinear))
    assert isinstance(model["up"].weight, Fp8Weight)


def test_names_within_wrappers(tmp_path):
    base = plain()
    folder = write(base, tmp_path / "base")
    model = adapted(base)
    assert merge_lora(torch.compile(model), original=folder) is not model and model["up"].merged
    layer = LoRALinear.from_linear(copy.deepcopy(base["up"]), r=2, base_dtype="float8_e4m3")
    merge_lora(layer, original=write(base["up"], tmp_path / "one"))
    assert torch.equal(layer.weight, base["up"].weight)  # lora_B is zero


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layers = plain(dtype)

    def forward(self, x):
        for name in ("up", "rest", "head"):
            x = self.layers[name](x)
        return x


def peft_model(base, **options):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "0", "head"], **options)
    model = stirred(peft.get_peft_model(copy.deepcopy(base), settings))
    patch_peft(model, base_dtype="float8_e4m3", base_dtype_exclude=["head"])
    return model


@BOTH
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_peft(dtype, safe, dora, tmp_path):
    base = Net(dtype)
    model, folder = peft_model(base, use_dora=dora), write(base, tmp_path / "base")
    layer = model.base_model.model.layers["up"]
    before = inner(layer.base_layer.weight)
    assert merge_peft(model, folder, safe_merge=safe) is model
    weight = copy.deepcopy(layer.base_layer.weight)
    delta = layer.get_delta_weight("default").detach()
    v = base.layers["up"].weight.detach().float() + delta
    if dora:
        v = v * (layer.lora_magnitude_vector["default"].weight.detach() / v.norm(dim=1))[:, None]
        torch.testing.assert_close(weight, v.to(dtype))
    else:
        assert torch.equal(weight, v.to(dtype))
    assert type(weight) is nn.Parameter and model.base_model.model.layers["head"].merged
    model.unmerge_adapter()
    assert isinstance(layer.base_layer.weight, Fp8Weight)
    assert all(torch.equal(t, before[name]) for name, t in inner(layer.base_layer.weight).items())
    merge_peft(model, folder)
    assert torch.equal(model.merge_and_unload().layers["up"].weight, weight)


def test_peft_refuses(tmp_path):
    base = Net(torch.float16)
    model, folder = peft_model(base), write(base, tmp_path / "base")
    layers = model.base_model.model.layers
    with torch.no_grad():
        layers["rest"][0].lora_B["default"].weight.fill_(1e5)  # finite in float32 alone
        layers["rest"][0].lora_A["default"].weight.fill_(1)
    with pytest.raises(ValueError, match=r"(?s)safe_merge: .*float16.*rest\.0"):
        merge_peft(model, folder, safe_merge=True)
    assert not layers["up"].merged and isinstance(layers["rest"][0].base_layer.weight, Fp8Weight)
    with pytest.raises(ValueError, match="expected None for a base that is not fp8"):
        layers["head"].merge(original=base.layers["head"].weight)
    model.merge_adapter()
    with pytest.raises(ValueError, match="expected None for a merged layer"):
        layers["up"].merge(original=base.layers["up"].weight)
    with pytest.raises(ValueError, match="original: .*up.* merged already"):
        merge_peft(model, folder)
    model.unmerge_adapter()
    save_file({"layers.up.weight": base.layers["up"].weight.data}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no 'layers\.rest\.0\.weight'"):
        merge_peft(model, folder)
    assert not layers["up"].merged
