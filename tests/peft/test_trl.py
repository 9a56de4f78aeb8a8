"""TRL's trainers over ``peft_config``: patched once they are made, two steps are those of stock PEFT; and what TRL
hands to vLLM of a patched model."""

import copy
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lora_fast import patch_peft, set_backend

for package in ("peft", "transformers", "accelerate", "trl", "triton"):
    pytest.importorskip(package)
import peft  # noqa: E402
from loops import WAYS, arguments, tiny_llama, watched  # noqa: E402
from transformers import ByT5Tokenizer, set_seed  # noqa: E402

TEXTS = ["W x", "B A x", "s B A x", "m W x"]
MAKERS: dict = {}


def maker(function):
    MAKERS[function.__name__] = function
    return function


@pytest.fixture(params=WAYS[::2])
def way(request):
    """(backend, device): plain torch on the CPU, the kernels on a GPU. (Interpreted in test_loops.py.)"""
    return request.param


def base():
    return tiny_llama(vocab=259).unload()


def config():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


@maker
def sft(way, path, **kwargs):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = arguments(way, SFTConfig, path, max_steps=2, logging_steps=1, bf16=False)
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    return SFTTrainer(base(), args, train_dataset=data, processing_class=ByT5Tokenizer(extra_ids=0), **kwargs)


@maker
def dpo(way, path, **kwargs):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = arguments(way, DPOConfig, path, max_steps=2, logging_steps=1, bf16=False)
    data = Dataset.from_list([{"prompt": text, "chosen": " + b", "rejected": " - c"} for text in TEXTS])
    return DPOTrainer(base(), args=args, train_dataset=data, processing_class=ByT5Tokenizer(extra_ids=0), **kwargs)


@maker
def grpo(way, path, **kwargs):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    lengths = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    args = arguments(way, GRPOConfig, path, max_steps=2, logging_steps=1, bf16=False, beta=0.1, **lengths)
    data = Dataset.from_list([{"prompt": text} for text in TEXTS])

    def reward(completions, **_):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    return GRPOTrainer(base(), reward, args, data, processing_class=ByT5Tokenizer(extra_ids=0), **kwargs)


@pytest.mark.medium
@pytest.mark.usefixtures("as_scripts")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_two_steps_over_a_peft_config(make, way, tmp_path):
    """The trainer makes the PEFT model; patched then, it logs the losses of one that is not."""

    def learn(patch):
        set_seed(0)
        trainer = make(way, tmp_path, peft_config=config())
        if patch:
            report = patch_peft(trainer.model)
            assert len(report.layers) == 7 and bool(report.fused) == (way[1] == "cuda")
        set_seed(0)
        with watched() as seen:
            trainer.train()
        return [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history[:2]], seen.launches

    expected, none = learn(False)
    found, launches = learn(True)
    assert not none and bool(launches) == (way[1] == "cuda")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_for_vllm(dora):
    """TRL merges, reads ``named_parameters`` and unmerges: names and numbers are those of stock, and the base is there
    again bit for bit, which stock's is not."""
    if find_spec("trl.generation") is None:
        pytest.skip("this TRL has them elsewhere")
    from trl.generation.vllm_generation import VLLMGeneration

    class NoGather:
        is_fsdp = False

        def gather_params(self, _):
            return torch.no_grad()

    def sync(model):
        keeper = SimpleNamespace(model=model, _dist=NoGather(), _fix_param_name_to_vllm=fix)
        return {name: t.clone() for name, t in VLLMGeneration._iter_named_params(keeper)}

    def fix(name, extra_prefixes=()):
        for prefix in extra_prefixes:
            name = name.replace(prefix, "")
        return name

    stock = tiny_llama(use_dora=dora)
    ours = copy.deepcopy(stock)
    patch_peft(ours)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    expected, found = sync(stock), sync(ours)
    plain = tiny_llama().unload()
    assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    after = dict(ours.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    assert ours.state_dict().keys() == tiny_llama(use_dora=dora).state_dict().keys()


def test_patched_too_early():
    """Before a trainer makes the PEFT model there is nothing to patch: the error says when there is."""
    set_backend("auto")
    with pytest.raises(ValueError, match=r"without LoRA layers of PEFT's.*trainer.model.*peft_config.*add_lora"):
        patch_peft(base())
