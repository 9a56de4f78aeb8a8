"""Imports run one way, and importing lora_fast stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the users' side down to the arithmetic: a module may import only from layers below its own.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "merge", "convert", "doctor", "bench"},
    {"arguments", "demo_report", "skeleton", "selfcheck", "machine"},
    {"__init__", "timing"},
    {"merging", "base_ties"},
    {"base_files"},
    {"checkpoint", "peft"},
    {"fitting"},
    {"ties"},
    {"parametrize", "peft_report"},
    {"parametrized", "state"},
    {"model", "peft_format", "bottleneck"},
    {"config", "pattern_keys"},
    {"parametrization", "dora", "peft_layers"},
    {"layers", "projections", "peft_merging"},
    {"merged_state", "layer_rules"},
    {"placement"},
    {"peft_rules", "peft_norms", "hub_names", "ways_out"},
    {"functional"},
    {"ops", "weight_ops", "bottleneck_ops"},
    {"custom_op"},
    {"op_parts"},
    {"reference"},
    {"fp8"},
    {"dispatch", "kernels", "gather", "wrappers", "fsdp1", "replacing"},
]
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}
MODULES = sorted((ROOT / "lora_fast").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that a file imports, at its top or inside functions, relative imports resolved."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["lora_fast" if node.level else None, node.module]))
            # `from lora_fast import layers` names a module, `from lora_fast.layers import LoRALinear` a thing in one.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "lora_fast" else {base}
    return found


def own_modules(names: set[str]) -> set[str]:
    """The modules of lora_fast among imported names; a thing of the package itself counts as its __init__."""
    parts = {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "lora_fast"}
    return {part if part in RANK else "__init__" for part in parts}


def test_finds_every_form_of_import():
    source = "import a.b, lora_fast\nfrom . import model, LoRALinear\nfrom .layers import x\ndef f():\n from c import d"
    names = imported(ast.parse(source))
    assert names == {"a.b", "lora_fast", "lora_fast.model", "lora_fast.LoRALinear", "lora_fast.layers", "c"}
    assert own_modules(names) == {"__init__", "model", "layers"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    assert path.stem in RANK, f"{path.name} has no place in LAYERS yet"
    upward = {name for name in own_modules(imported(ast.parse(path.read_text()))) if RANK[name] >= RANK[path.stem]}
    assert not upward, f"{path.name} imports {upward}, which stand beside or above it"


def test_every_layer_exists():
    assert {"__init__", "cli", "demo", "model", "layers", "functional"} <= {path.stem for path in MODULES}
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
