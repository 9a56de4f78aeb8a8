"""Imports run one way, and importing lora_fast stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

PACKAGE = ROOT / "lora_fast"

# From the users' side down to the arithmetic: the files and folders of lora_fast, each of which imports only from rooms
# below its own.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"__init__", "timing"},
    {"merging"},
    {"files", "parametrize", "peft"},
    {"models"},
    {"layers"},
    {"experts"},
    {"wrappers"},
    {"batch", "blocks", "embedding"},
    {"functional"},
    {"checks", "paths"},
    {"ops"},
    {"reference", "fp8", "kept"},
    {"bases"},
    {"dispatch", "interrupted", "kernels", "tables"},
]
RANK = {room: rank for rank, rooms in enumerate(reversed(ROOMS)) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "kernels"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def named(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


NAMES = {named(path): path for path in MODULES}


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that a file imports, at its top or inside functions: modules, and things in modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str:
    """The room that a full name is in; what the package itself holds counts as its __init__."""
    room = f"{name}.".split(".")[1]
    return room if room in RANK else "__init__"


def module_of(name: str) -> str:
    return name if name in NAMES else name.rpartition(".")[0]


def own(path: Path) -> set[str]:
    """What the file imports of lora_fast."""
    return {name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "lora_fast"}


def test_finds_every_form_of_import():
    source = "import a.b, lora_fast\nfrom lora_fast import models, LoRALinear\ndef f():\n from lora_fast.a.b import x"
    names = imported(ast.parse(source))
    rest = {"lora_fast.models", "lora_fast.LoRALinear", "lora_fast.a.b.x"}
    assert names == {"a.b", "lora_fast"} | rest
    assert [room_of(name) for name in sorted(rest)] == ["__init__", "__init__", "models"]


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_down(name):
    room = room_of(name)
    assert room in RANK, f"{name} has no place in ROOMS yet"
    upward = {other for other in own(NAMES[name]) if room_of(other) != room and RANK[room_of(other)] >= RANK[room]}
    assert not upward, f"{name} imports {upward}, which stand beside or above it"


def test_no_module_imports_itself_by_way_of_others():
    below = {name: {module_of(other) for other in own(path)} & NAMES.keys() for name, path in NAMES.items()}
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"these import each other: {sorted(below)}"


def test_what_is_private_stays_in_its_module():
    private = re.compile(r"_[^_].*")
    found = {
        (name, other)
        for name, path in NAMES.items()
        for other in own(path)
        if private.fullmatch(other.rpartition(".")[2])
    }
    assert not found


def test_every_room_exists():
    assert RANK.keys() == {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} | {"kernels"}
    assert KERNELS


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_kernels_only(path):
    for name in imported(ast.parse(path.read_text())):
        allowed = name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names} or "lora_fast.kernels." in name
        assert allowed, f"kernels/{path.name} imports {name}"


def test_kernels_is_no_package():
    """An importable top-level package `kernels` would hide Hugging Face's from transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light():
    """`import lora_fast` brings in only what `import torch` does, and itself."""
    code = """
import sys, torch
before = set(sys.modules)
import lora_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "transformers", "peft", "matplotlib", "rich", "mlxtend", "safetensors"} & new
kernels = [name for name in sys.modules if name.startswith("lora_fast.kernels")]
assert not heavy and not kernels, (heavy, kernels)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
