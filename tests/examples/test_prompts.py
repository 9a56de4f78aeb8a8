"""examples/prompts.py, shortened, and its page: prompts and LoRA train together, and come back from their files."""

import re
import shlex

import pytest
import smollm2
import torch
from checkout import ROOT

import lora_fast

common, peft, prompts = map(pytest.importorskip, ("common", "peft", "prompts"))
PAGE = (ROOT / "docs" / "prompt_tuning.md").read_text(encoding="utf-8")
OLD = not hasattr(peft, "initialize_kv_prefix_from_past_key_values")
pytestmark = pytest.mark.skipif(OLD, reason=f"the methods are those of a newer PEFT than {peft.__version__}")


def arguments(*more):
    return prompts.parse(["--steps", "12", "--length", "32", "--tokens", "5", "--rank", "2", *more])


@pytest.fixture
def base():
    """A tiny Llama with fewer heads for keys than for queries and a tied head, as SmolLM2's."""
    torch.manual_seed(0)
    config = common.LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return common.LlamaForCausalLM(config)


@pytest.mark.medium
@pytest.mark.parametrize("method", prompts.METHODS)
def test_method(base, method, tmp_path, capsys):
    """Every part gets gradients and changes, the base does not; what is saved gives the same logits."""
    args = arguments("--out", str(tmp_path))
    ids = torch.tensor(common.ByT5Tokenizer(extra_ids=0)("\n".join(common.paragraphs()[0][:40]))["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    seen = {}

    def spy(*given):
        model, groups = build(*given)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen.update(model=model, trained=trained, start={name: p.detach().clone() for name, p in trained.items()})
        assert len({p for g in groups for p in g["params"]}) == len(trained) == sum(len(g["params"]) for g in groups)
        return model, groups

    build = prompts.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "build", spy)
        result = prompts.train(base, method, ids, ids[-8:], args)

    kinds = {"lora": "lora_", "bottleneck": "bottleneck."}
    marks = [kinds.get(part, "prompt_encoder.") for part in method.split("+")]
    for name, p in seen["trained"].items():
        assert any(mark in name for mark in marks)
        assert p.grad is not None and p.grad.any() and not torch.equal(p, seen["start"][name]), name
    assert all(any(mark in name for name in seen["trained"]) for mark in marks)
    ours = sum(isinstance(module, lora_fast.LoRALinear) for module in seen["model"].modules())
    assert ours == (14 if "lora" in method else 0)
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters())
    assert result.parameters == sum(p.numel() for p in seen["trained"].values()) and result.step_s > 0
    assert result.after < result.before and len(result.losses) == 12 and result.saved > 0
    again = prompts.load(base, method, args, tmp_path / method).eval()
    with torch.no_grad():
        expected, found = (m(input_ids=ids[:3]).logits for m in (seen["model"].eval(), again))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found[:, -32:] - base(input_ids=ids[:3]).logits).abs().max() > 1e-3
    assert "loaded, it gives the same logits" in capsys.readouterr().out


def test_together_they_learn_more(base, tmp_path):
    """A prompt with LoRA ends below the prompt alone, and trains the sum of the parameters."""
    args = arguments("--out", str(tmp_path))
    ids = torch.randint(3, 259, (1, 32)).expand(8, 32).contiguous()
    alone, lora, both = (prompts.train(base, m, ids, ids, args) for m in ("prompt", "lora", "prompt+lora"))
    assert both.after < alone.after and both.parameters == alone.parameters + lora.parameters


def test_first_token_is_no_target(base):
    ids = torch.randint(3, 259, (2, 8))
    assert prompts.loss_of(base, ids).item() == pytest.approx(base(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    model = prompts.build(base, "prompt", arguments(), ids)[0].eval()
    logits = model(input_ids=ids).logits[:, -8:]  # behind the virtual tokens
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert prompts.loss_of(model, ids).item() == pytest.approx(truth.item(), rel=1e-5)


def test_a_wrong_file_is_an_error(base, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "load", lambda base, *args: base)
    ids = torch.randint(3, 259, (8, 32))
    with pytest.raises(RuntimeError, match="lora: loaded from .*, a logit differs"):
        prompts.train(base, "lora", ids, ids, arguments("--out", str(tmp_path)))


@pytest.mark.medium
def test_run(base, tmp_path, monkeypatch, capsys):
    tokenizer = common.ByT5Tokenizer(extra_ids=0)
    monkeypatch.setattr(smollm2, "load", lambda layers: (base, tokenizer))
    monkeypatch.setattr(smollm2, "why_not", lambda: None)
    argv = ["--method", "p-tuning-v2", "lora", "--steps", "2", "--length", "64", "--out", str(tmp_path)]
    assert prompts.main(argv) == 0
    said = capsys.readouterr().out
    lines = said[said.index("trained parameters") :].splitlines()[1:3]
    assert [re.split("  +", line)[0] for line in lines] == ["p-tuning-v2", "lora"]
    assert "2 steps of 4 x 64 tokens; the base alone has a perplexity of" in said


def test_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "why_not", lambda: "no model here")
    assert prompts.main([]) == 1 and capsys.readouterr().err == "prompts: no model here\n"


@pytest.mark.parametrize("argv", ["--steps 0", "--method magic", "--tokens x", "--rank -1"])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as done:
        prompts.main(argv.split())
    option, value = argv.split()
    message = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 2 and option in message and value in message


SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_snippet_of_the_page(i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(SNIPPETS[i], {"__name__": "__main__"})


def test_page():
    """Its commands are the script's; its tables have a row for each method; the parameters are those of the model."""
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
    ]
    assert len(SNIPPETS) == 3 and commands
    for command in commands:
        assert command[:2] == ["python", "examples/prompts.py"]
        prompts.parse(command[2:])
    measured = {
        row[0]: row for row in (re.split(r" +\| +", line.strip("| ")) for line in PAGE.splitlines() if "|" in line)
    }
    assert set(prompts.METHODS) <= measured.keys()
    counts = {name: int(measured[name][1].replace(",", "")) for name in prompts.METHODS}
    for name in prompts.RATES:
        if name != "lora":
            assert counts[f"{name}+lora"] == counts[name] + counts["lora"]
    assert counts["prompt"] == 20 * 576 and counts["p-tuning-v2"] == 20 * 30 * 2 * 192 and counts["lora"] == 2_442_240
    assert counts["bottleneck"] == 60 * (2 * 32 * 576 + 32 + 576)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        prompts.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--method" in said and "--seed" in said
