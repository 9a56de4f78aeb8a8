"""Which modules are MLPs, by their own forward; which layers share an input."""

import contextlib
import copy
import importlib
import inspect
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fast.blocks.predict import siblings_of
from lora_fast.blocks.recognise import Mlp as Found
from lora_fast.blocks.recognise import mlp_of
from lora_fast.blocks.reference import ACTIVATIONS


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
    found = mlp_of(mlp(forward), is_linear)
    assert isinstance(found, Found) and found.activation == activation and found.down == "down"
    assert found.inner[0] == ("up" if name == "names" else "gate")
    assert (found.dropout == "drop") == (name == "dropout")


@pytest.mark.parametrize(
    ("act", "activation"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh")],
)
def test_an_activation_is_known_by_its_type(act, activation):
    found = mlp_of(Mlp(act), is_linear)
    assert isinstance(found, Found) and found.activation == activation and found.act == "act"


def test_activations_of_transformers():
    """Configurations call the GELU by the error function "gelu" and Gemma's "gelu_pytorch_tanh". The number is that of
    the activation that we take it for."""
    from transformers.activations import ACT2FN

    ours = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "gelu_tanh")
    ours |= {name: name for name in ("silu", "gelu", "quick_gelu", "relu", "relu2")}
    e = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for name, activation in ours.items():
        found = mlp_of(Mlp(ACT2FN[name]), is_linear)
        assert isinstance(found, Found) and found.activation == activation
        torch.testing.assert_close(ACT2FN[name](e), ACTIVATIONS[activation](e), rtol=1e-6, atol=1e-6)
    for name in ("gelu_10", "mish", "tanh", "relu6", "leaky_relu"):
        assert isinstance(mlp_of(Mlp(ACT2FN[name]), is_linear), str)


REFUSED = {
    "clamp": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x).clamp(max=7)), "not given act"),
    "multiplier": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x)) * 2, "returns"),
    "inner multiplier": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x) * 2), "not given act"),
    "cast": (lambda s, x: s.down((s.act(s.gate(x)) * s.up(x)).float()), "product of two"),
    "other inputs": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x + 1)), "something else than its input"),
    "two inputs": (lambda s, x, z: s.down(s.act(s.gate(x)) * s.up(z)), "2 inputs"),
    "branch on data": (lambda s, x: s.down(s.act(s.gate(x)) * s.up(x)) if x.sum() > 0 else x, "cannot be traced"),
    "an activation that is not known": (lambda s, x: s.down(F.mish(s.gate(x)) * s.up(x)), "not given act"),
    "the square of another": (lambda s, x: s.down(F.silu(s.gate(x)) ** 2 * s.up(x)), "not given act"),
    "dropout of its own": (lambda s, x: s.down(F.dropout(s.act(s.gate(x)), 0.5) * s.up(x)), "not given act"),
    "one more step": (lambda s, x: (s.up(x + 1), s.down(s.act(s.gate(x)) * s.up(x)))[1], "also does"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gated_mlp(name):
    forward, why = REFUSED[name]
    found = mlp_of(mlp(forward), is_linear)
    assert isinstance(found, str) and why in found


class AlwaysDropout(nn.Dropout):
    """In evaluation, too."""

    def forward(self, x):
        return F.dropout(x, self.p, training=True)


class Two(nn.Module):
    def __init__(self, act=None, wide=6):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(4, wide), nn.Linear(6, 4), act or nn.GELU()
        self.drop, self.after, self.other = nn.Dropout(0.1), nn.Dropout(0.1), AlwaysDropout(0.1)
        self.seen = []
        self.register_buffer("calls", torch.zeros(()))


def two(forward, act=None, wide=6):
    """What it is found to be; which leaves the module as it was."""
    module = type("Variant", (Two,), {"forward": forward})(act, wide)
    before = {name: copy.copy(value) for name, value in vars(module).items()}
    found = mlp_of(module, is_linear)
    assert vars(module) == before and module.calls == 0
    return found


def _chunked(s, x):
    gate, up = s.fc1(x).chunk(2, dim=-1)
    return s.fc2(up * s.act(gate))


def _split(s, x):
    up, gate = torch.split(s.fc1(x), 6, dim=-1)
    return s.fc2(s.act(gate) * up)


def _sliced(s, x):
    y = s.fc1(x)
    return s.fc2(s.act(y[..., 6:]) * y[..., :6])


def _relu2(s, x):
    return s.fc2(torch.square(F.relu(s.fc1(x))))


TWO = {  # the forward, the rows of fc1, then activation, gate, dropout and what comes after
    "plain": (lambda s, x: s.fc2(s.act(s.fc1(x))), 6, "gelu", None, None, None),
    "dropouts": (lambda s, x: s.after(s.fc2(s.drop(s.act(s.fc1(x))))), 6, "gelu", None, "drop", "after"),
    "no dropout": (lambda s, x: F.dropout(s.fc2(s.act(s.fc1(x))), p=0.0), 6, "gelu", None, None, None),
    "relu": (lambda s, x: s.fc2(torch.relu(s.fc1(x))), 6, "relu", None, None, None),
    "a method": (lambda s, x: s.fc2(s.fc1(x).relu()), 6, "relu", None, None, None),
    "squared": (_relu2, 6, "relu2", None, None, None),
    "a power": (lambda s, x: s.fc2(F.relu(s.fc1(x)) ** 2), 6, "relu2", None, None, None),
    "chunk": (_chunked, 12, "gelu", "first", None, None),
    "split": (_split, 12, "gelu", "second", None, None),
    "slices": (_sliced, 12, "gelu", "second", None, None),
}


@pytest.mark.parametrize("name", TWO)
def test_forms_of_two_layers(name):
    forward, wide, *expected = TWO[name]
    found = two(forward, wide=wide)
    assert isinstance(found, Found) and found.layers == ("fc1", "fc2")
    assert [found.activation, found.gate, found.dropout, found.after] == expected


def _thirds(s, x):
    gate, up, _ = s.fc1(x).chunk(3, dim=-1)
    return s.fc2(up * s.act(gate))


def _interleaved(s, x):
    y = s.fc1(x)
    return s.fc2(s.act(y[..., ::2]) * y[..., 1::2])


def _unequal(s, x):
    up, gate = s.fc1(x).split([5, 7], dim=-1)
    return s.fc2(s.act(gate)[..., :5] * up)


def _rows(s, x):
    gate, up = s.fc1(x).chunk(2, dim=0)
    return s.fc2(up * s.act(gate))


def _twice(s, x):
    gate, _ = s.fc1(x).chunk(2, dim=-1)
    return s.fc2(gate * s.act(gate))


def _frozen_half(s, x):
    with torch.no_grad():
        y = s.fc1(x)
    return s.fc2(s.act(y))


def _in_16_bits(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        return s.fc2(s.act(s.fc1(x)))


def _checkpointed(s, x):
    return checkpoint(lambda x: s.fc2(s.act(s.fc1(x))), x, use_reentrant=False)


def _remembered(s, x):
    s.last = s.act(s.fc1(x))
    return s.fc2(s.last)


def _listed(s, x):
    h = s.act(s.fc1(x))
    return s.fc2(s.seen.append(h) or h)


def _counted(s, x):
    _ = s.calls.add_(1)
    return s.fc2(s.act(s.fc1(x)))


def _in_training(s, x):
    y = s.fc2(s.act(s.fc1(x)))
    return y + x if s.training else y


def _in_evaluation(s, x):
    return s.fc2(s.act(s.fc1(x))) if s.training else s.fc2(F.relu(s.fc1(x)))


NOT_TWO = {
    "no_grad": (_frozen_half, 6, "under no_grad"),
    "autocast": (_in_16_bits, 6, "under no_grad, autocast"),
    "a checkpoint": (_checkpointed, 6, "a checkpoint"),
    "an attribute set": (_remembered, 6, "writes to last"),
    "a list": (_listed, 6, "writes to seen"),
    "a buffer": (_counted, 6, "also does calls, add_"),
    "a branch of training": (_in_training, 6, "returns"),
    "a branch of evaluation": (_in_evaluation, 6, "another one in evaluation"),
    "a dropout of its own kind": (lambda s, x: s.fc2(s.other(s.act(s.fc1(x)))), 6, "neither a product"),
    "a residual": (lambda s, x: x + s.fc2(s.act(s.fc1(x))), 6, "returns"),
    "a norm between": (lambda s, x: s.fc2(F.layer_norm(s.act(s.fc1(x)), (6,))), 6, "neither a product"),
    "dropout ahead of the activation": (lambda s, x: s.fc2(s.act(s.drop(s.fc1(x)))), 6, "nor act of a layer's"),
    "dropout with a number": (lambda s, x: F.dropout(s.fc2(s.act(s.fc1(x))), p=0.1), 6, "returns"),
    "one layer twice": (lambda s, x: s.fc2(s.act(s.fc2(x))), 6, "two things"),
    "thirds": (_thirds, 18, "not given act"),
    "interleaved": (_interleaved, 12, "not given act"),
    "unequal parts": (_unequal, 12, "not given act"),
    "halves of the rows": (_rows, 12, "not given act"),
    "one half twice": (_twice, 12, "not given act"),
}


@pytest.mark.parametrize("name", NOT_TWO)
def test_what_is_no_mlp_of_two_layers(name):
    forward, wide, why = NOT_TWO[name]
    found = two(forward, wide=wide)
    assert isinstance(found, str) and why in found, found


class Tape:
    """What the forwards below write to beside the module: h, a list and a count."""

    def __init__(self):
        self.h, self.items, self.count, self.array = None, [], torch.zeros(()), np.zeros(1)

    def recorded(self, h):
        self.h = h
        return h


TAPE, FLAGS, CALLS = Tape(), {"double": False}, 0


def _taped(s, x):
    s.tape.h = h = s.act(s.fc1(x))
    return s.fc2(h)


def _taped_by_a_method(s, x):
    return s.fc2(s.tape.recorded(s.act(s.fc1(x))))


def _taped_in_a_list(s, x):
    h = s.act(s.fc1(x))
    s.tape.items.append(1)
    return s.fc2(h)


def _set(s, x):
    h = s.act(s.fc1(x))
    setattr(s.tape, "h", h)  # noqa: B010
    return s.fc2(h)


def _tensor(s, x):
    s.tape.count += 1
    return s.fc2(s.act(s.fc1(x)))


def _tensor_by_another_name(s, x):
    count = s.tape.count
    count *= 2
    return s.fc2(s.act(s.fc1(x)))


def _array(s, x):
    s.tape.array[0] += 1
    return s.fc2(s.act(s.fc1(x)))


def _array_by_another_name(s, x):
    array = s.tape.array
    array += 1
    return s.fc2(s.act(s.fc1(x)))


def _global(s, x):
    global CALLS
    CALLS += 1
    return s.fc2(s.act(s.fc1(x)))


def _flag(s, x):
    return s.fc2(s.act(s.fc1(2 * x if FLAGS["double"] else x)))


def _object(s, x):
    return s.fc2(s.act(s.fc1(2 * x if TAPE.h is not None else x)))


def _closed_over(flags):
    return lambda s, x: s.fc2(s.act(s.fc1(2 * x if flags["double"] else x)))


def _helper(s, h):
    s.tape.h = h
    return h


def _helped(s, x):
    return s.fc2(_helper(s, s.act(s.fc1(x))))


EFFECTS = {
    "an attribute of another object": (_taped, "writes to h"),
    "a method of another object": (_taped_by_a_method, "keeps what it makes"),
    "a list of another object": (_taped_in_a_list, "calls something for nothing but its effect"),
    "setattr": (_set, "calls something for nothing but its effect"),
    "a tensor": (_tensor, "writes to count"),
    "a tensor by another name": (_tensor_by_another_name, "also does mul_ to a tensor"),
    "an array": (_array, "writes to an item"),
    "an array by another name": (_array_by_another_name, "changes something in place"),
    "a global": (_global, "writes to CALLS"),
    "a global flag": (_flag, "reads FLAGS"),
    "a global object": (_object, "reads TAPE"),
    "a closure": (_closed_over(FLAGS), "reads flags"),
    "a function that it calls": (_helped, "writes to h"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_what_a_forward_does_besides(name):
    """A trace would do it twice, and then never again."""
    forward, why = EFFECTS[name]
    module = type("Variant", (Two,), {"forward": forward})()
    module.tape = Tape()
    found = mlp_of(module, is_linear)
    assert isinstance(found, str) and why in found, found
    assert module.tape.count == module.tape.array == 0 and not module.tape.items and CALLS == 0


def test_effects_of_methods():
    class Whole(Two):
        def forward(self, x):
            return self.fc2(self.hidden(x))

        def hidden(self, x):
            return self.act(self.fc1(x))

    class Counting(Whole):
        count = 0

        def hidden(self, x):
            Counting.count += 1
            return super().hidden(x)

    class Around(Counting):
        hidden = Whole.hidden

        def forward(self, x):
            return super().forward(x)

    assert isinstance(mlp_of(Whole(), is_linear), Found) and isinstance(mlp_of(Around(), is_linear), str)
    assert mlp_of(Counting(), is_linear) == "it also writes to count"


def test_a_forward_that_leaves_gradients_switched():
    """The one that patches has them as they were."""

    def forward(s, x):
        before = torch.is_grad_enabled(), torch.set_grad_enabled(False)
        h = s.fc1(x)
        return s.fc2(s.act(h)), before

    assert torch.is_grad_enabled() and isinstance(found := two(forward), str)
    assert torch.is_grad_enabled() and "under no_grad" in found


def test_a_branch_is_taken_as_the_instance_takes_it():
    def forward(self, x):
        if self.limit:
            return self.down(self.act(self.gate(x)).clamp(max=self.limit) * self.up(x))
        return self.down(self.act(self.gate(x)) * self.up(x))

    plain, limited = mlp(forward), mlp(forward)
    plain.limit, limited.limit = None, 7.0
    assert isinstance(mlp_of(plain, is_linear), Found) and isinstance(mlp_of(limited, is_linear), str)


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
GLUS = [f"{name}MLP" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite")]
GEMMAS, HALVES = [f"Gemma{i}MLP" for i in ("", 2, 3)], [f"{name}MLP" for name in ("Phi3", "Glm", "Glm4")]
GELUS, OTHERS = ["GPT2MLP", "GPTNeoMLP", "PhiMLP"], ["ModernBertMLP", "T5DenseActDense", "CLIPMLP", "ViTMLP", "FFN"]
NONE = ["FalconH1MLP", "DeepseekV4MLP", "Step3p7MLP", "BloomMLP", "Kosmos2TextFFN", "ApertusMLP"]
NO_MLP = re.compile("Attention|Mixer|DeltaNet|Model|ForCausal|Head|Pooler|Classif|Layer")


def is_a_layer(module):
    return type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D)


def candidates(path):
    """Names of the classes of a file of transformers' that have two linear layers."""
    for name, body in GATED.findall(path.read_text()):
        layers = re.findall(r"nn\.Linear\(|Conv1D\(", body)
        if not NO_MLP.search(name) and len(layers) >= 2 and "def forward" in body:
            yield name


def made_of(kinds):
    """Configurations, each made once."""
    for kind in kinds:
        with contextlib.suppress(Exception):
            yield kind()


def built(kind, configs):
    """Instances of a class on the meta device, of each configuration that it takes."""
    for made in configs:
        with contextlib.suppress(Exception), torch.device("meta"):
            given = {"config": made, "layer_idx": 0, "hidden_act": "silu", "act": "silu", "activation": "silu"}
            needed = [p for p in list(inspect.signature(kind.__init__).parameters.values())[1:] if p.default is p.empty]
            yield kind(**{p.name: given.get(p.name, 64) for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD})


@pytest.mark.slow
def test_the_mlps_of_transformers():
    """Every MLP of transformers that can be built on the meta device is one, gated or not; those with clamps,
    multipliers or casts are none."""
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
        kinds = [c for n, c in vars(configurations).items() if n.endswith("Config") and inspect.isclass(c)]
        configs = list(made_of(kinds))
        for name in names:
            for module in built(getattr(modules, name), configs):
                found = mlp_of(module, is_a_layer)
                if isinstance(found, Found):
                    form = "glu" if len(found.inner) == 2 else "fc" if found.gate is None else "halves"
                    accepted[name] = form, found.activation
                    break
                refused.setdefault(name, found)
    logging.disable(logging.NOTSET)
    forms = Counter(form for form, _ in accepted.values())
    assert forms["glu"] >= 146 and forms["halves"] >= 15 and forms["fc"] >= 170, forms
    assert [accepted[name] for name in GLUS] == [("glu", "silu")] * 6
    assert [accepted[name] for name in GEMMAS] == [("glu", "gelu_tanh")] * 3
    assert [accepted[name] for name in HALVES] == [("halves", "silu")] * 3
    assert [accepted[name] for name in GELUS] == [("fc", "gelu_tanh")] * 3
    gelu = "fc", "gelu"
    assert [accepted[name] for name in OTHERS] == [("halves", "gelu"), ("fc", "relu"), ("fc", "quick_gelu"), gelu, gelu]
    for name in NONE:
        assert name in refused, name
