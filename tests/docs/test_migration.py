"""docs/migration.md: its Python runs, the commands and names that it gives exist, its tables are tables."""

import importlib.util
import re
import shlex

import pytest
from checkout import ROOT

import lora_fast
from lora_fast.cli import main

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [shlex.split(line) for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def test_blocks():
    assert PAGE.count("```") == 2 * len(BLOCKS) and {language for language, _ in BLOCKS} == {"python", "sh", "text"}
    assert len(SNIPPETS) == 6 and COMMANDS


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_snippet(i, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^(?:from|import) (peft|transformers)\b", SNIPPETS[i], re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    exec(SNIPPETS[i], {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_command(command, capsys):
    assert command[0] == "lora-fast"
    with pytest.raises(SystemExit) as stop:
        main([command[1], "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in said for word in command if word.startswith("--"))


def test_names():
    """What stands in the tables' right column with a bracket, and every command, is ours."""
    rows = [line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert rows and all(len(row) == 2 for row in rows)
    right = " ".join(row[1] for row in rows)
    called = set(re.findall(r"\b(\w*[lL][oO][rR][aA]\w*|DoRALinear|save_adapter|load_adapter)\b(?=\()", right))
    called -= {"llama3_1_8b"}
    assert {"add_lora", "LoRAConfig", "LoRALinear", "remove_lora", "merge_lora", "save_adapter"} <= called
    ours = {*dir(lora_fast), *dir(lora_fast.parametrize)}
    assert called <= ours, called - ours
    config = lora_fast.LoRAConfig()
    fields = re.search(r"`LoraConfig\(([^)]*)\)`", PAGE).group(1).split(", ")
    assert len(fields) == 11 and all(hasattr(config, name) for name in fields)
    assert (config.r, config.lora_dropout, config.lora_alpha) == (8, 0.0, 8)  # as the last table says
