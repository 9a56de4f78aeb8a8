"""examples/run_all.py: which scripts it runs and how, what becomes of one that fails. The examples have tests of their
own."""

import re

import pytest
from checkout import ROOT

run_all = pytest.importorskip("run_all")
GALLERY, SYSTEMS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("gallery.md", "examples.md"))
SCRIPTS = {path.stem for path in (ROOT / "examples").glob("*.py")} - run_all.NO_EXAMPLES

GOOD = "import sys, pathlib\nprint(' '.join(sys.argv[1:]))\npathlib.Path('made').touch()\n"
BAD = "import a_package_that_nobody_has\n"


def test_it_runs_all(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").mkdir()
    for name, text in {"good": GOOD, "prompts": GOOD, "bad": BAD, "common": BAD, "run_all": BAD}.items():
        (tmp_path / "examples" / f"{name}.py").write_text(text)
    monkeypatch.setattr(run_all, "HERE", tmp_path / "examples")
    out = tmp_path / "out"
    assert run_all.main(["--out", str(out), "--seed", "7"]) == 1
    said = capsys.readouterr()
    assert re.findall(r"^(\w+) +\d+ s  (\w+)$", said.out, re.M) == [
        ("bad", "FAILED"),
        ("good", "done"),
        ("prompts", "done"),
    ]
    assert "bad failed:" in said.out + said.err and "No module named 'a_package_that_nobody_has'" in said.out + said.err
    assert "2 of 3 done" in said.out
    assert (out / "good" / "output.txt").read_text() == "--seed 7\n" and (out / "good" / "made").exists()
    assert (out / "prompts" / "output.txt").read_text() == " ".join(run_all.ARGUMENTS["prompts"]) + " --seed 7\n"
    assert run_all.main(["--out", str(out), "--only", "good"]) == 0


def test_its_arguments_are_the_scripts():
    assert run_all.ARGUMENTS.keys() | run_all.LAUNCHERS.keys() <= SCRIPTS
    for name, arguments in run_all.ARGUMENTS.items():
        script = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        options = script + (ROOT / "examples" / "common.py").read_text(encoding="utf-8") * ("common.options" in script)
        assert all(f'"{word}"' in options for word in arguments if word.startswith("--")), name
        if "\ndef parse(" in script:
            pytest.importorskip(name).parse(arguments)
    launched = run_all.command(ROOT / "examples" / "fsdp2.py", 3)
    assert launched[-3:] == [str(ROOT / "examples" / "fsdp2.py"), "--seed", "3"] and "--nproc-per-node=2" in launched


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_the_gallery_shows_it(name):
    assert f"examples/{name}.py" in GALLERY + SYSTEMS


def test_pictures_of_the_gallery():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", GALLERY)
    assert pictures and all((ROOT / "docs" / path).is_file() for path in pictures)


def test_bad_name(capsys):
    with pytest.raises(SystemExit) as stop:
        run_all.main(["--only", "nothing"])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err
