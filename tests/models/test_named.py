"""Adapters under names in one model: each in a batch of its own samples, against models that have it alone."""

import copy
import functools
import io
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_fast import (
    LoRAConfig,
    SlowPathWarning,
    add_lora,
    disable_lora,
    dispatch,
    load_adapter,
    load_lora_state_dict,
    lora_parameters,
    lora_plus_groups,
    lora_state_dict,
    merge_lora,
    print_trainable_parameters,
    remove_lora,
    save_adapter,
    set_adapter,
    set_backend,
    unmerge_lora,
    use_adapters,
)
from lora_fast.blocks.joining import joined_in
from lora_fast.layers.named import NamedLinear

ATTENTION = ["q_proj", "k_proj"]
CONFIGS = {
    "a": {"r": 3, "lora_alpha": 9, "target_modules": "all-linear"},
    "b": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": [*ATTENTION, "up_proj"]},
    "c": {"r": 8, "target_modules": ["down_proj", "gate_proj", "up_proj"]},
}
NAMES = ["a", "c", "__base__", "b", "a", "c"]


class Mlp(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(n, 2 * n, bias=False), nn.Linear(n, 2 * n, bias=False)
        self.down_proj, self.act_fn = nn.Linear(2 * n, n, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Mixed(nn.Module):
    """Layers with one input, as attention has them, and a gated MLP: blocks, both."""

    def __init__(self, n=16):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(n, n), nn.Linear(n, n)
        self.mlp = Mlp(n)

    def forward(self, x):
        return self.mlp(torch.tanh(self.q_proj(x)) * self.k_proj(x))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_decided", {})


def size(path):
    return 512 if path[1] == "cuda" else 16


def base(path=("reference", "cpu")):
    set_backend(path[0])
    torch.manual_seed(0)
    return Mixed(size(path)).to(path[1])


def stir(model, seed=1):
    """Adapters that do something, as after training; magnitudes off their start."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model):
            noise = torch.randn(p.shape, generator=gen).to(p)
            p.copy_(p * (1 + 0.2 * noise) if p.dim() == 1 else noise * p.shape[1] ** -0.5)
    return model


def several(net, names="abc", **more):
    model = copy.deepcopy(net)
    for name in names:
        add_lora(model, LoRAConfig(**CONFIGS[name], **more), name=name)
    return stir(model)


def alone(net, model, name, **more):
    """A model with this adapter of the other model's and no other."""
    made = add_lora(copy.deepcopy(net), LoRAConfig(**CONFIGS[name], **more))
    load_lora_state_dict(made, lora_state_dict(model, name))
    return made


def inputs(path=("reference", "cpu"), seed=2):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(6, 7, size(path), generator=gen).to(path[1])


def gradients(model, y, dy, name=None):
    """By the names of an adapter's tensors, and None where there is none."""
    model.zero_grad()
    (y * dy).sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in lora_parameters(model, name)]
    return dict(zip(lora_state_dict(model, name), found, strict=True))


def close(found, expected):
    """But for another order of sums, in which the largest numbers count."""
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, largest))


def rows_of(name, names=NAMES):
    return [i for i, other in enumerate(names) if other == name]


@pytest.mark.medium
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_each_gets_what_a_run_of_its_own_would_give(path, kind):
    net = base(path)
    model, x = several(net, **kind), inputs(path)
    dy = inputs(path, seed=3)
    with use_adapters(model, NAMES):
        y = model(x)
    (y * dy).sum().backward()
    found = {name: [p.grad for p in lora_parameters(model, name)] for name in CONFIGS}
    for name in CONFIGS:
        rows, own = rows_of(name), alone(net, model, name, **kind)
        expected = own(x[rows])
        close(y[rows], expected)
        for mine, theirs in zip(found[name], gradients(own, expected, dy[rows]).values(), strict=True):
            close(mine, theirs)
    close(y[rows_of("__base__")], net(x[rows_of("__base__")]))
    assert all(p.grad is None for key, p in model.named_parameters() if "lora_" not in key)


def test_dropout_is_each_adapters_own():
    """One that drops nothing is as in a run of its own, beside one that drops."""
    net = base()
    model = add_lora(copy.deepcopy(net), LoRAConfig(**CONFIGS["a"]), name="a")
    stir(add_lora(model, LoRAConfig(**CONFIGS["b"], lora_dropout=0.5), name="b"))
    names, x = ["a", "b", "a", "b", "a", "b"], inputs()
    with use_adapters(model, names):
        y, again = model(x), model(x)
        model.eval()
        still = model(x)
    rows = rows_of("a", names)
    close(y[rows], alone(net, model, "a")(x[rows]))
    assert torch.equal(y[rows], again[rows]) and not torch.allclose(y[1::2], again[1::2])
    close(still[1::2], alone(net, model, "b")(x[1::2]))


def test_one_that_does_not_occur_gets_no_gradient():
    model, x = several(base()), inputs()
    with use_adapters(model, ["a", "b"] * 3):
        model(x).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model, "b"))
    assert all(p.grad is None for p in lora_parameters(model, "c"))


@pytest.mark.medium
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_active_one_runs_in_blocks_and_names_take_them_apart(path, kind):
    net = base(path)
    model, x = several(net, **kind), inputs(path)
    [siblings] = vars(model)["_siblings"]
    assert list(joined_in(model).blocks) == ["mlp"] and siblings.names == ("q_proj", "k_proj")
    for name in CONFIGS:
        if name != "a":  # the first
            set_adapter(model, name)
        calls = siblings.calls
        y = model(x)
        close(y, alone(net, model, name, **kind)(x))
        assert siblings.calls == calls + (name != "c")  # which has nothing there
    calls = siblings.calls
    with use_adapters(model, NAMES):
        apart = model(x)
    assert siblings.calls == calls
    close(apart[rows_of("c")], y[rows_of("c")])


@pytest.mark.medium
@pytest.mark.interpreted
def test_half_precision():
    """Fused kernels in float16 are no farther from float32 than plain torch in float16, or nearly."""
    net = base()
    model, x = several(net), inputs()
    found = {}
    for way in ("exact", "reference", "triton"):
        set_backend("reference" if way == "exact" else way)
        one = copy.deepcopy(model) if way == "exact" else copy.deepcopy(model).half()
        with use_adapters(one, NAMES):
            found[way] = one(x if way == "exact" else x.half()).float()
    off = {way: (y - found["exact"]).norm() for way, y in found.items()}
    assert 0 < off["triton"] <= 1.5 * off["reference"]


class Checkpointed(nn.Module):
    """Makes its checkpoints by itself."""

    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_names_survive_a_models_own_checkpoints(reentrant):
    """The backward may come after the context; which of two forwards it repeats must be known."""
    model, x, dy = several(base()), inputs().requires_grad_(), inputs(seed=3)
    with use_adapters(model, NAMES):
        plain = gradients(model, model(x), dy, "b")
    wrapped = Checkpointed(model, reentrant)
    for _ in range(2):
        with use_adapters(wrapped, NAMES):
            y = wrapped(x)
        found = gradients(model, y, dy, "b")
        assert all(torch.equal(t, plain[key]) for key, t in found.items())
    with use_adapters(wrapped, NAMES):
        y = wrapped(x)
    wrapped(x)
    with pytest.raises(RuntimeError, match="^adapter_names: a checkpoint recomputes"):
        y.sum().backward()


@pytest.mark.medium
@pytest.mark.parametrize("reentrant", [False, True])
def test_names_survive_transformers_checkpoints(reentrant):
    """Of any forwards ahead of their backwards, of ones without names, and of threads."""
    transformers = pytest.importorskip("transformers")
    from loops import token_ids

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model, ids = several(llama, "ab").train(), token_ids()

    def step():
        model.zero_grad()
        losses = []
        for names in (["a", "b"], ["b", "__base__"]):
            with use_adapters(model, names):
                losses.append(model(input_ids=ids).logits.square().mean())
        losses.append(3 * model(input_ids=ids).logits.square().mean())
        for loss in losses:
            loss.backward()
        return {name: [p.grad.clone() for p in lora_parameters(model, name)] for name in "ab"}

    plain = step()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, grads in step().items():
        for found, expected in zip(grads, plain[name], strict=True):
            close(found, expected)
    model.requires_grad_(False)  # threads would add to the same gradients
    meet, embedded = threading.Barrier(2), model.get_input_embeddings()(ids).detach()

    def gradient(names, wait=lambda: None):
        x = embedded.clone().requires_grad_()
        with use_adapters(model, names):
            wait()
            y = model(inputs_embeds=x).logits
            wait()
        y.square().mean().backward()
        return x.grad

    orders = [["a", "b"], ["b", "__base__"]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda names: gradient(names, meet.wait), orders))
    for one, names in zip(found, orders, strict=True):
        close(one, gradient(names))
    with use_adapters(model, ["b", "b"]):
        other = copy.deepcopy(model)
    assert type(other.model.layers[0]._gradient_checkpointing_func) is functools.partial  # transformers' own


def test_names_are_nested_and_hold_in_one_thread_and_for_one_model():
    net, x = base(), inputs()
    model, other = several(net), several(net, "ab")
    y = model(x)
    other_y = other(x)
    with use_adapters(model, NAMES):
        named = model(x)
        assert not torch.allclose(named, y) and torch.equal(other(x), other_y)
        with use_adapters(model, ["b"] * 6):
            close(model(x), alone(net, model, "b")(x))
        assert torch.equal(model(x), named)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(model, x).result(), y)
        with pytest.raises(ZeroDivisionError), use_adapters(model, ["a"] * 6):
            raise ZeroDivisionError
        assert torch.equal(model(x), named)
        with disable_lora(model):
            close(model(x), net(x))
    assert torch.equal(model(x), y)


def test_a_context_is_entered_again():
    model, x = several(base()), inputs()
    named = use_adapters(model, NAMES)
    with named:
        y = model(x)
    with named, named:
        assert torch.equal(model(x), y)
    assert not torch.allclose(model(x), y)
    merge_lora(model)
    with pytest.raises(ValueError, match="^names: an adapter is merged"), named:
        pass


def test_a_context_that_was_kept_knows_when_layers_change():
    """Others may come and go in the same layers; in no case does it do nothing without a word."""
    net, x = base(), inputs()
    model = several(net, "ab")
    kept = use_adapters(model, ["a", "b"] * 3)
    add_lora(model, LoRAConfig(**CONFIGS["c"]), name="c")  # "a" is in all layers
    with kept:
        y = model(x)
    remove_lora(model, "c")
    with kept:
        assert torch.equal(model(x), y)

    def again():
        remove_lora(model)
        several_more = LoRAConfig(target_modules=ATTENTION)
        add_lora(add_lora(model, several_more, name="a"), several_more, name="b")

    def wider():
        add_lora(model, LoRAConfig(**CONFIGS["c"]), name="c")

    def narrower():
        remove_lora(model.mlp)

    def elsewhere():
        remove_lora(model.mlp)
        add_lora(model.mlp, LoRAConfig(**CONFIGS["c"]), name="a")

    for change in (again, wider, elsewhere, narrower, again):
        kept = use_adapters(model, ["a", "b"] * 3)
        change()
        with pytest.raises(ValueError, match="^names: got those of a use_adapters from before"), kept:
            pass
        with use_adapters(model, ["a", "b"] * 3):
            model(x)


def test_threads_have_names_of_their_own():
    model, x = several(base()), inputs()
    orders, meet = [NAMES, NAMES[::-1]], threading.Barrier(2)

    def run(names):
        with use_adapters(model, names):
            meet.wait()
            y = model(x)
            meet.wait()
        return y

    expected = []
    for names in orders:
        with use_adapters(model, names):
            expected.append(model(x))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, orders))
    assert all(map(torch.equal, found, expected)) and not torch.equal(*found)


def state(model):
    """All that an error may not change."""
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    return list(model.modules()), flags, {k: t.clone() for k, t in model.state_dict().items()}, repr(model)


def unchanged(model, before):
    now = state(model)
    same = now[2].keys() == before[2].keys() and all(torch.equal(t, before[2][k]) for k, t in now[2].items())
    return same and [now[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]


@pytest.mark.parametrize(
    "config, name, message",
    [
        ({}, "a", "^name: 'a' is there already"),
        ({}, "x.y", r"^name: got 'x\.y'"),
        ({}, "", "^name: got ''"),
        ({}, "__base__", "^name: got '__base__'"),
        ({}, "lora_B", "^name: got 'lora_B'"),
        ({"bias": "all"}, "d", "^bias: got 'all'"),
        ({"modules_to_save": ["mlp"]}, "d", "^modules_to_save"),
        ({"target_parameters": ["x"]}, "d", "^target_parameters"),
        ({"base_dtype": "nf4"}, "d", "^base_dtype"),
        ({"target_modules": ["nothing"]}, "d", "^target_modules: 'nothing' matches"),
        ({"rank_pattern": {"nothing": 2}}, "d", "^rank_pattern: 'nothing'"),
        ({}, None, "has LoRA layers already .*, or give another adapter a name"),
    ],
)
def test_an_addition_that_is_wrong_changes_nothing(config, name, message):
    model = several(base())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**{"target_modules": ATTENTION, **config}), name=name)
    assert unchanged(model, before)
    with pytest.raises(TypeError, match="^name: got int"):
        add_lora(model, LoRAConfig(target_modules=ATTENTION), name=3)


def test_what_is_there_may_refuse_others():
    biased = add_lora(base(), LoRAConfig(target_modules=ATTENTION, bias="all"))
    hooked = add_lora(base(), LoRAConfig(target_modules=ATTENTION))
    hooked.q_proj.register_forward_hook(lambda *args: None)
    merged = merge_lora(several(base()))
    for model, message in (biased, "trains biases"), (hooked, "q_proj: hooks would be lost"), (merged, "is merged"):
        before = state(model)
        with pytest.raises(ValueError, match=f"^model: .*{message}"):
            add_lora(model, LoRAConfig(target_modules=ATTENTION), name="d")
        assert unchanged(model, before)


def test_names_that_are_wrong():
    model, x = several(base()), inputs()
    without_b = add_lora(several(base(), "b"), LoRAConfig(**CONFIGS["c"]), name="c").mlp.gate_proj
    add_lora(model, LoRAConfig(target_modules=ATTENTION, use_dora=True), name="dora")
    for names, error, message in (
        (["a", "nobody"], ValueError, "^names: got 'nobody', expected 'a' or 'b' or 'dora' or 'c' or '__base__'"),
        (["a", "dora"], ValueError, r"^names: got DoRA \(dora\) beside LoRA in q_proj"),
        (["b", "nobody", "no-one"], ValueError, "^names: got 'no-one', 'nobody', expected"),
        ("a", TypeError, "^names: got 'a', expected a list"),
        ([1, 2], TypeError, "^names: got"),
    ):
        with pytest.raises(error, match=message), use_adapters(model, names):
            pass
    for wrong in (x[:5], x[0, 0]):
        with use_adapters(model, NAMES), pytest.raises(ValueError, match="^names: got 6, expected one for each of"):
            model(wrong)
    with use_adapters(model, ["c", "dora"] * 3):
        model(x)  # no layer has both
    before, more = state(model), {save_adapter: ["folder"], load_lora_state_dict: [{}], lora_plus_groups: [1e-3, 16]}
    calls = set_adapter, lora_state_dict, remove_lora, lora_parameters, merge_lora, *more
    for call, name in itertools.product(calls, ("nobody", "", "__base__")):
        with pytest.raises(ValueError, match=f"^name: got '{name}', expected 'a' or"):
            call(model, *more.get(call, []), name=name)
    with pytest.raises(ValueError, match="^model: has no layer of the active adapter, 'b'; give a name: 'c'$"):
        lora_state_dict(without_b)
    assert unchanged(model, before)
    bare = add_lora(base(), LoRAConfig(target_modules=ATTENTION))
    for call in (set_adapter, lambda model, name: use_adapters(model, [name])):
        with pytest.raises(ValueError, match="^model: its adapter has no name"):
            call(bare, "default")
        with pytest.raises(ValueError, match="^model: has no LoRA layers"):
            call(base(), "a")


def test_without_b_name_all_is_as_before_and_it_is_default_once_another_comes(tmp_path):
    net, x = base(), inputs()
    model = stir(add_lora(copy.deepcopy(net), LoRAConfig(**CONFIGS["b"])))
    assert not any(isinstance(module, NamedLinear) for module in model.modules())
    y, own = model(x), list(lora_parameters(model))
    save_adapter(model, tmp_path / "one", name="default")
    add_lora(model, LoRAConfig(**CONFIGS["c"]), name="c")
    assert torch.equal(model(x), y) and all(map(torch.is_same_size, own, lora_parameters(model, "default")))
    assert [id(p) for p in own] == [id(p) for p in lora_parameters(model, "default")]
    assert all(p.requires_grad for p in lora_parameters(model))
    assert print_trainable_parameters(model)[0] == sum(p.numel() for p in lora_parameters(model))
    save_adapter(model, tmp_path / "two")
    configs = [(tmp_path / folder / "adapter_config.json").read_bytes() for folder in ("one", "two")]
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("one", "two"))
    assert configs[0] == configs[1] and one.keys() == two.keys() and all(torch.equal(t, two[k]) for k, t in one.items())
    close(remove_lora(model, "c")(x), y)
    assert remove_lora(model).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_files_are_pefts(tmp_path, kind):
    """Each adapter's file gives PEFT the same numbers, and comes back under any name."""
    peft = pytest.importorskip("peft")
    net, x = base(), inputs()
    model = several(net, **kind).eval()
    for name in CONFIGS:
        save_adapter(model, tmp_path / name, name=name)
        set_adapter(model, name)
        y = model(x)
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / name)).eval()
        close(stock(x), y)
        fresh = load_adapter(copy.deepcopy(net), tmp_path / name, name="mine")
        load_adapter(fresh, tmp_path / "a", name="beside")
        assert torch.equal(fresh(x), y)
        assert load_adapter(copy.deepcopy(net), tmp_path / name)(x).equal(y)
    before = state(model)
    for wrong in ("b", "nothing.x"):
        with pytest.raises(ValueError, match="either the adapter or the model's LoRA layers lack|^name: got"):
            load_adapter(model, tmp_path / "a", name=wrong)
    assert unchanged(model, before)
    with torch.no_grad():
        for p in lora_parameters(model, "c"):
            p.zero_()
    load_adapter(model, tmp_path / "c", name="c")
    assert torch.equal(model(x), y)


def test_a_file_with_an_embedding_takes_no_name(tmp_path):
    def net():
        return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))

    save_adapter(add_lora(net(), LoRAConfig(target_modules=["0", "1"])), tmp_path)
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match=r"^adapter_model.safetensors: has adapters of embeddings .*\(0\), .* a name"):
        load_adapter(model, tmp_path, name="x")
    assert unchanged(model, before)
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_checkpoint_of_all(kind, merged):
    net, x = base(), inputs()
    model, other = several(net, **kind), several(base(), **kind)
    stir(other, seed=7)
    with torch.no_grad():
        other.q_proj.weight.add_(1)
    if merged:
        set_adapter(model, "c")
        merge_lora(model)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    assert other.load_state_dict(torch.load(saved)).missing_keys == []
    unmerge_lora(model)
    for one in (model, other):
        assert one.state_dict().keys() == several(net, **kind).state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    with use_adapters(model, NAMES), use_adapters(other, NAMES):
        assert torch.equal(model(x), other(x))


def test_a_merged_model_takes_a_checkpoint():
    model, other, x = several(base()), stir(several(base()), seed=7), inputs()
    merge_lora(model, name="b")
    model.load_state_dict(other.state_dict())
    set_adapter(other, "b")
    close(model(x), other(x))
    unmerge_lora(model)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_another_base_gives_fresh_magnitudes_anew():
    """As in a model with one DoRA adapter, which equals its base at the start."""
    model = add_lora(base(), LoRAConfig(**CONFIGS["b"], use_dora=True), name="b")
    add_lora(model, LoRAConfig(**CONFIGS["a"], use_dora=True), name="a")
    net, x = base(), inputs()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    model.load_state_dict(net.state_dict(), strict=False)
    for name in "ab":
        set_adapter(model, name)
        close(model(x), net(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_apart(copied):
    model, x = several(base()), inputs()
    with use_adapters(model, NAMES):
        y, other = model(x), copied(model)
    active = model(x)
    assert torch.equal(other(x), active)
    with use_adapters(other, NAMES):
        assert torch.equal(other(x), y) and torch.equal(model(x), active)
    set_adapter(other, "b")
    stir(other, seed=5)
    assert torch.equal(model(x), active)
    assert {id(p) for p in model.parameters()}.isdisjoint(map(id, other.parameters()))


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_one(kind):
    net, x = base(), inputs()
    model = several(net, **kind).eval()
    expected = alone(net, model, "b", **kind)(x)
    bits = {key: t.clone() for key, t in model.state_dict().items()}
    merge_lora(model, name="b")
    close(model(x), expected)
    for call, message in (
        (lambda: set_adapter(model, "a"), "^name: an adapter is merged"),
        (lambda: merge_lora(model, name="c"), "^name: an adapter is merged"),
        (lambda: remove_lora(model, "c"), "^name: an adapter is merged"),
        (lambda: use_adapters(model, NAMES), "^names: an adapter is merged"),
        (lambda: model.q_proj.adapter_a.merge(), "^merge: 'a' is not active, but 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with disable_lora(model):
        close(model(x), net(x))
    plain = remove_lora(copy.deepcopy(model))
    assert type(plain.q_proj) is nn.Linear
    close(plain(x), expected)
    unmerge_lora(model)
    assert all(torch.equal(t, bits[key]) for key, t in model.state_dict().items())
    set_adapter(model, "a")
    close(model(x), alone(net, model, "a", **kind)(x))


@pytest.mark.parametrize("named", [False, True])
def test_offloaded_layers_run_by_themselves(tmp_path, named):
    """Not in a group, since accelerate brings each one's weights for its own forward; saved and loaded from there."""
    accelerate = pytest.importorskip("accelerate")
    net, x = base(), inputs()
    full = several(net)
    model, y = full if named else alone(net, full, "b"), alone(net, full, "b")(x)
    save_adapter(alone(net, full, "b"), tmp_path / "b")
    if named:
        set_adapter(model, "b")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(SlowPathWarning, match="group layer by layer: q_proj: accelerate"):
        close(model(x), y)
    save_adapter(model, tmp_path / "offloaded")
    load_adapter(model, tmp_path / "b")
    close(model(x), y)
    close(load_adapter(copy.deepcopy(net), tmp_path / "offloaded")(x), y)


def test_a_merge_that_fails_leaves_the_active_one():
    model, x = several(base()).eval(), inputs()
    y = model(x)
    with torch.no_grad():
        list(lora_parameters(model, "b"))[-1].fill_(torch.inf)  # of its last layer
    with pytest.raises(ValueError, match="^safe_merge"):
        merge_lora(model, name="b", safe_merge=True)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_one_that_is_offloaded(kind, monkeypatch):
    """Where accelerate keeps the weights, by the model and by the layer; an error leaves all as it was."""
    accelerate = pytest.importorskip("accelerate")
    net, x = base(), inputs()
    model = several(net, **kind).eval()
    with torch.no_grad():
        expected = {name: alone(net, model, name, **kind)(x) for name in CONFIGS}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    layers = [layer for layer in model.modules() if isinstance(layer, NamedLinear)]

    def held():
        return [layer._hf_hook.weights_map["weight"].clone() for layer in layers]

    bits = held()
    assert all(layer.weight.is_meta for layer in layers)
    for name, y in expected.items():
        for by_layer in (False, True):
            set_adapter(model, name)
            if by_layer:
                for layer in layers:
                    if layer.active is not None:
                        layer.merge()
            else:
                merge_lora(model, name=name)
            assert not all(map(torch.equal, held(), bits))
            with torch.no_grad():
                close(model(x), y)
            unmerge_lora(model)
            assert all(map(torch.equal, held(), bits))

    def full(*args):
        raise OSError("full")

    monkeypatch.setattr("lora_fast.layers.merging.write", full)
    with pytest.raises(OSError, match="full"):
        model.mlp.gate_proj.merge()
    assert not model.mlp.gate_proj.merged
    with torch.no_grad():
        close(model(x), y)


def test_lora_plus_of_one():
    model = several(base(), use_dora=True)
    groups = lora_plus_groups(model, 1e-3, 16, name="b")
    assert {p for group in groups for p in group["params"]} == set(lora_parameters(model, "b"))
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    one = model.q_proj.adapter_b
    assert [rates[p] for p in (one.lora_A, one.lora_B, one.lora_magnitude_vector)] == [1e-3, 16e-3, 16e-3]


def test_removing_one_and_all():
    net, x = base(), inputs()
    net.mlp.up_proj.weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    model = several(net, "bca")
    expected = {name: alone(net, model, name)(x) for name in "ac"}
    remove_lora(model, "b")  # the active one
    assert torch.equal(model(x), expected["a"])
    remove_lora(model, "a")
    assert type(model.q_proj) is nn.Linear and isinstance(model.mlp.up_proj, NamedLinear)
    assert torch.equal(model(x), expected["c"]) and not model.q_proj.weight.requires_grad
    with use_adapters(model, ["c", "__base__"] * 3):
        model(x).sum().backward()
    remove_lora(model, "c")
    assert not any(isinstance(module, NamedLinear) for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags and torch.equal(model(x), net(x))
    assert not any(note.startswith("_") and "lora" in note for m in model.modules() for note in vars(m))
    several(model, "ab")


def test_a_module_that_has_no_adapter_left_lost_none():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    add_lora(model, LoRAConfig(r=2, target_modules=["0.0", "1.0"]), name="a")
    add_lora(model, LoRAConfig(r=2, target_modules=["1.0"]), name="b")
    remove_lora(model, "a")
    set_adapter(model, "b")
    assert len(list(lora_parameters(model))) == 2
    model[1]._modules["0"] = nn.Linear(4, 4)  # which nothing sees at once
    with pytest.raises(ValueError, match="has lost adapters"):
        set_adapter(model, "b")


@pytest.mark.medium
def test_compiled_once_for_all_names():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x, counter = several(base()), inputs(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for names in (NAMES, NAMES[::-1], ["c", "b", "a", "__base__", "c", "c"]):
        with use_adapters(model, names):
            close(compiled(x), model(x))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1]
    close(compiled(x), model(x))


def test_sharded(mesh):
    """By FSDP2, of one process: adapters come first."""
    from torch.distributed.fsdp import fully_shard

    model, x, dy = several(base()), inputs(), inputs(seed=3)
    with use_adapters(model, NAMES):
        expected = gradients(model, model(x), dy, "c")
    whole = lora_state_dict(model, "c")
    for part in (model.mlp, model):
        fully_shard(part, mesh=mesh)
    with use_adapters(model, NAMES):
        y = model(x)
    found = gradients(model, y, dy, "c")
    for key, t in expected.items():
        close(found[key].full_tensor(), t)
    assert all(torch.equal(t.full_tensor(), whole[key]) for key, t in lora_state_dict(model, "c").items())
    with pytest.raises(ValueError, match="^model: has weights that a wrapper keeps"):
        add_lora(model, LoRAConfig(target_modules=ATTENTION), name="d")


def test_a_base_in_four_bits():
    """Of which the first adapter decides; in a batch it is plain torch's, as one warning says."""
    set_backend("reference")
    torch.manual_seed(0)
    net, x = Mixed(64), torch.randn(2, 3, 64)
    model = add_lora(net, LoRAConfig(**CONFIGS["a"], base_dtype="nf4"), name="a")
    stir(add_lora(model, LoRAConfig(**CONFIGS["b"]), name="b"))
    with use_adapters(model, ["a", "b"]):
        y = model(x)
    for i, name in enumerate("ab"):
        set_adapter(model, name)
        close(y[i], model(x[i]))


def test_losses_of_a_tiny_sweep_are_those_of_separate_runs():
    """Each adapter with an optimizer of its own."""
    net, rates = base(), {"a": 1e-2, "b": 3e-2, "c": 1e-1}
    model = several(net)
    runs = {name: alone(net, model, name) for name in rates}
    together = {name: torch.optim.AdamW(lora_parameters(model, name), lr) for name, lr in rates.items()}
    apart = {name: torch.optim.AdamW(lora_parameters(runs[name]), lr) for name, lr in rates.items()}
    for step in range(4):
        x, target = inputs(seed=step)[:2], inputs(seed=9)[:2]
        with use_adapters(model, [name for name in rates for _ in x]):
            ys = model(x.repeat(len(rates), 1, 1)).split(len(x))
        losses = [F.mse_loss(y, target) for y in ys]
        sum(losses).backward()
        for name, loss in zip(rates, losses, strict=True):
            own = F.mse_loss(runs[name](x), target)
            own.backward()
            torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-5)
            for optimizer in (together[name], apart[name]):
                optimizer.step()
                optimizer.zero_grad()
