"""What PEFT does with a model, done with a patched one: adapters, merging, saving, copying, compiling."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from devices import PATHS
from peft_nets import Net, config, inputs, patched, results, same, stir, stock_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fast
from lora_fast import SlowPathWarning, patch_peft, peft_report, set_backend, unpatch_peft

peft = pytest.importorskip("peft")

KINDS = {"lora": {}, "dora": {"use_dora": True}}
BOTH = pytest.mark.parametrize("kind", KINDS)


def is_fast(layer):
    return type(layer).__name__ == "FastLinear"


def state(model):
    """All that a failed or undone patch may not change."""
    values = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    modules = [(type(m), sorted(vars(m)), list(m._buffers), type(getattr(m, "scaling", None))) for m in model.modules()]
    return values, modules


@BOTH
def test_unpatch_undoes_all(kind):
    model = stock_model(**KINDS[kind])
    before, expected = state(model), results(model, inputs())
    patch_peft(model)
    assert is_fast(model.base_model.model.up) and state(model) != before
    model.base_model.model.up.merge()
    unpatch_peft(model)
    model.base_model.model.up.unmerge()
    same(results(model, inputs()), expected)
    assert state(model) == before
    unpatch_peft(model)  # nothing left to do


def test_a_failed_patch_changes_nothing(monkeypatch):
    from lora_fast.peft.layers import FastLinear

    model = stock_model()
    before, adopt = state(model), FastLinear.adopt.__func__

    def fails_on_down(cls, layer):
        if layer.in_features == 24:
            raise MemoryError
        adopt(cls, layer)

    monkeypatch.setattr(FastLinear, "adopt", classmethod(fails_on_down))
    with pytest.raises(MemoryError):
        patch_peft(model)
    assert state(model) == before


@pytest.mark.parametrize("function", [patch_peft, unpatch_peft, peft_report])
def test_bad_input(function):
    with pytest.raises(TypeError, match="model: got dict, expected a PEFT model"):
        function({})
    with pytest.raises(ValueError, match="model: got a Net without LoRA layers of PEFT's"):
        function(Net())
    ia3 = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="model: got a PeftModel without LoRA layers"):
        function(ia3)


def test_a_model_with_peft_layers_alone():
    net = Net()
    peft.inject_adapter_in_model(config(), net)
    assert len(patch_peft(net).layers) == 2 and is_fast(net.up)


def test_state_dict_keys_stay(tmp_path):
    stock = stock_model(more=[{"r": 2}], use_dora=False)
    ours = patched(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in stock.named_buffers()]


@BOTH
def test_adapters_travel_both_ways(tmp_path, kind):
    stock = stock_model(more=[{"r": 2}], **KINDS[kind])
    ours, x = patched(stock), inputs()
    stir(ours, seed=5).save_pretrained(tmp_path / "ours")
    stir(stock, seed=6).save_pretrained(tmp_path / "stock")

    def load(base, folder):
        model = peft.PeftModel.from_pretrained(base, tmp_path / folder, is_trainable=True)
        model.load_adapter(tmp_path / folder / "more0", "more0", is_trainable=True)
        return model

    def base():
        return copy.deepcopy(stock).unload()

    again = load(base(), "ours")
    same(results(again, x), results(ours, x))
    other = load(base(), "stock")
    patch_peft(other)
    same(results(other, x), results(stock, x))
    other.load_adapter(tmp_path / "ours", "third")
    other.set_adapter("third")
    torch.testing.assert_close(other(x), ours(x))
    assert all(is_fast(m) for m in other.modules() if isinstance(m, peft.tuners.lora.Linear))


def test_an_adapter_added_later_is_fast():
    """Also where it brings layers that no adapter had before; and what is deleted is gone."""
    ours = patched(stock_model())
    stock = stock_model()
    for model in (ours, stock):
        torch.manual_seed(3)
        model.add_adapter("late", config(target_modules=["up", "head"], r=3))
        model.set_adapter("late")
        stir(model)
    assert is_fast(ours.base_model.model.head) and [layer.name[17:] for layer in peft_report(ours).layers] == [
        "up",
        "down",
        "head",
    ]
    same(results(ours, inputs()), results(stock, inputs()))
    assert "none of its adapters is active" in peft_report(ours).layers[1].reason
    for model in (ours, stock):
        model.delete_adapter("default")
    same(results(ours, inputs()), results(stock, inputs()))
    assert dict(ours.base_model.model.up.scaling) == stock.base_model.model.up.scaling == {"late": 2.0}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_of_a_merged_layer(init):
    stock = stock_model()
    ours = patched(stock)
    for model in (ours, stock):
        model.merge_adapter()
        model.add_adapter("late", config(init_lora_weights=init))
        model.unmerge_adapter()
        model.set_adapter("late")
    same(results(ours, inputs()), results(stock, inputs()))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_told_where_the_base_is_packed(init, merged):
    ours = stock_model()
    patch_peft(ours, base_dtype="float8_e4m3")
    before = ours(inputs())
    if merged:
        ours.merge_adapter()
    now = ours(inputs())
    with pytest.raises(ValueError, match="init_lora_weights: got one that changes the base weight"):
        ours.add_adapter("late", config(init_lora_weights=init))
    assert torch.equal(ours(inputs()), now)
    ours.unmerge_adapter()
    assert torch.equal(ours(inputs()), before)


def test_weighted_adapter_of_patched_ones():
    stock = stock_model(more=[{}])
    ours = patched(stock)
    for model in (ours, stock):
        model.add_weighted_adapter(["default", "more0"], [0.7, 0.2], "sum", combination_type="linear")
        model.set_adapter("sum")
    same(results(ours, inputs()), results(stock, inputs()))


@BOTH
def test_disabled_adapters_give_the_base(path, kind):
    stock, x = stock_model(path[1], **KINDS[kind]), inputs(path)
    ours = patched(stock, path)
    expected = ours(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)  # nothing is slow about that
        with ours.disable_adapter(), stock.disable_adapter():
            assert torch.equal(ours(x), stock(x))
            assert "disabled" in peft_report(ours).layers[0].reason
        assert torch.equal(ours(x), expected)
        ours.merge_adapter()
        with ours.disable_adapter(), stock.disable_adapter():
            assert torch.equal(ours(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
@BOTH
def test_merge_is_stocks_and_unmerge_exact(kind, safe, dtype):
    stock = stock_model(dtype=dtype, more=[{"r": 3, **KINDS[kind]}], **KINDS[kind])
    ours, x = patched(stock), inputs(dtype=dtype)
    before, expected = copy.deepcopy(ours.state_dict()), ours(x)
    for names in (["default"], ["default", "more0"]):
        unmerged = ours.base_model.model.up.base_layer.weight.clone()
        merging = copy.deepcopy(stock)
        for model in (ours, merging):
            for layer in (model.base_model.model.up, model.base_model.model.down):
                layer.merge(safe, names)
        weights = {
            name: p.to(dtype) for name, p in merging.named_parameters() if "base_layer" in name
        }  # PEFT 0.13: float32
        merged = {name: p for name, p in ours.named_parameters() if "base_layer" in name}
        same(merged, weights, 0 if len(names) == 1 else 0.02)
        assert not torch.equal(ours.base_model.model.up.base_layer.weight, unmerged)
        assert "merged" in peft_report(ours).layers[0].reason
        if len(names) == 1:
            torch.testing.assert_close(ours(x), expected, rtol=0.02, atol=0.02)
        ours.unmerge_adapter()
        assert before.keys() == ours.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert not list(ours.buffers()) and not ours.base_model.model.up._caches


def test_merging_one_by_one_unmerges_exactly():
    ours = patched(stock_model(dtype=torch.bfloat16, more=[{}]))
    layer = ours.base_model.model.up
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["more0"])
    assert layer.merged_adapters == ["default", "more0"]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_a_merge_that_fails_keeps_nothing():
    ours = patched(stock_model())
    layer = ours.base_model.model.up
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged and not list(layer.buffers())


@BOTH
def test_merge_and_unload(kind):
    stock, x = stock_model(modules_to_save=["head"], **KINDS[kind]), inputs()
    ours = patched(stock).merge_and_unload()
    assert type(ours) is Net and type(ours.up) is nn.Linear and not list(ours.buffers())
    assert torch.equal(ours(x), stock.merge_and_unload()(x))


@BOTH
def test_a_state_dict_taken_while_merged_loads_rightly(kind):
    """It holds the live weights, as stock's, and what was kept of the base; also into a merged model, which it
    unmerges."""
    stock, x = stock_model(dtype=torch.bfloat16, **KINDS[kind]), inputs(dtype=torch.bfloat16)
    ours = patched(stock)
    expected, before = ours(x), copy.deepcopy(ours.state_dict())
    ours.merge_adapter()
    taken, merged = copy.deepcopy(ours.state_dict()), copy.deepcopy(stock)
    merged.merge_adapter()
    same(
        {n: t for n, t in taken.items() if "unmerged" not in n},
        {n: t.bfloat16() if "base_layer" in n else t for n, t in merged.state_dict().items()},
        0,
    )
    kept = {n: t for n, t in taken.items() if n not in before}
    assert len(kept) == 2 and all("lora_" in name and "bias" not in name for name in kept)
    for target in (patched(stir(copy.deepcopy(stock), 7)), stir(ours, 8)):
        for p in target.parameters():
            p.data.add_(1)
        target.load_state_dict(taken)
        assert not target.base_model.model.up.merged and torch.equal(target(x), expected)
        assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_unmerged_weight"):
        copy.deepcopy(stock).load_state_dict(taken)


def test_merged_copies_and_casts_unmerge():
    ours = patched(stock_model())
    before = ours.base_model.model.up.base_layer.weight.clone()
    ours.merge_adapter()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours).to(torch.float64)):
        twin.unmerge_adapter()
        assert torch.equal(
            twin.base_model.model.up.base_layer.weight, before.to(twin.base_model.model.up.base_layer.weight.dtype)
        )


def test_mixed_batches_are_stocks():
    stock, x = stock_model(more=[{"r": 2}]).eval(), inputs()
    ours = patched(stock)
    names = ["more0", "__base__"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lora_fast leaves", SlowPathWarning)
        y = ours(x, adapter_names=names)
    torch.testing.assert_close(y, stock(x, adapter_names=names))
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.interpreted
def test_other_layers_and_variants_stay_stock():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            from transformers.pytorch_utils import Conv1D

            self.embed, self.conv1d, self.conv = nn.Embedding(7, 16), Conv1D(16, 16), nn.Conv1d(16, 16, 1)
            self.plain = nn.Linear(16, 16)
            self.special = type("Special", (nn.Linear,), {})(16, 16)

        def forward(self, ids):
            x = self.plain(self.conv1d(self.embed(ids)))
            return self.special(x) + self.conv(x.mT).mT

    torch.manual_seed(0)
    names = ["embed", "conv1d", "conv", "plain", "special"]
    try:
        stock = stir(peft.get_peft_model(Many(), config(target_modules=names)))
    except ValueError:  # an older PEFT
        names.remove("conv")
        stock = stir(peft.get_peft_model(Many(), config(target_modules=names)))
    set_backend("triton")
    ours = copy.deepcopy(stock)
    report = {layer.name.rpartition(".")[2]: layer for layer in patch_peft(ours).layers}
    assert {name for name, layer in report.items() if layer.fused} == {"plain", "conv1d", "embed"} and set(
        report
    ) == set(names)
    assert "Special" in report["special"].reason and is_fast(ours.base_model.model.plain)
    assert is_fast(ours.base_model.model.conv1d)
    ids = torch.arange(6).view(2, 3)
    ours(ids).sum().backward()
    stock(ids).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_multihead_attention_stays_stock():
    """Its output projection is one of PEFT's linear layers, whose weight PEFT puts in and takes out itself."""
    torch.manual_seed(0)
    try:
        stock = stir(peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config(target_modules=["0"])))
    except ValueError:
        pytest.skip("this PEFT has no such layer")
    ours, x = copy.deepcopy(stock), inputs(("auto", "cpu"), 3, 8)
    report = patch_peft(ours)
    assert len(report.layers) == 2 and report.fused == 0 and not any(map(is_fast, ours.modules()))
    ys = [model.base_model.model[0](x, x, x)[0] for model in (ours, stock)]
    assert torch.equal(*ys)


def test_quantised_layers_are_named_so():
    """Those of bitsandbytes and the like are classes of PEFT's that need these libraries: one made up must do."""
    from peft.tuners.lora import Linear

    model = stock_model()
    model.base_model.model.up.__class__ = type("Linear8bitLt", (Linear,), {"__module__": "peft.tuners.lora.bnb"})
    assert patch_peft(model).layers[0].reason == "PEFT's Linear8bitLt, on a quantised base"
    model.base_model.model.down.base_layer.weight.data = model.base_model.model.down.base_layer.weight.data.to(
        torch.int8
    )
    assert "quantised (torch.int8)" in peft_report(model).layers[1].reason


@pytest.mark.interpreted
def test_lora_bias_runs_stock_audibly():
    try:
        stock = stock_model(lora_bias=True, target_modules=["up"])
    except TypeError:
        pytest.skip("this PEFT has no lora_bias")
    set_backend("triton")
    ours = copy.deepcopy(stock)
    assert patch_peft(ours).layers[0].reason == "lora_bias=True"
    with pytest.warns(SlowPathWarning, match="lora_bias"):
        same(results(ours, inputs()), results(stock, inputs()))
    before = copy.deepcopy(ours.state_dict())
    ours.merge_adapter()
    assert torch.equal(
        ours.state_dict()["base_model.model.up.lora_unmerged_offset"], before["base_model.model.up.base_layer.bias"]
    )
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


@pytest.mark.interpreted
def test_variants():
    """MiCA is LoRA whose lora_B is frozen; what other variants do is not ours to guess."""
    torch.manual_seed(0)
    try:
        stock = peft.get_peft_model(Net(), config(init_lora_weights="mica"))
    except (AttributeError, ValueError):
        pytest.skip("this PEFT has no such variant")
    for name, parameter in stock.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter)
    set_backend("triton")
    ours = copy.deepcopy(stock)
    assert patch_peft(ours).fused == len(ours.base_model.targeted_module_names)
    assert not ours.base_model.model.up.lora_B["default"].weight.requires_grad
    same(results(ours, inputs()), results(stock, inputs()))
    for layer in (layer for model in (ours, stock) for layer in model.modules() if hasattr(layer, "lora_variant")):
        variant = type(layer.lora_variant["default"])
        layer.lora_variant["default"] = type("Another", (variant,), {})()
    assert "Another: only plain LoRA, DoRA and MiCA are fused" in peft_report(ours).layers[0].reason
    same(results(ours, inputs()), results(stock, inputs()))


def test_adapters_that_differ_in_dropout_run_stock():
    stock = stock_model(more=[{"lora_dropout": 0.5}])
    ours, x = patched(stock), inputs()
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "more0"])
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
    assert "differ in dropout" not in peft_report(ours).layers[0].reason
    assert "differ in dropout" in peft_report(ours.train()).layers[0].reason
    with pytest.warns(SlowPathWarning, match="several active adapters that differ in dropout"):
        ours(x)


def test_dora_among_several_adapters_runs_stock():
    stock = stock_model(more=[{"use_dora": True}])
    ours = patched(stock)
    for model in (ours, stock):
        model.base_model.set_adapter(["default", "more0"])
    assert "one of them DoRA" in peft_report(ours).layers[0].reason
    same(results(ours, inputs()), results(stock, inputs()))


def scalings(model):
    return [m.scaling for m in model.modules() if is_fast(m)]


def test_scaling_follows_pefts_dict():
    """Every way to set it that there is; the mirror for compiled graphs is the same tensor throughout."""
    from peft.helpers import rescale_adapter_scale

    stock = stock_model()
    ours, x = patched(stock), inputs()
    mirrors = [s.mirrors["default"] for s in scalings(ours)]
    changes = [
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.update(default=0.3),
        lambda layer: layer.scaling.__ior__({"default": 2}),
        lambda layer: setattr(layer, "scaling", {"default": 0.7}),
        lambda layer: layer.scaling.setdefault("default", 5),
    ]
    for change in changes:
        for model in (ours, stock):
            change(model.base_model.model.up)
        torch.testing.assert_close(ours(x), stock(x))
        scaling = ours.base_model.model.up.scaling
        assert dict(scaling) == stock.base_model.model.up.scaling
        assert scaling.mirrors["default"] is mirrors[0] and mirrors[0].item() == pytest.approx(scaling["default"])
    with rescale_adapter_scale(ours, 0.5), rescale_adapter_scale(stock, 0.5):
        torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours(x), stock(x))
    assert isinstance(ours.base_model.model.up.scaling, dict) and mirrors[0].item() == pytest.approx(0.7)


def test_scaling_moves_with_the_layer():
    ours = patched(stock_model()).to("meta")
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert {s.mirrors["default"].device.type for s in scalings(model)} == {"meta"}
    assert pickle.loads(pickle.dumps(scalings(ours)[0])).device.type == "cpu"  # which every reader has
    ours.to_empty(device="cpu").half()
    for scaling in scalings(ours):
        assert scaling.mirrors["default"].dtype == torch.float32
        assert scaling.mirrors["default"].item() == scaling["default"] == 1.5


@BOTH
def test_copies_are_independent(path, kind):
    stock = stock_model(path[1], **KINDS[kind])
    ours, x = patched(stock, path), inputs(path)
    expected = results(ours, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        same(results(twin, x), expected, 0)
        assert scalings(twin)[0].mirrors["default"].device.type == path[1]
        twin.base_model.model.up.scaling["default"] = 0.0
        twin.base_model.model.up.base_layer.weight.data.zero_()
    same(results(ours, x), expected, 0)
    assert scalings(ours)[0].mirrors["default"].item() == 1.5


REGION_OF_TWO = {"reference": "model", "triton": "layers"}  # of two adapters, on a CPU


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize(
    "path, kind, region",
    [
        pytest.param(path[:2], kind, region, marks=path[2], id=f"{'-'.join(path[:2])}-{region}-{kind}")
        for path in PATHS
        for kind in (*KINDS, "two adapters")
        for region in ("model", "layers")
        if path[1] == "cuda" or region == {"lora": "layers", "dora": "model"}.get(kind, REGION_OF_TWO[path[0]])
    ],
)
def test_compiled_once_for_all(path, kind, region):
    """Whole or layer by layer: one graph (each), also for new values of the adapters and of the scaling."""
    torch._dynamo.reset()
    more = [{"r": 3}] if kind == "two adapters" else []
    stock = stock_model(path[1], more=more, **KINDS.get(kind, {}))
    ours, x = patched(stock, path), inputs(path)
    if more:
        for model in (ours, stock):
            model.base_model.set_adapter(["default", "more0"])
    counter = CompileCounterWithBackend("inductor" if path[1] == "cuda" else "aot_eager")
    if region == "model":
        fn = torch.compile(ours, backend=counter, fullgraph=True)
    else:
        for layer in (ours.base_model.model.up, ours.base_model.model.down):
            layer.compile(backend=counter, fullgraph=True)
        fn = ours
    for step in range(2):
        found = {name.removeprefix("_orig_mod."): value for name, value in results(fn, x).items()}
        same(found, results(stock, x))
        for model in (ours, stock):
            stir(model, seed=step)
            for layer in (model.base_model.model.up, model.base_model.model.down):
                layer.scaling["default"] = 0.4 + step
    assert counter.frame_count == (1 if region == "model" else 2)


@pytest.mark.versions
@pytest.mark.medium
def test_compiled_with_dropout_and_in_eval(path):
    torch._dynamo.reset()
    stock = stock_model(path[1], lora_dropout=0.5)
    ours, x = patched(stock, path), inputs(path)
    fn = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert not torch.equal(fn(x), fn(x))
    ours.eval(), stock.eval()
    torch.testing.assert_close(fn(x), stock(x))
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(fn(x), stock(x))


@pytest.mark.medium
def test_compiled_stock_call_does_not_break_the_graph():
    torch._dynamo.reset()
    stock = stock_model()
    ours, x = patched(stock), inputs()
    ours.base_model.model.up.base_layer.weight.requires_grad_(True)
    fn = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with pytest.warns(SlowPathWarning, match="requires grad"):
        torch.testing.assert_close(fn(x), stock(x))


@pytest.mark.interpreted
def test_parameters_of_other_modules_stay_stock():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)
            self.experts = nn.Module()
            self.weight = nn.Parameter(torch.randn(2, 16, 16))

        def forward(self, x):
            return torch.einsum("bti,eio->bto", self.proj(x), self.weight)

    try:
        settings = config(target_modules=["proj"], target_parameters=["moe.weight"])
    except TypeError:
        pytest.skip("this PEFT has no target_parameters")
    torch.manual_seed(0)
    stock = stir(peft.get_peft_model(nn.Sequential(OrderedDict(moe=Experts())), settings))
    ours = copy.deepcopy(stock)
    set_backend("triton")
    layers = {layer.name.rpartition(".")[2]: layer for layer in patch_peft(ours).layers}
    why = "target_parameters: a Experts is none of transformers' modules of experts"
    assert layers["weight"].reason == why and layers["proj"].fused
    same(results(ours, inputs()), results(stock, inputs()))


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.interpreted
@pytest.mark.parametrize("first", [True, False], ids=["patched first", "sharded first"])
@BOTH
def test_fsdp2_gathers_what_the_kernels_read(mesh, kind, first):
    """Sharded by the model, layers are fused in either order; sharded one by one, only if they were patched first."""
    from torch.distributed.fsdp import fully_shard

    stock, x = stock_model(**KINDS[kind]), inputs()
    set_backend("triton")
    expected = results(stock, x)
    for alone in (False, True):
        ours = copy.deepcopy(stock)
        if first:
            patch_peft(ours)
        if alone:
            fully_shard(ours.base_model.model.up, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        report = patch_peft(ours)
        assert report.fused == 2 if first or not alone else "before fully_shard" in report.layers[0].reason, report
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            found = results(ours, x)
        same({name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in found.items()}, expected)


def test_report_under_fsdp2_speaks_of_where_it_gathers(mesh, monkeypatch):
    """Parameters that are kept on the CPU run on the mesh's devices."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    ours = fully_shard(patched(stock_model()), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    monkeypatch.setattr(type(mesh), "device_type", "cuda")
    monkeypatch.setattr(lora_fast.dispatch, "why_slow", lambda device, dtype: f"runs on {device.type}")
    assert {layer.reason for layer in peft_report(ours).layers} == {"runs on cuda"}


def test_dtensors_run_stock_audibly(mesh):
    from torch.distributed.tensor import DTensor, distribute_module

    stock, x = stock_model(), DTensor.from_local(inputs(), mesh)
    expected = results(stock, inputs())
    ours = distribute_module(patched(stock), mesh)
    assert "base weight is a DTensor" in peft_report(ours).layers[0].reason
    with pytest.warns(SlowPathWarning, match="the input is a DTensor"):
        found = results(ours, x)
    same({name: t.full_tensor() for name, t in found.items()}, expected)


def test_without_peft(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(ImportError, match=r"needs PEFT: pip install peft"):
        lora_fast.patch_peft(Net())


@BOTH
def test_fp8_base(kind):
    """The base weights become fp8, but for excluded ones; a merge is a 16- or 32-bit weight, an unmerge the fp8 one."""
    from lora_fast.fp8 import Fp8Weight

    model = stir(stock_model(**KINDS[kind]))
    x = inputs()
    expected = model(x).detach()
    report = patch_peft(model, base_dtype="float8_e4m3", base_dtype_exclude=["down"])
    up, down = model.base_model.model.up, model.base_model.model.down
    assert isinstance(up.base_layer.weight, Fp8Weight) and not isinstance(down.base_layer.weight, Fp8Weight)
    assert [("fp8 base" in layer.remark) for layer in report.layers if layer.fused] in ([], [True, False])
    held, y = up.base_layer.weight, model(x)
    assert 0 < (y - expected).norm() < 0.1 * expected.norm()
    y.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with model.disable_adapter():
        plain = model(x)
    assert torch.isfinite(plain).all() and not torch.equal(plain, y)
    up.merge()
    assert not isinstance(up.base_layer.weight, Fp8Weight)
    assert (model(x) - y).norm() < 0.1 * y.norm()
    up.unmerge()
    assert isinstance(up.base_layer.weight, Fp8Weight) and torch.equal(up.base_layer.weight.rows, held.rows)
    assert torch.equal(model(x), y)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), y)
    unpatch_peft(again)
    weight = again.base_model.model.up.base_layer.weight
    assert type(weight) is nn.Parameter and torch.equal(weight, held.dequantise())
    again.merge_adapter()
    for layer in (up, down):
        layer.save_x = "none"
    with pytest.raises(ValueError, match="save_x"):
        model(x)


def test_fp8_base_refused_changes_nothing():
    model = stock_model()
    with torch.no_grad():
        model.base_model.model.down.base_layer.weight[0, 0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match="down.*not finite"):
        patch_peft(model, base_dtype="float8_e4m3")
    assert state(model) == before
    for options, said in (
        ({"base_dtype": "int4"}, "base_dtype: got 'int4'"),
        ({"base_dtype_exclude": ["up"]}, "base_dtype_exclude"),
        ({"base_dtype": "nf4", "base_dtype_exclude": ["no"]}, r"'no' matches nothing \(linear layers: .*up"),
    ):
        with pytest.raises(ValueError, match=said):
            patch_peft(model, **options)
    assert state(model) == before
