"""patch_peft on PEFT models whose base bitsandbytes keeps in 4 bits: stock's results, keys, files and merges."""

import copy
from contextlib import nullcontext

import pytest
import torch
from devices import CUDA
from torch import nn

from lora_fast import SlowPathWarning, dispatch, patch_peft, peft_report, set_backend, unpatch_peft
from lora_fast.bases.four_bits import FourBitWeight

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
LoraConfig, get_peft_model = peft.LoraConfig, peft.get_peft_model


@pytest.fixture(params=[("cpu", "reference"), pytest.param(("cpu", "triton"), marks=pytest.mark.interpreted), CUDA])
def place(request):
    device, backend = ("cuda", "triton") if request.param == "cuda" else request.param
    set_backend(backend)
    return device


def stock(device, *, dora=False, nested=True, quant_type="nf4", compute=torch.float16, bias=True, p=0.0, **config):
    """Two adapted layers with an activation between them; 16-bit adapters, so that stock computes in 16 bits, too."""
    torch.manual_seed(0)
    options = {"compute_dtype": compute, "compress_statistics": nested, "quant_type": quant_type}
    shapes = (64, 128), (128, 64)
    first, second = (bnb.nn.Linear4bit(*shape, bias=bias, **options) for shape in shapes)
    model = nn.Sequential(first, nn.SiLU(), second).to(device)
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=dora, lora_dropout=p, **config)
    try:
        model = get_peft_model(model, config)
    except AssertionError as error:  # PEFT 0.13
        if "CUDA" not in str(error):
            raise
        pytest.skip("this PEFT makes DoRA over 4 bits on a GPU alone")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def interpreted(device):
    return device == "cpu" and dispatch.get_backend() == "triton"


def draw(device, dtype, seed=2):
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def step(model, x, autocast=None):
    """(y, {name: gradient})"""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
        y = model(x)
    y.float().square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, "x": x.grad}


def far(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("nested, quant_type", [(True, "nf4"), (False, "nf4"), (True, "fp4")])
@pytest.mark.parametrize("dtype, autocast", [(torch.float16, None), (torch.float32, None), (torch.float32, "on")])
def test_a_step_is_stocks(place, dora, nested, quant_type, dtype, autocast):
    if interpreted(place) and (nested, quant_type) != (True, "nf4"):
        pytest.skip("the interpreter is slow")
    model, x = stock(place, dora=dora, nested=nested, quant_type=quant_type), draw(place, dtype)
    autocast = torch.float16 if autocast else None
    # In float32 stock makes all but the base's product in it; ours is to be compared with its 16 bits.
    y, grads = step(model, x, autocast or (torch.float16 if dtype == torch.float32 else None))
    keys = list(model.state_dict())
    patch_peft(model)
    ours, our_grads = step(model, x, autocast)
    assert list(model.state_dict()) == keys
    assert ours.dtype == y.dtype and grads.keys() == our_grads.keys() and len(grads) > 4
    assert far(ours, y) < 2e-3 and max(far(our_grads[name], grads[name]) for name in grads) < 4e-3
    unpatch_peft(model)
    again, _ = step(model, x, autocast or (torch.float16 if dtype == torch.float32 else None))
    assert torch.equal(again, y) and type(model.base_model.model[0]).__name__ == "Linear4bit"


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_names_of_adapters_beside_float32_inputs(place, train, dora):
    """As prepare_model_for_kbit_training has them; each sample's y is that of its adapter alone."""
    model = stock(place, dora=dora)
    model.add_adapter("b", LoraConfig(r=8, target_modules=["0", "2"], use_dora=dora, init_lora_weights=False))
    patch_peft(model)
    model.train(train)
    x, expected = draw(place, torch.float32), []
    for i, name in enumerate(names := ["default", "b", "default"]):
        model.set_adapter(name)
        expected.append(model(x[i : i + 1]))
    y = model(x, adapter_names=names)
    assert y.dtype == torch.float32 and far(y.detach(), torch.cat(expected).detach()) < 1e-3
    if train:
        y.sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if ".default" in name]
        assert grads and all(grad is not None and grad.any() for grad in grads)


def test_what_the_report_says(place):
    model = stock(place, bias=False)
    report = patch_peft(model)
    assert all("nf4 base" in layer.remark for layer in report.layers)
    assert report.fused == (0 if place == "cpu" and not peft_report(model).fused else 2)
    report = patch_peft(stock(place, compute=None, dora=True, quant_type="fp4"))
    assert all("base computes in float32" in layer.reason for layer in report.layers)
    model = stock(place, compute=torch.float32)
    message = "give BitsAndBytesConfig bnb_4bit_compute_dtype=torch.bfloat16"
    assert all(message in layer.reason and not layer.fused for layer in patch_peft(model).layers)
    with pytest.warns(SlowPathWarning, match=message):
        dispatch._told.clear()
        model(draw(place, torch.float32))


def test_nothing_is_copied(place):
    model = stock(place)
    patch_peft(model)
    model(draw(place, torch.float16))
    layer = model.base_model.model[0]
    weight, ours = layer.base_layer.weight, layer.frozen()[0]
    assert isinstance(ours, FourBitWeight) and ours.packed.data_ptr() == weight.data_ptr()
    assert ours.absmax.data_ptr() == weight.quant_state.absmax.data_ptr()
    assert torch.equal(ours.dequantise(), bnb.functional.dequantize_4bit(weight.data, weight.quant_state).half())


def test_another_weight_is_seen(place):
    model, other = stock(place), stock(place)
    patch_peft(model)
    x = draw(place, torch.float16)
    before = model(x)
    target, source = model.base_model.model[0].base_layer, other.base_model.model[0].base_layer
    with torch.no_grad():
        fresh = bnb.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4", compress_statistics=True)
        source.weight = fresh.to(place)
        other.base_model.model[0].base_layer.bias.copy_(target.bias)
    target.weight = source.weight
    after = model(x)
    assert far(after, before) > 0.1
    unpatch_peft(model)
    assert far(after, model(x)) < 2e-3


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True])
def test_compiled(place, dora):
    """Without a graph break, in a model that never ran before."""
    torch._dynamo.reset()
    model, x = stock(place, dora=dora), draw(place, torch.float16)
    patch_peft(model)
    compiled = torch.compile(model, backend="inductor" if place == "cuda" else "aot_eager", fullgraph=True)
    ours, grads = step(compiled, x)
    eager, eager_grads = step(model, x)
    assert far(ours, eager) < 1e-3
    assert max(far(grads[f"_orig_mod.{name}" if name != "x" else name], g) for name, g in eager_grads.items()) < 2e-3


@pytest.mark.parametrize("dora", [False, True])
def test_merging_goes_into_16_bits(place, dora):
    model, x = stock(place, dora=dora), draw(place, torch.float16)
    patch_peft(model)
    layer = model.base_model.model[0]
    base, y = layer.base_layer, model(x)
    keys = list(model.state_dict())
    model.merge_adapter()
    assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight.dtype == torch.float16
    assert far(model(x), y) < 4e-3 and model(x.float()).dtype == torch.float32
    model.unmerge_adapter()
    assert layer.base_layer is base and torch.equal(model(x), y) and list(model.state_dict()) == keys
    with model.disable_adapter():
        plain = model(x)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges, as stock does
        assert torch.equal(model(x), plain)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged[0]) is nn.Linear and far(merged(x), y) < 4e-3
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert layer.base_layer is base and not layer.merged


def test_merging_into_the_original(place):
    model = stock(place)
    patch_peft(model)
    layer = model.base_model.model[0]
    original = layer.frozen()[0] if layer.base_weight() is None else layer.base_weight().dequantise()
    noise = original.clone()
    with pytest.raises(ValueError, match="original: got another weight"):
        layer.merge(original=-noise)
    with pytest.raises(TypeError, match="original: got torch.float32"):
        layer.merge(original=noise.float())
    assert not layer.merged and type(layer.base_layer) is bnb.nn.Linear4bit


def test_later_adapters_files_and_copies(place, tmp_path):
    model, x = stock(place), draw(place, torch.float16)
    patch_peft(model)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    model.save_pretrained(tmp_path)
    loaded = stock(place)
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(parameter)
    loaded.load_adapter(tmp_path, "default")
    patch_peft(loaded)
    assert torch.equal(loaded(x), y)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("second")
    second = model(x)
    assert far(second, y) > 0.01
    unpatch_peft(model)
    assert far(second, model(x)) < 2e-3


@pytest.mark.medium
@pytest.mark.parametrize("dora", [False, True])
def test_products_of_8_bits(place, dora):
    if dora and interpreted(place):
        pytest.skip("the interpreter is slow")
    model, x = stock(place, dora=dora), draw(place, torch.float16)
    y, _ = step(model, x)
    report = patch_peft(model, base_compute="float8_e4m3")
    ours, grads = step(model, x)
    assert 1e-3 < far(ours, y) < 0.1 and all(g.isfinite().all() for g in grads.values())
    assert all("nf4 base, 8-bit products" in layer.remark for layer in peft_report(model).layers), report


def test_what_cannot_be_fused_says_so(place):
    model, x = stock(place), draw(place, torch.float16)
    base = model.base_model.model[0].base_layer
    patch_peft(model)
    state, kept = base.weight.quant_state, base.quant_state
    base.weight.quant_state = base.quant_state = None
    assert "has no quant_state" in peft_report(model).layers[0].reason
    base.weight.quant_state, base.quant_state = state, kept
    for name, value, reason in (
        ("packing_format_for_cpu", True, "packed for bitsandbytes' code for CPUs"),
        ("shape", torch.Size((64, 128)), r"quant_state says that the base weight is (64, 128), the layer (128, 64)"),
        ("blocksize", 96, "no whole number of blocks of 96"),
    ):
        old = getattr(state, name, False)
        setattr(state, name, value)
        model.base_model.model[0]._view.made_from = None
        assert reason in peft_report(model).layers[0].reason
        setattr(state, name, old)
    model.base_model.model[0]._view.made_from = None
    assert "nf4 base" in peft_report(model).layers[0].remark
    with pytest.raises(ValueError, match="base_compute: got 'float8_e4m3', expected None without a base_dtype"):
        patch_peft(
            get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"])), base_compute="float8_e4m3"
        )
    model(x)


@pytest.mark.versions
@pytest.mark.medium
def test_a_checkpointed_model_prepared_for_training(place):
    """prepare_model_for_kbit_training casts what is not quantised to float32."""
    transformers = pytest.importorskip("transformers")
    kind = torch.bfloat16 if place == "cuda" else torch.float16  # the interpreter's bfloat16 is no number
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).to(kind)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                ours = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=kind, quant_type="nf4"
                )
                ours.weight = bnb.nn.Params4bit(child.weight.detach(), requires_grad=False, quant_type="nf4")
                setattr(parent, name, ours)
    model = model.to(place)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    tokens = torch.randint(96, (2, 12), device=place)

    def run(autocast):
        model.zero_grad()
        model.train()
        with torch.autocast(place, kind) if autocast else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, grads = run(True)
    patch_peft(model)
    for autocast in (True, False):
        ours, our_grads = run(autocast)
        assert abs(ours - loss) < 2e-3 * loss and our_grads.keys() == grads.keys() and len(grads) == 14
        squares = [sum((our_grads[n] - (g if one else 0)).square().sum() for n, g in grads.items()) for one in (1, 0)]
        assert (squares[0] / squares[1]).sqrt() < 0.05
