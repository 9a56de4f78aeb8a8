"""Every snippet and command of the README, and of the pages that it hands its details to, works."""

import csv
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from checkout import ROOT

PAGES = ["README.md", "docs/use.md", "docs/gallery.md"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.DOTALL)]
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [shlex.split(line) for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def run(command: list, cwd: Path) -> None:
    """In another folder than the checkout's, which need not be installed for this."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"


def commands(*start: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(start)] == list(start)]


def test_everything_is_checked():
    """Each block is in a language that is run here, each command of a kind that is."""
    assert sum(text.count("```") for text in TEXTS.values()) == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"python", "sh", ""}  # "": what a script prints
    kinds = [commands("make"), commands("pip", "install"), commands(".venv/bin/python", "-m", "lora_fast")]
    kinds.append([command for command in COMMANDS if "examples/" in str(command)])  # in test_examples.py
    assert all(kinds) and sum(map(len, kinds)) == len(COMMANDS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"from lora_fast.*", text)[-1])
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"__name__": "__main__"})


@pytest.mark.parametrize("command", commands("make"), ids=shlex.join)
def test_make_command(command):
    run([*command, "--dry-run"], ROOT)
    for word in command[1:]:
        if "=" in word:
            assert re.search(rf"^{word.partition('=')[0]} \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands("pip", "install"), ids=shlex.join)
def test_pip_command(command):
    path, extras = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", command[-1]).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert path == "." and set(filter(None, (extras or "").split(","))) <= project["optional-dependencies"].keys()


def test_extras_named_in_the_text():
    extras = re.search(r"^extras are ([^.]*)\.", README, re.MULTILINE).group(1)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"`(\w+)`", extras) == list(project["optional-dependencies"])


@pytest.mark.medium
@pytest.mark.parametrize("command", commands(".venv/bin/python", "-m"), ids=shlex.join)
def test_lora_fast_command(command, tmp_path):
    """The demo, which trains, only up to its arguments: tests/cli/test_demo.py runs it with these and another rank."""
    if "demo" in command:
        assert command[4:] == ["--seeds", "1", "--ranks", "1", "--out", "demo-out"]
        command = [*command, "--help"]
    run([sys.executable, *command[1:]], tmp_path)


LINKS = [
    (path, target)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for target in re.findall(r"[\w`*]\]\((?!https?:)([^) ]+)\)", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path, target", LINKS, ids=lambda value: getattr(value, "stem", value))
def test_link(path, target):
    """It leads to a file, and to a heading in it."""
    name, _, heading = target.partition("#")
    file = (path.parent / name) if name else path
    assert file.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_numbers_beside_the_peers():
    """The README's and docs/peers.md's are those of the run, but for lora_fast's blocks."""
    with (ROOT / "benchmarks" / "results" / "peers_h200.csv").open(newline="") as file:
        found = {(row["block"], row["shape"], row["implementation"]): row for row in csv.DictReader(file)}

    def ratio(block, shapes, name):
        ratios = [float(row["ratio_to_frozen"]) for s in shapes if (row := found.get((block, s, name)))]
        return f"{math.prod(ratios) ** (1 / len(ratios)):.2f}" if ratios else ""

    large = [shape for block, shape, name in found if block == "layer" and name == "frozen" and "2048" not in shape]
    for label, block, shapes, kind in (
        ("LoRA, one layer", "layer", large, "p0"),
        ("DoRA, one layer", "layer", large, "dora p0"),
        ("LoRA, a SwiGLU MLP", "mlp", ["8192, 4096, 14336"], "p0"),
        ("LoRA, q, k and v", "qkv", ["8192, 4096, 1024"], "p0"),
    ):
        first, *cells = cells_of(label)
        names = ("PEFT", "unsloth", "axolotl")
        assert cells == [ratio(block, shapes, f"{name} {kind}") for name in names], label
        assert block != "layer" or first == f"**{ratio(block, shapes, f'ours {kind}')}**"
    kinds = {"LoRA": "p0", "LoRA, dropout 0.1": "p.1", "DoRA": "dora p0", "DoRA, dropout 0.1": "dora p.1"}
    page, count = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8"), 0
    for block, shape, kind, cells in re.findall(
        r"^\| (.+), (\d+ x \d+ x \d+) \| (\w+.*?) \|(.*)\|$", page, re.MULTILINE
    ):
        block = {"MLP": "mlp", "q, k, v": "qkv"}.get(block, block)
        for cell, name in zip(cells.split("|"), ("ours", "PEFT", "unsloth", "axolotl"), strict=True):
            row = found.get((block, shape.replace(" x ", ", "), f"{name} {kinds[kind]}"))
            count += row is not None
            wanted = f"{float(row['ratio_to_frozen']):.2f}; {row['peak_mib']}" if row else ""
            assert cell.strip() == wanted, (block, shape, kind, name)
    assert count == sum(not row["implementation"].startswith("frozen") for row in found.values())


def cells_of(label):
    """Of the row of the README's first table."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("label, block", [("LoRA, a SwiGLU MLP", "mlp"), ("LoRA, q, k and v", "qkv")])
def test_numbers_of_blocks(label, block):
    with (ROOT / "benchmarks" / "results" / "bench_blocks_h200.csv").open(newline="") as file:
        wanted = {"block": block, "M": "8192", "p": "0", "impl": "lora_fast_lora"}
        (row,) = (row for row in csv.DictReader(file) if wanted.items() <= row.items())
    assert cells_of(label)[0] == f"**{float(row['ratio_to_frozen']):.2f}**"
