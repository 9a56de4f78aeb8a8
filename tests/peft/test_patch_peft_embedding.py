"""patch_peft over nn.Embedding: the numbers of stock PEFT, its files, tied heads, and why the rest stays stock."""

import copy
import warnings

import pytest
import torch
from accuracy import error
from peft_nets import config, patched, stir
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_fast import SlowPathWarning, patch_peft, peft_report, set_backend, unpatch_peft

peft = pytest.importorskip("peft")

KINDS = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.25}, "rslora": {"use_rslora": True}}
BOTH = pytest.mark.parametrize("kind", ["lora", "dora"])


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 16, **options)
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def stock_model(path=("auto", "cpu"), dtype=torch.float32, options=None, net=None, **kwargs):
    torch.manual_seed(0)
    net = net or Net(**options or {})
    return stir(peft.get_peft_model(net.to(path[1], dtype), config(**{"target_modules": ["embed"], **kwargs})))


def ids(path=("auto", "cpu")):
    return torch.tensor([[3, 3, 0, 10], [2, 3, 5, 0]], device=path[1])


def results(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, expected, tol=1e-4):
    assert ours.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(ours[name], t, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=["plain", "padding"])
def test_numbers_are_stocks(path, kind, options):
    stock = stock_model(path, options=options, **KINDS[kind])
    ours = patched(stock, path)
    for mode in (True, False):
        same(results(ours.train(mode), ids(path)), results(stock.train(mode), ids(path)))
    assert list(ours.state_dict()) == list(stock.state_dict()) and repr(ours) == repr(stock)


@BOTH
def test_16_bits_are_no_worse_than_stocks(path, dtype16, kind):
    stock = stock_model(path, dtype16, **KINDS[kind])
    ours, truth = patched(stock, path), copy.deepcopy(stock).double()
    found, base, exact = (results(model, ids(path)) for model in (ours, stock, truth))
    for name, t in exact.items():
        assert found[name].dtype == base[name].dtype
        assert error(found[name], t) <= 1.05 * error(base[name], t) + 2 * torch.finfo(dtype16).eps, name


@BOTH
def test_scaled_embeddings_are_stocks(path, kind):
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    net = Net()
    net.embed = gemma.Gemma3TextScaledWordEmbedding(11, 16, 0, embed_scale=4.0)
    stock = stock_model(path, net=net, **KINDS[kind])
    if not hasattr(peft.tuners.lora.Embedding, "_get_embed_scale"):  # it does not scale the adapter's rows
        reason = patch_peft(copy.deepcopy(stock)).layers[0].reason
        assert "Gemma3TextScaledWordEmbedding, not an nn.Embedding" in reason
        return
    same(results(patched(stock, path), ids(path)), results(stock, ids(path)))


def test_several_adapters_are_one(path):
    stock = stock_model(path)
    stock.add_adapter("more", config(target_modules=["embed"], r=3))
    stir(stock).base_model.set_adapter(["default", "more"])
    ours = patched(stock, path)
    same(results(ours, ids(path)), results(stock, ids(path)))
    assert peft_report(ours).layers[0].remark == "2 adapters as one"


@BOTH
def test_what_peft_does_is_stocks(kind, tmp_path):
    stock = stock_model(**KINDS[kind])
    ours, x = patched(stock), ids()
    expected, before = ours(x), copy.deepcopy(ours.state_dict())
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(ours(x), stock(x)) and "disabled" in peft_report(ours).layers[0].reason
    for model in (ours, stock):
        model.merge_adapter()
    weights = (model.base_model.model.embed.base_layer.weight for model in (ours, stock))
    assert torch.equal(*weights) and "merged" in peft_report(ours).layers[0].reason
    if hasattr(ours.base_model.model.embed, "_get_embed_scale"):  # PEFT's merging of DoRA was wrong before
        torch.testing.assert_close(ours(x), expected)
    ours.unmerge_adapter()
    for key, t in ours.state_dict().items():
        torch.testing.assert_close(t, before[key])
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    again.base_model.model.load_state_dict(ours.base_model.model.state_dict())
    torch.testing.assert_close(again(x), expected)
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    torch.testing.assert_close(ours(x), expected)
    unpatch_peft(ours)
    assert type(ours.base_model.model.embed) is peft.tuners.lora.Embedding
    torch.testing.assert_close(ours(x), expected)


def test_an_adapter_that_comes_later_is_fast():
    ours = patched(stock_model(target_modules=["head"]))
    ours.add_adapter("late", config(target_modules=["embed"]))
    ours.set_adapter("late")
    assert type(stir(ours).base_model.model.embed).__name__ == "FastEmbedding"
    expected = copy.deepcopy(ours)
    unpatch_peft(expected)
    same(results(ours, ids()), results(expected, ids()))


@pytest.mark.parametrize("ensure", [False, True], ids=["apart", "tied adapters"])
def test_tied_heads(path, ensure):
    """A head whose weight is the embedding's, with adapters on both: apart, or PEFT's one for both."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(vocab_size=11, tie_word_embeddings=True, num_key_value_heads=2, **sizes)

    def tied():  # anew: PEFT's adapter of both cannot be copied
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(llama).to(path[1])
        try:
            lora = config(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=ensure)
        except TypeError:
            pytest.skip("this PEFT has no ensure_weight_tying")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return stir(peft.get_peft_model(model, lora))

    set_backend(path[0])
    ours, stock = tied(), tied()
    report = patch_peft(ours)
    assert len(report.layers) == 3 and (report.not_fused if path[0] == "triton" else report.fused) == 0, report
    assert ours.base_model.model.lm_head.weight is ours.base_model.model.model.embed_tokens.weight
    losses = []
    for one in (ours, stock):
        trained = [p for p in one.parameters() if p.requires_grad]
        step = torch.optim.SGD(trained, 0.1, foreach=False)  # of PEFT's adapters for both some share their memory
        for _ in range(3):
            loss = one(input_ids=ids(path), labels=ids(path)).loss
            loss.backward()
            step.step()
            step.zero_grad()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-4, atol=1e-4)


def test_checkpointing_and_compiling():
    ours = patched(stock_model(use_dora=True))
    expected = results(ours, ids())
    ours.zero_grad()
    checkpoint(ours, ids(), use_reentrant=False).square().sum().backward()
    same(
        {n: p.grad for n, p in ours.named_parameters() if p.grad is not None},
        {k: expected[k] for k in list(expected)[1:]},
    )
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(ours, backend=counter, fullgraph=True)(ids()), expected["y"])
    assert counter.frame_count == 1


def special():
    net = Net()
    net.embed = type("Special", (nn.Embedding,), {})(11, 16)
    return net


NEVER = {
    "max_norm": (lambda: Net(max_norm=1.0), "max_norm of its embedding is 1.0"),
    "sparse": (lambda: Net(sparse=True), "sparse of its embedding is True"),
    "by frequency": (lambda: Net(scale_grad_by_freq=True), "scale_grad_by_freq of its embedding is True"),
    "a subclass": (special, "the base layer is a Special, not an nn.Embedding itself"),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_stays_stock_for_good(case):
    net, reason = NEVER[case]
    stock = stock_model(net=net())
    ours = copy.deepcopy(stock)
    report = patch_peft(ours)
    assert [(layer.fused, layer.reason) for layer in report.layers] == [(False, reason)]
    assert type(ours.base_model.model.embed) is peft.tuners.lora.Embedding


def hooked(model):
    model.base_model.model.embed.base_layer.register_forward_hook(lambda *_: None)


def trains(model):
    model.base_model.model.embed.base_layer.weight.requires_grad_()


def with_option(model):
    model.base_model.model.embed.base_layer.max_norm = 2.0


LATER = {"hooks": hooked, "requires grad": trains, "max_norm of its embedding is 2.0": with_option}


@pytest.mark.interpreted
@pytest.mark.parametrize("reason", LATER)
def test_what_is_stocks_in_a_call(reason):
    from lora_fast import dispatch

    ours = patched(stock_model(), ("triton", "cpu"))
    stock = copy.deepcopy(ours)
    unpatch_peft(stock)
    for model in (ours, stock):
        LATER[reason](model)
    dispatch._told.clear()
    with pytest.warns(SlowPathWarning, match=f"leaves a layer to stock PEFT: .*{reason}"):
        torch.testing.assert_close(ours(ids()), stock(ids()))
    assert reason in peft_report(ours).layers[0].reason


@pytest.mark.interpreted
def test_several_in_a_batch_are_stocks():
    stock = stock_model()
    stock.add_adapter("more", config(target_modules=["embed"]))
    ours = patched(stir(stock), ("triton", "cpu")).eval()
    names = ["default", "more"]
    torch.testing.assert_close(ours(ids(), adapter_names=names), stock.eval()(ids(), adapter_names=names))
