"""lora_fast.parametrize: minLoRA's demo, names, ties, errors that change nothing, training beside the formula."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

import lora_fast
from lora_fast import LoRAConfig, parametrize
from lora_fast.parametrize import DoRAParametrization, LoRAParametrization

KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
ALL = LoRAConfig(r=3, lora_alpha=6, target_modules=".*")


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding, self.conv = nn.Embedding(11, 12), nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)  # [n, 12]
        return self.head(self.norm(x + self.conv(x.view(-1, 2, 3, 2)).mean(1).flatten(1).repeat(1, 2)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Net()


TOKENS = torch.arange(11)


def config(dora, **changes):
    return LoRAConfig(**{**vars(ALL), "use_dora": dora, **changes})


def stir(model, name=None):
    """Adapters as if trained."""
    for p in parametrize.get_lora_params(model, name):
        p.data += 0.3 * torch.randn_like(p)
    return model


def snapshot(model):
    """All that a failed call must leave as it was."""
    kinds = [(name, id(m), type(m), m.training, getattr(m, "enabled", None)) for name, m in model.named_modules()]
    tensors = [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters(remove_duplicate=False)]
    return kinds, tensors


@KINDS
def test_demo(model, dora):
    """minLoRA's demo.ipynb, assertion by assertion."""
    types, before, y0 = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict()), model(TOKENS)
    assert parametrize.add_lora(model, config(dora)) is model
    torch.testing.assert_close(model(TOKENS), y0)
    y1 = stir(model)(TOKENS)
    assert not torch.allclose(y1, y0, atol=1e-2)
    assert torch.equal(parametrize.disable_lora(model)(TOKENS), y0)
    assert torch.equal(parametrize.enable_lora(model)(TOKENS), y1)
    saved = copy.deepcopy(parametrize.get_lora_state_dict(model))
    assert len(saved) == 3 * (3 if dora else 2) and "head.parametrizations.weight.0.lora_A" in saved
    assert torch.equal(parametrize.remove_lora(model)(TOKENS), y0)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())

    parametrize.add_lora(model, config(dora))
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected and not any(map(parametrize.name_is_lora, missing))
    assert torch.equal(model(TOKENS), y1)
    assert torch.equal(parametrize.merge_lora(model)(TOKENS), y1)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == list(before)
    assert not any(map(parametrize.name_is_lora, model.state_dict()))


@KINDS
def test_three_adapters_selected_in_turn(model, dora):
    names, saved = ("a", "b", "c"), {}
    base = copy.deepcopy(model)
    for name in names:
        one = stir(parametrize.add_lora(copy.deepcopy(base), config(dora)))
        saved[name] = parametrize.get_lora_state_dict(one)
        parametrize.add_lora(model, config(dora), name)
        parametrize.load_lora_state_dict(model, saved[name], name)
    outputs = []
    for name in names:
        alone = parametrize.add_lora(copy.deepcopy(base), config(dora))
        expected = parametrize.merge_lora(parametrize.load_lora_state_dict(alone, saved[name]))(TOKENS)
        outputs.append(parametrize.select_lora(model, name)(TOKENS))
        assert torch.equal(outputs[-1], expected)
        mine = parametrize.get_lora_state_dict(model, name)
        assert len(mine) == len(saved[name]) and {key.split(".")[3] for key in mine} == {str(names.index(name))}
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
    parametrize.remove_lora(model, "a")  # positions move up, names stay
    assert torch.equal(parametrize.select_lora(model, "b")(TOKENS), outputs[1])
    assert torch.equal(parametrize.merge_lora(parametrize.select_lora(model, "c"))(TOKENS), outputs[2])


def test_several_in_order(model):
    """The second adapts what the first gives; each has a switch of its own."""
    linear = model.head
    parametrize.add_lora(linear, LoRAConfig(r=2), "first")
    stir(linear)
    w1 = linear.weight.detach()
    parametrize.add_lora(linear, LoRAConfig(r=3, use_dora=True), "second")
    torch.testing.assert_close(linear.weight, w1)
    stir(linear, "second")
    first, second = linear.parametrizations.weight
    assert (first.name, second.name) == ("first", "second") and isinstance(second, DoRAParametrization)
    v = w1 + second.scaling * second.lora_B @ second.lora_A
    torch.testing.assert_close(linear.weight, v / v.norm(dim=1, keepdim=True) * second.lora_magnitude_vector[:, None])
    parametrize.disable_lora(linear, "second")
    assert torch.equal(linear.weight, w1)
    assert len(list(parametrize.get_lora_params(linear))) == 5 == len(parametrize.get_lora_state_dict(linear))
    assert sum(p.numel() for p in parametrize.get_lora_params(linear, "second")) == 3 * (11 + 12) + 11
    parametrize.merge_lora(linear)
    assert torch.equal(linear.weight, w1)


def test_registered_by_hand():
    """Two parametrizations registered one after the other with torch's own function, the module printed."""
    linear = nn.Linear(5, 7)
    weight = linear.weight.detach()
    for name in ("default", "other"):
        made = LoRAParametrization.from_linear(linear, r=4, lora_alpha=1, name=name)
        torch_parametrize.register_parametrization(linear, "weight", made)
    text = repr(linear)
    assert text.startswith("ParametrizedLinear(") and text.index("(0): LoRAPar") < text.index("(1): LoRAPar")
    assert "'other', r=4, lora_alpha=1, lora_dropout=0.0)" in text
    assert torch.equal(linear.weight, weight)
    assert torch.equal(parametrize.remove_lora(linear).weight, weight) and type(linear) is nn.Linear
    with pytest.raises(ValueError, match=r"weight: got shape \(3, 3\), expected \[7, ...\] with 5 elements in a row"):
        made(torch.ones(3, 3))


@KINDS
def test_tied_weights(dora):
    model, plain = Net(tied=True), Net(tied=True)
    plain.load_state_dict(model.state_dict())
    base = model.head.weight.detach().clone()
    stir(parametrize.add_lora(model, config(dora)))
    adapter = model.head.parametrizations.weight[0]
    assert adapter is model.embedding.parametrizations.weight[0]
    assert len(list(parametrize.get_lora_params(model))) == 2 * (3 if dora else 2)
    tied, y = model.head.weight.detach(), model(TOKENS)
    assert torch.equal(tied, model.embedding.weight) and not torch.allclose(tied, base, atol=1e-2)
    torch.testing.assert_close(tied, adapter.adapted(base))
    assert torch.equal(parametrize.merge_lora(copy.deepcopy(model))(TOKENS), y)
    assert torch.equal(parametrize.remove_lora(copy.deepcopy(model)).head.weight, base)
    parametrize.merge_lora(model)
    assert model.head.weight is model.embedding.weight and torch.equal(model.head.weight, tied)
    assert model.head.weight.requires_grad
    parametrize.untie_weights(model.head)
    assert model.head.weight is not model.embedding.weight and torch.equal(model.head.weight, tied)


@KINDS
def test_tie_and_untie(model, dora):
    """As in minLoRA's advanced_usage.ipynb: apart first, with adapters of their own."""
    parametrize.add_lora(model, config(dora))
    stir(model)
    assert not torch.equal(model.head.weight, model.embedding.weight)
    parametrize.tie_weights(model.head, model.embedding)
    stir(model.head)
    assert torch.equal(model.head.weight, model.embedding.weight)
    stir(model.embedding)
    assert torch.equal(model.head.weight, model.embedding.weight)
    again = copy.deepcopy(model)
    assert again.head.parametrizations.weight[0] is again.embedding.parametrizations.weight[0]
    parametrize.untie_weights(model.embedding)
    assert torch.equal(model.head.weight, model.embedding.weight)
    stir(model.embedding)
    assert not torch.equal(model.head.weight, model.embedding.weight)
    model.embedding.parametrizations.weight.original.data.zero_()
    assert torch.equal(again.head.weight, model.head.weight)
    weight = again.head.weight.detach()
    parametrize.merge_lora(again)
    assert again.head.weight is again.embedding.weight and torch.equal(again.head.weight, weight)


def test_tie_plain_layers(model):
    parametrize.tie_weights(model.head, model.embedding)
    assert model.head.weight is model.embedding.weight and model.head.weight.requires_grad
    stir(parametrize.add_lora(model.head))
    parametrize.tie_weights(model.embedding, model.head)  # the adapter goes
    assert type(model.head) is nn.Linear and model.head.weight is model.embedding.weight


def test_a_tie_that_is_adapted_at_one_end():
    """Merging must not change the layer that shares the base without an adapter."""
    model = Net(tied=True)
    base = model.embedding.weight.detach().clone()
    stir(parametrize.add_lora(model))
    parametrize.merge_lora(model)
    assert torch.equal(model.embedding.weight, base) and not torch.allclose(model.head.weight, base, atol=1e-2)


def test_what_trains(model):
    """The adapted weights are frozen and get their flags back; nothing else is touched."""
    model.conv.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    parametrize.add_lora(model, ALL)
    parametrize.add_lora(model, ALL, "other")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{layer}.parametrizations.weight.original" for layer in ("embedding", "conv", "head")}
    assert all(p.requires_grad for p in parametrize.get_lora_params(model))
    other = copy.deepcopy(model)
    for done in (parametrize.remove_lora(parametrize.remove_lora(model, "other")), parametrize.merge_lora(other)):
        assert {name: p.requires_grad for name, p in done.named_parameters()} == before


def test_a_copy_goes_its_own_way(model):
    """torch gives a copy of a parametrized layer the same class, and takes the weight off it on removal."""
    parametrize.add_lora(model, ALL)
    parametrize.remove_lora(copy.deepcopy(model))
    parametrize.merge_lora(copy.deepcopy(model))
    assert model.head.weight.shape == (11, 12) and type(parametrize.remove_lora(model).head) is nn.Linear


def test_name_filters(model):
    names = [name for name, _ in parametrize.add_lora(model, ALL).named_parameters()]
    assert sum(map(parametrize.name_is_lora, names)) == 6 and sum(map(parametrize.name_is_bias, names)) == 3
    assert not parametrize.name_is_lora("head.parametrizations.weight.original")
    assert not parametrize.name_is_lora("head.lora_A") and parametrize.name_is_lora("parametrizations.weight.0.lora_A")
    biases = [model.conv.bias, model.norm.bias, model.head.bias]
    assert list(map(id, parametrize.get_bias_params(model))) == list(map(id, biases))
    parametrize.remove_lora(model)
    parametrize.add_lora(model, LoRAConfig(target_modules=["conv", "head"], exclude_modules=["head"]))
    assert {key.split(".")[0] for key in parametrize.get_lora_state_dict(model)} == {"conv"}
    parametrize.add_lora(model, name="other")  # every nn.Linear
    assert {key.split(".")[0] for key in parametrize.get_lora_state_dict(model, "other")} == {"head"}
    patterns = LoRAConfig(r=1, target_modules=".*", rank_pattern={"conv": 5}, alpha_pattern={"head": 3})
    parametrize.add_lora(model, patterns, "patterns")
    assert model.conv.parametrizations.weight[1].r == 5 and model.head.parametrizations.weight[1].scaling == 3


def test_other_parametrizations(model):
    """An adapter goes on top of another kind of parametrization and comes off again; merging says that it cannot."""
    nn.utils.parametrizations.weight_norm(model.head)
    y0 = model(TOKENS)
    stir(parametrize.add_lora(model))
    assert not model.head.parametrizations.weight.original0.requires_grad and not torch.allclose(model(TOKENS), y0)
    with pytest.raises(ValueError, match="head has other parametrizations too"):
        parametrize.merge_lora(model)
    with pytest.raises(ValueError, match="source: has other parametrizations too"):
        parametrize.tie_weights(model.head, model.embedding)
    assert torch.equal(parametrize.remove_lora(model)(TOKENS), y0)
    assert model.head.parametrizations.weight.original0.requires_grad


def test_attention_reads_the_weight():
    """The output projection, which no layer may replace, can be parametrized."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    y0 = attention(x, x, x)[0]
    stir(parametrize.add_lora(attention))
    y1 = attention(x, x, x)[0]
    assert not torch.allclose(y0, y1, atol=1e-2)
    torch.testing.assert_close(parametrize.merge_lora(attention)(x, x, x)[0], y1)


@KINDS
def test_training_equals_the_plain_formula(dora):
    """AdamW, step by step, on all three kinds of layers, weights and adapters in float64."""
    model, plain = Net().double(), Net().double()
    plain.load_state_dict(model.state_dict())
    parametrize.add_lora(model, config(dora))
    adapters = {name: m.parametrizations.weight[0] for name, m in model.named_children() if name != "norm"}
    mine = {
        name: {k: p.detach().clone().requires_grad_() for k, p in a.named_parameters()} for name, a in adapters.items()
    }
    base = {name: p.detach() for name, p in plain.named_parameters()}
    ours = torch.optim.AdamW(parametrize.get_lora_params(model), lr=0.05)
    theirs = torch.optim.AdamW([p for tensors in mine.values() for p in tensors.values()], lr=0.05)
    losses = []
    for step in range(5):
        weights = dict(base)
        for name, t in mine.items():
            w = base[f"{name}.weight"]
            v = w + (6 / 3 * t["lora_B"] @ t["lora_A"]).reshape(w.shape)
            if dora:
                rows = v.detach().flatten(1).norm(dim=1)
                v = v * (t["lora_magnitude_vector"] / rows).view(-1, *[1] * (w.dim() - 1))
            weights[f"{name}.weight"] = v
        loss = F.cross_entropy(model(TOKENS), TOKENS.flip(0))
        expected = F.cross_entropy(torch.func.functional_call(plain, weights, (TOKENS,)), TOKENS.flip(0))
        torch.testing.assert_close(loss, expected)
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
        for name, adapter in adapters.items():
            for key, p in adapter.named_parameters():
                assert step == 0 and key == "lora_A" or p.grad.any()
                torch.testing.assert_close(p.grad, mine[name][key].grad, rtol=1e-9, atol=1e-12)
        ours.step()
        theirs.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_dropout(model):
    """Whole columns of A, in training alone; merging takes all of them."""
    stir(parametrize.add_lora(model, LoRAConfig(r=3, lora_dropout=0.5)))
    base = model.head.parametrizations.weight.original.detach()
    update = model.eval().head.weight.detach() - base
    torch.manual_seed(1)
    ratio = (model.train().head.weight.detach() - base) / update
    assert set(ratio[0].round().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(ratio, ratio[:1].round().expand_as(ratio), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parametrize.merge_lora(model).head.weight.detach(), base + update)


@KINDS
def test_state_dict_and_deepcopy(model, dora):
    stir(parametrize.add_lora(model, config(dora)))
    again = copy.deepcopy(model)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}
    fresh = parametrize.add_lora(Net(), config(dora))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    stir(again)
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and not torch.allclose(again(TOKENS), model(TOKENS))


def test_half_precision_weights():
    linear = nn.Linear(8, 4, dtype=torch.float16)
    stir(parametrize.add_lora(linear, LoRAConfig(r=2, use_dora=True)))
    assert {p.dtype for p in parametrize.get_lora_params(linear)} == {torch.float32}
    assert linear.weight.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear.weight.dtype == torch.float16


loose: Any = parametrize  # for callers that check no types
MISTAKES = [
    (lambda m: loose.add_lora(m), ValueError, "name: got 'default', which head has already, expected another"),
    (lambda m: loose.add_lora(m, ALL), ValueError, "name: got 'default', which head has already"),
    (lambda m: loose.add_lora(m, name=""), ValueError, "name: got '', expected a string, not empty"),
    (lambda m: loose.add_lora(m, name=3), TypeError, "name: got 3, expected a string"),
    (lambda m: loose.add_lora("m"), TypeError, "model: got str, expected an nn.Module"),
    (lambda m: loose.add_lora(m, {"r": 4}), TypeError, "config: got dict, expected a LoRAConfig or None"),
    (lambda m: loose.add_lora(m, LoRAConfig(bias="all"), "b"), ValueError, "config: got bias='all'"),
    (lambda m: loose.add_lora(m, LoRAConfig(modules_to_save=["norm"]), "b"), ValueError, "config: got modules_"),
    (lambda m: loose.add_lora(m, LoRAConfig(base_dtype="nf4"), "b"), ValueError, "config: got base_dtype='nf4'"),
    (
        lambda m: loose.add_lora(m, LoRAConfig(target_parameters=["x"]), "b"),
        ValueError,
        "config: got target_parameters",
    ),
    (lambda m: loose.add_lora(m, LoRAConfig(target_modules=["norm"]), "b"), ValueError, "'norm' matches nothing"),
    (lambda m: loose.add_lora(m.norm), ValueError, "target_modules: None leaves no layer of the model to adapt"),
    (lambda m: loose.add_lora(m, LoRAConfig(target_modules=".*", rank_pattern={"x": 2}), "b"), ValueError, "'x'"),
    (lambda m: loose.remove_lora(m, "b"), ValueError, "name: got 'b', expected one that the model has: 'def"),
    (lambda m: loose.select_lora(m, "b"), ValueError, "name: got 'b', expected one that the model has"),
    (lambda m: loose.enable_lora(m, 0), TypeError, "name: got 0, expected a string"),
    (lambda m: loose.merge_lora(m.conv), ValueError, "model: has no parametrized layers; call"),
    (lambda m: loose.get_lora_params(m.conv), ValueError, "model: has no parametrized layers"),
    (lambda m: loose.tie_weights(m.head, m.norm), TypeError, "target: got LayerNorm, expected an nn.Linear"),
    (lambda m: loose.tie_weights(m.head, m.conv), ValueError, r"target: got a weight \(6, 1, 3, 3\)"),
    (lambda m: loose.untie_weights(m), TypeError, "layer: got Net, expected an nn.Linear"),
    (lambda m: loose.load_lora_state_dict(m, []), TypeError, "state_dict: got list"),
    (lambda m: loose.load_lora_state_dict(m, {}), ValueError, "missing head.lora_A; missing head.lora_B"),
    (
        lambda m: loose.load_lora_state_dict(m, {"head.parametrizations.weight.0.lora_A": torch.ones(2, 2)}),
        ValueError,
        r"head.parametrizations.weight.0.lora_A has shape \(2, 2\)",
    ),
    (lambda m: loose.load_lora_state_dict(m, {"head.weight": torch.ones(2, 2)}), ValueError, "unexpected head.w"),
    (lambda m: loose.load_lora_state_dict(m, {"a": 3}), TypeError, r"state_dict\['a'\]: got int"),
    (lambda m: loose.LoRAParametrization(torch.ones(3)), ValueError, r"weight: got shape \(3,\), expected two dim"),
    (lambda m: loose.LoRAParametrization(torch.ones(3, 3).long()), TypeError, "weight: got dtype torch.int64"),
    (lambda m: loose.LoRAParametrization(3), TypeError, "weight: got int"),
    (lambda m: loose.LoRAParametrization.from_layer(m.norm), TypeError, "layer: got LayerNorm"),
    (lambda m: loose.DoRAParametrization(torch.ones(3, 3, device="meta")), ValueError, "weight: is on the meta device"),
    (lambda m: loose.DoRAParametrization(torch.full((3, 3), torch.nan)), ValueError, "weight: has rows whose norm"),
]


@pytest.mark.parametrize("call, kind, message", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_change_nothing(model, call, kind, message):
    stir(parametrize.add_lora(model))
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert snapshot(model) == before


def test_layers_that_cannot_be_adapted(model):
    lora_fast.add_lora(model, LoRAConfig(target_modules=["head"]))
    model.lazy = nn.LazyLinear(3)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot adapt head is a LoRALinear; lazy has no weight yet"):
        parametrize.add_lora(model)
    assert snapshot(model) == before


def test_two_adapters_in_one_state_dict(model):
    parametrize.add_lora(parametrize.add_lora(model), name="other")
    with pytest.raises(ValueError, match="is of a second adapter"):
        parametrize.load_lora_state_dict(model, parametrize.get_lora_state_dict(model))


def test_sparse_embeddings_are_refused_before_anything_changes():
    """Their gradient is a sparse tensor, which the weight's formula cannot take: it would fail in the backward."""
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"cannot adapt 0 has sparse=True.*set its sparse to False"):
        parametrize.add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert not any(torch.nn.utils.parametrize.is_parametrized(layer) for layer in model)
    for kind in (LoRAParametrization, DoRAParametrization):
        with pytest.raises(ValueError, match="layer: has sparse=True"):
            kind.from_layer(model[0], 2)
    model[0].sparse = False
    parametrize.add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    model(torch.tensor([1, 2])).sum().backward()
