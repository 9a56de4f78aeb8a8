"""patch_peft on tiny transformers models, beside the same model with stock PEFT."""

import copy
import re

import pytest
import torch
from checkout import ROOT
from peft_nets import config, patched, stir

from lora_fast import SlowPathWarning, patch_peft, peft_report, set_backend

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def llama(**kwargs):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **kwargs))


def gpt2():
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=0)
    )


def t5():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0)
    )


ALL = "all-linear"
MODELS = {
    "llama": (llama, {"target_modules": ALL}),
    "llama dora": (llama, {"target_modules": ALL, "use_dora": True}),
    "llama tied head": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj", "lm_head"], "bias": "all"},
    ),
    "llama new head": (llama, {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}),
    "t5": (t5, {"target_modules": ["q", "v", "wi", "wo"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
}


def stock_of(name, device="cpu"):
    build, settings = MODELS[name]
    torch.manual_seed(0)
    return stir(peft.get_peft_model(build(), config(**settings))).to(device)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def token_ids(device):
    return torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])
def test_loss_gradients_and_generation_are_stocks(path, name):
    stock = stock_of(name, path[1])
    ours, ids = patched(stock, path), token_ids(path[1])
    found, expected = loss_and_gradients(ours, ids), loss_and_gradients(stock, ids)
    assert found.keys() == expected.keys() and len(found) > 4
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    tokens = [
        m.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None) for m in (ours, stock)
    ]
    assert torch.equal(*tokens) and tokens[0].shape[1] >= 3


@pytest.mark.interpreted
def test_gpt2_fuses_its_head_and_its_conv1d():
    stock = stock_of("gpt2")
    ours, ids = copy.deepcopy(stock), token_ids("cpu")
    set_backend("triton")
    report = patch_peft(ours)
    assert [(layer.name.rpartition(".")[2], layer.fused) for layer in report.layers] == [
        ("c_attn", True),
        ("lm_head", True),
    ]
    found, expected = loss_and_gradients(ours, ids), loss_and_gradients(stock, ids)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_tied_embeddings_are_unmerged_exactly():
    ours = patched(stock_of("llama tied head"))
    embedding = ours.get_input_embeddings().weight
    head = ours.base_model.model.lm_head.base_layer.weight
    assert head is embedding
    before = embedding.clone()
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert torch.equal(embedding, before) and torch.equal(ours.base_model.model.lm_head.base_layer.weight, before)


def test_eva_after_the_patch():
    torch.manual_seed(0)
    try:
        model = peft.get_peft_model(llama(), config(target_modules=["q_proj", "up_proj"], init_lora_weights="eva"))
        batches = [{"input_ids": token_ids("cpu")} for _ in range(4)]
        ours = patched(model)
        for either in (ours, model):
            torch.manual_seed(1)
            peft.initialize_lora_eva_weights(either, batches, show_progress_bar=False)
    except (AttributeError, ValueError, TypeError) as error:
        pytest.skip(f"this PEFT: {error}")
    stir(ours), stir(model)
    found, expected = (loss_and_gradients(m, token_ids("cpu")) for m in (ours, model))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_accelerates_hooks_are_honoured():
    """On the layer itself or below it: what they do happens, and the report says why nothing is fused."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    stock, ids = stock_of("llama"), token_ids("cpu")
    for model in (stock, ours := copy.deepcopy(stock)):
        block = model.base_model.model.model.layers[0]
        hooks.add_hook_to_module(block.mlp.up_proj, Twice())
        hooks.add_hook_to_module(block.mlp.down_proj.base_layer, Twice())
    layers = {layer.name.partition("layers.0.")[2]: layer.reason for layer in patch_peft(ours).layers}
    assert "replaced" in layers["mlp.up_proj"] and "hooks" in layers["mlp.down_proj"]
    with pytest.warns(SlowPathWarning, match="hooks or a replaced forward"):
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.interpreted
def test_accelerates_hooks_after_the_patch_leave_it_fused():
    hooks = pytest.importorskip("accelerate.hooks")
    ours = patched(stock_of("llama"), ("triton", "cpu"))
    hooks.add_hook_to_module(ours.base_model.model.model.layers[0].mlp.up_proj, hooks.ModelHook())
    assert peft_report(ours).not_fused == 0


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_one_mask(path, reentrant):
    """The loss with the masks of one seed, and its gradients, are those without checkpointing."""
    torch.manual_seed(0)
    stock = stir(peft.get_peft_model(llama(), config(target_modules=["q_proj", "up_proj"], lora_dropout=0.5)))
    ours, ids = patched(stock.to(path[1]), path).train(), token_ids(path[1])
    torch.manual_seed(3)
    expected = loss_and_gradients(ours, ids)
    ours.enable_input_require_grads()
    ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    found = loss_and_gradients(ours, ids)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)
    torch.manual_seed(4)
    assert loss_and_gradients(ours, ids)["loss"] != expected["loss"]


@pytest.mark.versions
@pytest.mark.medium
def test_whole_model_compiles_to_one_graph(path):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    stock = stock_of("llama", path[1])
    ours, ids = patched(stock, path), token_ids(path[1])
    counter = CompileCounterWithBackend("inductor" if path[1] == "cuda" else "aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for step in range(2):
        found = {key.removeprefix("_orig_mod."): t for key, t in loss_and_gradients(compiled, ids).items()}
        for key, expected in loss_and_gradients(stock, ids).items():
            torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-5)
        for model in (ours, stock):
            stir(model, seed=step)
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.Linear):
                    module.scaling["default"] = 0.5 + step
    assert counter.frame_count == 1


def test_a_model_patched_before_it_moves_is_fused_after(device):
    """On the CPU and with the plain path the report says why not; the layers are ready all the same."""
    ours = stock_of("llama")
    report = patch_peft(ours)
    assert report.fused == 0 and all("'cpu'" in layer.reason for layer in report.layers)
    ours.to(device)
    if device == "cpu":
        set_backend("triton")
    assert peft_report(ours).not_fused == 0


def test_the_page_in_the_docs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert snippets and text.count("```") == 2 * len(snippets)
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(snippet, {"__name__": "__main__"})
