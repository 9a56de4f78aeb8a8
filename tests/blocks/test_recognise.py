"""Which modules are gated MLPs, by their own forward; which layers share an input."""

import contextlib
import importlib
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fast.blocks.recognise import Glu, glu_of, siblings_of


def is_linear(module):
    return type(module) is nn.Linear


class Mlp(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act = nn.SiLU() if act is None else act
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def mlp(forward, act=None):
    return type("Variant", (Mlp,), {"forward": forward})(act)


ACCEPTED = {
    "other order": (lambda s, x: s.down(s.up(x) * s.act(s.gate(x))), "silu"),
    "dropout": (lambda s, x: s.down(s.drop(s.act(s.gate(x)) * s.up(x))), "silu"),
    "a function": (lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)), "silu"),
    "gelu": (lambda s, x: s.down(F.gelu(s.gate(x)) * s.up(x)), "gelu"),
    "tanh gelu": (lambda s, x: s.down(F.gelu(s.gate(x), approximate="tanh") * s.up(x)), "gelu_tanh"),
    "torch.mul": (lambda s, x: s.down(torch.mul(s.act(s.gate(x)), s.up(x))), "silu"),
    "names": (lambda s, x: s.down(s.act(s.up(x)) * s.gate(x)), "silu"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_forms_of_a_gated_mlp(name):
    forward, activation = ACCEPTED[name]
    found = glu_of(mlp(forward), is_linear)
    assert isinstance(found, Glu) and found.activation == activation and found.down == "down"
    assert found.gate == ("up" if name == "names" else "gate")
    assert (found.dropout == "drop") == (name == "dropout")


@pytest.mark.parametrize(
    ("act", "activation"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh")],
)
def test_an_activation_is_known_by_its_type(act, activation):
    found = glu_of(Mlp(act), is_linear)
    assert isinstance(found, Glu) and found.activation == activation and found.act == "act"


def test_activations_of_transformers():
    """Configurations call the GELU by the error function "gelu" and Gemma's "gelu_pytorch_tanh"."""
    from transformers.activations import ACT2FN

    for name, activation in (("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        found = glu_of(Mlp(ACT2FN[name]), is_linear)
        assert isinstance(found, Glu) and found.activation == activation
    assert isinstance(glu_of(Mlp(ACT2FN["quick_gelu"]), is_linear), str)


REFUSED = {
    "clamp": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x).clamp(max=7)), "not given act"),
    "multiplier": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x)) * 2, "returns"),
    "inner multiplier": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x) * 2), "not given act"),
    "cast": (lambda s, x: s.down((s.act(s.gate(x)) * s.up(x)).float()), "product of two"),
    "other inputs": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x + 1)), "not given act"),
    "two inputs": (lambda s, x, z: s.down(s.act(s.gate(x)) * s.up(z)), "2 inputs"),
    "branch on data": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x)) if x.sum() > 0 else x, "cannot be traced"),
    "relu": (lambda s, x: s.down(F.relu(s.gate(x)) * s.up(x)), "not given act"),
    "one more step": (lambda s, x: (s.up(x + 1), s.down(s.act(s.gate(x)) * s.up(x)))[1], "also does"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gated_mlp(name):
    forward, why = REFUSED[name]
    found = glu_of(mlp(forward), is_linear)
    assert isinstance(found, str) and why in found


def test_a_branch_is_taken_as_the_instance_takes_it():
    def forward(self, x):
        if self.limit:
            return self.down(self.act(self.gate(x)).clamp(max=self.limit) * self.up(x))
        return self.down(self.act(self.gate(x)) * self.up(x))

    plain, limited = mlp(forward), mlp(forward)
    plain.limit, limited.limit = None, 7.0
    assert isinstance(glu_of(plain, is_linear), Glu) and isinstance(glu_of(limited, is_linear), str)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, hidden, other=None):
        q = self.q(hidden).view(-1, 4)
        k, v = self.k(hidden), self.v(hidden)
        return self.o(q + k + v)


class Cross(Attention):
    def forward(self, hidden, other=None):
        q = self.q(hidden)
        if other is not None:
            return self.o(q + self.k(other) + self.v(other))
        hidden = hidden + 1
        return self.o(q + self.k(hidden))


class Changed(Attention):
    def forward(self, hidden, other=None):
        q = self.q(hidden)
        hidden = hidden * 2
        return self.o(q + self.k(hidden) + self.v(hidden))


def test_layers_with_one_input():
    names = ("q", "k", "v", "o")
    assert siblings_of(Attention(), names) == [("q", "k", "v")]
    assert siblings_of(Attention(), ("q", "v")) == [("q", "v")]
    assert siblings_of(Cross(), names) == [("k", "v")]
    assert siblings_of(Changed(), names) == [("k", "v")]
    assert siblings_of(Attention(), ("o",)) == []
    scope: dict = {}
    exec("class Sourceless(Base):\n def forward(self, x):\n  return self.q(x) + self.k(x)", {"Base": Attention}, scope)
    assert siblings_of(scope["Sourceless"](), names) == []


GATED = re.compile(r"^class (\w+)\(.*?\):\n(.*?)(?=^class |^def |^@|\Z)", re.M | re.S)
NO_MLP = re.compile("Attention|Mixer|DeltaNet|Model|ForCausal")


def candidates(path):
    """Names of the classes of a file of transformers' that have three linear layers and multiply."""
    for name, body in GATED.findall(path.read_text()):
        if not NO_MLP.search(name) and body.count("nn.Linear(") >= 3 and " * " in body and "def forward" in body:
            yield name


def built(kind, configs):
    """Instances of a class on the meta device, of each configuration that it takes."""
    for config in configs:
        with contextlib.suppress(Exception), torch.device("meta"):
            made = config()
            given = {"config": made, "layer_idx": 0, "hidden_act": "silu", "act": "silu", "activation": "silu"}
            needed = [p for p in list(inspect.signature(kind.__init__).parameters.values())[1:] if p.default is p.empty]
            yield kind(**{p.name: given.get(p.name, 64) for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD})


@pytest.mark.slow
def test_the_mlps_of_transformers():
    """Every gated MLP of transformers that can be built on the meta device is one; those with clamps, multipliers or
    casts are none."""
    logging.disable(logging.WARNING)
    root = Path(importlib.import_module("transformers.models").__path__[0])
    accepted, refused = {}, {}
    for path in sorted(root.glob("*/modeling_*.py")):
        if not (names := list(candidates(path))):
            continue
        folder = f"transformers.models.{path.parent.name}"
        try:
            modules = importlib.import_module(f"{folder}.{path.stem}")
            configurations = importlib.import_module(f"{folder}.{path.stem.replace('modeling', 'configuration')}")
        except ImportError:  # of a package that is not there
            continue
        configs = [c for n, c in vars(configurations).items() if n.endswith("Config") and inspect.isclass(c)]
        for name in names:
            verdicts = [glu_of(module, is_linear) for module in built(getattr(modules, name), configs)]
            found = next((verdict for verdict in verdicts if isinstance(verdict, Glu)), None)
            if found is not None:
                accepted[name] = found.activation
            elif verdicts:
                refused[name] = verdicts[0]
    logging.disable(logging.NOTSET)
    assert len(accepted) >= 140
    assert {accepted[f"{name}MLP"] for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite")} == {"silu"}
    assert {accepted[f"{name}MLP"] for name in ("Gemma", "Gemma2", "Gemma3")} == {"gelu_tanh"}
    for name in ("FalconH1MLP", "DeepseekV4MLP", "Step3p7MLP", "SeedOssMLP", "T5DenseGatedActDense"):
        assert name in refused, name
