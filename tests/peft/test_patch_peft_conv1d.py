"""patch_peft over GPT-2's Conv1D, whose weight is stored as [in, out]: the numbers of stock PEFT, and its habits."""

import copy

import pytest
import torch
from peft_nets import config, inputs, patched, results, same, stir
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_fast import patch_peft, peft_report, unpatch_peft

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

KINDS = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.25}}


class Net(nn.Module):
    """GPT-2's MLP: 16 -> 24 -> 16."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(24, 16), Conv1D(16, 24)

    def forward(self, x):
        return x + self.c_proj(torch.relu(self.c_fc(x)))


def stock_model(path=("auto", "cpu"), dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    settings = config(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, **kwargs)
    return stir(peft.get_peft_model(Net().to(path[1], dtype), settings))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_stocks(path, kind):
    stock = stock_model(path, **KINDS[kind])
    ours, x = patched(stock, path), inputs(path)
    same(results(ours.eval(), x), results(stock.eval(), x))
    if kind != "dropout":
        same(results(ours.train(), x), results(stock.train(), x))
    assert list(ours.state_dict()) == list(stock.state_dict())


@pytest.mark.versions
@pytest.mark.medium
def test_dropout_drops_the_low_rank_branch_alone(path):
    ours, x = patched(stock_model(path, lora_dropout=0.25), path).train(), inputs(path, 4096, 16)
    layer = ours.base_model.model.c_fc
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    with ours.disable_adapter():
        base = ours(x)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    torch.testing.assert_close(first.mean(0), layer(x).mean(0), rtol=0.1, atol=0.15)
    assert torch.isfinite(base).all()


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_is_stocks_and_unmerge_exact(kind, safe):
    stock = stock_model(**KINDS[kind])
    ours, x = patched(stock), inputs()
    before, expected = copy.deepcopy(ours.state_dict()), ours(x)
    trial = copy.deepcopy(stock)
    try:
        trial.merge_adapter()
        trial.unmerge_adapter()
    except RuntimeError:
        pytest.skip("this PEFT cannot unmerge it")
    for model in (ours, stock):
        for name in ("c_fc", "c_proj"):  # a model's merge_adapter takes no safe_merge in every PEFT
            getattr(model.base_model.model, name).merge(safe_merge=safe)
    for name in ("c_fc", "c_proj"):
        merged = getattr(ours.base_model.model, name).base_layer.weight
        torch.testing.assert_close(merged, getattr(stock.base_model.model, name).base_layer.weight)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[key]) for key, t in ours.state_dict().items())
    with ours.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(ours(x), stock(x))
    unpatch_peft(ours)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_adapters_travel_both_ways_and_come_later(tmp_path):
    stock, x = stock_model(use_dora=True), inputs()
    ours = patched(stock)
    stir(ours, seed=5).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), tmp_path)
    torch.testing.assert_close(again(x), ours.eval()(x))
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    torch.testing.assert_close(ours(x), again(x))
    ours.add_adapter("late", config(target_modules=["c_fc"], r=3, fan_in_fan_out=True))
    ours.set_adapter("late")
    report = {layer.name.rpartition(".")[2]: layer for layer in peft_report(stir(ours)).layers}
    assert "none of its adapters is active" in report["c_proj"].reason and "active" not in report["c_fc"].reason
    expected = copy.deepcopy(ours)
    unpatch_peft(expected)
    same(results(ours, x), results(expected, x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_several_in_a_batch_are_stocks(path, kind):
    stock = stock_model(path, **KINDS[kind])
    stock.add_adapter("more", config(target_modules=["c_fc"], fan_in_fan_out=True, **KINDS[kind]))
    stir(stock)
    ours, x = patched(stock, path).eval(), inputs(path)
    names, y = ["default", "more"], []
    for i, name in enumerate(names):  # which is all that stock PEFT does of DoRA
        stock.eval().set_adapter(name)
        y.append(stock(x[i]))
    torch.testing.assert_close(ours(x, adapter_names=names), torch.stack(y))


def test_checkpointing_and_autocast(path, dtype16):
    stock = stock_model(path)
    ours, x = patched(stock, path), inputs(path).requires_grad_()
    expected = results(ours, x)
    checkpoint(ours, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, expected["dx"])
    with torch.autocast(path[1], dtype16):
        y, theirs = ours(x), stock(x)
    assert y.dtype == theirs.dtype
    torch.testing.assert_close(y.float(), theirs.float(), rtol=0.02, atol=0.02)


@pytest.mark.versions
@pytest.mark.medium
def test_compiles_to_one_graph():
    ours, x = patched(stock_model(use_dora=True)), inputs()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    y = torch.compile(ours, backend=counter, fullgraph=True)(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(y, ours(x))


def test_a_base_dtype_leaves_the_weight_as_it_is():
    ours = stock_model()
    patch_peft(ours, base_dtype="nf4")
    assert type(ours.base_model.model.c_fc.base_layer.weight) is nn.Parameter
    assert "nf4" not in peft_report(ours).layers[0].remark
