"""The documentation as a site: every page and every public name is in it, and the quick start runs."""

import json
import re
from importlib.util import find_spec

import pytest
from checkout import ROOT

import lora_fast

DOCS = ROOT / "docs"
NAV = re.findall(r": (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_page_has_its_place():
    pages = {path.stem for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} | {"index"}
    assert set(NAV) == pages and len(NAV) == len(pages)


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    for path in named:
        module, _, name = path.rpartition(".")
        found = getattr(__import__(module, fromlist=[name]), name)
        assert found.__doc__, path
    shown = {path.rpartition(".")[2] for path in named}
    assert set(lora_fast.__all__) - shown == {"functional", "reference"}  # of the first its functions, for users


@pytest.mark.medium
@pytest.mark.usefixtures("as_scripts")
def test_the_quick_start(capsys):
    """Its cells run, one after the other, and what it shows is what they print, but for what follows the machine."""
    pytest.importorskip("peft")
    cells = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            shown = "".join("".join(output["text"]) for output in cell["outputs"])
            said = capsys.readouterr().out
            if "PEFT's" in shown or "very weight" in shown:
                assert shown.splitlines()[-1] == said.splitlines()[-1]
            assert len(said.splitlines()) == len(shown.splitlines()) or "fused" in shown
            losses = [re.findall(r"steps: (\S+)", text) for text in (said, shown)]
            assert all(abs(float(a) - float(b)) < 0.2 for a, b in zip(*losses, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_it_builds(tmp_path):
    """Strictly: a link that leads nowhere is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "patch_peft" in (tmp_path / "reference.html").read_text(encoding="utf-8")
