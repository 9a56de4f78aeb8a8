"""Every snippet and command of the README works."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from checkout import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
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
    assert README.count("```") == 2 * len(BLOCKS)
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    kinds = [commands("make"), commands("pip", "install"), commands(".venv/bin/python", "-m", "lora_fast")]
    kinds.append([command for command in COMMANDS if "examples/" in str(command)])  # in test_examples.py
    assert all(kinds) and sum(map(len, kinds)) == len(COMMANDS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"from lora_fast.*", text)[0])
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
    extras = re.search(r"with the extras that you need \(([^)]*)\)", README).group(1)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"`(\w+)`", extras) == list(project["optional-dependencies"])


@pytest.mark.medium
@pytest.mark.parametrize("command", commands(".venv/bin/python", "-m"), ids=shlex.join)
def test_lora_fast_command(command, tmp_path):
    run([sys.executable, *command[1:]], tmp_path)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_link(target):
    assert (ROOT / target).exists()
