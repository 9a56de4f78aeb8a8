"""Bottleneck adapters: the formula in float64, the fused kernels under the error rule, layers in models."""

import copy
import re
import warnings
from itertools import product

import pytest
import torch
from accuracy import compare
from devices import CPU, CUDA
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import BottleneckAdapter, LoRAConfig, SlowPathWarning, add_bottleneck, add_lora, bottleneck_state_dict
from lora_fast.layers.bottleneck import bottleneck
from lora_fast.reference import ACTIVATIONS

BF16, HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = "x", "down", "up", "down_bias", "up_bias"
SMALL = [(45, 70, 3), (96, 64, 16), (5, 9, 1), (16, 24, 40), (33, 130, 70)]
LARGE = [(8192, 4096, 16), (4096, 4096, 64), (1001, 1003, 12), (4097, 2048, 100), (4, 576, 4)]
CASES = [
    pytest.param(
        *device.values,
        dtype,
        shape,
        marks=device.marks,
        id=f"{device.values[0]}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}",
    )
    for device, dtypes, shapes in ((CPU, (FLOAT, HALF), SMALL), (CUDA, (BF16, HALF, FLOAT), SMALL + LARGE))
    for dtype, shape in product(dtypes, shapes)
]


def draw(m, n, r, dtype, device="cpu", seed=0, adapter=None, bias=True):
    """x [M, N], D [R, N], U [N, R], d [R], u [N] (None without a bias) and dY [M, N], each term of y of the size of
    one."""
    gen = torch.Generator(device).manual_seed(seed)
    kind = adapter or dtype
    sizes = ((m, n), dtype, 1), ((r, n), kind, n**-0.5), ((n, r), kind, r**-0.5), ((r,), kind, 1), ((n,), kind, 1)
    tensors = [(std * torch.randn(*shape, generator=gen, device=device)).to(to) for shape, to, std in sizes]
    dy = torch.randn(m, n, generator=gen, device=device).to(dtype)
    return [*(tensors if bias else [*tensors[:3], None, None]), dy]


def results(fn, tensors, activation="gelu", **kwargs):
    """{name: y and each gradient}."""
    *tensors, dy = tensors
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves, activation, **kwargs)
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    return {"y": y.detach(), **grads}


def plain(x, down, up, down_bias, up_bias, activation):
    """Houlsby's layer as everybody writes it."""
    first, second = (
        nn.Linear(*t.t().shape, bias=b is not None, device=x.device, dtype=x.dtype)
        for t, b in ((down, down_bias), (up, up_bias))
    )
    for layer, weight, b in ((first, down, down_bias), (second, up, up_bias)):
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight.to(x.dtype), b if b is None else b.to(x.dtype)
    act = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[activation]
    return x + second(act(first(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_plain_formula(activation, bias):
    tensors = draw(6, 7, 3, DOUBLE, bias=bias)
    ours, truth = (results(fn, tensors, activation) for fn in (lora_fast.reference.bottleneck, plain))
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name])
    leaves = [t.requires_grad_() for t in tensors[:-1] if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: lora_fast.reference.bottleneck(*t, *[None] * (5 - len(t)), activation=activation), leaves
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_in_float64(activation, bias):
    for shape in ((5, 7, 3), (40, 70, 70))[: 2 if activation == "gelu" else 1]:
        tensors = draw(*shape, DOUBLE, bias=bias)
        ours, truth = results(bottleneck, tensors, activation, backend="triton"), results(plain, tensors, activation)
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name])


@pytest.mark.medium
@pytest.mark.interpreted
def test_kernels_gradcheck():
    leaves = [t.requires_grad_() for t in draw(2, 3, 1, DOUBLE)[:-1]]
    assert torch.autograd.gradcheck(lambda *t: bottleneck(*t, "gelu", backend="triton"), leaves, fast_mode=True)


@pytest.mark.medium
@pytest.mark.parametrize("adapter", [None, FLOAT], ids=["same", "float32"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_kernels(poisoned, device, dtype, shape, adapter):
    if adapter is dtype:
        pytest.skip("the same")
    ours, eagers, truths = [], [], []
    for seed in range(2 if device == "cpu" else 16 if shape[0] * shape[1] < 10000 else 1):
        tensors = draw(*shape, dtype, device, seed, adapter)
        ours.append(results(bottleneck, tensors, backend="triton"))
        assert [t.dtype for t in ours[-1].values()] == [dtype, dtype, *[adapter or dtype] * 4]
        eagers.append(results(plain, tensors))
        truths.append(results(plain, [t.double() for t in tensors]))
    compare(ours, eagers, truths, dtype)


def test_shapes_strides_and_needs(poisoned, device):
    """Zero rows, more dimensions than two, transposed and expanded tensors, one gradient alone."""
    tensors = draw(12, 40, 3, FLOAT, device)
    truth = results(plain, tensors)

    def check(inputs, shape=(12, 40)):
        for name, t in results(bottleneck, inputs, backend="triton").items():
            torch.testing.assert_close(t.reshape(truth[name].shape), truth[name], rtol=1e-4, atol=1e-4)

    check([t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in tensors])
    check([tensors[0].view(2, 6, 40), *tensors[1:-1], tensors[-1].view(2, 6, 40)])
    empty = results(bottleneck, [tensors[0][:0], *tensors[1:-1], tensors[-1][:0]], backend="triton")
    assert empty["y"].shape == (0, 40) and not any(t.any() for t in empty.values())
    vector = bottleneck(tensors[0][0], *tensors[1:-1], backend="triton")
    torch.testing.assert_close(vector, truth["y"][0], rtol=1e-4, atol=1e-4)
    expanded = results(bottleneck, [*tensors[:-1], torch.ones((), device=device).expand(12, 40)], backend="triton")
    ones = results(plain, [*tensors[:-1], torch.ones(12, 40, device=device)])
    torch.testing.assert_close(expanded["dx"], ones["dx"], rtol=1e-4, atol=1e-4)
    for wanted, name in enumerate(NAMES):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors[:-1])]
        bottleneck(*leaves, backend="triton").backward(tensors[-1])
        torch.testing.assert_close(leaves[wanted].grad, truth[f"d{name}"], rtol=1e-4, atol=1e-4)


def test_autocast(path, dtype16):
    """A float32 residual stays float32; the products are autocast's, as accurate as eager's."""
    if path == ("triton", "cpu"):
        pytest.skip("the interpreter is wrong in bfloat16, the CPU's autocast to float16 is slow")
    tensors = draw(45, 70, 3, FLOAT, path[1])
    with torch.autocast(path[1], dtype16):
        ours, eager = results(bottleneck, tensors, backend=path[0]), results(plain, tensors)
    assert all(t.dtype == FLOAT for t in ours.values())
    compare([ours], [eager], [results(plain, [t.double() for t in tensors])], dtype16)


@pytest.mark.medium
def test_opcheck_and_compile(device):
    *leaves, dy = draw(12, 20, 3, FLOAT, device)
    leaves = [t.requires_grad_() for t in leaves]
    from lora_fast.ops import bottleneck as bottleneck_ops  # noqa: F401

    torch.library.opcheck(torch.ops.lora_fast.bottleneck, (*leaves, FLOAT, "gelu"), atol=1e-4, rtol=1e-4)
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")
    ours, again = (results(fn, [*leaves, dy], backend="triton") for fn in (compiled, bottleneck))
    assert all(torch.equal(ours[name], again[name]) for name in again)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(path, reentrant, monkeypatch):
    monkeypatch.setattr(lora_fast.dispatch, "_backend", path[0])
    layer = BottleneckAdapter(16, 3, device=path[1])
    nn.init.normal_(layer.up)
    x = torch.randn(3, 16, device=path[1], requires_grad=True)
    found = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=reentrant)):
        found.append(torch.autograd.grad(run().square().sum(), [x, *layer.parameters()]) if not reentrant else None)
        if reentrant:  # which knows backward() alone
            run().square().sum().backward()
            found[-1] = [t.grad for t in (x, *layer.parameters())]
            layer.zero_grad()
            x.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layer_starts_as_the_identity_and_trains():
    layer = BottleneckAdapter(8, 3)
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), x)
    target = torch.randn(2, 5, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert repr(layer) == "BottleneckAdapter(in_features=8, r=3, activation='gelu', bias=True)"
    layer.reset_parameters()
    assert torch.equal(layer(x), x)
    assert sum(p.numel() for p in BottleneckAdapter(8, 3, bias=False).parameters()) == 48
    half = BottleneckAdapter(8, 3, dtype=BF16)
    assert {p.dtype for p in half.parameters()} == {FLOAT} and half(x.to(BF16)).dtype == BF16


def test_slow_path_is_told(monkeypatch):
    monkeypatch.setattr(lora_fast.dispatch, "_told", set())
    monkeypatch.setattr(lora_fast.dispatch, "_decided", {})
    layer = BottleneckAdapter(8, 3)
    with pytest.warns(SlowPathWarning, match="takes the plain torch path: the tensors are on 'cpu'"):
        layer(torch.randn(2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.o_proj(x)
        return x + self.down_proj(self.up_proj(x).relu())


def stack():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


TARGETS = ["o_proj", "down_proj"]


def test_model():
    """Houlsby's two places: nothing changes at the start, only adapters train, their state goes to another model."""
    base, x = stack(), torch.randn(4, 8)
    model = add_bottleneck(copy.deepcopy(base).eval(), TARGETS, r=3, activation="relu")
    layers = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    assert len(layers) == 4 and not any(layer.training for layer in layers)
    assert torch.equal(model(x), base(x))
    train = {name for name, p in model.named_parameters() if p.requires_grad}
    assert train == set(bottleneck_state_dict(model)) and len(train) == 16
    assert "0.o_proj.bottleneck.down" in train and base.state_dict().keys() < model.state_dict().keys()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # at first only U gets a gradient, and its bias
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for name, p in model.named_parameters() if name in train)
    assert (model(x) - base(x)).abs().max() > 1e-2
    again = add_bottleneck(copy.deepcopy(base), TARGETS, r=3, activation="relu")
    missing, unexpected = again.load_state_dict(bottleneck_state_dict(model), strict=False)
    assert not unexpected and not any("bottleneck" in name for name in missing)
    assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


def test_where_it_acts():
    """On the target's output, before the residual sum."""
    base = stack()
    model = add_bottleneck(copy.deepcopy(base), r".*\.o_proj", r=3)
    nn.init.normal_(model[0].o_proj.bottleneck.up)
    x = torch.randn(4, 8)
    found = model[0].o_proj(x)
    torch.testing.assert_close(found, model[0].o_proj.bottleneck(base[0].o_proj(x)))
    assert not torch.allclose(found, base[0].o_proj(x))
    assert torch.equal(model[0].down_proj(x.repeat(1, 2)), base[0].down_proj(x.repeat(1, 2)))


def test_beside_lora():
    """With ``freeze=False`` LoRA that is there trains too."""
    model = add_lora(stack(), LoRAConfig(r=2, target_modules="all-linear"))
    lora = set(lora_fast.lora_state_dict(model))
    add_bottleneck(model, TARGETS, r=3, freeze=False)
    train = {name for name, p in model.named_parameters() if p.requires_grad}
    assert train == lora | set(bottleneck_state_dict(model)) and len(lora) == 12
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.1 * p.grad
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    frozen = add_bottleneck(add_lora(stack(), LoRAConfig(r=2, target_modules="all-linear")), TARGETS, r=3)
    assert not any(p.requires_grad for p in lora_fast.lora_parameters(frozen))


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"in_features": 0}, ValueError, "in_features: got 0"),
        ({"in_features": 8, "r": 0}, ValueError, "r: got 0"),
        ({"in_features": 8, "r": 2.0}, TypeError, "r: got 2.0"),
        ({"in_features": 8, "r": True}, TypeError, "r: got True"),
        ({"in_features": 8, "activation": "swish"}, ValueError, "activation: got 'swish', expected one of gelu, relu"),
        ({"in_features": 8, "activation": None}, ValueError, "activation: got None"),
        ({"in_features": 8, "bias": 1}, TypeError, "bias: got 1"),
        ({"in_features": 8, "dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
    ],
)
def test_bad_layers(kwargs, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        BottleneckAdapter(**kwargs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": 3}, TypeError, "x: got int"),
        ({"x": torch.ones(2, 8, dtype=torch.int8)}, TypeError, "x: got dtype torch.int8"),
        ({"x": torch.ones(())}, ValueError, "x: got a tensor without dimensions"),
        ({"x": torch.ones(2, 7)}, ValueError, "down: got shape (3, 8), expected [r, 7]"),
        ({"up": torch.ones(3, 8)}, ValueError, "up: got shape (3, 8), expected (8, 3)"),
        ({"down_bias": torch.ones(8)}, ValueError, "down_bias: got shape (8,), expected (3,)"),
        ({"up_bias": torch.ones(3)}, ValueError, "up_bias: got shape (3,), expected (8,)"),
        ({"up": torch.ones(8, 3, device="meta")}, ValueError, "up: got a tensor on meta, expected cpu"),
        ({"up": None}, TypeError, "up: got NoneType"),
        ({"activation": "swish"}, ValueError, "activation: got 'swish'"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    ],
)
def test_bad_arguments(change, error, message):
    *tensors, _ = draw(2, 8, 3, FLOAT)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        bottleneck(**{**dict(zip(NAMES, tensors, strict=True)), **change})


class Named(nn.Linear):
    bottleneck = None


@pytest.mark.parametrize(
    "model, kwargs, error, message",
    [
        (None, {}, TypeError, "model: got NoneType"),
        (stack, {"target_modules": ["q_proj"]}, ValueError, "target_modules: 'q_proj' matches nothing"),
        (stack, {"target_modules": ["0"]}, ValueError, "target_modules: cannot adapt 0 is a Block without"),
        (
            lambda: nn.Sequential(Named(4, 4)),
            {"target_modules": ["0"]},
            ValueError,
            "target_modules: cannot adapt 0 has something else called 'bottleneck'",
        ),
        (
            lambda: nn.MultiheadAttention(8, 2),
            {"target_modules": ["out_proj"]},
            ValueError,
            "target_modules: cannot adapt out_proj is the output projection of nn.MultiheadAttention",
        ),
        (stack, {"r": 0}, ValueError, "r: got 0"),
        (stack, {"freeze": "no"}, TypeError, "freeze: got 'no'"),
        (lambda: add_bottleneck(stack(), TARGETS), {}, ValueError, "model: has bottleneck adapters already"),
    ],
)
def test_bad_models(model, kwargs, error, message):
    model = model and model()
    before = None if model is None else [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        add_bottleneck(model, **{"target_modules": TARGETS, **kwargs})
    assert model is None or before == [(name, p.requires_grad) for name, p in model.named_parameters()]


def test_state_dict_without_adapters():
    with pytest.raises(ValueError, match="has no bottleneck adapters"):
        bottleneck_state_dict(stack())
    layer = BottleneckAdapter(8, 3)
    assert list(bottleneck_state_dict(layer)) == ["down", "up", "down_bias", "up_bias"]
