"""``adapter_names``: each sample's adapter in one batch, in training and in inference, against runs of each adapter on
its own samples."""

import copy
import warnings

import pytest
import torch
from peft_nets import inputs, patched, stock_model
from torch.utils.checkpoint import checkpoint

from lora_fast import patch_peft, set_backend

pytest.importorskip("peft")
NAMES = ["default", "more0", "__base__", "more0", "default", "more1"]
MORE = [{"r": 3, "lora_alpha": 9}, {"r": 8}]


def training(model):
    """All adapters train, whichever is active."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model.train()


def gradients(model, y, dy):
    model.zero_grad()
    (y * dy).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(stock, x, dy, names):
    """What each adapter gives for its samples alone."""
    y, grads = torch.empty_like(dy), {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        model = training(copy.deepcopy(stock))
        if name == "__base__":
            with model.disable_adapter():
                y[rows] = model(x[rows]).detach()
            continue
        model.set_adapter(name)
        training(model)
        own = model(x[rows])
        y[rows] = own.detach()
        grads |= {key: t for key, t in gradients(model, own, dy[rows]).items() if f".{name}." in key}
    return y, grads


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_training_equals_runs_of_each_adapter(path, kind):
    stock = stock_model(path[1], more=[{**one, **kind} for one in MORE], **kind)
    x = inputs(path, 6, 5, 16)
    dy = inputs(path, 6, 5, 5, seed=3)
    model = training(patched(stock, path))
    y = model(x, adapter_names=NAMES)
    expected, grads = apart(stock, x, dy, NAMES)
    close(y.detach(), expected)
    found = gradients(model, y, dy)
    assert found.keys() == grads.keys()
    for name, t in grads.items():
        close(found[name], t)


@pytest.mark.medium
def test_inference_equals_stocks(path):
    stock, x = stock_model(path[1], more=MORE).eval(), inputs(path, 6, 5, 16)
    ours = patched(stock, path).eval()
    with torch.no_grad():
        close(ours(x, adapter_names=NAMES), stock(x, adapter_names=NAMES))
        close(ours(x), stock(x))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_after_an_error_the_names_are_forgotten(mode):
    model, x = patched(stock_model(more=MORE)).train(mode), inputs(("auto", "cpu"), 6, 5, 16)
    expected, named = model(x), model(x, adapter_names=NAMES)

    def fail(*_):
        raise ArithmeticError("in the forward")

    hook = model.base_model.model.head.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="in the forward"):
        model(x, adapter_names=NAMES)
    hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(x), expected) and not torch.equal(named, expected)
    assert torch.equal(model(x, adapter_names=NAMES), named)


class Checkpointed(torch.nn.Module):
    """A model that makes its checkpoints by itself."""

    def __init__(self, net, reentrant):
        super().__init__()
        self.up, self.down, self.head, self.reentrant = net.up, net.down, net.head, reentrant

    def forward(self, x):
        hidden = checkpoint(lambda x: x + self.down(torch.relu(self.up(x))), x, use_reentrant=self.reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("reentrant", [False, True])
def test_names_survive_a_models_own_checkpoints(reentrant):
    stock = stock_model(more=MORE)
    model = training(patched(stock))
    x, dy = inputs(("auto", "cpu"), 6, 5, 16).requires_grad_(), inputs(("auto", "cpu"), 6, 5, 5, seed=3)
    plain = gradients(model, model(x, adapter_names=NAMES), dy)
    tuner = model.base_model
    tuner.model = Checkpointed(tuner.model, reentrant)
    for _ in range(2):
        found = gradients(model, model(x, adapter_names=NAMES), dy)
        assert found.keys() == plain.keys() and all(torch.equal(t, plain[name]) for name, t in found.items())
    y = model(x, adapter_names=NAMES)
    model(x, adapter_names=NAMES[::-1])
    with pytest.raises(RuntimeError, match="^adapter_names: a checkpoint recomputes"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_names_survive_transformers_checkpoints(reentrant):
    """Of two forwards ahead of their backwards, too."""
    pytest.importorskip("transformers")
    from loops import tiny_llama, token_ids

    set_backend("auto")
    model, ids = tiny_llama(), token_ids()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    patch_peft(model)
    training(model)

    def step():
        model.zero_grad()
        first = model(input_ids=ids, adapter_names=["default", "other"]).logits.square().mean()
        second = model(input_ids=ids, adapter_names=["other", "__base__"]).logits.square().mean()
        first.backward()
        second.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = step()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = step()
    assert len(plain) and found.keys() == plain.keys()
    for name, t in plain.items():
        close(found[name], t)


def test_what_is_wrong_is_said():
    model, x = training(patched(stock_model(more=MORE))), inputs(("auto", "cpu"), 6, 5, 16)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["nobody"] * 6)
    assert model.training and model.base_model.training
    model.base_model.model.up.lora_A["more1"].weight.requires_grad_(False)
    for p in (p for name, p in model.named_parameters() if ".more1." in name):
        p.requires_grad_(False)
    with pytest.warns(UserWarning, match="'more1' occurs, and none"):
        model(x, adapter_names=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x, adapter_names=NAMES)


@pytest.mark.parametrize("names, message", [(NAMES[:4], "Length of `adapter_names`"), (NAMES, "there are merged")])
def test_wrong_count_and_merged_adapters(names, message):
    model = patched(stock_model(more=MORE)).eval()
    if "merged" in message:
        model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=message):
        model(inputs(("auto", "cpu"), 6, 5, 16), adapter_names=names)


def test_dora_beside_lora_is_refused():
    model = training(patched(stock_model(more=[{"use_dora": True}, {}])))
    with pytest.raises(ValueError, match=r"^adapter_names: got DoRA \(more0\) beside LoRA"):
        model(inputs(("auto", "cpu"), 6, 5, 16), adapter_names=NAMES)


def test_generate():
    pytest.importorskip("transformers")
    from loops import tiny_llama, token_ids

    stock, ids = tiny_llama().eval(), token_ids()
    stock.add_adapter("other", copy.deepcopy(stock.peft_config["default"]))
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    for beams in (1, 2):
        given = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "num_beams": beams}
        names = ["other", "default"]
        assert torch.equal(
            ours.generate(input_ids=ids, adapter_names=names, **given),
            stock.generate(input_ids=ids, adapter_names=names, **given),
        )
