"""LoRAConfig: its checks, and which layers a pattern stands for."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_fast import LoRAConfig, LoRALinear, add_lora
from lora_fast.models.targets import matching, resolve_pattern


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4, bias=False)


class Model(nn.Module):
    """Named as the models of transformers are, with their output head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "up": nn.Linear(4, 6)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 9, bias=False)

    def get_output_embeddings(self):
        return self.lm_head


ALL = ["layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.0.up"]
ALL += [name.replace("0", "1") for name in ALL]


def converted(**config):
    model = add_lora(Model(), LoRAConfig(**config))
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"target_modules": ["q_proj"]}, [ALL[0], ALL[3]]),
        ({"target_modules": ("attn.q_proj", "layers.1.up")}, [ALL[0], ALL[3], ALL[5]]),
        ({"target_modules": {"lm_head"}}, ["lm_head"]),
        ({"target_modules": r"layers\.1\..*_proj"}, ALL[3:5]),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": "All-Linear", "exclude_modules": ["up", "lm_head"]}, [ALL[i] for i in (0, 1, 3, 4)]),
        ({"target_modules": ["q_proj", "up"], "exclude_modules": r"layers\.0.*"}, [ALL[3], ALL[5]]),
        ({"target_modules": "all-linear", "modules_to_save": ["layers.0.attn"]}, ALL[2:]),
    ],
)
def test_targets(config, expected):
    assert list(converted(**config)) == expected


def test_a_suffix_is_whole_parts_of_the_name():
    with pytest.raises(ValueError, match="target_modules: 'proj' matches nothing"):
        converted(target_modules=["proj"])
    with pytest.raises(ValueError, match="target_modules: 'q_proj' matches nothing"):
        converted(target_modules="q_proj")  # a string is a regex for the full name
    with pytest.raises(ValueError, match="target_modules: .* matches nothing"):
        converted(target_modules=r"layers\.0\.attn\.q")


def test_rank_and_alpha_patterns():
    layers = converted(
        r=2,
        lora_alpha=16,
        target_modules="all-linear",
        rank_pattern={"layers.0.up": 5, "up": 3, r"^layers\.1\.attn\..*": 4},
        alpha_pattern={"q_proj": 7.5},
    )
    assert [layer.r for layer in layers.values()] == [2, 2, 5, 4, 4, 3]
    assert [layer.lora_alpha for layer in layers.values()] == [7.5, 16, 16, 7.5, 16, 16]
    assert layers[ALL[0]].scaling == 7.5 / 2
    assert layers[ALL[2]].lora_A.shape == (5, 4) and layers[ALL[2]].lora_B.shape == (6, 5)


def test_hyperparameters_reach_the_layers():
    layers = converted(target_modules=["up"], r=4, lora_alpha=2, lora_dropout=0.25, use_rslora=True)
    for layer in layers.values():
        assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling) == (4, 2, 0.25, 1.0)
        assert not layer.lora_B.any()
    assert all(layer.lora_B.all() for layer in converted(target_modules=["up"], init_lora_weights=False).values())
    wide = add_lora(nn.Sequential(nn.Linear(4000, 2)), LoRAConfig(target_modules=["0"], init_lora_weights="gaussian"))
    assert wide[0].lora_A.std().item() == pytest.approx(1 / 8, rel=0.05)


parts = st.sampled_from(["a", "b", "ab", "0"])
dotted = st.lists(parts, min_size=1, max_size=3).map(".".join)


@given(st.lists(dotted, min_size=1, max_size=6, unique=True), dotted)
def test_matching_is_pefts_rule(names, entry):
    modules = {nn.Identity(): [name] for name in names}
    expected = {name for name in names if name == entry or name.endswith("." + entry)}
    if expected:
        assert {modules[m][0] for m in matching("x", [entry], modules)} == expected
        values = resolve_pattern("x", {re.escape(entry): 1}, 0, list(modules), modules)
        assert {modules[m][0] for m, value in values.items() if value} == expected
    else:
        with pytest.raises(ValueError, match="x: .* matches nothing"):
            matching("x", [entry], modules)
        with pytest.raises(ValueError, match="x: .* matches none"):
            resolve_pattern("x", {re.escape(entry): 1}, 0, list(modules), modules)


@pytest.mark.parametrize(
    "error, name, value",
    [
        (ValueError, "r", 0),
        (TypeError, "r", 2.0),
        (TypeError, "r", True),
        (TypeError, "lora_alpha", "8"),
        (ValueError, "lora_alpha", float("nan")),
        (ValueError, "lora_alpha", float("inf")),
        (ValueError, "lora_dropout", 1.0),
        (ValueError, "lora_dropout", -0.1),
        (ValueError, "lora_dropout", float("nan")),
        (TypeError, "lora_dropout", None),
        (TypeError, "use_rslora", 1),
        (ValueError, "init_lora_weights", "pissa"),
        (ValueError, "init_lora_weights", None),
        (ValueError, "bias", "some"),
        (TypeError, "target_modules", 3),
        (TypeError, "target_modules", ["q_proj", 3]),
        (ValueError, "target_modules", []),
        (ValueError, "target_modules", ["q_proj", ""]),
        (ValueError, "target_modules", "*.q_proj"),
        (ValueError, "exclude_modules", "("),
        (TypeError, "exclude_modules", {"up": True}),
        (TypeError, "modules_to_save", "norm"),
        (ValueError, "modules_to_save", []),
        (TypeError, "rank_pattern", ["up"]),
        (TypeError, "rank_pattern", {3: 3}),
        (ValueError, "rank_pattern", {"(": 3}),
        (ValueError, "rank_pattern", {"(?i)up": 3}),
        (ValueError, "rank_pattern", {"up": 0}),
        (TypeError, "rank_pattern", {"up": 1.5}),
        (TypeError, "alpha_pattern", {"up": "1"}),
        (ValueError, "alpha_pattern", {"up": float("inf")}),
    ],
)
def test_bad_values_name_the_argument(error, name, value):
    with pytest.raises(error, match=rf"^{name}\b"):
        LoRAConfig(**{name: value})
    config = LoRAConfig(target_modules=["up"])
    setattr(config, name, value)
    with pytest.raises(error, match=rf"^{name}\b"):
        add_lora(Model(), config)


@pytest.mark.parametrize(
    "message, config",
    [
        ("target_modules: got None", {}),
        ("target_modules: 'k_proj' matches nothing", {"target_modules": ["q_proj", "k_proj"]}),
        ("target_modules: .* matches nothing", {"target_modules": "attn"}),
        ("target_modules: .* leaves no layer", {"target_modules": ["up"], "exclude_modules": ".*"}),
        ("target_modules: .* leaves no layer", {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}),
        ("target_modules: cannot convert norm, which is a LayerNorm", {"target_modules": ["up", "norm"]}),
        ("target_modules: cannot convert layers.0.attn, which is a Attention", {"target_modules": ["attn"]}),
        ("exclude_modules: 'down' matches nothing", {"target_modules": ["up"], "exclude_modules": ["down"]}),
        ("exclude_modules: 'q_proj' matches nothing", {"target_modules": ["up"], "exclude_modules": ["q_proj"]}),
        ("modules_to_save: 'score' matches nothing", {"target_modules": ["up"], "modules_to_save": ["score"]}),
        ("rank_pattern: 'q_proj' matches none", {"target_modules": ["up"], "rank_pattern": {"q_proj": 2}}),
        ("alpha_pattern: 'p' matches none", {"target_modules": ["up"], "alpha_pattern": {"p": 2}}),
    ],
)
def test_patterns_that_fit_no_layer(message, config):
    with pytest.raises(ValueError, match=message):
        add_lora(Model(), LoRAConfig(**config))


class Subclass(nn.Linear):
    pass


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


def shadowed():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    "layer, why",
    [
        (Subclass(4, 4), "x, which is a Subclass"),
        (nn.LazyLinear(4), "x, which is a LazyLinear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "x, which is a ParametrizedLinear"),
        (hooked(), "x, which has hooks"),
        (shadowed(), "x, which has hooks or a replaced forward"),
        (nn.MultiheadAttention(4, 2), "x.out_proj, which is the output projection of nn.MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 2, 4), "x.linear1, which is in an nn.TransformerEncoderLayer"),
    ],
)
def test_layers_that_lora_could_not_stand_in_for(layer, why):
    model = nn.ModuleDict({"x": layer, "y": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=why):
        add_lora(model, LoRAConfig(target_modules="all-linear"))
    add_lora(model, LoRAConfig(target_modules="all-linear", exclude_modules="x.*"))
    assert model["x"] is layer and isinstance(model["y"], LoRALinear)


def test_output_head_may_be_missing():
    model = Model()
    model.get_output_embeddings = lambda: None
    add_lora(model, LoRAConfig(target_modules="all-linear"))
    assert isinstance(model.lm_head, LoRALinear)


@pytest.mark.parametrize("model, config", [(SimpleNamespace(), LoRAConfig()), (nn.ReLU(), {"r": 8})])
def test_add_lora_wants_a_module_and_a_config(model, config):
    with pytest.raises(TypeError, match="model: got Simple|config: got dict"):
        add_lora(model, config)
