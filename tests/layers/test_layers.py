"""LoRALinear: a linear layer to everybody around it, with an adapter inside."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import LoRALinear, SlowPathWarning

CHANGED = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def layer():
    return LoRALinear(7, 5, **CHANGED)


@pytest.fixture
def on_path(path):
    """The device of each path, with that path chosen for every layer."""
    lora_fast.set_backend(path[0])
    return path[1]


def bits(tensor):
    return tensor.detach().clone()


def formula(layer, x):
    low = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    return F.linear(x, layer.base_weight, layer.bias) + low * layer.scaling


def test_trains_like_its_formula(on_path):
    layer = LoRALinear(7, 5, **CHANGED, device=on_path)
    x = torch.randn(2, 4, 7, device=on_path)
    y = layer(x)
    expected = formula(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    y.backward(dy)
    for ours, truth in zip(
        (layer.lora_A, layer.lora_B), torch.autograd.grad(expected, [layer.lora_A, layer.lora_B], dy), strict=True
    ):
        torch.testing.assert_close(ours.grad, truth, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_starts_as_its_base(on_path):
    layer = LoRALinear(7, 5, r=2, device=on_path)
    x = torch.randn(3, 7, device=on_path)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_dropout_follows_the_training_flag(on_path):
    layer = LoRALinear(16, 5, lora_dropout=0.5, **CHANGED, device=on_path)
    x = torch.randn(3, 16, device=on_path)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_with_dropout(on_path, reentrant):
    layer = LoRALinear(16, 5, lora_dropout=0.5, **CHANGED, device=on_path)
    x = torch.randn(3, 16, device=on_path, requires_grad=True)

    def grads(run):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        run().sum().backward()
        return x.grad, layer.lora_A.grad, layer.lora_B.grad

    plain = grads(lambda: layer(x))
    again = grads(lambda: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_is_a_linear_layer(layer):
    base = nn.Linear(7, 5)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == base.weight.shape and layer.bias.shape == base.bias.shape
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert LoRALinear(7, 5, bias=False).bias is None
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not any(p.requires_grad for p in (layer.weight, layer.bias))


@pytest.mark.parametrize(
    "base, adapter",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(base, adapter):
    for layer in (LoRALinear(7, 5, dtype=base), LoRALinear.from_linear(nn.Linear(7, 5, dtype=base))):
        found = [t.dtype for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)]
        assert found == [base, base, adapter, adapter]
        assert layer(torch.ones(2, 7, dtype=base)).dtype == base


def test_initialisation():
    layer = LoRALinear(400, 300, r=16)
    limit = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert not layer.lora_B.any()
    assert 0.99 * limit < layer.lora_A.abs().max() <= limit
    assert layer.lora_A.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    layer.reset_lora_parameters("gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.03) and not layer.lora_B.any()
    before = bits(layer.lora_A)
    layer.reset_lora_parameters(False)
    assert layer.lora_B.abs().max() > 0.9 / math.sqrt(16) and not torch.equal(layer.lora_A, before)
    with pytest.raises(ValueError, match="init_lora_weights: got 'pissa'"):
        layer.reset_lora_parameters("pissa")


def test_scaling():
    assert LoRALinear(7, 5, r=4, lora_alpha=6).scaling == 1.5
    assert LoRALinear(7, 5, r=4, lora_alpha=6, use_rslora=True).scaling == 3.0
    assert LoRALinear(7, 5, r=100).scaling == 0.08  # a rank above both sizes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_and_freezes(bias, training):
    linear = nn.Linear(7, 5, bias=bias).train(training)
    layer = LoRALinear.from_linear(linear, **CHANGED)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and layer.training is training
    assert (layer.r, layer.lora_alpha, layer.lora_A.device) == (3, 6, linear.weight.device)
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert back.training is training and (back.in_features, back.out_features) == (7, 5)


def hooked() -> nn.Linear:
    linear = nn.Linear(7, 5)
    linear.register_forward_hook(lambda *_: None)
    return linear


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "linear, message",
    [
        (nn.Conv1d(1, 1, 1), "is a Conv1d, not a plain nn.Linear"),
        (LoRALinear(7, 5), "is a LoRALinear, not a plain"),
        (OwnForward(7, 5), "is a OwnForward, not a plain"),
        (nn.MultiheadAttention(8, 2).out_proj, "output projection of nn.MultiheadAttention"),
        (None, "is a NoneType"),
        (hooked(), "has hooks or a replaced forward"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_linear_refuses(linear, message):
    with pytest.raises(TypeError, match=f"^linear: .*{message}"):
        LoRALinear.from_linear(linear)
    if isinstance(linear, nn.Linear) and not isinstance(linear, LoRALinear):
        assert linear.weight.requires_grad


def test_from_linear_refuses_a_quantised_weight():
    linear = nn.Linear(7, 5)
    linear.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="^linear: .*quantised weight"):
        LoRALinear.from_linear(linear)


BAD = [
    (ValueError, "r", 0),
    (ValueError, "r", -1),
    (TypeError, "r", 2.0),
    (TypeError, "r", True),
    (TypeError, "lora_alpha", "8"),
    (ValueError, "lora_alpha", math.nan),
    (ValueError, "lora_alpha", math.inf),
    (ValueError, "lora_dropout", 1.0),
    (ValueError, "lora_dropout", -0.1),
    (ValueError, "lora_dropout", math.nan),
    (TypeError, "lora_dropout", None),
    (ValueError, "init_lora_weights", "pissa"),
    (ValueError, "init_lora_weights", None),
]


@pytest.mark.parametrize("error, name, value", BAD)
def test_bad_hyperparameters(error, name, value):
    linear = nn.Linear(7, 5)
    for make in (lambda **kw: LoRALinear(7, 5, **kw), lambda **kw: LoRALinear.from_linear(linear, **kw)):
        with pytest.raises(error, match=rf"^{name}: got .*expected"):
            make(**{name: value})
    assert linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="^dtype: got .*expected float16"):
        LoRALinear(7, 5, dtype=dtype)
    with pytest.raises(TypeError, match="^use_rslora: got 'no'"):
        LoRALinear(7, 5, use_rslora="no")


@pytest.mark.parametrize("merged", [False, True])
def test_disable_gives_the_base(layer, merged):
    x = torch.randn(3, 7)
    adapted, base = layer(x), F.linear(x, layer.weight, layer.bias)
    if merged:
        layer.merge()
    layer.disable()
    assert not layer.enabled and torch.equal(layer(x), base)
    layer.enable()
    assert layer.enabled
    torch.testing.assert_close(layer(x), adapted)


def test_extra_repr(layer):
    assert repr(layer) == "LoRALinear(in_features=7, out_features=5, bias=True, r=3, lora_alpha=6, lora_dropout=0.0)"
    layer.merge()
    layer.disable()
    assert layer.extra_repr().endswith(", merged, disabled")
    assert "use_rslora=True" in LoRALinear(7, 5, use_rslora=True).extra_repr()


def test_on_the_meta_device():
    layer = LoRALinear(7, 5, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.ones(3, 7, device="meta")).shape == (3, 5)
    layer.to_empty(device="cpu").reset_lora_parameters()
    assert layer.lora_A.isfinite().all() and layer.lora_A.any() and not layer.lora_B.any()


def test_in_place_activation_after_it(on_path):
    layer = LoRALinear(7, 5, **CHANGED, device=on_path)
    x = torch.randn(3, 7, device=on_path)
    y = nn.Sequential(layer, nn.ReLU(inplace=True))(x)
    torch.testing.assert_close(y, formula(layer, x).relu(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert layer.lora_B.grad.any()


def test_compiled(on_path):
    torch._dynamo.reset()
    layer = LoRALinear(7, 5, **CHANGED, device=on_path)
    x = torch.randn(3, 7, device=on_path)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), formula(layer, x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert layer.lora_A.grad.any()


def test_frozen_adapters(on_path):
    layer = LoRALinear(7, 5, **CHANGED, device=on_path)
    layer.lora_A.requires_grad_(False)
    layer(torch.randn(3, 7, device=on_path)).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad.any()


def test_warns_of_the_slow_path_at_the_caller(layer, monkeypatch):
    monkeypatch.setattr(lora_fast.dispatch, "_told", set())
    monkeypatch.setattr(lora_fast.dispatch, "_decided", {})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        layer(torch.ones(1, 7))
        layer(torch.ones(1, 7))
    assert [w.category for w in told] == [SlowPathWarning] and told[0].filename == __file__
