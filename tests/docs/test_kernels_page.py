"""docs/kernels.md: the files that it names exist, and its example is the code."""

import ast
import re

from checkout import ROOT

PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_files_exist():
    names = set(re.findall(r"[\w/]+\.py\b", PAGE))
    rooms = ROOT / "kernels", ROOT / "lora_fast", ROOT
    assert {"gemm.py", "few_rows.py", "ops/weight.py", "tools/compile_kernels.py"} <= names
    assert not [name for name in names if not any((room / name).exists() for room in rooms)]


def test_every_kernel_file_is_named():
    kernels = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in (ROOT / "kernels").rglob("*.py")
        if re.search(r"^def _\w+_kernel", path.read_text(), re.M)
    }
    assert kernels and not [name for name in kernels if name not in PAGE]


def test_example_is_the_code():
    example = ast.parse(next(text for text in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if text.startswith("def ")))
    source = ast.parse((ROOT / "kernels" / "cast.py").read_text())
    ours = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "cast_adapters")
    body = [node for node in ours.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert isinstance(example.body[0], ast.FunctionDef)
    assert [ast.unparse(node) for node in example.body[0].body] == [ast.unparse(node) for node in body]
