"""DoRA: the norm, the operator on every path, the layer, whole models."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accuracy import allowed, check_one_mask, draw, error, with_mask
from devices import PATHS
from dora_forms import NAMES, eager, hold, magnitude, op, plain, results
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import DoRALinear, LoRAConfig, add_lora, lora_parameters, reference
from lora_fast.functional import dora_linear, dora_norm

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEYS = ["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(ours, expected, tolerance=1e-4):
    """Of tensors, sequences or dicts of them."""
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def dense(weight, a, b, scaling):
    """The norms from V in float64."""
    return torch.linalg.vector_norm(weight.double() + float(scaling) * b.double() @ a.double(), dim=1)


def off(norm, *v):
    """The largest relative error; a row of zero norm must be exact."""
    truth = dense(*v)
    return ((norm.double() - truth).abs() / torch.where(truth > 0, truth, 1e-30)).max().item()


def small(path):
    inputs = draw(12, 19, 11, 3, FLOAT, path[1])
    return inputs, magnitude(inputs)


# The norm


@pytest.mark.parametrize("scaling", [1e-8, 0, 0.5, 1e6, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("n, k, r", [(45, 70, 3), (12, 8, 40), (1030, 33, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_norm(device, n, k, r, scaling):
    """Also with more ranks than columns and more rows than reference.ROWS; zero rows have norm 0."""
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.to(device)
    inputs = draw(1, k, n, r, FLOAT, device)
    inputs.weight[[7, n - 1]], inputs.lora_B[[7, n - 1]] = 0.0, 0.0
    v = inputs.weight, inputs.lora_A.requires_grad_(), inputs.lora_B
    found = dora_norm(*v, scaling)
    assert found.dtype == FLOAT and found.shape == (n,) and not found.requires_grad
    assert off(found, *v, scaling) <= 1e-5


@pytest.mark.parametrize("left, bound", [(0.1, 1e-3), (1e-2, 1e-3), (1e-3, 1e-3), (1e-4, 1e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_rows_that_cancel(device, left, bound):
    """W = -s B A but for the share ``left`` in every third row: there the factored sum alone would be noise."""
    inputs = draw(1, 24, 1030, 5, FLOAT, device, b_std=1.0)
    update, rest = 0.5 * inputs.lora_B.double() @ inputs.lora_A.double(), inputs.weight.double()
    some = torch.arange(1030, device=device) % 3 == 1
    rest *= left * update.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
    v = torch.where(some[:, None], rest - update, inputs.weight).float(), inputs.lora_A, inputs.lora_B
    share = dense(*v, 0.5) / v[0].double().norm(dim=1)
    assert 0.8 * left < share[some].min() and share[some].max() < 1.2 * left
    found = dora_norm(*v, 0.5)
    assert off(found[some], v[0][some], v[1], v[2][some], 0.5) <= bound
    assert off(found[~some], v[0][~some], v[1], v[2][~some], 0.5) <= 1e-5


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_16_bit_weights(device, dtype):
    """Computed in float32, whatever autocast says."""
    inputs = draw(1, 70, 45, 3, dtype, device, adapter=FLOAT)
    v = inputs.weight, inputs.lora_A, inputs.lora_B, 0.5
    found = dora_norm(*v)
    assert found.dtype == FLOAT and off(found, *v) <= 1e-5
    with torch.autocast(device, dtype=BF16):
        assert torch.equal(dora_norm(*v), found)
        assert off(reference.dense_norm(*v), *v) <= 1e-5
    for i in range(3):
        wide = [t.double() if i == j else t for j, t in enumerate(v[:3])]
        assert dora_norm(*wide, 0.5).dtype == DOUBLE and off(dora_norm(*wide, 0.5), *wide, 0.5) <= 1e-13


# The operator

TYPES = [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BF16, None), (BF16, FLOAT)]
SHAPES = [(7, 19, 11, 3), (33, 40, 24, 16), (5, 12, 8, 40)]
CASES = [
    pytest.param(*path[:2], *types, shape, marks=path[2])
    for path in PATHS
    for types in TYPES
    for shape in SHAPES
    if path[:2] != ("triton", "cpu") or (types in TYPES[:3:2] and shape == SHAPES[0])
]


@pytest.mark.medium
@pytest.mark.parametrize("backend, device, dtype, adapter, shape", CASES, ids=str)
def test_error_rule(backend, device, dtype, adapter, shape):
    """With biases up to 1 and up to 100."""
    for largest in (1, 100) if (backend, device) != ("triton", "cpu") else (100,):
        draws = [draw(*shape, dtype, device, seed, adapter=adapter) for seed in range(16)]
        for inputs in draws:
            inputs.bias *= largest / inputs.bias.abs().max()
        hold(lambda inputs: op(backend), draws)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
@pytest.mark.parametrize("device", DEVICES)
def test_error_rule_with_dropout(device, dtype):
    draws = [draw(33, 40, 24, 16, dtype, device, seed, adapter=FLOAT) for seed in range(16)]
    draws = [with_mask(inputs, torch.rand(inputs.x.shape, device=device) >= 0.3, 1 / 0.7) for inputs in draws]

    def of(inputs):
        return lambda x, w, a, b, m, bias: reference.dora_linear(x, w, a, b, m, 2.0, bias, 0.3, keep=inputs.keep)

    hold(of, draws)


def test_error_rule_with_gradients_through_the_norm(path):
    draws = [draw(17, 19, 11, 3, FLOAT, path[1], seed) for seed in range(6)]
    hold(lambda inputs: op(path[0], detach_norm=False), draws, detach=False)


def test_the_output_is_rounded_once(path, dtype16):
    """Where z is a whole number, y is within half a unit in its last place, however loud the bias."""
    inputs = draw(12, 40, 24, 3, dtype16, path[1], b_std=0.0)
    inputs.x, inputs.weight, m = inputs.x.round(), (6 * inputs.weight).round(), magnitude(inputs).float()
    inputs.bias[::2] *= 100
    y, truth = results(op(path[0]), inputs, m)["y"].double(), results(plain(), inputs, m, DOUBLE)["y"]
    assert ((y - truth).abs() <= 0.51 * torch.finfo(dtype16).eps * truth.abs() + 1e-5).all()


def test_forward_and_backward_use_one_mask(path):
    """y is linear in each of x, A, B (beside the constant norm) and m, with one mask for all of them."""
    inputs, m = small(path)
    inputs.weight, inputs.bias = torch.zeros_like(inputs.weight), None
    ours = results(op(path[0], 0.5), inputs, m)
    check_one_mask(inputs, ours)
    close((ours["dm"] * m).sum(), (ours["y"] * inputs.dy).sum())
    assert not torch.equal(ours["y"], results(op(path[0], 0.5), inputs, m)["y"])
    assert torch.equal(*(results(op(path[0], p, training=False), inputs, m)["y"] for p in (0.0, 0.5)))


@pytest.mark.parametrize("through", [False, True], ids=["constant_norm", "through_the_norm"])
def test_gradients_in_float64(through):
    """By default LoRA's formulas with dZ = dY m / n, and sum(dY z) / n; else the derivative of all."""
    inputs, keep = draw(4, 7, 5, 3, DOUBLE), torch.rand(4, 7) >= 0.4
    w, dy = inputs.weight, inputs.dy
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B, magnitude(inputs), inputs.bias)]
    x, a, b, m, bias = leaves

    def fn(x, a, b, m, bias):
        return reference.dora_linear(
            x, w, a, b, m, 2.0, bias, 0.4, keep=keep, **({"detach_norm": False} if through else {})
        )

    found = torch.autograd.grad(fn(*leaves), leaves, dy)
    with torch.no_grad():
        n, dropped = dense(w, a, b, 2.0), x * keep / 0.6
        z, dz = x @ w.T + 2 * dropped @ a.T @ b.T, dy * m / n
        expected = (
            dz @ w + 2 * dz @ b @ a * keep / 0.6,
            2 * (dz @ b).T @ dropped,
            2 * dz.T @ (dropped @ a.T),
            (dy * z).sum(0) / n,
            dy.sum(0),
        )
        close(fn(*leaves), z * m / n + bias, 1e-12)
    for name, ours, formula in zip(NAMES, found, expected, strict=True):
        if through and name in ("dA", "dB"):
            assert error(ours, formula) > 0.01
        else:
            close(ours, formula, 1e-12)
    if through:
        assert torch.autograd.gradcheck(fn, leaves) and torch.autograd.gradgradcheck(fn, leaves)


def test_a_norm_rounded_as_peft_rounds_it(path, dtype16):
    """A magnitude that is a rounded norm then starts from the base, to the bit."""
    inputs = draw(12, 64, 48, 3, dtype16, path[1], b_std=0.0)
    m = dora_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 2.0).to(dtype16)
    ours = results(op(path[0], round_norm=True), inputs, m)
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    close(ours["y"], base, 2 * torch.finfo(dtype16).eps)
    truth = dense(inputs.weight, inputs.lora_A, inputs.lora_B, 2.0).to(dtype16)
    assert torch.equal(results(op(path[0], round_norm=True), inputs, truth)["y"], ours["y"])


@pytest.mark.parametrize("detach", [True, False])
def test_rows_of_zero_norm_and_zero_magnitude(path, detach):
    """They give the bias; a magnitude of 0 has the gradient that leads away from it."""
    inputs, m = small(path)
    inputs.weight[2], inputs.lora_B[2], m[4] = 0.0, 0.0, 0.0
    ours = results(op(path[0], detach_norm=detach), inputs, m)
    assert all(torch.equal(ours["y"][:, row], inputs.bias[row].expand(12)) for row in (2, 4))
    assert all(t.isfinite().all() for t in ours.values()) and ours["dm"][2] == 0
    truth = results(plain(detach), inputs, m, DOUBLE)["dm"][4].float()
    assert abs(truth) > 0.1
    close(ours["dm"][4], truth)
    inputs.bias = None
    assert not results(op(path[0]), inputs, m)["y"][:, [2, 4]].any()


@pytest.mark.medium
@pytest.mark.parametrize(
    "grad",
    [[name for name, on in zip(NAMES, flags, strict=True) if on] for flags in product([False, True], repeat=5)],
    ids="-".join,
)
def test_gradients_go_to_whoever_asks(path, grad):
    inputs, m = small(path)
    ours = results(op(path[0]), inputs, m, grad=grad)
    assert ours.keys() == {"y", *grad}
    close(ours, results(plain(), inputs, m, grad=grad))


@pytest.mark.parametrize("save", ["auto", "z"])
def test_in_place_on_the_output(path, save):
    ours = results(lambda *t: op(path[0], save=save)(*t).add_(1).mul_(2).relu_(), *small(path))
    close(ours, results(lambda *t: ((plain()(*t) + 1) * 2).relu(), *small(path)))


SHAPES_OF_X = {"1d": lambda x: x[0], "swapped": lambda x: x.view(3, 4, 19).transpose(0, 1), "no_rows": lambda x: x[:0]}


@pytest.mark.parametrize("layout", SHAPES_OF_X)
def test_shapes_and_strides(path, layout):
    inputs, m = small(path)
    inputs.x = SHAPES_OF_X[layout](inputs.x)
    inputs.dy = torch.ones((), device=path[1]).expand(*inputs.x.shape[:-1], 11)
    close(results(op(path[0]), inputs, m), results(plain(), inputs, m))


BAD = [
    (TypeError, "magnitude", [1.0] * 5),
    (TypeError, "magnitude", torch.ones(5, dtype=torch.int64)),
    (ValueError, "magnitude", torch.ones(6)),
    (ValueError, "magnitude", torch.ones(5, 1)),
    (ValueError, "magnitude", torch.ones(5, device="meta")),
    (ValueError, "save", "y"),
    (TypeError, "detach_norm", 1),
    (TypeError, "round_norm", 0),
    (ValueError, "scaling", math.nan),
    (TypeError, "weight", None),
    (ValueError, "weight", torch.ones(5)),
    (ValueError, "lora_B", torch.ones(5, 3)),
    (ValueError, "backend", "cuda"),
]


@pytest.mark.parametrize("wrong, name, value", BAD)
def test_bad_input_names_the_argument(wrong, name, value, path):
    """Also after a call that was right, and equal to the wrong one."""
    backend, device = path
    weights = {"weight": torch.ones(5, 6), "lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2)}
    good = {key: t.to(device) for key, t in weights.items()} | {"scaling": 1.0}
    dora = {"x": torch.ones(4, 6, device=device), "magnitude": torch.ones(5, device=device)}
    if isinstance(value, torch.Tensor) and not value.is_meta:
        value = value.to(device)
    for fn, more in ((dora_norm, {}), (dora_linear, dora)):
        if name in ("save", "detach_norm", "round_norm", "magnitude") and fn is dora_norm:
            continue
        fn(**good, **more, backend=backend)
        with pytest.raises(wrong, match=rf"^{name}: got .*expected"):
            fn(**{**good, **more, "backend": backend, name: value})


def test_norm_kernel(device):
    """Its own tests are in test_kernels.py."""
    inputs = draw(1, 70, 45, 20, FLOAT, device)
    v = inputs.weight, inputs.lora_A.requires_grad_(), inputs.lora_B, torch.tensor(0.5, device=device)
    found = dora_norm(*v, "triton")
    assert off(found, *v) <= 1e-5 and not found.requires_grad
    with pytest.raises(RuntimeError, match="^backend='triton': the fused kernels cannot run here: .*'meta'"):
        dora_norm(*(t.to("meta") for t in v), "triton")


# The layer

CHANGED = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


def changed(k=7, n=5, **kwargs):
    """A layer whose every part matters, as after training."""
    layer = DoRALinear(k, n, **{**CHANGED, **kwargs})
    layer.lora_magnitude_vector.data *= torch.linspace(-1, 2, n, device=layer.weight.device)
    return layer


def formula(layer, x):
    adapter = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    return eager(x, layer.base_weight, *adapter, layer.bias, layer.scaling)


def grads(layer, y):
    return torch.autograd.grad(y.float().square().sum(), list(lora_parameters(layer)))


def norms(layer):
    return dense(layer.base_weight, layer.lora_A, layer.lora_B, layer.scaling)


def values(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
def test_starts_as_its_base(dtype, bias, device):
    """Without a bias to the bit in plain torch; with one, eager rounds once more than the base does."""
    base = nn.Linear(64, 48, bias=bias, device=device, dtype=dtype)
    layer, x = DoRALinear.from_linear(base, r=4), torch.randn(32, 64, device=device, dtype=dtype)
    y, truth = layer(x), copy.deepcopy(base).double()(x.double())
    assert error(y, truth) <= allowed(error(formula(layer, x) if bias else base(x), truth), dtype, y.numel())
    assert bias or device != "cpu" or torch.equal(y, base(x))


@pytest.mark.medium
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_trains_like_its_formula(device, rslora):
    """In eager, compiled as one graph, and with an activation that overwrites the output."""
    torch._dynamo.reset()
    layer, x = changed(use_rslora=rslora, device=device), torch.randn(2, 4, 7, device=device)
    assert layer.scaling == pytest.approx(6 / (math.sqrt(3) if rslora else 3))
    expected = formula(layer, x).relu()
    run = nn.Sequential(layer, nn.ReLU(inplace=True))
    for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = fn(x)
        close(y, expected)
        close(grads(layer, y), grads(layer, formula(layer, x).relu()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_checkpointed_with_dropout(device, reentrant):
    layer, x = changed(16, lora_dropout=0.5, device=device), torch.randn(3, 16, device=device, requires_grad=True)

    def found(run):
        torch.manual_seed(1)
        leaves = [x, *lora_parameters(layer)]
        for leaf in leaves:
            leaf.grad = None
        run().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    close(found(lambda: checkpoint(layer, x, use_reentrant=reentrant)), found(lambda: layer(x)), 0)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_autocast():
    layer, x = changed(64, 48), torch.randn(32, 64)
    with torch.autocast("cpu", dtype=BF16):
        y, base = layer(x), F.linear(x, layer.weight, layer.bias)
    assert y.dtype == base.dtype == BF16 and error(y, formula(layer, x).double()) < 0.01
    for ours, truth in zip(grads(layer, y), grads(layer, formula(layer, x)), strict=True):
        assert ours.dtype == FLOAT and error(ours, truth.double()) < 0.02


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, HALF, BF16])
def test_parameters(dtype):
    wide = torch.promote_types(dtype, FLOAT)
    linear = nn.Linear(7, 5, dtype=dtype)
    for layer in (DoRALinear(7, 5, **CHANGED, dtype=dtype), DoRALinear.from_linear(linear, **CHANGED)):
        assert list(layer.state_dict()) == KEYS
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == KEYS[2:]
        assert [t.dtype for t in layer.state_dict().values()] == [dtype, dtype, wide, wide, wide]
        assert error(layer.lora_magnitude_vector, norms(layer)) < 1e-6
        assert layer(torch.ones(7, dtype=dtype)).dtype == dtype
    assert repr(layer).startswith("DoRALinear(in_features=7, out_features=5, bias=True, r=3, lora_alpha=6, ")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(clone, merged):
    layer, x = changed(), torch.randn(3, 7)
    if merged:
        layer.merge()
    expected, other = layer(x), clone(layer)
    close(values(other), values(layer), 0)
    assert torch.equal(other(x), expected)
    other.unmerge()
    other.lora_magnitude_vector.data += 1
    assert torch.equal(layer(x), expected) and not torch.allclose(other(x), expected, atol=0.01)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
def test_merge_disable_and_back(dtype):
    layer, x = changed(64, 48, dtype=dtype), torch.randn(4, 64, dtype=dtype)
    eps, before, y, base = torch.finfo(dtype).eps, values(layer), layer(x), F.linear(x, layer.weight, layer.bias)
    weight = layer.lora_magnitude_vector[:, None] * F.normalize(layer.weight.float() + layer.delta_weight())
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.weight.detach(), weight.to(dtype), rtol=2 * eps, atol=1e-7)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=4 * eps * y.abs().max().item())
    kept = values(layer)
    assert torch.equal(kept.pop("weight"), layer.weight)
    close({"weight": kept.pop("lora_unmerged_weight"), **kept}, before, 0)
    assert layer.extra_repr().endswith("merged")
    for _ in range(2):
        layer.disable()
        assert torch.equal(layer(x), base)
        layer.enable()
        layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before["weight"]) and torch.equal(layer(x), y)
    layer.lora_magnitude_vector.data[0] = math.inf
    with pytest.raises(ValueError, match="^safe_merge: .*NaN or infinite"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, before["weight"])


@pytest.mark.parametrize("merged", [False, True])
def test_loading(merged):
    """A merged layer stays merged, with what it was given; a magnitude that is not finite changes nothing."""
    layer, source, x = changed(), changed(), torch.randn(3, 7)
    if merged:
        layer.merge()
    layer.load_state_dict(source.state_dict())
    for value in (math.nan, -math.inf):
        bad = {name: t + 1 for name, t in values(source).items()}
        bad["lora_magnitude_vector"][3] = value
        with pytest.raises(RuntimeError, match="lora_magnitude_vector: has elements that are not finite"):
            layer.load_state_dict(bad)
    close(layer(x), source(x))
    assert layer.merged == merged
    layer.unmerge()
    close(values(layer), values(source), 0)


def emptied():
    """Built on the meta device, with adapters, but neither a base nor a magnitude."""
    layer = DoRALinear(7, 5, **CHANGED, device="meta").to_empty(device="cpu")
    for t in (layer.weight, layer.bias, layer.lora_magnitude_vector):
        t.data.fill_(math.nan)
    layer.reset_lora_parameters(False)
    return layer


def test_a_base_without_a_magnitude_starts_it_anew():
    layer, base = emptied(), nn.Linear(7, 5)
    for _ in range(2):
        assert layer.load_state_dict(base.state_dict(), strict=False).missing_keys == KEYS[2:]
        layer.unmerge()
        assert error(layer.lora_magnitude_vector, norms(layer)) < 1e-6 and torch.equal(layer.weight, base.weight)
        layer.lora_magnitude_vector.data += 1
        close(layer(torch.ones(7)), formula(layer, torch.ones(7)))  # it stays
        layer.merge()
        layer.reset_magnitude()
        assert error(layer.lora_magnitude_vector, norms(layer)) < 1e-6
        base.reset_parameters()
    base.weight.data[1, 2] = math.inf
    with pytest.raises(RuntimeError, match="weight: has rows whose norm is not finite"):
        layer.load_state_dict(base.state_dict(), strict=False)


def test_a_magnitude_that_is_loaded_stays():
    layer, source = emptied(), changed()
    layer.load_state_dict(source.state_dict())
    close(layer(torch.ones(7)), source(torch.ones(7)), 0)
    close(values(layer), values(source), 0)


@pytest.mark.parametrize("use", [lambda layer: layer(torch.ones(7)), DoRALinear.merge], ids=["forward", "merge"])
def test_weights_copied_by_hand_start_the_magnitude_once(use):
    layer, base = emptied(), nn.Linear(7, 5)
    layer.weight.data.copy_(base.weight)
    layer.bias.data.copy_(base.bias)
    use(layer)
    layer.unmerge()
    assert error(layer.lora_magnitude_vector, norms(layer)) < 1e-6
    before = layer.lora_magnitude_vector.data.mul_(2).clone()
    close(layer(torch.ones(7)), formula(layer, torch.ones(7)))
    assert torch.equal(layer.lora_magnitude_vector, before)


@pytest.mark.parametrize("updates", ["fused AdamW", "data", "data, accumulated"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_is_never_stale(device, updates):
    """Training in float32 follows the formula in float64, step by step."""
    layer = changed(12, 9, device=device)
    twin, start = copy.deepcopy(layer).double(), norms(layer)
    both = [list(lora_parameters(m)) for m in (layer, twin)]
    optimizers = [torch.optim.AdamW(own, lr=0.03, fused=True) for own in both]
    for step in range(15):
        for x in torch.randn(2 if "accumulated" in updates else 1, 8, 12, device=device):
            (layer(x) - 1).square().mean().backward()
            (formula(twin, x.double()) - 1).square().mean().backward()
        for own, optimizer in zip(both, optimizers, strict=True):
            if updates == "fused AdamW":
                optimizer.step()
            else:
                for p in own:
                    p.data -= 0.1 * p.grad
            optimizer.zero_grad()
        assert all(error(ours, truth) < 1e-4 for ours, truth in zip(*both, strict=True)), step
    assert error(norms(layer), start) > 0.05


# Whole models

CONFIG = LoRAConfig(r=2, target_modules="all-linear", use_dora=True)


def model():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=False))


def perturbed(layers):
    for p in lora_parameters(layers):
        p.data.copy_(torch.randn_like(p))
    return layers


def state(layers):
    own = [(name, id(p), p.requires_grad, p.tolist()) for name, p in layers.named_parameters()]
    return own, [(id(m), sorted(vars(m))) for m in layers.modules()]


def test_conversion_and_back():
    layers, x = model(), torch.randn(3, 6)
    before, expected = state(layers)[0], layers(x)
    assert [type(m) for m in add_lora(layers, CONFIG)] == [DoRALinear, nn.ReLU, DoRALinear]
    close(layers(x), expected)
    names = [f"{i}.{key}" for i in (0, 2) for key in KEYS[2:]]
    assert list(lora_fast.lora_state_dict(layers)) == names
    assert [name for name, p in layers.named_parameters() if p.requires_grad] == names
    assert [id(p) for p in lora_parameters(layers)] == [id(layers.get_parameter(name)) for name in names]
    adapted = perturbed(layers)(x)
    with lora_fast.disable_lora(layers):
        assert torch.equal(layers(x), expected)
    close(lora_fast.merge_lora(layers)(x), adapted)
    plain_layers = lora_fast.remove_lora(copy.deepcopy(layers))
    assert [type(m) for m in plain_layers] == [nn.Linear, nn.ReLU, nn.Linear]
    close(plain_layers(x), adapted)
    assert torch.equal(lora_fast.unmerge_lora(layers)(x), adapted)
    assert state(lora_fast.remove_lora(layers))[0] == before and torch.equal(layers(x), expected)


def test_adapters_travel_with_their_magnitude():
    base, x = model(), torch.randn(3, 6)
    source, other = (add_lora(copy.deepcopy(base), CONFIG) for _ in range(2))
    adapter = lora_fast.lora_state_dict(perturbed(source))
    lora_fast.load_lora_state_dict(other, adapter)
    assert torch.equal(other(x), source(x))
    before = state(other)
    for key, value in (("0.lora_magnitude_vector", math.inf), ("2.lora_magnitude_vector", math.nan)):
        bad = {name: t + 1 for name, t in adapter.items()}
        bad[key][1] = value
        with pytest.raises(ValueError, match=f"{key} has elements that are not finite"):
            lora_fast.load_lora_state_dict(other, bad)
        del bad[key]
        with pytest.raises(ValueError, match=f"missing {key}"):
            lora_fast.load_lora_state_dict(other, bad)
    assert state(other) == before


def test_weights_that_are_not_finite_fail_the_conversion():
    layers = model()
    layers[2].weight.data[1, 2] = math.inf
    layers[0].bias.requires_grad_(False)
    before = state(layers)
    with pytest.raises(ValueError, match="weight: has rows whose norm is not finite") as caught:
        add_lora(layers, CONFIG)
    assert state(layers) == before and caught.value.__notes__ == ["while converting '2'"]


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_use_dora_is_a_bool(value):
    with pytest.raises(TypeError, match=r"^use_dora: got .*expected True or False"):
        LoRAConfig(use_dora=value)


@pytest.mark.parametrize("kind", [lora_fast.LoRALinear, DoRALinear])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_layers_run_without_data(kind, dtype):
    """On the meta device and under FakeTensorMode, built there or elsewhere: shapes come out, gradients too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(layer, x):
        y = layer(x)
        y.sum().backward()
        assert y.shape == (3, 6) and all(p.grad is not None for n, p in layer.named_parameters() if "lora_" in n)
        layer.merge()
        assert layer(x).shape == (3, 6)
        layer.unmerge()

    run(kind(8, 6, device="meta", dtype=dtype), torch.empty(3, 8, device="meta", dtype=dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 8, dtype=dtype)
        run(kind(8, 6, dtype=dtype), x)
        model = nn.Sequential(nn.Linear(8, 6, dtype=dtype))
        add_lora(model, LoRAConfig(r=2, target_modules=["0"], use_dora=kind is DoRALinear))
        model.load_state_dict(model.state_dict())
        run(model[0], x)
    run(kind(8, 6, dtype=dtype).to("meta"), torch.empty(3, 8, device="meta", dtype=dtype))
    layer, mode = kind(8, 6, dtype=dtype), FakeTensorMode()
    with mode:
        fakes = {name: mode.from_tensor(p) for name, p in layer.named_parameters()}
        assert torch.func.functional_call(layer, fakes, torch.empty(3, 8, dtype=dtype)).shape == (3, 6)


def test_a_layer_without_data_gets_its_magnitude_with_the_data():
    layer = DoRALinear(8, 6, device="meta")
    layer(torch.empty(3, 8, device="meta"))
    layer.to_empty(device="cpu")
    for p in (layer.weight, layer.bias, layer.lora_A):
        nn.init.normal_(p.data)
    layer.lora_B.data.zero_()
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
