"""State dicts of layers over 4-bit bases: plain tensors that bitsandbytes, transformers and safetensors take and give,
bit for bit, and what is refused."""

import copy
import json

import pytest
import torch
from devices import CUDA
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from lora_fast import DoRALinear, LoRAConfig, LoRALinear, add_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lora_fast.bases.four_bit_files import from_tensors, to_tensors
from lora_fast.bases.four_bits import BlockWeight, Mxfp4Weight, Nf4Weight

CHOICES = [("nf4", None), ("nf4", "float8_e4m3"), ("mxfp4", None), ("mxfp4", "float8_e4m3")]
choices = pytest.mark.parametrize("base_dtype, base_compute", CHOICES)
layers = pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
STATE = "weight.quant_state.bitsandbytes__nf4"
BF16 = torch.bfloat16


def linear(seed=0, dtype=BF16, n=48, k=64):
    torch.manual_seed(seed)
    return nn.Linear(k, n, dtype=dtype)


def made(seed=0, base_dtype="nf4", base_compute=None, layer=LoRALinear, dtype=BF16):
    made = layer.from_linear(linear(seed, dtype), r=4, base_dtype=base_dtype, base_compute=base_compute)
    nn.init.normal_(made.lora_B)
    return made


def same(a, b):
    """The same packed weight."""
    return type(a.data) is type(b.data) and all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.INNER)


@choices
@layers
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_there_and_back(base_dtype, base_compute, layer, merged, assign, tmp_path):
    source, target = (made(seed, base_dtype, base_compute, layer) for seed in (0, 1))
    held = copy.deepcopy(source.weight)
    if merged:
        source.merge()
    save_file(source.state_dict(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert all(type(t) is torch.Tensor for t in source.state_dict().values()) and not any(
        "_scale" in k[-6:] for k in state
    )
    assert ("lora_unmerged_weight.absmax" in state or "lora_unmerged_weight_blocks" in state) == merged
    target.load_state_dict(state, assign=assign)
    assert same(target.weight, held) and not target.weight.requires_grad
    x = torch.randn(5, 64, dtype=BF16)
    source.unmerge()
    assert torch.equal(target(x), source(x)) and same(source.weight, held)
    target.merge()
    target.load_state_dict(source.state_dict(), assign=assign)
    target.unmerge()
    assert same(target.weight, held)


@choices
@layers
@pytest.mark.parametrize("assign", [False, True])
def test_a_16_bit_weight_is_quantised_on_the_way(base_dtype, base_compute, layer, assign):
    source, target = made(0, base_dtype, base_compute, layer), made(1, base_dtype, base_compute, layer)
    target.load_state_dict({**linear(0).state_dict()}, strict=False, assign=assign)
    assert same(target.weight, source.weight)


@choices
def test_a_layer_made_without_data(base_dtype, base_compute):
    source = made(0, base_dtype, base_compute)
    bare = LoRALinear(64, 48, 4, device="meta", dtype=BF16)
    bare.load_state_dict(source.state_dict(), assign=True)
    assert type(bare.weight.data) is source.weight.exact()
    assert torch.equal(bare.weight.dequantise(), source.weight.dequantise())
    quantised = LoRALinear(64, 48, 4, device="meta", dtype=BF16)
    quantised.quantise_base(base_dtype, base_compute)
    empty = copy.deepcopy(quantised).to_empty(device="cpu")
    assert all(t.is_meta for t in quantised.state_dict().values())
    for state in (source.state_dict(), {**source.state_dict(), **linear(0).state_dict()}):
        if "weight" in state and state["weight"].is_floating_point():
            state = {key: t for key, t in state.items() if not key.startswith(("weight.", "weight_"))}
        for target, assign in ((copy.deepcopy(quantised), True), (copy.deepcopy(empty), False)):
            target.load_state_dict(state, assign=assign)
            assert same(target.weight, source.weight) and torch.equal(target.lora_B, source.lora_B)


def test_into_a_plain_base():
    source, target = made(), LoRALinear.from_linear(linear(1), r=4)
    target.load_state_dict(source.state_dict())
    assert type(target.weight.data) is torch.Tensor and torch.equal(target.weight, source.weight.dequantise())


def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def theirs(weight, quant_type="nf4", nested=True, blocksize=64, storage=torch.uint8):
    """A Linear4bit, quantised."""
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    given = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage, "module": layer}
    layer.weight = bnb.nn.Params4bit(weight.clone(), blocksize=blocksize, **given)
    return layer.to("cpu")


def dequantised(parameter):
    return bitsandbytes().functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_bitsandbytes_reads_ours(dtype, where):
    bnb, ours = bitsandbytes(), made(dtype=dtype).to(where)
    state = ours.state_dict()
    stats = {key.removeprefix("weight."): t for key, t in state.items() if key.startswith("weight.")}
    read = bnb.nn.Params4bit.from_prequantized(state["weight"], copy.deepcopy(stats), device=where)
    assert read.quant_state.nested and read.quant_state.dtype == dtype and read.quant_state.shape == (48, 64)
    assert torch.equal(dequantised(read), ours.weight.dequantise())
    written = read.quant_state.as_dict(packed=True)
    assert written.keys() == stats.keys()
    assert all(torch.equal(written[key].cpu(), t.cpu()) for key, t in stats.items())


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", [None, "float8_e4m3"])
def test_ours_reads_bitsandbytes(quant_type, nested, blocksize, storage, compute, tmp_path):
    """Where no block straddles rows, which its code for CPUs reads otherwise than that for GPUs."""
    stock = theirs(linear(k=128).weight.data, quant_type, nested, blocksize, storage)
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    target = LoRALinear(128, 48, 4, bias=False, device="meta", dtype=BF16)
    target.quantise_base("nf4", compute)
    target.load_state_dict(load_file(tmp_path / "stock.safetensors"), strict=False, assign=True)
    held = target.weight
    assert isinstance(held, Nf4Weight if nested else BlockWeight) and held.E4M3_PRODUCTS == (compute is not None)
    assert held.block == blocksize and torch.equal(held.dequantise(), dequantised(stock.weight))
    again = {key: t for key, t in target.state_dict().items() if key.startswith("weight")}
    for key, t in stock.state_dict().items():
        assert torch.equal(again.pop(key).view(-1), t.view(torch.uint8).view(-1) if key == "weight" else t.view(-1)), (
            key
        )
    assert not again


def test_kept_blocks_of_other_sizes_and_shapes():
    """Blocks that straddle rows, in both forms."""
    for kind in (Nf4Weight, BlockWeight, Mxfp4Weight):
        weight = kind.quantise(torch.randn(12, 48))
        found = from_tensors(to_tensors(weight), weight.shape, weight.dtype)
        assert same(found, weight)
    assert to_tensors(weight)["_blocks"].shape == (18, 16)


def test_original_of_a_base_whose_offset_was_summed_in_another_order():
    """As on another device, or by bitsandbytes on a CPU."""
    weight = linear(n=64, k=512).weight.data
    held = Nf4Weight.quantise(weight)
    held.offset.mul_(1 + 2e-7)
    held.absmax2.mul_(1 - 2e-7)
    held.absmax[:3] ^= 1
    held.check_original(weight)
    for other in (weight * 2, weight * 1.01, -weight, weight.roll(1, 0)):
        with pytest.raises(ValueError, match="another weight, expected that which the nf4 base was made from"):
            held.check_original(other)
    stock = theirs(weight, "nf4", True, 128).state_dict()
    kept = from_tensors({key.removeprefix("weight"): t for key, t in stock.items()}, weight.shape, BF16)
    with pytest.raises(ValueError, match="another weight"):
        kept.check_original(weight)


def test_gpt_oss_reads_our_mxfp4():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    weight = Mxfp4Weight.quantise(torch.randn(48, 64, dtype=BF16))
    parts = to_tensors(weight)
    read = mxfp4.convert_moe_packed_tensors(parts["_blocks"][None], parts["_scales"][None], dtype=BF16)
    assert torch.equal(read[0].t(), weight.dequantise())


def edited(state, **changes):
    found = json.loads(bytes(state[STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def test_what_is_refused():
    """By name, with what was given and expected; the layer stays as it was."""
    state, mxfp4 = made().state_dict(), made(base_dtype="mxfp4").state_dict()
    without = lambda key: {name: t for name, t in state.items() if name != key}  # noqa: E731
    stock = theirs(linear().weight.data, nested=False).state_dict()
    adapter = {key: t for key, t in state.items() if "lora" in key}
    cases = [
        (without(STATE), rf"weight: got 4-bit tensors without {STATE} or "),
        ({"weight": state["weight"], **adapter}, rf"weight: got 4-bit tensors without {STATE}"),
        (without("weight.absmax"), r"weight.absmax: is missing, expected torch.uint8 of shape \(48,\)"),
        (without("weight.nested_absmax"), r"weight.nested_absmax: is missing"),
        (without("weight"), "weight: is missing, expected torch.uint8"),
        (state | {"weight": state["weight"][:-1]}, r"weight: got torch.uint8 of shape \(1535, 1\), expected .*1536, 1"),
        (state | {STATE: edited(state, shape=[64, 48])}, rf"{STATE}: got shape \[64, 48\], expected \[48, 64\]"),
        (state | {STATE: edited(state, dtype="int8")}, rf"{STATE}: got dtype 'int8'"),
        (state | {STATE: edited(state, blocksize=48)}, rf"{STATE}: got blocksize 48"),
        (state | {STATE: edited(state, nested_blocksize=64)}, rf"{STATE}: got nested_blocksize"),
        (state | {STATE: torch.zeros(4, dtype=torch.uint8)}, rf"{STATE}: got no JSON"),
        (state | {STATE: edited(state)[1:]}, rf"{STATE}: got no JSON"),
        (mxfp4, "weight: got mxfp4, expected nf4 or fp4 with nested absmax, blocksize 64"),
        (
            stock | adapter,
            r"weight: got nf4 or fp4 with float32 absmax.*expected .*nested.*\(assign=True takes either\)",
        ),
    ]
    for given, message in cases:
        target = made(1)
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict({"bias": torch.zeros(48, dtype=BF16), **given})
        held, kept = target.state_dict(), before.state_dict()
        assert held.keys() == kept.keys() and all(torch.equal(t, kept[key]) for key, t in held.items())
    for change in ({"weight_blocks": mxfp4["weight_blocks"][:-1]}, {"weight_scales": mxfp4["weight_scales"].float()}):
        with pytest.raises(RuntimeError, match=f"{next(iter(change))}: got torch"):
            made(1, "mxfp4").load_state_dict(mxfp4 | change)
    with pytest.raises(RuntimeError, match="weight: got nf4 or fp4 .*expected the fp8 base's own form"):
        made(1, "float8_e4m3").load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight: got mxfp4"):
        made(1).load_state_dict(mxfp4, assign=True)
    with pytest.raises(RuntimeError, match="weight: .*not finite"):
        made(1).load_state_dict({"weight": torch.full((48, 64), torch.nan)}, strict=False, assign=True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(BF16)


@choices
@pytest.mark.parametrize("merged", [False, True])
def test_a_whole_model(base_dtype, base_compute, merged, tmp_path):
    """Through safetensors, adapters' files and torch's distributed state dicts."""
    config = LoRAConfig(r=4, target_modules="all-linear", base_dtype=base_dtype, base_compute=base_compute)
    model, target = add_lora(net(), config), add_lora(nn.Sequential(*net()), config)
    for name in "02":
        nn.init.normal_(model.get_submodule(name).lora_B)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(target, tmp_path / "adapter")
    if merged:
        merge_lora(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(3, 64, dtype=BF16)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    assert state.keys() == model.state_dict().keys()
    for load in (
        lambda: target.load_state_dict(load_file(tmp_path / "model.safetensors")),
        lambda: set_model_state_dict(target, state, options=options),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        load()
        assert torch.equal(target(x), unmerge_lora(model)(x))
        for name in "02":
            assert same(target.get_submodule(name).weight, model.get_submodule(name).weight)


@pytest.mark.medium
def test_transformers_reads_ours_and_we_read_its(tmp_path):
    bitsandbytes()
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    stock = transformers.LlamaForCausalLM(config).to(BF16)
    ours = add_lora(copy.deepcopy(stock), LoRAConfig(r=4, target_modules="all-linear", base_dtype="nf4"))
    state = {key: t for key, t in ours.state_dict().items() if "lora_" not in key}
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    )
    stock.save_pretrained(tmp_path / "plain")
    stock.config.quantization_config = quantised
    stock.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16, device_map="cpu")
    modules = {name: m for name, m in ours.named_modules() if isinstance(m, LoRALinear)}
    assert len(modules) == 7
    for name, module in modules.items():
        assert torch.equal(dequantised(read.get_submodule(name).weight), module.weight.dequantise()), name
    options = {"dtype": BF16, "device_map": "cpu", "quantization_config": quantised}
    made_there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)
    made_there.save_pretrained(tmp_path / "again")
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config).to(BF16)
    add_lora(skeleton, LoRAConfig(r=4, target_modules="all-linear", base_dtype="nf4", base_compute="float8_e4m3"))
    found = skeleton.load_state_dict(load_file(tmp_path / "again" / "model.safetensors"), strict=False, assign=True)
    assert all("lora_" in key for key in found.missing_keys) and not found.unexpected_keys
    for name in modules:
        held, theirs = skeleton.get_submodule(name).weight, made_there.get_submodule(name).weight
        assert torch.equal(held.dequantise(), dequantised(theirs)) and held.E4M3_PRODUCTS
