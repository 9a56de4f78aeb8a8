"""Conversion of a whole model: in place, all or nothing, and back."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_fast import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    disable_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    print_trainable_parameters,
    remove_lora,
    unmerge_lora,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(inplace=True), nn.Linear(10, 6))

    def forward(self, x):
        return x + self.mlp(self.norm(self.q_proj(x)))


class Model(nn.Module):
    """A small transformer-like tree with embeddings tied to its head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.score = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.layers[0].norm.weight.requires_grad_(False)  # a flag of its own to restore

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x), self.score(x.mean(1))


IDS = torch.arange(8).reshape(2, 4)
ATTENTION = LoRAConfig(r=2, target_modules=["q_proj"])


def build(seed=0, **config):
    torch.manual_seed(seed)
    return add_lora(Model(), LoRAConfig(r=2, **{"target_modules": "all-linear", **config}))


def perturb(model):
    """Adapters that do something, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(torch.randn_like(p))
    return model


def state(model):
    """All that add_lora may not change when it fails: modules, flags and values."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    parameters = [(n, id(p), p.requires_grad, p.tolist()) for n, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, [sorted(vars(m)) for m in model.modules()]


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def outputs(model):
    with torch.no_grad():
        return [y.clone() for y in model.eval()(IDS)]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_conversion_is_in_place_and_starts_at_the_base():
    model = Model()
    expected, weight = outputs(model), model.layers[0].q_proj.weight
    assert add_lora(model, ATTENTION) is model
    assert isinstance(model.layers[0].q_proj, LoRALinear) and model.layers[0].q_proj.weight is weight
    assert trainable(model) == {f"layers.{i}.q_proj.lora_{x}" for i in (0, 1) for x in "AB"}
    for y, expected_y in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(y, expected_y)


def test_only_the_adapters_learn():
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    for _ in range(2):  # lora_A has a gradient once lora_B is not zero
        logits, scores = model.eval()(IDS)
        optimizer.zero_grad()
        (logits.square().mean() + scores.square().mean()).backward()
        optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(lora_state_dict(model)) == trainable(model)


def test_training_flags_are_kept():
    model = Model().eval()
    model.layers[1].train()
    before = {name: m.training for name, m in model.named_modules()}
    assert {name: m.training for name, m in add_lora(model, ATTENTION).named_modules()} == before
    assert {name: m.training for name, m in remove_lora(model).named_modules()} == before


def test_a_shared_layer_is_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(4, 4)})
    add_lora(model, LoRAConfig(target_modules=["b.0"], rank_pattern={"a": 3}))
    assert isinstance(model["a"], LoRALinear) and model["a"] is model["b"][0] and model["a"].r == 3
    assert list(lora_state_dict(model)) == ["a.lora_A", "a.lora_B"]
    remove_lora(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0]
    with pytest.raises(ValueError, match="leaves no layer"):
        add_lora(model, LoRAConfig(target_modules=["b.0"], exclude_modules=["a"]))


def test_calling_twice_leaves_the_first_conversion():
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=r"has LoRA layers already \(layers.0.q_proj.* and 1 more\); call remove_lora"):
        add_lora(model, ATTENTION)
    assert state(model) == before


@pytest.mark.parametrize("model, message", [(nn.Linear(2, 2), "from_linear"), (LoRALinear(2, 2), "already .itself")])
def test_a_model_that_is_one_linear(model, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(target_modules="all-linear"))


@given(position=st.integers(0, 6), interrupt=st.booleans())
@settings(max_examples=14, deadline=None)
def test_a_conversion_that_fails_halfway_leaves_the_model_alone(position, interrupt):
    model = Model()
    before = state(model)
    real, calls, error = LoRALinear.from_linear, [], KeyboardInterrupt if interrupt else MemoryError

    def failing(*args, **kwargs):
        calls.append(real(*args, **kwargs))  # this has frozen its base already
        if len(calls) == position + 1:
            raise error("no room")
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRALinear, "from_linear", failing)
        with pytest.raises(error, match="no room") as caught:
            add_lora(model, LoRAConfig(target_modules="all-linear"))
    assert len(calls) == position + 1 and state(model) == before
    assert interrupt or "while converting" in caught.value.__notes__[0]


@pytest.mark.parametrize("config", [{"target_modules": ["nowhere"]}, {"target_modules": ["q_proj", "norm"]}])
def test_bad_targets_leave_the_model_alone(config):
    model = Model()
    before = state(model)
    with pytest.raises(ValueError, match="nowhere|norm"):
        add_lora(model, LoRAConfig(**config))
    assert state(model) == before


def test_bias_options_train_the_biases_and_save_them():
    biases = {name for name, _ in Model().named_parameters() if name.endswith("bias")}
    own = {f"layers.{i}.{name}.bias" for i in (0, 1) for name in ("q_proj", "mlp.2")} | {"score.1.bias"}
    assert own < biases
    for bias, expected in (("none", set()), ("lora_only", own), ("all", biases)):
        model = build(bias=bias)
        adapters = {f"{n}.lora_{x}" for n, m in model.named_modules() if isinstance(m, LoRALinear) for x in "AB"}
        assert trainable(model) == set(lora_state_dict(model)) == adapters | expected
        sum(y.square().mean() for y in model(IDS)).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_modules_to_save_train_in_full_and_travel_with_the_adapter():
    model = build(target_modules=["q_proj"], modules_to_save=["score"])
    score = {f"score.{name}" for name in model.score.state_dict()}
    assert "score.0.running_mean" in score and {n for n in trainable(model) if "lora_" not in n} < score
    assert all(p.requires_grad for p in model.score.parameters())
    perturb(model).train()(IDS)  # moves the running mean
    other = build(seed=0, target_modules=["q_proj"], modules_to_save=["score"])
    load_lora_state_dict(other, lora_state_dict(model))
    assert score < set(lora_state_dict(other)) and other.score[0].num_batches_tracked == 1
    assert all(map(torch.equal, outputs(other), outputs(model)))


def test_modules_to_save_may_not_train_a_base_weight():
    model = Model()
    before = state(model)
    with pytest.raises(ValueError, match="modules_to_save: .*lm_head, which is tied"):
        add_lora(model, LoRAConfig(target_modules=["lm_head"], modules_to_save=["embed"]))
    assert state(model) == before


def test_state_dict_round_trip():
    model = perturb(build())
    buffer = io.BytesIO()
    torch.save(lora_state_dict(model), buffer)
    buffer.seek(0)
    other = build(seed=0)
    load_lora_state_dict(other, torch.load(buffer, weights_only=True))
    assert all(map(torch.equal, outputs(other), outputs(model)))
    adapter, full = lora_state_dict(model), model.state_dict()
    assert all(torch.equal(t, full[name]) and not t.requires_grad for name, t in adapter.items())
    assert adapter["layers.0.q_proj.lora_A"].data_ptr() == model.layers[0].q_proj.lora_A.data_ptr()
    assert list(adapter) == [name for name in full if "lora_" in name]


def test_loading_casts_to_the_model():
    model, other = perturb(build()), build()
    load_lora_state_dict(other, {name: t.double() for name, t in lora_state_dict(model).items()})
    assert other.layers[0].q_proj.lora_A.dtype == torch.float32
    assert all(map(torch.equal, lora_parameters(other), lora_parameters(model)))


def drop(name, d):
    del d[name]


KEY = "layers.0.q_proj.lora_A"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda d: drop(KEY, d), ValueError, f"missing {KEY}"),
        (lambda d: d.update(x=torch.ones(1)), ValueError, "unexpected x"),
        (lambda d: d.update({"embed.weight": torch.ones(11, 6)}), ValueError, "unexpected embed.weight"),
        (lambda d: d.update({KEY: torch.ones(3, 6)}), ValueError, rf"{KEY} has shape \(3, 6\), expected \(2, 6\)"),
        (lambda d: d.update({KEY: torch.ones(2, 6, dtype=torch.int64)}), ValueError, "int64, expected torch.float32"),
        (lambda d: d.update({KEY: torch.ones(2, 6, dtype=torch.complex64)}), ValueError, "complex64"),
        (lambda d: d.update({KEY: torch.ones(2, 6, device="meta")}), ValueError, "meta device"),
        (lambda d: d.update({KEY: [1.0]}), TypeError, f"state_dict.'{KEY}'.: got list"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, error, message):
    model = build()
    before = state(model)
    adapter = {name: t + 1 for name, t in lora_state_dict(model).items()}
    change(adapter)
    with pytest.raises(error, match=message):
        load_lora_state_dict(model, adapter)
    assert state(model) == before
    with pytest.raises(TypeError, match="state_dict: got list"):
        load_lora_state_dict(model, list(adapter))


def test_loading_into_a_merged_model_is_refused():
    model = perturb(build())
    adapter = {name: t + 1 for name, t in lora_state_dict(model).items()}
    before = state(merge_lora(model))
    with pytest.raises(ValueError, match="merged LoRA layers .*unmerge_lora"):
        load_lora_state_dict(model, adapter)
    assert state(model) == before


def test_print_trainable_parameters(capsys):
    mlp = nn.Sequential(nn.Linear(784, 64), nn.Linear(64, 64), nn.Linear(64, 5))
    add_lora(mlp, LoRAConfig(r=1, target_modules="all-linear"))
    assert print_trainable_parameters(mlp) == (1045, 54725 + 1045)
    assert capsys.readouterr().out == "trainable params: 1,045 || all params: 55,770 || trainable%: 1.8738\n"


def test_merge_and_unmerge():
    model = perturb(build())
    expected, weights = outputs(model), {n: t.clone() for n, t in model.state_dict().items()}
    merge_lora(model, safe_merge=True)
    merge_lora(model)  # merged already: nothing happens
    for y, expected_y in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    assert unmerge_lora(model) is model
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert all(map(torch.equal, outputs(model), expected))


def test_merging_the_head_leaves_the_embeddings_tied_to_it():
    model = perturb(build(target_modules=["lm_head"]))
    before = model.embed.weight.clone()
    merge_lora(model)
    assert torch.equal(model.embed.weight, before) and not torch.equal(model.lm_head.weight, before)
    unmerge_lora(model)
    assert model.lm_head.weight is model.embed.weight


def test_a_merge_that_fails_halfway_is_undone():
    model = perturb(build())
    model.layers[0].q_proj.merge()
    with torch.no_grad():
        model.layers[1].mlp[2].lora_B[0, 0] = float("nan")
    merged = {name: m.merged for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    weights = {name: (id(p), p.tolist()) for name, p in model.named_parameters() if name.endswith("weight")}
    with pytest.raises(ValueError, match="safe_merge") as caught:
        merge_lora(model, safe_merge=True)
    assert caught.value.__notes__ == ["while merging 'layers.1.mlp.2'"]
    assert {name: m.merged for name, m in model.named_modules() if isinstance(m, LoRALinear)} == merged
    assert {n: (id(p), p.tolist()) for n, p in model.named_parameters() if n.endswith("weight")} == weights


@pytest.mark.parametrize("bias", ["none", "all"])
def test_remove_gives_the_base_model_back(bias):
    model = Model()
    before, expected = state(model)[1], outputs(model)
    add_lora(model, LoRAConfig(target_modules="all-linear", bias=bias, modules_to_save=["norm"]))
    assert remove_lora(perturb(model)) is model
    assert state(model)[1] == before
    assert not any(isinstance(m, LoRALinear) or any("lora" in key for key in vars(m)) for m in model.modules())
    assert all(map(torch.equal, outputs(model), expected))
    add_lora(model, ATTENTION)  # and it can be converted again


def test_merge_then_remove_gives_plain_layers_with_merged_weights():
    model = Model()
    before, keys = flags(model), set(model.state_dict())
    merge_lora(perturb(add_lora(model, LoRAConfig(target_modules="all-linear"))))
    expected = outputs(model)
    remove_lora(model)
    assert type(model.layers[0].q_proj) is nn.Linear and set(model.state_dict()) == keys
    assert flags(model) == before and all(map(torch.equal, outputs(model), expected))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_wrapped_models_work_alike(clone, merged):
    base = Model()
    before = flags(base)
    model = perturb(add_lora(copy.deepcopy(base), LoRAConfig(target_modules="all-linear", modules_to_save=["norm"])))
    if merged:
        merge_lora(model)
    expected, adapter = outputs(model), lora_state_dict(model)
    twin = nn.Sequential(clone(model))  # within a wrapper, as DDP is one
    assert all(map(torch.equal, outputs(twin[0]), expected))
    assert list(lora_state_dict(twin)) == [f"0.{name}" for name in adapter]
    remove_lora(unmerge_lora(twin))
    assert flags(twin[0]) == before and all(map(torch.equal, outputs(twin[0]), outputs(base)))
    assert all(map(torch.equal, outputs(model), expected))  # the original is not touched


@pytest.mark.parametrize("merged", [False, True])
def test_disable_lora_restores_each_layer(merged):
    model = Model()
    base = outputs(model)
    perturb(add_lora(model, LoRAConfig(target_modules="all-linear")))
    if merged:
        merge_lora(model)
    model.layers[1].q_proj.disable()
    expected = outputs(model)
    with pytest.raises(RuntimeError, match="stop"), disable_lora(model):
        assert all(map(torch.equal, outputs(model), base))
        with disable_lora(model):
            pass
        assert all(map(torch.equal, outputs(model), base))
        raise RuntimeError("stop")
    assert all(map(torch.equal, outputs(model), expected))
    assert [m.enabled for m in model.modules() if isinstance(m, LoRALinear)].count(False) == 1


def test_lora_in_a_transformer_encoder_acts_in_eval():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 3, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        add_lora(encoder, LoRAConfig(target_modules=["linear1", "linear2"]))
        base = encoder(x)
        assert not torch.allclose(perturb(encoder)(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def run_disabled(model):
    with disable_lora(model):
        pass


@pytest.mark.parametrize(
    "function",
    [
        remove_lora,
        lora_parameters,
        lora_state_dict,
        lambda model: load_lora_state_dict(model, {}),
        print_trainable_parameters,
        merge_lora,
        unmerge_lora,
        run_disabled,
    ],
)
def test_models_without_lora_layers(function):
    with pytest.raises(ValueError, match="model: has no LoRA layers; call add_lora first"):
        function(Model())
    with pytest.raises(TypeError, match="model: got dict"):
        function({})


def test_a_lone_lora_layer():
    layer = perturb(LoRALinear(3, 3))
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B"]
    with pytest.raises(ValueError, match="to_linear"):
        remove_lora(layer)
