"""A patched model in the hands of others: tools that read names, PEFT's own switches and files, FSDP1."""

import copy
import pickle
import warnings

import pytest
import torch
from peft_nets import Net, config, inputs, patched, results, same, stir, stock_model
from torch import nn

from lora_fast import (
    DoRALinear,
    LoRAConfig,
    SlowPathWarning,
    add_lora,
    parametrize,
    patch_peft,
    peft_report,
    set_backend,
)
from lora_fast.wrappers.fsdp1 import NO_FP8

peft = pytest.importorskip("peft")
KINDS = {"lora": {}, "dora": {"use_dora": True}}
BOTH = pytest.mark.parametrize("kind", KINDS)


def test_names_that_tools_compare_are_stocks():
    stock = stock_model(use_dora=True)
    ours = patched(copy.deepcopy(stock))
    assert repr(ours) == repr(stock)
    assert type(ours.base_model).__name__ == type(stock.base_model).__name__ == "LoraModel"
    again = pickle.loads(pickle.dumps(ours))
    assert type(again.base_model) is type(ours.base_model) is not type(stock.base_model)
    if hasattr(peft, "get_layer_status"):
        for status in (peft.get_layer_status, peft.get_model_status):
            assert status(ours) == status(stock)


def test_a_reason_says_whose_linear_it_is():
    class Linear(nn.Linear):
        pass

    net = Net()
    net.up = Linear(16, 24)
    ours = peft.get_peft_model(net, config())
    patch_peft(ours)
    assert peft_report(ours).layers[0].reason == f"the base layer is a {__name__}.Linear, not an nn.Linear itself"


# DoraCaching


@pytest.fixture
def caching():
    """PEFT's switch, off again after the test."""
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("this PEFT keeps no norms")
    yield helpers.DoraCaching()
    helpers.DoraCaching()(enabled=False)


def kept(model):
    return {name: dict(module._dora_cache) for name, module in model.named_modules() if hasattr(module, "_dora_cache")}


def test_calls_of_stock_peft_keep_norms_as_it_does(caching):
    """Two DoRA adapters at once: where PEFT keeps their norms, and drops them."""
    stock = stock_model(use_dora=True, more=[{"use_dora": True}])
    ours, x = patched(stock), inputs()
    for model in (stock, ours):
        model.eval()
        model.base_model.set_adapter(["default", "more0"])
    for enabled in (False, True, True, False):
        caching(enabled=enabled)
        same(results(ours, x), results(stock, x))
        found = kept(ours)
        assert [*map(len, found.values())] == [*map(len, kept(stock).values())]
        assert any(found.values()) == enabled
        if enabled:
            ours(x)
            for now, was in zip(kept(ours).values(), found.values(), strict=True):
                assert all(now[name] is t for name, t in was.items())
    caching(enabled=True)
    ours(x)
    assert any(kept(ours).values()) and not any(kept(ours.train()).values())


def scale_b(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.detach().mul_(3)


def write_data(model):
    model.base_model.model.up.lora_A["default"].weight.data.mul_(-2)


def load(model):
    values = {n: 1.5 * t if "lora_" in n else t for n, t in model.state_dict().items()}
    model.load_state_dict(values)


def load_base(model):
    model.load_state_dict({n: 1.5 * t if "base_layer" in n else t for n, t in model.state_dict().items()})


def step(model):
    """In evaluation mode, by an optimizer that counts no version up."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True)
    model(inputs()).square().sum().backward()
    with torch.no_grad():
        model(inputs())
    optimizer.step()


def rescale(model):
    model.base_model.model.up.scaling["default"] *= 3


def rescale_by_a_tensor(model):
    """As peft.utils.hotswap's models have it: the layer is stock PEFT's then."""
    scaling = model.base_model.model.up.scaling
    if isinstance(scaling["default"], torch.Tensor):
        scaling["default"].mul_(3)
    else:
        scaling["default"] = torch.tensor(float(scaling["default"]))


def new_data(model):
    for _ in range(2):
        weight = model.base_model.model.up.base_layer.weight
        weight.data = weight.data * 2


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def to_double(model):
    model.double()
    model.float()


CHANGES = [
    scale_b,
    write_data,
    load,
    load_base,
    step,
    rescale,
    rescale_by_a_tensor,
    new_data,
    merge_and_back,
    to_double,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_stale_norm_is_read(caching, change):
    """Whatever happens between two evaluations, fused or stock: the second is that of a model that keeps nothing."""
    ours = patched(stock_model(use_dora=True, more=[{"use_dora": True}])).eval()
    x = inputs()
    caching(enabled=True)
    for first in (["default"], ["default", "more0"]):  # the second is a stock call
        for then in (["default"], ["default", "more0"]):
            ours.base_model.set_adapter(first)
            ours(x)
            ours.base_model.set_adapter(["default"])
            change(ours)
            ours.base_model.set_adapter(then)
            found = ours(x)
            caching(enabled=False)
            torch.testing.assert_close(found, ours(x))
            caching(enabled=True)


def test_a_fused_call_drops_what_a_stock_call_kept(caching):
    """Stock PEFT drops it in every forward without caching; a later stock call must not find it."""
    stock = stock_model(use_dora=True, more=[{"use_dora": True}])
    ours, x = patched(copy.deepcopy(stock)), inputs()
    for model in (stock, ours):
        model.eval()
        model.base_model.set_adapter(["default", "more0"])
        caching(enabled=True)
        model(x)
        caching(enabled=False)
        for name in ("default", "more0"):
            model.base_model.set_adapter([name])
            model(x)
        scale_b(model)
        caching(enabled=True)
        model.base_model.set_adapter(["default", "more0"])
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fresh_dora_over_a_bias_is_its_base_exactly(dtype):
    """On the CPU, also with 256 summands; where the adapter does something, the bias is still added once."""
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 100).to(dtype), inputs(("auto", "cpu"), 7, 256, dtype=dtype)
    expected = linear(x)
    own = DoRALinear.from_linear(copy.deepcopy(linear))
    settings = peft.LoraConfig(target_modules=["0"], use_dora=True)
    ours = patched(peft.get_peft_model(nn.Sequential(linear), settings))
    for model in (own, ours):
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected)
    exact = copy.deepcopy(own).double()
    with torch.no_grad():
        for layer in (own, exact):
            layer.lora_B[:50] = 0.1
    truth, eps = exact(x.double()), torch.finfo(dtype).eps
    assert (own(x).double() - truth).norm() < 2 * eps * truth.norm()


# Layers that come later, and files


def test_later_layers_get_what_the_patch_was_asked_for():
    from lora_fast.fp8 import Fp8Weight

    ours = stock_model(use_dora=True)
    patch_peft(ours, save="z", base_dtype="float8_e4m3", base_dtype_exclude=["down", "base_model.model.up"])
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    ours.add_adapter("late", config(target_modules=["up", "head"]))
    net = ours.base_model.model
    assert {layer.save for layer in (net.up, net.down, net.head)} == {"z"}
    eight = [isinstance(layer.base_layer.weight, Fp8Weight) for layer in (net.up, net.down, net.head)]
    assert eight == [False, False, True]
    ours.set_adapter("late")
    ours(inputs()).sum().backward()


def test_a_later_layer_that_cannot_be_fp8_is_told():
    ours = stock_model()
    patch_peft(ours, base_dtype="float8_e4m3")
    head = ours.base_model.model.head
    with torch.no_grad():
        head.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match=r"came later keeps its base weight.*head: .*not finite"):
        ours.add_adapter("late", config(target_modules=["head"]))
    assert ours.base_model.model.head.base_layer.weight is head.weight


@BOTH
def test_an_fp8_head_is_saved_plain(tmp_path, kind):
    """PEFT saves an adapted head's base weight with the adapter; its file says what the fp8 base says."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    made = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    base, ids = transformers.LlamaForCausalLM(made), torch.arange(8)[None]
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], **KINDS[kind]}
    ours = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    patch_peft(ours, base_dtype="float8_e4m3", base_dtype_exclude=["q_proj"])
    stir(ours)
    held = ours.base_model.model.lm_head.base_layer.weight.dequantise()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.base_layer.weight"], held)
    stock = peft.PeftModel.from_pretrained(base, tmp_path)
    expected = stock(ids).logits
    again = copy.deepcopy(ours)
    again.load_adapter(tmp_path, "again")
    again.set_adapter("again")
    for model in (ours, again):  # fp8 products round x, too
        logits = model(ids).logits
        assert (logits - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(logits, ours(ids).logits)
    later = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    patch_peft(later, base_dtype="float8_e4m3")
    later.load_adapter(tmp_path, "again")
    later.save_pretrained(tmp_path / "later", selected_adapters=["again"])
    assert (tmp_path / "later" / "again" / "adapter_model.safetensors").exists()


def test_an_fp8_head_under_fsdp2_is_saved_plain(alone, tmp_path):
    """Whether the state dict was gathered by torch or tensor by tensor, as accelerate does."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from torch import distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    made = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    ours = peft.get_peft_model(transformers.LlamaForCausalLM(made), peft.LoraConfig(target_modules=["lm_head"]))
    patch_peft(ours, base_dtype="float8_e4m3")
    held = ours.base_model.model.lm_head.base_layer.weight.dequantise()
    fully_shard(ours, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    whole = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    gathered = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in ours.state_dict().items()}
    for state_dict in (whole, gathered):
        ours.save_pretrained(tmp_path, state_dict=state_dict)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert torch.equal(saved["base_model.model.lm_head.base_layer.weight"], held)


# FSDP1


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.fixture
def alone():
    """A process group of this process."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def trained(model, x, steps=2):
    """Losses and trained parameters."""
    trainable = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(trainable.values(), 0.05), []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.tensor(losses)} | {name: p.detach().clone() for name, p in trainable.items()}


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:FSDP")
@BOTH
def test_fsdp1_runs_fused(alone, kind):
    """Patched layers, before and after the wrapping, and own ones: fused, as the report says, and stock's numbers."""
    stock, x = stock_model(**KINDS[kind]), inputs()
    expected = trained(copy.deepcopy(stock), x)
    set_backend("triton")
    early, late = patched(copy.deepcopy(stock), ("triton", "cpu")), copy.deepcopy(stock)
    wrapped = [fsdp1(early), fsdp1(late)]
    patch_peft(late)
    for model in wrapped:
        assert peft_report(model).fused == 2, peft_report(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            same(trained(model, x), expected)
        assert peft_report(model).fused == 2
    torch.manual_seed(0)
    own = add_lora(Net(), LoRAConfig(r=4, lora_alpha=6, target_modules=["up", "down"], **KINDS[kind]))
    stir(own)
    same(trained(fsdp1(copy.deepcopy(own)), x), trained(own, x))


def test_a_base_that_trains_under_fsdp1_runs_stock(alone):
    stock, x = stock_model(), inputs()
    stock.base_model.model.up.base_layer.weight.requires_grad_()
    expected = trained(copy.deepcopy(stock), x)
    ours = fsdp1(patched(copy.deepcopy(stock)))
    assert "requires grad" in peft_report(ours).layers[0].reason
    same(trained(ours, x), expected)


@BOTH
def test_an_fp8_base_under_fsdp1_is_refused(alone, kind):
    """FSDP1 would hold it in full precision, without a word."""
    ours = stock_model(**KINDS[kind])
    patch_peft(ours, base_dtype="float8_e4m3")
    dora = kind == "dora"
    own = add_lora(Net(), LoRAConfig(r=4, target_modules=["up"], use_dora=dora, base_dtype="float8_e4m3"))
    wrapped = fsdp1(ours)
    assert {layer.reason for layer in peft_report(wrapped).layers} == {NO_FP8}
    for model in (wrapped, fsdp1(own)):
        with torch.no_grad(), pytest.raises(TypeError, match="weight: FSDP1 makes a plain weight of an fp8 one"):
            model(inputs())


def test_add_lora_after_fsdp1_is_refused(alone):
    wrapped = fsdp1(Net())
    for model in (wrapped, wrapped.module):
        for convert in (add_lora, parametrize.add_lora):
            with pytest.raises(ValueError, match="model: is wrapped by FSDP1 .*add_lora first"):
                convert(model, LoRAConfig(target_modules=["up"]))


@BOTH
def test_patched_models_run_without_data(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    ours = patched(stock_model(**KINDS[kind])).to("meta")
    other = patched(peft.get_peft_model(Net().to("meta"), config(**KINDS[kind])))
    for model in (ours, other):
        y = model(torch.empty(3, 16, device="meta"))
        y.sum().backward()
        assert y.shape == (3, 5)
    model = patched(stock_model(**KINDS[kind]))
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        assert torch.func.functional_call(model, fakes, torch.empty(3, 16)).shape == (3, 5)
