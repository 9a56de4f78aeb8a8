"""Generation by a patched model: in evaluation and inside a training loop, the tokens are stock PEFT's."""

import copy
from importlib.util import find_spec

import pytest
import torch

from lora_fast import patch_peft, set_backend

for package in ("peft", "transformers", "accelerate", "triton"):
    pytest.importorskip(package)
from loops import KINDS, LAYERS, WAYS, arguments, tiny_llama, token_ids, watched  # noqa: E402


@pytest.fixture(params=WAYS)
def way(request):
    """(backend, device), as in test_loops.py."""
    return request.param


def patched(stock, way):
    ours = copy.deepcopy(stock)
    set_backend(way[0])
    patch_peft(ours)
    return ours


@pytest.mark.medium
@KINDS
def test_generate(way, kind):
    """Token by token in float16, with the keys and values of those before: each is what stock PEFT finds likeliest, up
    to rounding."""
    stock = tiny_llama(**kind).half().to(way[1]).eval()
    ours, ids = patched(stock, way), token_ids().to(way[1])
    with watched() as seen:
        found = ours.generate(input_ids=ids, do_sample=False, min_new_tokens=6, max_new_tokens=6, pad_token_id=0)
    assert seen.calls == (0 if way == ("auto", "cpu") else 6 * LAYERS)
    with torch.no_grad():
        logits = stock(found).logits[:, ids.shape[1] - 1 : -1].float()
    logits[..., 2] = logits.min()  # which ends a text, and may not come so early
    chosen = logits.gather(-1, found[:, ids.shape[1] :, None])[..., 0]
    assert found.shape == (2, 12) and (logits.amax(-1) - chosen).max() < 0.01 * logits.std()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
@pytest.mark.usefixtures("as_scripts")
@pytest.mark.parametrize("way", WAYS[1:])
def test_grpo(way, tmp_path):
    """Two steps of TRL's GRPO, which samples, scores what it sampled with the adapters on and off, and learns: DoRA on
    the kernels."""
    from datasets import Dataset
    from transformers import ByT5Tokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list([{"prompt": "W x"}, {"prompt": "B A x"}] * 4)
    texts: list[list[str]] = []

    def reward(completions, **_):
        texts.append(completions)
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def learn(model):
        args = arguments(
            way,
            GRPOConfig,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            beta=0.1,
            logging_steps=1,
            bf16=False,
        )
        set_seed(0)
        with watched() as seen:
            trainer = GRPOTrainer(model, reward, args, data, processing_class=ByT5Tokenizer(extra_ids=0))
            trainer.train()
        return [[log[name] for name in ("loss", "grad_norm", "kl")] for log in trainer.state.log_history[:2]], seen

    stock = tiny_llama(vocab=259, use_dora=True)
    ours = patched(stock, way)
    expected, none = learn(stock)
    found, seen = learn(ours)
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert expected[1][2] > 0 and none.calls == 0
    assert min(seen.calls, seen.launches) > 2 * 6 * LAYERS
