"""`lora-fast merge` into a base with tied weights: PEFT's result or a refusal that names the tie."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors.torch import save_model
from tied import bert, llama, outputs, perturbed, t5

from lora_fast import LoRAConfig, add_lora, load_adapter, merge_lora, remove_lora, save_adapter
from lora_fast.cli import main
from lora_fast.models.adapters import adapter_tensors

IDS = torch.arange(10).reshape(2, 5)


def gemma(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            **options,
        )
    )


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=4))


def encoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def mamba():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=32,
            hidden_size=16,
            state_size=4,
            num_hidden_layers=1,
            tie_word_embeddings=True,
        )
    )


def whisper():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            pad_token_id=0,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def albert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(
            vocab_size=32,
            embedding_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def saved(model, folder, config=True):
    """The base as a hub has it: config.json without tie_word_embeddings (``config``: with this value)."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}
    path.write_text(json.dumps(said if config is True else {**said, "tie_word_embeddings": config}))
    return folder


def untied(**options):
    model = llama(tie_word_embeddings=False, **options)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    return model


QV, EMBED = ["q_proj", "v_proj"], ["embed_tokens"]
TIED = {
    "Gemma": (gemma, QV, EMBED),
    "Gemma's head": (gemma, QV, ["lm_head"]),
    "Gemma's both": (gemma, QV, ["embed_tokens", "lm_head"]),
    "adapted head": (gemma, [*QV, "lm_head"], None),
    "GPT-2": (gpt2, ["lm_head"], ["wte"]),
    "Llama": (llama, QV, EMBED),
    "T5": (t5, ["q", "v"], ["shared"]),
    "T5's head": (t5, ["q", "v"], ["lm_head"]),
    "T5's encoder": (t5, ["q", "v"], ["encoder.embed_tokens"]),
    "BERT": (bert, ["query"], ["word_embeddings"]),
    "BERT's head": (bert, ["query"], ["decoder"]),
    "BERT's adapted head": (bert, ["query", "decoder"], None),
    "ALBERT's adapted head": (albert, ["query", "decoder"], None),
    "Mamba's adapted head": (mamba, ["lm_head"], None),
}


@pytest.mark.medium
@pytest.mark.parametrize("alone", [False, True], ids=["directory", "file"])
@pytest.mark.parametrize("case", TIED)
def test_one_end_alone(case, alone, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    build, targets, full = TIED[case]
    base, out = saved(build(), tmp_path / "base"), tmp_path / "out"
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=full))
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    if alone:
        (base / "config.json").unlink()
        base, out = base / "model.safetensors", tmp_path / "out.safetensors"
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(out)]) == 1
    assert "tied to" in capsys.readouterr().err and not out.exists()
    # The way out that the refusal names:
    right = outputs(model)
    with pytest.warns(UserWarning, match="is tied to") if full else torch.no_grad():
        model = load_adapter(build(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(model), right, rtol=1e-5, atol=1e-5)
    if case == "T5":
        return  # whatever merges it: transformers ties all to `shared` when it loads
    remove_lora(merge_lora(model)).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path / "merged")), right, rtol=1e-4, atol=1e-4)


def test_whispers_head(tmp_path, capsys):
    pytest.importorskip("transformers")
    whisper().save_pretrained(tmp_path / "base")
    save_adapter(add_lora(whisper(), LoRAConfig(target_modules=["proj_out"])), tmp_path / "adapter")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 1
    assert "it is tied to model.decoder.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [False, True], ids=["PEFT's", "ours"])
@pytest.mark.parametrize("build", [bert, albert])
def test_one_bias_of_two_names(build, ours, tmp_path):
    """PEFT's bias="all" writes it under both; the base has one."""
    peft = pytest.importorskip("peft")
    base = saved(build(), tmp_path / "base")
    options = {"r": 2, "target_modules": ["query"], "bias": "all"}
    model = (
        add_lora(build(), LoRAConfig(**options)) if ours else peft.get_peft_model(build(), peft.LoraConfig(**options))
    )
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    (save_adapter if ours else peft.PeftModel.save_pretrained)(model, tmp_path / "adapter")
    right = outputs(peft.PeftModel.from_pretrained(build(), tmp_path / "adapter"))
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    merged = type(build()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "config", "targets", "full"),
    [
        (encoder, True, ["query"], ["word_embeddings"]),
        (untied, False, QV, EMBED),
        (lambda: llama(tie_word_embeddings=False), True, QV, ["lm_head"]),
        (lambda: llama(tie_word_embeddings=False), False, [*QV, "lm_head"], EMBED),
        (lambda: gemma(tie_word_embeddings=False), False, [*QV, "gate_proj"], ["embed_tokens", "lm_head"]),
        (gemma, True, [*QV, "gate_proj"], ["norm"]),
    ],
    ids=["no head", "cut by hand", "head", "embeddings", "both", "as many rows as the vocabulary"],
)
def test_what_is_not_tied(build, config, targets, full, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = saved(build(), tmp_path / "base", config)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=full))
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    model = model.merge_and_unload().eval()
    again = type(build()).from_pretrained(tmp_path / "out").eval()
    for name, tensor in again.named_parameters():
        torch.testing.assert_close(tensor, model.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("config", [True, False], ids=["unsaid", "false"])
@pytest.mark.parametrize("full", [["lm_head"], EMBED, ["embed_tokens", "lm_head"]], ids="-".join)
def test_both_ends_alike_stay_tied(full, config, tmp_path):
    """Ours, trained together; PEFT's under ensure_weight_tying."""
    base = saved(gemma(), tmp_path / "base", config)
    model = add_lora(gemma(), LoRAConfig(r=2, target_modules=QV, modules_to_save=full))
    perturbed(model, adapter_tensors(model).values())
    save_adapter(model, tmp_path / "adapter")
    right = {"adapter": outputs(model)}
    peft = pytest.importorskip("peft")
    if "ensure_weight_tying" in peft.LoraConfig.__dataclass_fields__:
        config = peft.LoraConfig(r=2, target_modules=QV, modules_to_save=full, ensure_weight_tying=True)
        model = perturbed(peft.get_peft_model(gemma(), config), ())
        perturbed(model, [p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(tmp_path / "theirs")
        right["theirs"] = outputs(model)
    for adapter, logits in right.items():
        assert main(["merge", str(base), str(tmp_path / adapter), str(tmp_path / f"out {adapter}")]) == 0
        merged = type(gemma()).from_pretrained(tmp_path / f"out {adapter}", tie_word_embeddings=True)
        torch.testing.assert_close(outputs(merged), logits, rtol=1e-4, atol=1e-4)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.a, self.b = (nn.Linear(6, 6) for _ in range(3))
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["fc"], "modules_to_save": ["a"]}, {"target_modules": ["b"]}, {"target_modules": ["a"]}],
    ids=str,
)
def test_ties_that_save_model_wrote_down(options, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    save_model(Pair(), tmp_path / "base.safetensors")
    model = peft.get_peft_model(Pair(), peft.LoraConfig(r=2, **options))
    perturbed(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path / "adapter")
    paths = [str(tmp_path / name) for name in ("base.safetensors", "adapter", "out.safetensors")]
    assert main(["merge", *paths]) == 1
    error = capsys.readouterr().err
    assert "a.weight" in error and "b" in error and "alone" in error
