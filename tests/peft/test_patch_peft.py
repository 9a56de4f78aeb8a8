"""patch_peft on small modules: the numbers of stock PEFT, what is fused, and why the rest is not."""

import copy
import operator

import pytest
import torch
from accuracy import compare, error
from peft_nets import Net, config, inputs, patched, peft, results, same, stir, stock_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lora_fast import SlowPathWarning, dispatch, patch_peft, peft_report, set_backend, unpatch_peft
from lora_fast.peft.rules import examine, plainly

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"down": 7}, "alpha_pattern": {"up": 3}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "use_dora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_stocks(path, kind):
    stock = stock_model(path[1], **KINDS[kind])
    ours, x = patched(stock, path), inputs(path)
    for mode in (True, False):
        same(results(ours.train(mode), x), results(stock.train(mode), x))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_change_the_base_are_kept(init):
    torch.manual_seed(0)
    try:
        stock = peft.get_peft_model(Net(), config(init_lora_weights=init))
    except (ValueError, TypeError, AttributeError):
        pytest.skip(f"this PEFT has no {init}")
    ours = patched(stock)
    for (name, p), (_, q) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    same(results(ours, inputs()), results(stock, inputs()))


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("kind", ["lora", "dora", "two adapters"])
@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32 adapters", "16-bit adapters"])
def test_16_bit_within_the_error_rule(path, dtype16, kind, adapters):
    """Against stock PEFT with its adapters in x's dtype, both against stock PEFT in float64."""
    runs = ([], [], [])
    for seed in range(4 if path == ("triton", "cpu") else 16):  # the interpreter is slow
        more = [{"lora_alpha": 2, "r": 3}] if kind == "two adapters" else []
        stock = stir(stock_model(path[1], dtype16, more, use_dora=kind == "dora"), seed).base_model.model.up
        if more:
            stock.set_adapter(["default", "more0"])
        ours, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
        for name, p in (*stock.named_parameters(), *ours.named_parameters()):
            if "lora_" in name:
                p.data = p.data.to(dtype16)
        if adapters is not None:
            for name, p in ours.named_parameters():
                if "lora_" in name:
                    p.data = p.data.to(adapters)
        for (_, p), (_, q) in zip(ours.named_parameters(), truth.named_parameters(), strict=True):
            q.data = p.data.double()
        x, dy = inputs(path, 12, 16, dtype=dtype16, seed=seed), inputs(path, 12, 24, dtype=dtype16, seed=99 - seed)
        set_backend(path[0])
        patch_peft(ours)
        for run, layer in zip(runs, (ours, stock, truth), strict=True):
            run.append(results(layer, x.to(layer.base_layer.weight.dtype), dy))
        assert runs[0][-1]["y"].dtype == dtype16
    compare(*runs, dtype16)


@pytest.mark.versions
@pytest.mark.medium
def test_output_dtype_is_stocks(path, dtype16):
    """float32 adapters on a 16-bit base, in autocast and without it; and autocast over a float32 model."""
    for dtype, dora in ((dtype16, False), (dtype16, True), (torch.float32, False), (torch.float32, True)):
        stock = stock_model(path[1], dtype, use_dora=dora)
        ours, x = patched(stock, path), inputs(path, dtype=dtype)
        for autocast in (False, True):
            with torch.autocast(path[1], dtype=dtype16, enabled=autocast):
                y, expected = ours(x), stock(x)
            assert y.dtype == expected.dtype and error(y, expected.double()) < 0.01
            y.sum().backward()


def test_dora_starts_at_the_base(path, dtype16):
    """The gain of each output, found over many rows, is one: PEFT's magnitude is a rounded norm, and so is ours."""
    torch.manual_seed(0)
    base = Net().to(path[1], dtype16)
    x = inputs(path, 256, 24, dtype=dtype16)
    expected = base.down(x).double()
    ours = patched(peft.get_peft_model(base, config(use_dora=True)), path)
    gain = (ours.base_model.model.down(x).double() * expected).sum(0) / expected.square().sum(0)
    assert (gain - 1).abs().max() < torch.finfo(dtype16).eps / 16


def readable(path, p, dora=False):
    """A layer on 16 inputs whose output is its dropout mask, times the scaling: W = 0 (1 in a last column for DoRA's
    norm), A = B = 1, and the scaling 1."""
    base = nn.Sequential(nn.Linear(16, 16, bias=False))
    base[0].weight.data.zero_()
    stock = peft.get_peft_model(base, config(r=16, lora_alpha=16, lora_dropout=p, target_modules=["0"], use_dora=dora))
    layer = stock.to(path[1]).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(16))
        layer.lora_B["default"].weight.copy_(torch.eye(16))
        if dora:
            layer.lora_magnitude_vector["default"].weight.fill_(1.0)
    return patched(stock, path)


@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_mask_read_back(path, dora):
    model, x = readable(path, 0.25, dora), torch.ones(64, 16, device=path[1])
    seen = []
    for _ in range(2):
        found = results(model.train(), x)
        y, dx = found["y"], found["dx"]
        kept = y > 0.5
        torch.testing.assert_close(y, kept / 0.75)
        torch.testing.assert_close(dx, y)  # the gradient of the same mask
        assert 0.68 < kept.float().mean() < 0.82  # 5 deviations
        seen.append(y)
    assert not torch.equal(*seen)
    torch.testing.assert_close(model.eval()(x), x)


@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_in_expectation(path, dora):
    """The mean over many masks is the output without dropout, as stock's is."""
    stock = stock_model(path[1], lora_dropout=0.5, use_dora=dora)
    ours, x = patched(stock, path).base_model.model.up, inputs(path, 1, 16).expand(1024, 16)
    expected = stock.eval().base_model.model.up(x[:1])
    y = ours.train()(x)
    far = (y.mean(0) - expected[0]).abs() / (y.std(0) / 32)
    assert y.std(0).min() > 0 and far.max() < 4.5, far


def test_mask_is_drawn_from_torchs_generator(path):
    model, x = readable(path, 0.5), torch.ones(8, 16, device=path[1])
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.train()(x))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_several_adapters_are_one(path):
    stock = stock_model(path[1], more=[{"r": 3, "lora_alpha": 1}, {"r": 1}])
    ours, x = patched(stock, path), inputs(path)
    for names in (["default", "more0"], ["more1", "default", "more0"], ["more0"]):
        for model in (ours, stock):
            model.base_model.set_adapter(names)
        report = peft_report(ours)
        assert report.not_fused == 0 if path[0] == "triton" else report.fused == 0
        same(results(ours, x), results(stock, x))


def test_several_adapters_share_a_mask(path):
    """Two equal adapters then give twice what one gives; stock PEFT draws a mask for each."""
    model, x = readable(path, 0.5), torch.ones(8, 16, device=path[1])
    model.add_adapter("more", config(r=16, lora_alpha=16, lora_dropout=0.5, target_modules=["0"]))
    layer = model.base_model.model[0]
    for matrices in (layer.lora_A, layer.lora_B):
        matrices["more"].to(path[1]).load_state_dict(matrices["default"].state_dict())
    model.base_model.set_adapter(["default", "more"])
    y = model.train()(x)
    assert set(y.unique().tolist()) == {0.0, 4.0}


def test_report_on_this_machine():
    ours = copy.deepcopy(stock_model())
    report = patch_peft(ours)
    assert report == peft_report(ours) == patch_peft(ours)  # twice is once
    assert [layer.name for layer in report.layers] == ["base_model.model.up", "base_model.model.down"]
    assert (report.fused, report.not_fused) == (0, 2)
    assert report.layers[0].reason == dispatch.why_not_triton(torch.device("cpu"), torch.float32)
    set_backend("reference")
    assert "reference" in peft_report(ours).layers[0].reason
    unpatch_peft(ours)
    assert {layer.reason for layer in peft_report(ours).layers} == {"not patched"}


@pytest.mark.interpreted
def test_report_prints_a_table():
    set_backend("triton")
    model = stock_model(use_dora=True, lora_dropout=0.5)
    text = str(patch_peft(model.eval())).splitlines()
    assert text[0].split() == ["layer", "count", "reason"] and text[-1] == "2 fused, 0 not fused"
    assert "base_model.model.up" in text[1] and "DoRA, dropout in the low-rank branch alone" in text[1]


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_report_tells_what_the_kernels_run(kind, monkeypatch):
    """As many calls of the fused operator as there are fused layers in the report, in every state."""
    from lora_fast.ops import linear as ops

    calls, run = [], ops.FusedLinear.__call__
    monkeypatch.setattr(ops.FusedLinear, "__call__", lambda *args: calls.append(args) or run(*args))
    stock = stock_model(more=[{}, {"use_dora": True}], use_dora=kind == "dora")
    model, x = patched(stock, ("triton", "cpu")), inputs()
    up, down = model.base_model.model.up, model.base_model.model.down

    def check(count):
        calls.clear()
        model(x)
        assert len(calls) == peft_report(model).fused == count

    check(2)
    hook(up)
    check(1)
    down.merge()
    check(0)
    down.unmerge()
    check(1)
    for names, count in (["default", "more0"], kind == "lora"), (["more0"], 2), (["more1"], 2), (["more0", "more1"], 0):
        model.base_model.set_adapter(names)
        check(count)
    model.base_model.set_adapter("more0")
    with model.disable_adapter():
        check(0)
    down.base_layer.weight.requires_grad_(True)
    check(1)
    set_backend("reference")
    check(0)
    set_backend("auto")
    check(0)


def test_layers_are_counted_by_pattern():
    model = peft.get_peft_model(nn.Sequential(Net(), Net()), config())
    text = str(patch_peft(model))
    assert "base_model.model.*.up" in text and "base_model.model.0" not in text


def hook(layer):
    layer.lora_B["default"].register_forward_hook(lambda *_: None)


def hook_dropout(layer):
    layer.lora_dropout["default"].register_forward_hook(lambda *_: None)


def hook_base(layer):
    layer.base_layer.register_forward_pre_hook(lambda *_: None)


def hook_backward(layer):
    layer.lora_A["default"].register_full_backward_hook(lambda *_: None)


def hook_before_backward(layer):
    layer.base_layer.register_full_backward_pre_hook(lambda *_: None)


def parametrize_base(layer):
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    layer.base_layer.parametrizations.weight.original.requires_grad_(False)


def replace_base_forward(layer):
    layer.base_layer.forward = layer.base_layer.forward


def train_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def subclass_weight(layer):
    class Weight(nn.Parameter):
        pass

    layer.base_layer.weight = Weight(layer.base_layer.weight.data, requires_grad=False)


def subclass_adapter(layer):
    class Weight(nn.Parameter):
        pass

    layer.lora_B["default"].weight = Weight(layer.lora_B["default"].weight.data)


def tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(1.5)


def drop_features(layer):
    layer.lora_dropout["default"] = nn.FeatureAlphaDropout(0.5).eval()


def wrap_adapter(layer):
    class Wrapped(nn.Linear):
        pass

    layer.lora_A["default"].__class__ = Wrapped


REASONS = {
    hook: "lora_A, lora_B or lora_dropout has hooks",
    hook_dropout: "lora_A, lora_B or lora_dropout has hooks",
    hook_backward: "lora_A, lora_B or lora_dropout has hooks",
    hook_base: "base layer has hooks",
    hook_before_backward: "base layer has hooks",
    parametrize_base: "base layer is a ParametrizedLinear",
    replace_base_forward: "replaced forward",
    train_base: "requires grad",
    subclass_weight: "base weight is a Weight",
    subclass_adapter: "adapter's weight is a Weight",
    tensor_scaling: "scaling is tensor",
    drop_features: "FeatureAlphaDropout",
    wrap_adapter: "is a Wrapped",
}


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("first", [True, False], ids=["before the patch", "after it"])
def test_what_is_out_of_the_ordinary_runs_stock_audibly(change, first):
    set_backend("triton")
    stock = stock_model()
    ours = copy.deepcopy(stock)
    change(stock.base_model.model.up)
    if not first:
        patch_peft(ours)
    change(ours.base_model.model.up)
    report = patch_peft(ours)
    assert (report.fused, report.not_fused) == (1, 1) and REASONS[change] in report.layers[0].reason
    with pytest.warns(SlowPathWarning, match=r"leaves a layer to stock PEFT: .*" + REASONS[change]) as heard:
        same(results(ours, inputs()), results(stock, inputs()))
        ours(inputs())
    assert len(heard) == 1 and heard[0].filename == results.__code__.co_filename  # who called


@pytest.mark.parametrize("change", [None, *REASONS], ids=lambda change: change and change.__name__)
def test_the_plainest_call(change):
    """Told by few looks, and given what the long way gives; where anything is out of the ordinary that has to look."""
    ours, x = patched(stock_model(lora_dropout=0.25)), inputs()
    layer = ours.base_model.model.up
    for mode in (True, False):
        layer.train(mode)
        long_way = layer._layer(x, examine(layer, ["default"]))
        assert all(map(operator.is_, plainly(layer, x)[:3], long_way)) and plainly(layer, x) == long_way[:6]
        assert plainly(layer, x.double()) is None and plainly(layer, nn.Parameter(x)) is not None
    for flag in ("_disable_adapters", "merged_adapters"):
        before = vars(layer)[flag]
        vars(layer)[flag] = ["default"]
        assert plainly(layer, x) is None
        vars(layer)[flag] = before
    if change is not None:
        change(layer)
        assert plainly(layer, x) is None


def test_hooks_on_all_modules_run():
    """Those of a layer's parts, too, whatever they give."""
    stock = stock_model()
    ours = patched(copy.deepcopy(stock))
    same(results(ours, inputs()), results(stock, inputs()))
    with register_module_forward_hook(lambda module, _, y: 2 * y if module.__class__ is nn.Linear else None):
        with pytest.warns(SlowPathWarning, match="leaves a layer to stock PEFT: there are hooks on all modules"):
            same(results(ours, inputs()), results(stock, inputs()))
        assert {layer.reason for layer in peft_report(ours).layers} == {"there are hooks on all modules"}
    assert plainly(ours.base_model.model.up, inputs()) is not None


def test_a_forward_on_the_instance_is_reported():
    """As accelerate's hooks leave it: class and all, the layer then calls what it was given."""
    stock = stock_model()
    layer = stock.base_model.model.up
    layer.forward = layer.forward
    ours = copy.deepcopy(stock)
    assert "forward was replaced" in patch_peft(ours).layers[0].reason
    same(results(ours, inputs()), results(stock, inputs()))


def test_hooks_on_the_magnitude_run():
    stock = stock_model(use_dora=True)
    ours, seen = patched(stock), []
    ours.base_model.model.up.lora_magnitude_vector["default"].register_forward_hook(lambda *_: seen.append(1))
    assert "the magnitude has hooks" in peft_report(ours).layers[0].reason
    same(results(ours, inputs()), results(stock, inputs()))
    assert seen


def test_a_base_that_is_called_transposed_and_is_not_is_left_alone():
    model = stock_model()
    model.base_model.model.up.fan_in_fan_out = True
    reason = "fan_in_fan_out=True over a Linear, whose weight is not stored transposed"
    assert patch_peft(model).layers[0].reason == reason


def test_what_stock_refuses_is_refused_alike():
    """Arguments that the base layer does not take, and an input of another dtype without autocast."""
    stock = stock_model(dtype=torch.bfloat16)
    layers = [model.base_model.model.up for model in (stock, patched(stock))]
    for args, kwargs in ((inputs(),), {}), ((inputs(dtype=torch.bfloat16),), {"nonsense": 1}):
        messages = []
        for layer in layers:
            with pytest.raises((RuntimeError, TypeError)) as error:
                layer(*args, **kwargs)
            messages.append((error.type, str(error.value)))
        assert messages[0] == messages[1]
    x = inputs(dtype=torch.bfloat16)
    assert torch.equal(layers[1](x, adapter_names=None), layers[1](x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_changed_in_place(path, kind):
    """As an nn.Linear's may be; a DoRA layer without a bias needs save="z" for that, and says so."""
    base = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(inplace=True)).to(path[1])
    stock = stir(peft.get_peft_model(base, config(target_modules=["0"], use_dora=kind == "dora")))
    ours, x = patched(stock, path), inputs(path)
    if kind == "dora":
        if path[0] == "triton":
            with pytest.raises(RuntimeError, match='save="z"'):
                results(ours, x)
        patch_peft(ours, save="z")
    same(results(ours, x), results(stock, x))
    unpatch_peft(ours)
    assert "save" not in vars(ours.base_model.model[0])
    with pytest.raises(ValueError, match="save: got 'y', expected"):
        patch_peft(ours, save="y")
