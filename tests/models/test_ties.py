"""modules_to_save of tied modules: PEFT's files here and ours there give PEFT's result."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file
from tied import Tied, bert, llama, outputs, perturbed, t5

from lora_fast import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    remove_lora,
    save_adapter,
)
from lora_fast.cli import doctor
from lora_fast.files.format import CONFIG, PREFIX, TENSORS
from lora_fast.models.adapters import adapter_tensors

CASES = {
    "embed": (llama, ["q_proj"], ["embed_tokens"]),
    "head": (llama, ["q_proj"], ["lm_head"]),
    "both": (llama, ["q_proj"], ["embed_tokens", "lm_head"]),
    "full names": (llama, ["q_proj"], ["model.embed_tokens", "lm_head"]),
    "a layer": (Tied, ["fc"], ["gate"]),
    "its partner": (Tied, ["fc"], ["twin"]),
    "a shared module": (Tied, ["fc"], ["left"]),
    "from the other side": (Tied, ["fc"], ["right"]),
    "all": (Tied, ["fc"], ["left", "right", "gate", "twin", "lm_head"]),
    "a name that ends in it": (llama, ["q_proj"], ["norm"]),
    "decoder": (bert, ["query"], ["decoder"]),
    "cls": (bert, ["query"], ["cls"]),
    "shared": (t5, ["q"], ["shared"]),
    "T5's head": (t5, ["q"], ["lm_head"]),
}


def case_of(name):
    peft = pytest.importorskip("peft")
    if {"left", "right"} & set(CASES[name][2]) and peft.__version__.startswith("0.1"):
        pytest.skip("this PEFT knows a module by its first name only")
    return CASES[name]


@pytest.mark.medium
@pytest.mark.parametrize("ensure", [False, True], ids=["", "ensure_weight_tying"])
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_peft(case, ensure, tmp_path, recwarn, capsys):
    peft = pytest.importorskip("peft")
    build, targets, saved = case_of(case)
    if ensure and (build is not llama or "ensure_weight_tying" not in peft.LoraConfig.__dataclass_fields__):
        pytest.skip("no such option, or not for this model")
    options = {"ensure_weight_tying": True} if ensure else {}
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, use_dora=case == "head", **options)
    model = peft.get_peft_model(build(), config)
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path)
    base = build()
    before = base.state_dict(keep_vars=True)
    right = outputs(peft.PeftModel.from_pretrained(build(), tmp_path))
    ours = load_adapter(base, tmp_path)
    torch.testing.assert_close(outputs(ours), right, rtol=1e-5, atol=1e-5)
    assert (right - outputs(build())).abs().max() > 0.01
    told = [str(w.message) for w in recwarn if "load_adapter" in str(w.message)]
    assert len(told) == (not ensure and saved != ["norm"]) and all("is tied to" in text for text in told)
    # It goes on as any other: saved again, read by PEFT and by us, the base untouched where PEFT has it so.
    save_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(build(), tmp_path / "again")), right)
    torch.testing.assert_close(outputs(load_adapter(build(), tmp_path / "again")), right)
    load_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(outputs(ours), right)
    torch.testing.assert_close(outputs(remove_lora(ours)).shape, right.shape)
    assert before.keys() == base.state_dict().keys()
    assert doctor.adapter(tmp_path) and "load_adapter takes it" in capsys.readouterr().out


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES)
def test_ours_train_together_and_say_so(case, tmp_path):
    """add_lora trains in place, so both users of a tensor; PEFT and we read that back."""
    (build, targets, saved), dora = case_of(case), case in ("both", "a layer", "T5's head")
    model = add_lora(build(), LoRAConfig(r=2, target_modules=targets, modules_to_save=saved, use_dora=dora))
    perturbed(model, adapter_tensors(model).values())
    right = outputs(model)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_adapter(build(), tmp_path)
    torch.testing.assert_close(outputs(again), right)
    other = add_lora(build(), LoRAConfig(r=2, target_modules=targets, modules_to_save=saved, use_dora=dora))
    torch.testing.assert_close(outputs(load_adapter(other, tmp_path)), right)
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(build(), tmp_path)), right, rtol=1e-5, atol=1e-5)


def on_cpu(model, folder):
    return pytest.importorskip("accelerate").cpu_offload(model, "cpu", offload_buffers=True)


def apart(model, folder):
    """As from a GPU: a copy for each name."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return pytest.importorskip("accelerate").cpu_offload(model, "cpu", state_dict=kept)


def on_disk(model, folder):
    return pytest.importorskip("accelerate").disk_offload(model, folder / "disk", torch.device("cpu"))


@pytest.mark.medium
@pytest.mark.parametrize(
    "case, offload",
    [(case, offload) for i, case in enumerate(CASES) for offload in (on_cpu, (apart, on_disk)[i % 2])],
)
def test_offloaded_models_keep_their_ties(case, offload, tmp_path):
    """What is saved is what is saved before; what is loaded is PEFT's or refused."""
    build, targets, saved = CASES[case]
    config = LoRAConfig(r=2, lora_alpha=8, target_modules=targets, modules_to_save=saved)
    model = add_lora(build(), config)
    perturbed(model, adapter_tensors(model).values())
    save_adapter(model, tmp_path)
    right, names = outputs(model), list(lora_state_dict(model))
    offload(model, tmp_path)
    for _ in range(2):
        save_adapter(model, tmp_path / "again")
        file, again = load_file(tmp_path / TENSORS), load_file(tmp_path / "again" / TENSORS)
        assert file.keys() == again.keys() and all(torch.equal(again[name], file[name]) for name in file)
        assert (tmp_path / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()
        torch.testing.assert_close(outputs(model), right)  # after which the tensors without data are others
    if offload is not on_cpu:
        return
    assert list(lora_state_dict(model)) == names
    other = offload(add_lora(build(), config), tmp_path)
    torch.testing.assert_close(outputs(load_adapter(other, tmp_path)), right)
    load_lora_state_dict(other, lora_state_dict(model))
    if saved == ["norm"] or {"left", "right"} & set(saved):
        return  # no tie; a module that PEFT cannot have twice
    by_peft(build, tmp_path / "theirs", target_modules=targets, modules_to_save=saved)
    with pytest.raises(ValueError, match="tied to"):
        load_adapter(other, tmp_path / "theirs")
    torch.testing.assert_close(outputs(other), right)


@pytest.mark.parametrize("offload", [on_cpu, apart, on_disk])
def test_offloaded_models_get_no_new_ties(offload, tmp_path):
    """Norms and zero biases are alike at first; two biases that are one are saved once."""
    model = add_lora(bert(), LoRAConfig(target_modules=["query"], modules_to_save=["transform.LayerNorm"], bias="all"))
    save_adapter(model, tmp_path)
    save_adapter(offload(model, tmp_path), tmp_path / "again")
    assert (tmp_path / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()
    files = load_file(tmp_path / TENSORS).keys(), load_file(tmp_path / "again" / TENSORS).keys()
    assert files[0] == files[1] or offload is not on_cpu


def test_a_tie_to_an_adapter_is_refused_when_it_would_be_lost(tmp_path):
    model = Tied()
    model.fc.bias = model.lm_head.bias = nn.Parameter(torch.zeros(11)[:6])
    model.norm = nn.LayerNorm(6)
    model.norm.bias = model.fc.bias
    add_lora(model, LoRAConfig(target_modules=["fc"], modules_to_save=["norm"]))
    with pytest.raises(ValueError, match="norm has a tensor that is tied to one of fc, which has an adapter"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir()) and "norm.bias" in lora_state_dict(model)


def by_peft(build, folder, **options):
    """PEFT's adapter for such a model, saved."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, **options))
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder, save_embedding_layers=False)
    return peft.PeftModel.from_pretrained(build(), folder)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
        (llama, {"target_modules": ["q_proj", "lm_head"]}),
        (Tied, {"target_modules": ["fc", "gate"], "modules_to_save": ["twin"]}),
        (Tied, {"target_modules": ["fc"], "bias": "all"}),
        (Tied, {"target_modules": ["fc", "twin"], "bias": "lora_only"}),
    ],
    ids=lambda value: "" if callable(value) else "-".join(value["target_modules"]) + str(value.get("bias", "")),
)
def test_adapters_of_what_is_tied(build, options, tmp_path):
    right = outputs(by_peft(build, tmp_path, **options))
    torch.testing.assert_close(outputs(load_adapter(build(), tmp_path)), right, rtol=1e-5, atol=1e-5)


def test_a_converted_model_keeps_its_ties(tmp_path):
    by_peft(Tied, tmp_path, target_modules=["fc"], modules_to_save=["lm_head"])
    model = add_lora(Tied(), LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["lm_head"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to embed.weight in the model, but not in the"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("saved", ["left", "twin"])
def test_a_load_that_fails_leaves_the_ties(saved, tmp_path):
    by_peft(Tied, tmp_path, target_modules=["fc"], modules_to_save=[saved])
    tensors = load_file(tmp_path / TENSORS)
    del tensors[next(name for name in tensors if name.startswith(f"{PREFIX}{saved}.") and name.endswith("bias"))]
    save_file(tensors, tmp_path / TENSORS)
    model = Tied()
    before = {name: id(t) for name, t in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match="missing"):
        load_adapter(model, tmp_path)
    assert before == {name: id(t) for name, t in model.named_parameters(remove_duplicate=False)}
    assert model.right[0] is model.left[0] and all(p.requires_grad for p in model.parameters())


def test_a_layer_in_several_places_has_no_file(tmp_path):
    ours = add_lora(Tied(), LoRAConfig(r=2, target_modules=["left.0"]))
    with pytest.raises(ValueError, match=r"left.0: one layer in several places, of which PEFT adapts the first"):
        save_adapter(ours, tmp_path)
    assert not list(tmp_path.iterdir())
    by_peft(Tied, tmp_path, target_modules=["left.0"])
    model = Tied()
    for each in (model, ours):
        with pytest.raises(ValueError, match=r"left.0: one layer in several places"):
            load_adapter(each, tmp_path)
    assert model.right[0] is model.left[0] and type(model.left[0]) is nn.Linear
