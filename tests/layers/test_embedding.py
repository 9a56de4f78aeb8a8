"""LoRAEmbedding: alone, in a model by add_lora, and in PEFT's files."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lora_fast
from lora_fast import (
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    add_lora,
    disable_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_backend,
    unmerge_lora,
)

BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def ids(device="cpu"):
    return torch.tensor([[3, 3, 0, 8], [2, 3, 5, 0]], device=device)


def layer(dora, device="cpu", dtype=torch.float32, padding_idx=None):
    """One whose adapter does something, and the embedding that it stands for."""
    torch.manual_seed(0)
    base = nn.Embedding(9, 8, padding_idx, device=device, dtype=dtype)
    made = LoRAEmbedding.from_embedding(base, 3, 6, use_dora=dora)
    return stir(made), base


def stir(model):
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = 0.3 * torch.randn(p.shape, generator=gen).to(p)
                p.copy_(p * (1 + noise) if "magnitude" in name else noise)
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, x):
        return self.head(self.embed(x))


def adapted(dora=False, targets=("embed", "head")):
    torch.manual_seed(0)
    return stir(add_lora(Net(), LoRAConfig(r=3, lora_alpha=6, target_modules=list(targets), use_dora=dora)))


@BOTH
def test_starts_at_its_base_and_trains(path, dora):
    set_backend(path[0])
    base = nn.Embedding(9, 8, 3, device=path[1])
    made = LoRAEmbedding.from_embedding(base, use_dora=dora)
    torch.testing.assert_close(made(ids(path[1])), base(ids(path[1])))
    assert made.weight is base.weight and not base.weight.requires_grad and not made.lora_embedding_A.any()
    made(ids(path[1])).square().sum().backward()
    assert made.lora_embedding_A.grad.any() and not made.lora_embedding_A.grad[:, 3].any()
    assert dora == hasattr(made, "lora_magnitude_vector") and made.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_merge_is_exact_to_undo(dora, dtype):
    made, base = layer(dora, dtype=dtype)
    weight, expected = base.weight.clone(), made(ids())
    made.merge(safe_merge=True)
    assert made.merged and torch.equal(base.weight, weight), "what shares the base does not change"
    torch.testing.assert_close(made(ids()), expected, rtol=0.02, atol=0.02)
    if dtype == torch.float32:
        torch.testing.assert_close(made(ids()), expected)
    made.disable()
    assert torch.equal(made(ids()), base(ids()))
    made.enable()
    state = copy.deepcopy(made.state_dict())
    assert "lora_unmerged_weight" in state
    made.unmerge()
    assert torch.equal(made.weight, weight) and made.weight is base.weight
    torch.testing.assert_close(made(ids()), expected)
    fresh = layer(dora, dtype=dtype)[0]
    fresh.load_state_dict(state)
    assert torch.equal(fresh(ids()), expected)


@BOTH
def test_copies_pickles_and_its_plain_form(dora):
    made, base = layer(dora, padding_idx=2)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(ids()), made(ids()))
    plain = made.to_embedding()
    assert type(plain) is nn.Embedding and plain.weight is base.weight and plain.padding_idx == 2
    assert "r=3, lora_alpha=6" in repr(made) and ("use_dora=True" in repr(made)) == dora


def test_16_bits_and_initialisations():
    made = LoRAEmbedding(9, 8, dtype=torch.bfloat16)
    assert made.lora_embedding_A.dtype == torch.float32 and made(ids()).dtype == torch.bfloat16
    assert LoRAEmbedding(9, 8, init_lora_weights=False).lora_embedding_A.any()
    assert LoRAEmbedding(9, 8, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


ODD: Any = str(True)
LINEAR: Any = nn.Linear(3, 3)
BAD = [
    (lambda: LoRAEmbedding(9, 8, r=0), ValueError, "r: got 0"),
    (lambda: LoRAEmbedding(9, 8, use_dora=ODD), TypeError, "use_dora: got 'True'"),
    (lambda: LoRAEmbedding(9, 8, dtype=torch.int8), TypeError, "dtype: got torch.int8"),
    (lambda: LoRAEmbedding.from_embedding(LINEAR), TypeError, "is a Linear, not a plain nn.Embedding"),
    (lambda: LoRAEmbedding.from_embedding(nn.Embedding(3, 3, max_norm=1.0)), TypeError, "has max_norm=1.0"),
    (lambda: LoRAEmbedding.from_embedding(nn.Embedding(3, 3, sparse=True)), TypeError, "has sparse=True"),
    (
        lambda: LoRAEmbedding.from_embedding(nn.Embedding(3, 3, device="meta"), use_dora=True),
        ValueError,
        "without data, expected some to start DoRA from",
    ),
]


@pytest.mark.parametrize("make, kind, message", BAD, ids=lambda value: value if type(value) is str else "")
def test_bad_input(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@BOTH
def test_in_a_model(dora):
    net = Net()
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    add_lora(net, LoRAConfig(r=3, target_modules=["embed", "head"], use_dora=dora))
    assert type(net.embed) is LoRAEmbedding and isinstance(net.head, LoRALinear)
    assert sum(1 for _ in lora_parameters(net)) == (6 if dora else 4)
    stir(net)
    expected = net(ids())
    with disable_lora(net):
        assert torch.equal(net(ids()), nn.functional.linear(net.embed.weight[ids()], net.head.weight, net.head.bias))
    merge_lora(net)
    torch.testing.assert_close(net(ids()), expected)
    unmerge_lora(net)
    assert torch.equal(net(ids()), expected)
    with pytest.raises(RuntimeError, match="would take the place of a LoRAEmbedding and drop its adapter"):
        net.embed = nn.Embedding(12, 8)
    remove_lora(net)
    assert type(net.embed) is nn.Embedding and [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_all_linear_leaves_embeddings_and_a_base_dtype_too():
    net = add_lora(Net(), LoRAConfig(r=3, target_modules="all-linear"))
    assert type(net.embed) is nn.Embedding
    net = Net()
    net.head = nn.Linear(8, 32)
    with pytest.warns(UserWarning, match="is for nn.Linear layers and experts; these stay as they are: LoRAEmbedding"):
        add_lora(net, LoRAConfig(r=3, target_modules=["embed", "head"], base_dtype="mxfp4"))
    assert type(net.embed.weight) is nn.Parameter and "mxfp4" in repr(net.head)


def test_targets_that_cannot_be():
    net = Net()
    net.embed.max_norm = 1.0
    with pytest.raises(ValueError, match=r"cannot convert embed, which has max_norm=1.0"):
        add_lora(net, LoRAConfig(target_modules=["embed"]))


@BOTH
def test_files_are_pefts(tmp_path, dora):
    peft = pytest.importorskip("peft")
    ours = adapted(dora)
    save_adapter(ours, tmp_path / "ours")

    def base():
        torch.manual_seed(0)
        return Net()

    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(theirs(ids()), ours(ids()))
    stir(theirs).save_pretrained(tmp_path / "theirs")
    again = load_adapter(base(), tmp_path / "theirs")
    assert type(again.embed) is LoRAEmbedding and again.embed.use_dora == dora
    torch.testing.assert_close(again(ids()), theirs(ids()))
    torch.testing.assert_close(load_adapter(base(), tmp_path / "ours")(ids()), ours(ids()))
    with pytest.raises(ValueError, match=r"has lora_embedding_A, lora_embedding_B.*expected lora_A, lora_B"):
        other = base()
        other.embed = nn.Linear(8, 9)
        load_adapter(other, tmp_path / "ours")


def test_pefts_files_with_the_base_in_them(tmp_path):
    """PEFT writes an embedding that is a target beside its adapter: the model's own is no news, another is."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes))
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(ValueError, match="unexpected .*embed_tokens.*save_embedding_layers"):
        load_adapter(other, tmp_path)
    x = torch.arange(11)[None]
    torch.testing.assert_close(load_adapter(model, tmp_path)(x).logits, theirs(x).logits)


def test_doctor_names_it():
    from lora_fast.cli.doctor_layers import examine

    [found] = [one for one in examine(adapted(targets=["embed"])) if one.name == "embed"]
    assert found.what.startswith("LoRAEmbedding 9, 8, r=3")


def test_peft_config_is_taken():
    peft = pytest.importorskip("peft")
    net = lora_fast.add_lora(Net(), peft.LoraConfig(r=2, target_modules=["embed"]))
    assert net.embed.r == 2


def test_dora_starts_from_the_weights_that_come():
    """Another base brings norms of its own, a trained magnitude stays, without data it is made when there is some."""
    torch.manual_seed(0)
    other, ids = nn.Embedding(11, 16), torch.arange(11)
    layer = LoRAEmbedding.from_embedding(nn.Embedding(11, 16), r=4, use_dora=True)
    layer.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(layer(ids), other(ids))
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(2)
    layer.load_state_dict(nn.Embedding(11, 16).state_dict(), strict=False)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), 2 * other.weight.detach().norm(dim=0))
    later = LoRAEmbedding(11, 16, r=4, use_dora=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        later.lora_embedding_A.zero_()
        later.lora_embedding_B.zero_()
    later.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(later(ids), other(ids))
    bad = {**layer.state_dict(), "lora_magnitude_vector": torch.full((16,), torch.nan)}
    with pytest.raises(RuntimeError, match="lora_magnitude_vector: has elements that are not finite"):
        layer.load_state_dict(bad)


@pytest.mark.parametrize("rows", [40, 20])
def test_a_vocabulary_is_not_resized_under_an_adapter(rows):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    stir(add_lora(model, LoRAConfig(r=2, target_modules=["embed_tokens"])))
    x = torch.arange(20)[None]
    before = model.model(x).last_hidden_state
    with pytest.raises(RuntimeError, match=f"embed_tokens: the weight has {rows} rows now.*resize before") as error:
        model.resize_token_embeddings(rows)
    assert ("lost" in str(error.value)) == (rows < 32)
    if rows > 32:
        assert model.get_input_embeddings().num_embeddings == 32
        assert torch.equal(model.model(x).last_hidden_state, before)
