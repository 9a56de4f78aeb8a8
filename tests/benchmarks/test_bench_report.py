"""What becomes of the benchmarks' rows: the CSV, the summary, the plot."""

import csv

import pytest

from benchmarks import bench_lora, common, plot, status, summary


def fake_rows(ours: float = 1.1) -> list[dict]:
    """A bench_lora run in which every candidate has one ratio, ours 0.02 more with dropout and 0.01 more at r = 64."""
    cost = {"frozen": 1.0, "frozen_again": 1.004, "eager": 1.4, "peft": 1.6, "lora_fast_lora": ours}
    rows = []
    for shape in common.SHAPES:
        for r, p, what in ((r, p, what) for r in (16, 64) for p in common.PS for what in ("fwd", "fwd+bwd")):
            frozen_mib = shape[0] * shape[2] * 2 / 2**20
            for impl, ratio in cost.items():
                if impl == "lora_fast_lora":
                    ratio += 0.02 * (p > 0) + 0.01 * (r == 64)
                case = bench_lora.Case("bf16", *shape, r, p)
                s_mib, bits_mib = shape[0] * r * 2 / 2**20, shape[0] * shape[1] / 8 / 2**20
                peak = frozen_mib if impl.startswith("frozen") else frozen_mib + s_mib + bits_mib * (p > 0)
                rows.append(
                    {
                        "gpu": "NVIDIA H100",
                        "torch": "2",
                        "triton": "3",
                        "commit": "abc",
                        **case._asdict(),
                        "what": what,
                        "impl": impl,
                        "median_us": 1000 * ratio,
                        "p20_us": 999.0,
                        "p80_us": 2000.0,
                        "ratio_to_frozen": ratio,
                        "peak_mib": peak,
                    }
                )
    return rows


def cells(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_summary():
    rows = fake_rows()
    graph = [{**row, "ratio_to_frozen": 1.25} for row in rows if row["M"] == 1024]
    for row in rows:
        if (row["impl"], row["M"], row["K"], row["N"]) == ("lora_fast_lora", 8192, 14336, 4096):
            row["ratio_to_frozen"] += 0.05
            row["peak_mib"] *= 1.1
    text = summary.summarise(rows, graph)
    low, high = (1.1**4 * 1.15) ** 0.2, (1.12**4 * 1.17) ** 0.2
    assert cells(text, "peft") == ["1.600"] * 4
    assert cells(text, "geometric mean, r=16")[:2] == [f"{low:.3f}", f"{high:.3f}"]
    assert cells(text, "worst of the five shapes")[:2] == ["1.150", "1.170"]
    assert cells(text, "dropout adds")[1] == f"{high - low:.3f}"
    assert cells(text, "r=64 minus r=16")[0] == "0.010"
    assert cells(text, "M=1024, eager")[:2] == ["1.100", "1.120"]
    assert cells(text, "M=1024, CUDA graph")[:2] == ["1.250", "1.250"]
    assert cells(text, "the same, worst of all points")[:2] == ["+10.0%", "+10.0%"]
    assert cells(text, "frozen_again, farthest from 1 at r=16")[0] == "0.004"


def test_summary_of_a_part():
    """What was not measured is a dash, never a number."""
    rows = [row for row in fake_rows() if row["M"] == 1024 and row["p"] == 0]
    text = summary.summarise(rows, [])
    assert cells(text, "geometric mean, r=16")[:2] == ["-", "-"]
    assert cells(text, "M=1024, eager")[:2] == ["1.100", "-"]
    assert cells(text, "M=1024, CUDA graph")[:2] == ["-", "-"]
    assert cells(text, "the same, worst of all points")[:2] == ["+0.0%", "-"]


def test_csv(tmp_path):
    path = tmp_path / "new" / "bench_lora_h100.csv"
    for rows in (fake_rows(), fake_rows()[:3]):  # rewritten, not added to
        common.write_csv(path, bench_lora.COLUMNS, rows)
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert found == [{key: str(value) for key, value in row.items()} for row in rows]
    assert path.read_text().splitlines()[0] == (
        "gpu,torch,triton,commit,dtype,M,K,N,r,p,what,impl,median_us,p20_us,p80_us,ratio_to_frozen,peak_mib"
    )
    with pytest.raises(ValueError):
        common.write_csv(path, bench_lora.COLUMNS, [{**fake_rows()[0], "extra": 1}])


def test_rows_of_other_runs_stay(tmp_path):
    path = tmp_path / "rows.csv"
    assert common.others(path, [], ["mode"]) == []
    rows = [
        {"mode": mode, "tokens": tokens, "impl": impl}
        for mode, tokens in (("eager", 512), ("default", 512), ("eager", 2048))
        for impl in ("frozen", "peft")
    ]
    common.write_csv(path, list(rows[0]), rows)
    as_read = [{name: str(value) for name, value in row.items()} for row in rows]
    assert common.others(path, rows[:1], ["mode", "tokens"]) == as_read[2:]
    assert common.others(path, rows[:1], ["mode", "tokens", "impl"]) == as_read[1:]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench_lora_h100.csv"
    common.write_csv(path, bench_lora.COLUMNS, fake_rows())
    rows = plot.read(path)
    assert set(plot.extra(rows, "peft", 0.0, "ratio_to_frozen")) == set(plot.SHOWN)
    assert plot.extra(rows, "lora_fast_lora", 0.1, "ratio_to_frozen")[plot.SHOWN[0]] == pytest.approx(12)
    figure = plot.draw(rows)
    heights = [bar.get_height() for bar in figure.axes[0].containers[-1]]
    assert heights == pytest.approx([10] * len(plot.SHOWN))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PEFT", "plain torch", "lora_fast"]
    assert plot.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_high_bar_does_not_flatten_the_others(tmp_path):
    pytest.importorskip("matplotlib")
    path, rows = tmp_path / "bench_lora_h100.csv", fake_rows()
    common.write_csv(path, bench_lora.COLUMNS, rows)
    before = plot.draw(plot.read(path)).axes[0].get_ylim()[1]
    shown = {"impl": "peft", "p": 0, "what": "fwd+bwd", "dtype": "bf16", "r": 16}
    next(row for row in rows if shown.items() <= row.items())["ratio_to_frozen"] = 100
    common.write_csv(path, bench_lora.COLUMNS, rows)
    axes = plot.draw(plot.read(path)).axes[0]
    assert axes.get_ylim()[1] < 3 * before and [text.get_text() for text in axes.texts if "%" in text.get_text()] == [
        "9900%"
    ]


def test_plot_of_nothing(tmp_path, capsys):
    path = tmp_path / "empty.csv"
    common.write_csv(path, bench_lora.COLUMNS, [])
    assert plot.main([str(path)]) == 1 and "no rows" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "none.csv")]) == 1 and "none.csv" in capsys.readouterr().err


def test_the_status_is_of_the_results():
    assert status.PATH.read_text(encoding="utf-8") == status.page()


def test_a_bound_without_its_rows_is_an_error():
    bound = status.Bound("LoRA", "bench_lora_h200.csv", 1.0, [(1, 2, 3)], {"impl": "lora_fast_lora"})
    with pytest.raises(ValueError, match="0 rows for LoRA"):
        status.measured(bound)
