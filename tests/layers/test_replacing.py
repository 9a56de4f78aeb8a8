"""Tools that put other layers, or other weights, where adapters are: refused, or the adapter is kept."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_fast import (
    LoRAConfig,
    LoRALinear,
    add_bottleneck,
    add_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    parametrize,
    print_trainable_parameters,
    remove_lora,
)
from lora_fast.functional import dora_linear, lora_linear

BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Float8(nn.Linear):
    """As torchao's Float8Linear, which takes the weight over."""

    @classmethod
    def from_float(cls, linear):
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight  # of a parametrized layer no parameter
        new.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
        new.bias = linear.bias
        return new


def convert(model, put=setattr):
    """As torchao's convert_to_float8_training."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(child, Float8):
                put(parent, name, Float8.from_float(child))
    return model


PUTS = {
    "setattr": setattr,
    "add_module": lambda parent, name, new: parent.add_module(name, new),
    "register_module": lambda parent, name, new: parent.register_module(name, new),
    "set_submodule": lambda parent, name, new: parent.set_submodule(name, new),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.list = nn.Embedding(9, 8), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.rest = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, ids):
        return self.rest(self.list[0](self.up(self.embed(ids))))


TARGETS = ["up", "list.0", "rest.0"]


def adapted(kind):
    model = Net()
    if kind.startswith("peft"):
        peft = pytest.importorskip("peft")
        from lora_fast import patch_peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, use_dora="dora" in kind))
        patch_peft(model)
        return model
    if kind == "bottleneck":
        return add_bottleneck(model, TARGETS)
    config = LoRAConfig(target_modules=TARGETS, use_dora="dora" in kind)
    return parametrize.add_lora(model, config) if kind.startswith("parametrize") else add_lora(model, config)


KINDS = ["lora", "dora", "parametrize", "parametrize dora", "bottleneck"]


@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_swapped(kind, put):
    model, ids = adapted(kind), torch.arange(9)
    expected, before = model(ids), [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(
        RuntimeError, match="a Float8 would take the place of .* and drop its adapter; .*before it gets"
    ):
        convert(model, PUTS[put])
    assert torch.equal(model(ids), expected)
    after = [p for p in model.parameters() if p.requires_grad]
    assert len(before) == len(after) >= 6 and all(p is q for p, q in zip(before, after, strict=True))


@BOTH
def test_a_replacement_that_nobody_saw_is_told_later(dora):
    """Of one layer or of all."""
    for names in (["up"], ["rest.0"], ["up", "list.0"], TARGETS):
        model = adapted("dora" if dora else "lora")
        for name in names:
            parent, _, last = name.rpartition(".")
            parent = model.get_submodule(parent)
            parent._modules[last] = Float8.from_float(parent._modules[last])
        for use in (lora_parameters, lora_state_dict, merge_lora, print_trainable_parameters):
            with pytest.raises(ValueError, match=f"model: has lost adapters: .*{names[-1]}"):
                use(model)
        if names is not TARGETS:
            remove_lora(model)
        assert not [m for m in model.modules() if isinstance(m, LoRALinear)]


@pytest.mark.parametrize("kind", ["peft", "peft dora"])
def test_layers_of_pefts_are_not_replaced_either(kind):
    """A tool that swaps what is in them is none that drops them."""
    model, ids = adapted(kind), torch.arange(9)
    net = model.base_model.model
    with pytest.raises(RuntimeError, match="^up: a Linear would take the place of a FastLinear"):
        net.up = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="^0: a Linear would take"):
        net.list[0] = nn.Linear(8, 8)
    expected = model(ids)
    torch.testing.assert_close(convert(model)(ids), expected)
    assert model.get_nb_trainable_parameters()[0] > 0
    plain = model.unload()
    assert type(plain.up) is Float8 and not list(plain.up.children())


def llama(kind, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model, names = transformers.LlamaForCausalLM(config), ["lm_head", "q_proj"]
    if kind == "peft":
        peft = pytest.importorskip("peft")
        from lora_fast import patch_peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=names))
        patch_peft(model)
        return model
    if kind is None:
        return model
    add = parametrize.add_lora if kind == "parametrize" else add_lora
    return add(model, LoRAConfig(target_modules=names, use_dora=kind == "dora"))


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["lora", "dora", "parametrize", "peft"])
def test_a_resized_vocabulary(kind):
    """transformers makes a new head; of PEFT's it makes none by itself."""
    model = llama(kind, tied=False)
    before = trained(model)
    error, words = (TypeError, "FastLinear") if kind == "peft" else (RuntimeError, "^lm_head: a Linear would take")
    with pytest.raises(error, match=words):
        model.resize_token_embeddings(20)
    assert trained(model) == before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "peft"])
def test_a_vocabulary_of_the_same_size(kind, tied):
    """The head stays, and transformers freezes it whole."""
    if kind == "peft" and tied:
        pytest.skip("PEFT's head cannot be tied again")
    model = llama(kind, tied)
    with pytest.warns(UserWarning, match="freezes its adapter, too .*resize before the adapters come"):
        model.resize_token_embeddings(16)
    if kind != "peft":
        assert not model.lm_head.lora_A.requires_grad


@pytest.mark.parametrize("kind", ["lora", "dora", "parametrize", "peft"])
def test_a_resized_vocabulary_with_a_tied_head(kind):
    """Whose weight grows with the embedding's, unlike its adapter."""
    model = llama(kind, tied=True)
    with pytest.raises((ValueError, KeyError), match="got shape|'weight' already exists"):
        model.resize_token_embeddings(20)
        model(torch.arange(4)[None])


@BOTH
@pytest.mark.parametrize("tied", [False, True])
def test_a_parametrized_embedding_is_not_resized(tied, dora):
    """Of which transformers would resize a copy, and let the base train."""
    model, ids = llama(None, tied), torch.arange(9)[None]
    parametrize.add_lora(model, LoRAConfig(target_modules=["embed_tokens", "q_proj"], use_dora=dora))
    before, expected, embedding = trained(model), model(ids).logits, model.get_input_embeddings()
    for size in (20, 12):
        with pytest.raises(RuntimeError, match=f"^embed_tokens: num_embeddings is {size}, but the weight .* 16 rows"):
            model.resize_token_embeddings(size)
        assert trained(model) == before and embedding.num_embeddings == 16
        assert torch.equal(model(ids).logits, expected)
    if not tied:
        with pytest.warns(UserWarning, match="^embed_tokens: the base weight of a parametrized .* trains, .* freeze"):
            model.resize_token_embeddings(16)
        parametrize.remove_lora(model)
        with pytest.warns(UserWarning, match="^lm_head: the base weight of a parametrized .* trains"):
            parametrize.add_lora(model, LoRAConfig(target_modules=["lm_head"])).resize_token_embeddings(16)
    parametrize.remove_lora(model).resize_token_embeddings(20)
    assert model(ids).logits.shape[-1] == 20


@BOTH
def test_what_may_take_an_adapted_layers_place(dora):
    """Wrappers of it, what it gave itself, another adapter, nothing at all."""
    config, ids = LoRAConfig(target_modules=TARGETS, use_dora=dora), torch.arange(9)
    model = add_lora(Net(), config)
    y = model(ids)
    model.rest[0] = nn.Sequential(model.rest[0])
    model.up = copy.deepcopy(model.up)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(copied(ids), y) and len(list(lora_parameters(copied))) == 3 * (2 + dora)
        copied.up = LoRALinear.from_linear(copied.up.to_linear())
        copied.up = copied.up.to_linear()
        copied.list[0] = nn.Identity()
        copied.list[0] = nn.Linear(8, 8)
        del copied.list[0]
        copied.rest[0] = None
    assert not hasattr(remove_lora(add_lora(Net(), config)).up, "_in_place_of_lora")


def test_wrappers_of_torchs():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, ids = add_lora(Net(), LoRAConfig(target_modules=TARGETS)), torch.arange(9)
    y = model(ids)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    model.rest = torch.compile(model.rest, backend="eager")
    assert torch.equal(model(ids), y) and len(list(lora_parameters(model))) == 6


class Outer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = adapted(kind)
        self.other = adapted(kind)

    def forward(self, ids):
        return self.net(ids) + self.other(ids)


@pytest.mark.parametrize("kind", [*KINDS, "peft"])
def test_a_module_around_adapted_layers(kind):
    """Is not replaced by one without adapters; by one that has them, or its parameters, or nothing, it is. A whole
    model that PEFT or add_lora gave them to is by anything."""
    model, ids = Outer(kind), torch.arange(9)
    y = model(ids)
    net = model.net.base_model.model if kind == "peft" else model.net
    for put in PUTS.values():
        with pytest.raises(RuntimeError, match="^list: a ModuleList would take the place of a .* and drop its adapter"):
            put(net, "list", nn.ModuleList([nn.Linear(8, 8)]))
    net.list = copy.deepcopy(net.list)
    model.net, model.other = copy.deepcopy(model.net), nn.Sequential(model.other)
    assert torch.equal(model(ids), y)
    if kind == "lora":
        model.net = torch.jit.trace(model.net, ids, check_trace=False)
        assert torch.equal(model(ids), y)
    if kind.partition(" ")[0] in ("lora", "dora", "peft"):
        model.net = Net()
    with pytest.raises(RuntimeError, match="^other: a Net would take the place of a Sequential"):
        model.other = Net()
    model.other = None
    model.other = Net()


@BOTH
@pytest.mark.parametrize("where", ["net", "net.rest", "net.list"])
def test_a_replaced_module_that_nobody_saw_is_told_later(where, dora):
    config = LoRAConfig(target_modules="all-linear", use_dora=dora)
    model = nn.ModuleDict({"net": Net(), "other": Net()})
    model = add_lora(model, config)
    copied = copy.deepcopy(model)
    parent, _, last = where.rpartition(".")
    model.get_submodule(parent)._modules[last] = Net().get_submodule(where[4:])
    for use in (lora_parameters, lora_state_dict, merge_lora, print_trainable_parameters):
        with pytest.raises(ValueError, match=f"model: has lost adapters: .*{where}"):
            use(model)
    copied["net"].rest[0] = nn.Identity()
    copied["net"].list = nn.ModuleList()
    copied["net"].rest._modules["0"] = copied["net"].rest[0]
    assert len(list(lora_parameters(copied))) == (2 + dora) * 4
    remove_lora(copied)
    copied["other"] = Net()


def test_scripted_modules_are_left_alone():
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 8)))
    setattr(model, "0", torch.jit.script(nn.Linear(8, 8)))
    net = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))
    add_lora(net, LoRAConfig(target_modules=["0"]))
    assert len(list(lora_parameters(net))) == 2


# Weights


class Quantised(torch.Tensor):
    """As torchao's: a wrapper that makes its values anew in each operation."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    def __repr__(self):
        return "Quantised()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        args = [a.inner if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def quantize_(model):
    """As torchao's function of this name."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)


@BOTH
def test_weights_quantised_after_the_conversion(dora):
    model, ids = add_lora(Net(), LoRAConfig(target_modules=TARGETS, use_dora=dora)), torch.arange(9)
    y = model(ids)
    with pytest.raises(TypeError, match="^weight: got a Quantised, which a (LoRA|DoRA)Linear cannot compute with; "):
        quantize_(model)
    assert torch.equal(model(ids), y)
    layer, x = model.up, torch.ones(2, 8)
    layer(x)  # what is remembered of calls that look alike is not of these
    lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, 1.0)
    dora_linear(x, layer.weight, layer.lora_A, layer.lora_B, torch.ones(8), 1.0)
    layer._parameters["weight"] = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match="^weight: got a Quantised, expected a plain tensor"):
        layer(x)
    with pytest.raises(TypeError, match="^weight: got a Quantised"):
        lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, 1.0)
    with pytest.raises(TypeError, match="^weight: got a Quantised"):
        dora_linear(x, layer.weight, layer.lora_A, layer.lora_B, torch.ones(8), 1.0)


@pytest.mark.parametrize("add", [add_lora, parametrize.add_lora])
def test_weights_quantised_before_it(add):
    model = Net()
    quantize_(model)
    with pytest.raises(ValueError, match=r"up.* has a quantised weight \(a Quantised\)"):
        add(model, LoRAConfig(target_modules=TARGETS))


def test_patched_layers_over_quantised_weights_run_stock():
    model, ids = adapted("peft"), torch.arange(9)
    y = model(ids)
    quantize_(model)
    torch.testing.assert_close(model(ids), y)
