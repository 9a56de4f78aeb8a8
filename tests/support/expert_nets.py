"""Small Mixture-of-Experts models of transformers', with PEFT's adapters on their experts."""

import contextlib
import importlib
import io

import pytest
import torch
from peft_nets import peft, stir

transformers = pytest.importorskip("transformers", "5.0")
if not hasattr(peft.LoraConfig, "target_parameters"):
    pytest.skip("this PEFT has no target_parameters", allow_module_level=True)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def moe_model(kind="qwen3_moe", experts=4, **more):
    """With weights that do something."""
    torch.manual_seed(0)
    counts = {"num_experts": experts, "moe_intermediate_size": 24}
    if kind == "gpt_oss":
        counts = {"num_local_experts": experts, "intermediate_size": 24, "layer_types": ["full_attention"] * 2}
    name = {"qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss"}[kind]
    # Their files, and no attribute of transformers, which imports whatever it has.
    config = getattr(importlib.import_module(f"transformers.models.{kind}.configuration_{kind}"), f"{name}Config")
    model = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), f"{name}ForCausalLM")
    with contextlib.redirect_stderr(io.StringIO()):
        made = model(config(**{**SIZES, **counts, "pad_token_id": 0, **more})).eval()
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() > 1 or "bias" in name:
                p.copy_(1.6 * p.shape[-1] ** -0.5 * torch.randn(p.shape, generator=gen))
    return made


def moe_peft(kind="qwen3_moe", experts=4, r=3, parameters=BOTH, sizes=None, **settings):
    """A stock PEFT model whose adapters do something."""
    config = peft.LoraConfig(
        **{"r": r, "lora_alpha": 5, "target_modules": [], "target_parameters": parameters, **settings}
    )
    return stir(peft.get_peft_model(moe_model(kind, experts, **(sizes or {})), config))


def eagerly(model):
    """The loop over experts: transformers' products of groups are 16-bit on a GPU."""
    model.get_base_model().set_experts_implementation("eager")
    return model


def ids(rows=2, length=9, seed=4):
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, tokens=None):
    tokens = (ids() if tokens is None else tokens).to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads
