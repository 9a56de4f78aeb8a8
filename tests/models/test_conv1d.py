"""GPT-2's Conv1D in own layers: the numbers of PEFT's over the same model, its files both ways, and everything back."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_fast import (
    DoRALinear,
    LoRAConfig,
    LoRALinear,
    add_bottleneck,
    add_lora,
    disable_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    set_backend,
    unmerge_lora,
    use_adapters,
)
from lora_fast.cli import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
NAMES = ["c_attn", "c_proj", "c_fc"]


def gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return transformers.GPT2LMHeadModel(config).eval()


def stir(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(1.1) if "magnitude" in name else p.normal_(std=0.1)
    return model


def adapted(kind="lora", **fields):
    fields = {"target_modules": NAMES, "r": 3, "lora_alpha": 6, **KINDS[kind], **fields}
    return stir(add_lora(gpt2(), LoRAConfig(**fields)))


def stock(kind="lora", **fields):
    fields = {"target_modules": NAMES, "r": 3, "lora_alpha": 6, "fan_in_fan_out": True, **KINDS[kind], **fields}
    return stir(peft.get_peft_model(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", **fields)))


IDS = torch.arange(12).view(2, 6)


def loss_and_gradients(model):
    out = model(input_ids=IDS, labels=IDS)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out.logits.detach(), torch.autograd.grad(out.loss, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_files_travel_both_ways_and_numbers_are_pefts(kind, tmp_path):
    ours = adapted(kind)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours", is_trainable=True)
    for mine, its in zip(loss_and_gradients(ours), loss_and_gradients(theirs), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)

    theirs = stock(kind)
    theirs.save_pretrained(tmp_path / "pefts")
    back = load_adapter(gpt2(), tmp_path / "pefts")
    assert {type(m) for m in back.modules() if isinstance(m, LoRALinear)} == {
        DoRALinear if kind == "dora" else LoRALinear
    }
    torch.testing.assert_close(back(IDS).logits, theirs.eval()(IDS).logits)
    load_adapter(ours, tmp_path / "pefts")  # into layers that are there
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("targets", [NAMES, ["c_fc"], ["c_fc", "lm_head"], ["lm_head"], ["wte", "c_fc"]], ids=str)
def test_the_config_says_what_pefts_says(targets, tmp_path):
    ours, theirs = adapted(target_modules=targets), stock(target_modules=targets)
    save_adapter(ours, tmp_path / "ours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        theirs.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    saved = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "pefts")]
    assert saved[0]["fan_in_fan_out"] == saved[1]["fan_in_fan_out"]
    torch.testing.assert_close(load_adapter(gpt2(), tmp_path / "pefts")(IDS).logits, theirs.eval()(IDS).logits)


def test_all_linear_means_them_as_in_peft():
    ours = add_lora(gpt2(), LoRAConfig(target_modules="all-linear"))
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(gpt2(), config)
    mine = {name for name, m in ours.named_modules() if isinstance(m, LoRALinear)}
    layers = [name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert mine == {name.removeprefix("base_model.model.") for name in layers}
    again = add_lora(gpt2(), config)
    assert {name for name, m in again.named_modules() if isinstance(m, LoRALinear)} == mine


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_and_the_way_back(kind):
    model, plain = adapted(kind), gpt2()
    expected, base = model(IDS).logits, plain(IDS).logits
    state = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(merge_lora(model, safe_merge=True)(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model)
    remove_lora(merged)
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain.modules()}
    assert list(merged.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(p.is_contiguous() for p in merged.parameters())
    with disable_lora(model):
        torch.testing.assert_close(model(IDS).logits, base)
    restored = adapted(kind)
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    remove_lora(model)
    assert all(torch.equal(t, plain.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_starts_as_its_base_and_takes_the_bases_files(kind):
    plain = gpt2(seed=2)
    model = add_lora(gpt2(), LoRAConfig(target_modules=NAMES, **KINDS[kind]))
    torch.testing.assert_close(model(IDS).logits, gpt2()(IDS).logits)
    model.load_state_dict(plain.state_dict(), strict=False)  # [in, out], as they are on disk
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_a_layer_by_itself():
    conv = Conv1D(24, 16)
    layer = LoRALinear.from_linear(conv, r=4)
    assert layer.weight is conv.weight and layer.bias is conv.bias and layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (16, 24) and "fan_in_fan_out=True" in repr(layer)
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), conv(x))
    back = layer.to_linear()
    assert type(back) is Conv1D and back.weight is conv.weight and back.bias is conv.bias
    torch.testing.assert_close(back(x), conv(x))
    assert copy.deepcopy(layer).fan_in_fan_out


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_under_names(kind):
    model = add_lora(gpt2(), LoRAConfig(target_modules=NAMES, **KINDS[kind]), name="a")
    add_lora(model, LoRAConfig(target_modules=["c_fc"], r=5, **KINDS[kind]), name="b")
    stir(model)
    rows = []
    for name in ("a", "b"):
        set_adapter(model, name)
        rows.append(model(IDS).logits)
    with use_adapters(model, ["a", "b"]):
        mixed = model(IDS).logits
    torch.testing.assert_close(mixed, torch.stack([rows[0][0], rows[1][1]]))
    set_adapter(model, "a")
    torch.testing.assert_close(merge_lora(model)(IDS).logits, rows[0], rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    remove_lora(remove_lora(model, "b"), "a")
    assert all(torch.equal(t, gpt2().state_dict()[key]) for key, t in model.state_dict().items())


def test_other_bases_are_refused_or_told():
    with pytest.raises(ValueError, match="base_dtype: got 'nf4', expected None over a Conv1D"):
        LoRALinear.from_linear(Conv1D(24, 16), base_dtype="nf4")
    with pytest.warns(UserWarning, match="these stay as they are: Conv1D"):
        model = add_lora(gpt2(), LoRAConfig(target_modules=["c_fc", "lm_head"], base_dtype="nf4"))
    with pytest.raises(ValueError, match="base_compute: got 'float8_e4m3', expected None over a Conv1D"):
        model.transformer.h[0].mlp.c_fc.quantise_base(None, "float8_e4m3")
    with pytest.raises(ValueError, match="got a Conv1D, which cannot be replaced in place"):
        add_lora(Conv1D(24, 16), LoRAConfig(target_modules="all-linear"))


def as_on_disk(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_command_turns_them(kind, tmp_path):
    pytest.importorskip("rich")
    model = adapted(kind)
    save_adapter(model, tmp_path / "adapter")
    base = as_on_disk(gpt2(), tmp_path / "base")
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_merge_command_refuses_what_it_cannot_tell(tmp_path, capsys):
    pytest.importorskip("rich")
    save_adapter(adapted(target_modules=["c_attn", "c_proj"]), tmp_path / "adapter")
    plain = gpt2()
    plain.transformer.h[0].attn.c_attn.weight = nn.Parameter(plain.transformer.h[0].attn.c_attn.weight.t().contiguous())
    base = as_on_disk(plain, tmp_path / "base")
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert "may be stored either way" in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_bottlenecks_stand_behind_them():
    model = add_bottleneck(gpt2(), ["attn.c_proj", "mlp.c_proj"], r=4)
    torch.testing.assert_close(model(IDS).logits, gpt2()(IDS).logits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_step_lowers_the_loss():
    model = adapted("dora")
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_kernels_numbers_are_plain_torchs(path, kind):
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(40, 24), nn.ReLU(), Conv1D(24, 40)).to(path[1])
    add_lora(net, LoRAConfig(target_modules=["0", "2"], r=3, **KINDS[kind]))
    stir(net)
    x, results = torch.randn(33, 24, device=path[1]), []
    for backend in (path[0], "reference"):
        set_backend(backend)
        y = net(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [*lora_parameters(net)])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_shards(kind, mesh, tmp_path):
    """FSDP2 of one process: forwards, merges within the shards, files."""
    whole, model = adapted(kind), adapted(kind)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(gpt2(), tmp_path)(IDS).logits, whole(IDS).logits)
