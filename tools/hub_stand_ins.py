"""Random stand-ins for the hub's tiny models that some test files name, as a hub cache.

python tools/hub_stand_ins.py FOLDER TEST_FILE ...

They are read with HF_HUB_CACHE=FOLDER HF_HUB_OFFLINE=1. One that is there already stays; one that cannot be made is
named and left out.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT = "0" * 40
PEFT, HF, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"

# Of every model. With weights as large as these the layers decide the output, not the token embedding alone.
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OTHER_SIZES: dict[str, dict[str, Any]] = {  # by what the architecture's name begins with
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 5},
    "GPT2": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "Bart": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    "Gemma3": {"head_dim": 8},
    "Mixtral": MOE,
    "Qwen3Moe": MOE,
    "GptOss": MOE,
    "Llama4": MOE | {"intermediate_size_mlp": 32, "num_experts_per_tok": 1},
    "DebertaV2": DEBERTA,
    "Deberta": DEBERTA,
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "FalconMamba": {"state_size": 4},
}
MODELS = {  # name: architecture
    PEFT + "tiny-random-OPTForCausalLM": "OPTForCausalLM",
    PEFT + "opt-125m": "OPTForCausalLM",
    "facebook/opt-125m": "OPTForCausalLM",
    "facebook/opt-350m": "OPTForCausalLM",
    PEFT + "tiny-random-GPT2LMHeadModel": "GPT2LMHeadModel",
    PEFT + "tiny-random-gpt2": "GPT2LMHeadModel",
    HF + "tiny-random-gpt2": "GPT2LMHeadModel",
    "openai-community/gpt2": "GPT2LMHeadModel",
    "gpt2": "GPT2LMHeadModel",
    PEFT + "tiny-random-GPTJForCausalLM": "GPTJForCausalLM",
    PEFT + "tiny-random-BloomForCausalLM": "BloomForCausalLM",
    PEFT + "tiny-random-GPTNeoXForCausalLM": "GPTNeoXForCausalLM",
    PEFT + "tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    HF + "tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    TRL + "tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    TRL + "tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    HF + "tiny-random-MistralForCausalLM": "MistralForCausalLM",
    PEFT + "tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "Qwen/Qwen2-0.5B": "Qwen2ForCausalLM",
    TRL + "tiny-Qwen3ForCausalLM": "Qwen3ForCausalLM",
    HF + "tiny-random-Gemma3ForCausalLM": "Gemma3ForCausalLM",
    HF + "Mixtral-tiny": "MixtralForCausalLM",
    TRL + "tiny-Qwen3MoeForCausalLM": "Qwen3MoeForCausalLM",
    HF + "tiny-qwen3-moe": "Qwen3MoeForCausalLM",
    TRL + "tiny-GptOssForCausalLM": "GptOssForCausalLM",
    TRL + "tiny-Llama4ForCausalLM": "Llama4ForCausalLM",
    PEFT + "tiny-random-BertModel": "BertModel",
    HF + "tiny-random-BertModel": "BertModel",
    PEFT + "tiny-random-RobertaModel": "RobertaModel",
    PEFT + "tiny-random-DebertaModel": "DebertaModel",
    PEFT + "tiny-random-DebertaV2Model": "DebertaV2Model",
    PEFT + "tiny-random-BertForSequenceClassification": "BertForSequenceClassification",
    PEFT + "tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    PEFT + "tiny-random-T5ForConditionalGeneration-calibrated": "T5ForConditionalGeneration",
    PEFT + "tiny-random-T5ForConditionalGeneration": "T5ForConditionalGeneration",
    PEFT + "tiny-random-t5": "T5ForConditionalGeneration",
    "google/flan-t5-small": "T5ForConditionalGeneration",
    PEFT + "tiny-random-BartForConditionalGeneration": "BartForConditionalGeneration",
    PEFT + "tiny-random-ResNetForImageClassification": "ResNetForImageClassification",
    PEFT + "tiny-clip-text-2": "CLIPTextModel",
    "tiiuae/falcon-mamba-tiny-dev": "FalconMambaForCausalLM",
}
ADAPTERS = {  # name: (its base, a random one; PEFT's name of the task; transformers' auto class for it)
    PEFT + "tiny-OPTForCausalLM-lora": ("tiny-random-OPTForCausalLM", "CAUSAL_LM", "AutoModelForCausalLM"),
    PEFT + "gpt2-lora-random": ("tiny-random-gpt2", "CAUSAL_LM", "AutoModelForCausalLM"),
    PEFT + "opt-125m-dummy-lora": ("opt-125m", "CAUSAL_LM", "AutoModelForCausalLM"),
    PEFT + "tiny_T5ForSeq2SeqLM-lora": ("tiny-random-t5", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    PEFT + "tiny_OPTForFeatureExtraction-lora": ("tiny-random-OPTForCausalLM", "FEATURE_EXTRACTION", "AutoModel"),
    PEFT + "tiny-random-BertModel-lora": ("tiny-random-BertModel", "FEATURE_EXTRACTION", "AutoModel"),
}


def main(folder: Path, files: list[Path]) -> None:
    text = "\n".join(file.read_text() for file in files)
    adapters = [name for name in ADAPTERS if f'"{name}"' in text]
    bases = {PEFT + ADAPTERS[name][0] for name in adapters}
    for name in MODELS:
        if f'"{name}"' in text or name in bases:
            attempt(folder, name, make_model)
    for name in adapters:
        attempt(folder, name, make_adapter)


def attempt(folder: Path, name: str, make: Callable[[Path, str], None]) -> None:
    target = snapshot(folder, name)
    if target.exists():
        return
    try:
        make(folder, name)
    except Exception as error:  # whatever transformers says to such sizes
        print(f"no stand-in for {name}: {type(error).__name__}: {error}")
    else:
        refs = target.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(COMMIT)


def snapshot(folder: Path, name: str) -> Path:
    return folder / ("models--" + name.replace("/", "--")) / "snapshots" / COMMIT


def make_model(folder: Path, name: str) -> None:
    import torch
    import transformers

    architecture = getattr(transformers, MODELS[name])
    sizes = dict(SIZES)
    for start, others in OTHER_SIZES.items():
        if MODELS[name].startswith(start):
            sizes |= others
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**sizes))
    model.eval().save_pretrained(snapshot(folder, name))
    tokenizer().save_pretrained(snapshot(folder, name))


def make_adapter(folder: Path, name: str) -> None:
    import peft
    import torch
    import transformers

    base, task, auto = ADAPTERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_pretrained(snapshot(folder, PEFT + base))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = PEFT + base
    model.save_pretrained(str(snapshot(folder, name)))


def tokenizer() -> Any:
    """One that knows bytes and a few words."""
    import tokenizers
    import transformers

    words = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(words.values()), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["a text of some words, and the words of another text"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **words)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
