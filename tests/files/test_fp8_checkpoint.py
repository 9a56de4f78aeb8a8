"""A whole fp8 checkpoint in a model that never was in 16 bits: DeepSeek's form and compressed-tensors', of
transformers' Qwen3 and Llama."""

import gc
import json

import pytest
import torch
from devices import CUDA
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fast import LoRAConfig, add_lora, load_fp8
from lora_fast.bases.scaled import E8M0, ScaledFp8E4m3Weight, ScaledFp8Weight, quantise
from lora_fast.fp8 import E4M3

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

SIZES = {"hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FORMS = {"blocks": DEEPSEEK, "e8m0": DEEPSEEK | {"scale_fmt": "ue8m0"}, "rows": COMPRESSED}


def config_of(family, tied=False, dtype=torch.float32):
    kind = transformers.Qwen3Config if family == "qwen3" else transformers.LlamaConfig
    return kind(**SIZES, tie_word_embeddings=tied, dtype=dtype)


def model_of(config, without_data=False):
    kind = transformers.AutoModelForCausalLM
    if not without_data:
        torch.manual_seed(0)
        return kind.from_config(config)
    with accelerate.init_empty_weights(include_buffers=False):
        return kind.from_config(config)


def write(folder, config, form, shards=1):
    """A checkpoint of random weights; what it stands for, dense, in float32."""
    model = model_of(config)
    tensors, dense = {}, {}
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[name] = dense[name] = t.clone()
        if name.endswith("proj.weight"):
            kind = {"blocks": torch.float32, "e8m0": torch.uint8, "rows": torch.bfloat16}[form]
            stored, scale = quantise(t.float(), form == "rows", kind)
            dense[name] = ScaledFp8Weight(stored, scale, shape=t.shape, dtype=t.dtype).dequantise()
            tensors[name] = stored.view(E4M3)
            key = "_scale" if form == "rows" else "_scale_inv"
            tensors[name + key] = scale.view(E8M0) if form == "e8m0" else scale
    folder.mkdir(exist_ok=True)
    told = config.to_dict() | {"quantization_config": FORMS[form]}
    (folder / "config.json").write_text(json.dumps(told, default=str))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:  # a weight and its scale in different files
        weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return dense


def dense_model(config, dense):
    model = model_of(config)
    model.load_state_dict(dense, strict=False)
    return model


def linears(model):
    return {name: m for name, m in model.named_modules() if name.endswith("proj")}


def trained(model, dora=False, base_compute=None):
    """The losses of three steps of training, and the last gradients."""
    torch.manual_seed(1)
    targets = r".*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    config = LoRAConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, base_compute=base_compute)
    add_lora(model, config, blocks=False)  # which packed bases are in none of
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(adapters, lr=0.5)
    tokens = torch.arange(24).view(2, 12) * 7 % 96
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses, [p.grad for p in adapters]


@pytest.mark.parametrize(
    "family, form, shards, tied, dora",
    [
        ("qwen3", "blocks", 1, False, False),
        ("qwen3", "e8m0", 3, True, False),
        ("llama", "rows", 3, False, True),
        ("llama", "blocks", 1, True, True),
    ],
)
def test_training_is_that_of_the_dequantised_model(family, form, shards, tied, dora, tmp_path):
    config = config_of(family, tied)
    dense = write(tmp_path, config, form, shards)
    model = load_fp8(model_of(config, without_data=True), tmp_path)
    for name, linear in linears(model).items():
        assert type(linear) is nn.Linear and type(linear.weight) is ScaledFp8Weight, name
        assert torch.equal(linear.weight.dequantise(), dense[f"{name}.weight"])
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    losses, grads = trained(model, dora)
    expected, their_grads = trained(dense_model(config, dense), dora)
    assert all(map(torch.equal, losses, expected)) and all(map(torch.equal, grads, their_grads))
    assert losses[2] < losses[0]


def test_8_bit_products(tmp_path):
    config = config_of("qwen3")
    dense = write(tmp_path, config, "blocks")
    model = load_fp8(model_of(config, without_data=True), tmp_path)
    losses, _ = trained(model, base_compute="float8_e4m3")
    assert type(model.model.layers[0].mlp.up_proj.weight) is ScaledFp8E4m3Weight
    expected, _ = trained(dense_model(config, dense))
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=0.02, atol=0.02)


@pytest.mark.medium
@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("form", ["blocks", "rows"])
def test_no_weight_of_a_linear_is_ever_in_16_bits(where, form, tmp_path):
    """Nothing as large as one of them in 16 bits is there but the embedding, while it loads nor after a step."""
    config = config_of("llama", tied=True, dtype=torch.bfloat16)
    write(tmp_path, config, form)
    made = []

    class Recorded(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if type(found) in (torch.Tensor, nn.Parameter) and found.dtype != E4M3 and not found.is_meta:
                made.append((tuple(found.shape), found.dtype))
            return found

    model = model_of(config, without_data=True)
    with Recorded():
        load_fp8(model, tmp_path, device=where)
    shapes = {tuple(linear.weight.shape) for linear in linears(model).values()}
    assert made and not [one for one in made if one[0] in shapes and one[1].itemsize > 1]
    add_lora(model, LoRAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model(input_ids=torch.arange(12, device=where)[None], labels=torch.arange(12, device=where)[None]).loss.backward()
    gc.collect()
    kept = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta]
    assert not [t for t in kept if tuple(t.shape) in shapes and t.dtype.itemsize > 1]
    held = sum(linear.weight.stored.nbytes + linear.weight.scale.nbytes for linear in linears(model).values())
    elements = sum(linear.weight.numel() for linear in linears(model).values())
    assert elements < held < 1.02 * elements  # scales of short rows


def test_saved_as_it_was(tmp_path):
    config = config_of("qwen3")
    write(tmp_path, config, "blocks")
    model = load_fp8(model_of(config, without_data=True), tmp_path)
    add_lora(model, LoRAConfig(r=4, target_modules=[name.rpartition(".")[2] for name in linears(model)]))
    saved, given = model.state_dict(), load_file(tmp_path / "model.safetensors")
    base = {name: t for name, t in saved.items() if "lora_" not in name}
    assert base.keys() == given.keys() and all(torch.equal(base[name], t) for name, t in given.items())


def change(folder, **changes):
    """Other tensors in the checkpoint's file; None for none."""
    tensors = load_file(folder / "model.safetensors")
    for name, t in changes.items():
        tensors.pop(name, None)
        if t is not None:
            tensors[name] = t
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
BAD = [
    ({f"{Q}.weight_scale_inv": torch.ones(1)}, "per-tensor.*load the model dequantised"),
    ({f"{Q}.weight_scale_inv": torch.ones(3, 2)}, r"q_proj.weight_scale_inv: got shape \(3, 2\), expected \(1, 2\)"),
    ({f"{Q}.weight_scale_inv": None}, "q_proj.weight: got F8_E4M3 without .*weight_scale_inv or .*weight_scale"),
    ({f"{Q}.activation_scale": torch.ones(1)}, "fixed scales of inputs .*q_proj.activation_scale"),
    (
        {f"{Q}.weight": torch.ones(4, 4).to(E4M3)},
        r"q_proj.weight: got shape \(4, 4\), expected the model's, \(128, 144\)",
    ),
    ({f"{Q}.weight": None, f"{Q}.weight_scale_inv": None}, "lacks model.layers.0.self_attn.q_proj.weight"),
    ({"other": torch.ones(1)}, r"has tensors that the model has not: other \(strict=False leaves them out\)"),
    ({EXPERT: torch.ones(4, 4).to(E4M3)}, "has fp8 experts, .*experts.3.up_proj"),
    ({"lm_head.weight": torch.ones(96, 144).to(torch.float8_e5m2)}, "lm_head.weight: got F8_E5M2"),
    ({"model.embed_tokens.weight": torch.ones(96, 144).to(E4M3)}, "F8_E4M3 for 'weight' of a Embedding"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: next(iter(value)) if type(value) is dict else "")
def test_what_cannot_be_is_named(changes, message, tmp_path):
    config = config_of("qwen3")
    write(tmp_path, config, "blocks")
    change(tmp_path, **changes)
    model = model_of(config, without_data=True)
    with pytest.raises(ValueError, match=message):
        load_fp8(model, tmp_path)
    assert all(p.is_meta for p in model.parameters())
    if "other" in changes:
        assert not any(p.is_meta for p in load_fp8(model, tmp_path, strict=False).parameters())


def test_what_the_config_says_and_empty_buffers(tmp_path):
    config = config_of("qwen3")
    write(tmp_path, config, "blocks")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model: has buffers without data .*inv_freq.*init_empty_weights\(\)"):
        load_fp8(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for settings, message in (
        ({"activation_scheme": "static"}, "activation_scheme 'static', expected 'dynamic'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\], expected \[128, 128\]"),
    ):
        written = told | {"quantization_config": DEEPSEEK | settings}
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(ValueError, match=message):
            load_fp8(model_of(config, without_data=True), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_fp8(model, tmp_path / "none")
