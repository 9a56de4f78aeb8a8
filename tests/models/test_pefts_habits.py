"""What a user of PEFT brings along: its LoraConfig, its fields, its starts, its LoRA+ optimiser."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_fast import LoRAConfig, LoRALinear, add_lora, lora_plus_groups, patch_peft

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, ids):
        return self.down(self.norm(self.up(self.embed(ids))))


SETTINGS = {
    "list": {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 6, "lora_dropout": 0.1},
    "regex": {"target_modules": ".*(up|down)", "use_dora": True, "use_rslora": True, "bias": "lora_only"},
    "patterns": {"target_modules": ["up", "down"], "rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
    "saved": {"target_modules": ["up", "down"], "modules_to_save": ["norm"], "exclude_modules": ["down"]},
    "gaussian": {"target_modules": "all-linear", "init_lora_weights": "gaussian", "task_type": "FEATURE_EXTRACTION"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_its_config(settings):
    """The layers, ranks, scalings and trained tensors that PEFT makes of it, which stays as it was."""
    config = peft.LoraConfig(inference_mode=False, **settings)
    before = copy.deepcopy(config)
    ours = add_lora(Net(), config)
    assert config == before
    theirs = peft.get_peft_model(Net(), config)
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, LoRALinear)}
    start = "base_model.model."
    stock = {n.removeprefix(start): m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert list(layers) == list(stock)
    for name, layer in layers.items():
        assert (layer.r, layer.scaling) == (stock[name].r["default"], stock[name].scaling["default"])
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert count[0] == count[1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layers_to_transform": [0]}, "layers_to_transform: got .*get_peft_model.*patch_peft"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias: got True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: got"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*then lora_fast.patch_peft"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_of_it_our_layers_have_not(given, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        add_lora(model, peft.LoraConfig(target_modules=["up"], **given))
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize(
    "name, words",
    [
        ("task_type", "PEFT wraps the model for a task.* Leave it out"),
        ("layers_to_transform", "no such field .PEFT has it: get_peft_model"),
        ("target_module", "target_module: LoRAConfig has no such field$"),
    ],
)
def test_fields_that_ours_has_not_are_named(name, words):
    with pytest.raises(TypeError, match=words):
        LoRAConfig(r=4, target_modules=["up"], **{name: "CAUSAL_LM"})
    config = LoRAConfig(r=4, target_modules=["up"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_its_starts_by_way_of_peft(start):
    """What the refusal says to do: PEFT starts, the patched model computes as stock."""
    with pytest.raises(ValueError, match=f"init_lora_weights={start!r}"):
        LoRAConfig(target_modules=["up"], init_lora_weights=start)
    torch.manual_seed(0)
    stock = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=start))
    ours, ids = copy.deepcopy(stock), torch.arange(6)
    patch_peft(ours)
    torch.testing.assert_close(ours(ids), stock(ids))


@pytest.mark.parametrize("whose", ["ours", "peft"])
def test_lora_plus(whose):
    """Each parameter's rate and decay are those that PEFT's helper gives it; and the groups train."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["up", "down"], "bias": "all", "modules_to_save": ["norm"]}
    if whose == "peft":
        settings |= {"use_dora": True, "target_modules": ["embed", "up", "down"]}
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**settings))
    model = theirs if whose == "peft" else add_lora(Net(), LoRAConfig(**settings))
    optimizers = pytest.importorskip("peft.optimizers")
    groups = lora_plus_groups(model, 1e-3, 16, weight_decay=0.1, embedding_lr=1e-5)
    kinds = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    stock = optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, **kinds
    ).param_groups

    def rates(groups, model):
        names = {p: n.removeprefix("base_model.model.").replace(".default", "") for n, p in model.named_parameters()}
        rows = [(names[p], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
        short = (".modules_to_save", ".base_layer", "lora_A.weight", "lora_B.weight", "magnitude_vector.weight")
        found = {}
        for name, *rest in rows:
            for word in short:
                name = name.replace(word, word.removesuffix(".weight") if "lora" in word or "mag" in word else "")
            found[name] = rest
        return found

    assert rates(groups, model) == rates(stock, theirs)
    optimizer, ids = torch.optim.AdamW(groups), torch.arange(6)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        (loss := model(ids).square().mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0}, "lr: got 0"),
        ({"ratio": float("nan")}, "ratio: got nan"),
        ({"weight_decay": -1}, "weight_decay: got -1"),
    ],
    ids=str,
)
def test_lora_plus_checks(change, message):
    model = add_lora(Net(), LoRAConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=message):
        lora_plus_groups(model, **{"lr": 1e-3, "ratio": 16, **change})
    with pytest.raises(ValueError, match="none of its parameters trains"):
        lora_plus_groups(model.requires_grad_(False), 1e-3, 16)
    with pytest.raises(TypeError, match="model: got int"):
        lora_plus_groups(3, 1e-3, 16)
