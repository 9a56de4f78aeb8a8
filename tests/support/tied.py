"""Small models with tied tensors."""

import pytest
import torch
from torch import nn

IDS = torch.arange(10).reshape(2, 5)


class Tied(nn.Module):
    """Ties that are no embeddings: a weight, a whole module, a bias and a buffer under two names each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.gate, self.twin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin.weight, self.twin.bias = self.gate.weight, self.gate.bias
        self.subtwin = nn.Linear(6, 6)  # which ends in twin, and so is one of PEFT's modules_to_save=["twin"]
        self.left = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.right = nn.Sequential(self.left[0], nn.BatchNorm1d(6))
        self.right[1].running_mean = self.left[1].running_mean
        self.left[2].weight = self.left[0].weight
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.fc(self.embed(input_ids).mean(1))
        x = self.subtwin(x) + self.gate(x) - 2 * self.twin(x).sin() + self.right(self.left(x))
        return self.lm_head(x)


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            **{"tie_word_embeddings": True, **options},
        )
    )


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_ff=24,
            num_layers=1,
            num_heads=4,
            d_kv=4,
            decoder_start_token_id=0,
        )
    )


def outputs(model):
    model.eval()
    takes_both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    out = model(input_ids=IDS, **({"decoder_input_ids": IDS} if takes_both else {}))
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
def perturbed(model, tensors):
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor).abs())
    return model
