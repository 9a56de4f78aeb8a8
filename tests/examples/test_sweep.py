"""examples/sweep.py on its tiny model: adapters in one run are those of separate runs."""

import json

import pytest
from checkout import ROOT

sweep = pytest.importorskip("sweep")
SHORT = ["--tiny", "--steps", "4", "--length", "16", "--ranks", "2", "5", "--lrs", "1e-3", "1e-2"]
for package in ("matplotlib", "rich", "safetensors", "transformers"):
    pytest.importorskip(package)


@pytest.mark.medium
@pytest.mark.parametrize("kind", [[], ["--dora"]], ids=["lora", "dora"])
def test_losses_are_those_of_separate_runs(kind, tmp_path, capsys):
    argv = [*SHORT, *kind, "--seeds", "0", "3", "--out", str(tmp_path)]
    together, apart = sweep.run(sweep.parse(argv))
    assert len(together.losses) == 8 and together.losses.keys() == apart.losses.keys()
    tolerance = 0.05 if sweep.GPU else 1e-4
    for name, one in together.losses.items():
        own = apart.losses[name]
        assert len(one.steps) == len(own.steps) == 4 and sweep.difference(one, own) < tolerance
        assert one.held_out == pytest.approx(own.held_out, abs=tolerance)
    ends = {name: one.held_out for name, one in together.losses.items()}
    assert len({round(end, 7) for end in ends.values()}) == 8  # each went a way of its own
    said = capsys.readouterr().out
    best = min(ends, key=ends.get)
    assert f"{best} is best" in said and f"{ends[best]:.4f}" in said and "s one by one" in said
    config = json.loads((tmp_path / best / "adapter_config.json").read_text())
    assert config["r"] == int(best[1]) and config["use_dora"] == bool(kind)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sweep.smollm2, "why_not", lambda: "the model is not installed")
    assert sweep.main([]) == 1 and capsys.readouterr().err == "sweep: the model is not installed\n"
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    assert sweep.main(["--tiny"]) == 1 and "pip install rich" in capsys.readouterr().err


@pytest.mark.parametrize("argv", ["--steps 0", "--ranks x", "--lrs fast"])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as done:
        sweep.main(argv.split())
    assert done.value.code == 2 and argv.split()[0] in capsys.readouterr().err


def test_the_pages_show_it():
    assert "python examples/sweep.py" in (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert "examples/sweep.py" in (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
