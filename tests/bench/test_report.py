"""The report's forms: the table fits, JSON and CSV hold the figures, the plot is a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from report_rows import row

from qzoo.bench.plot import _panel
from qzoo.bench.report import footnotes, print_table, write_report
from qzoo.bench.results import PeerSpeedup, Report
from qzoo.bench.timing import Timing

MACHINE = {
    "processor": "Some CPU",
    "qzoo": "0.1.0",
    "torch": "2.14.1",
    "onnxruntime": "1.32",
    "openvino": "not installed",
}


@pytest.fixture
def report() -> Report:
    rows = (
        row("pytorch", "float32", 25.0, 25.0, sqnr_db=math.inf, agreement=100.0),
        row("pytorch", "fake-quant int8", 1234.5, 1234.5, file_bytes=None),
        row("onnxruntime", "int8", 4.7, 4.6),
    )
    settings = {"threads": 1, "batches": [1, 8], "seconds": 2.0}
    return Report(rows, "2026-01-02T03:04:05+00:00", settings, MACHINE)


def test_table_fits_and_holds_the_figures(report: Report, capsys) -> None:
    print_table(report)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for part in ("86.80 [83.0, 89.9]", "98.40", "4.70/5.64", "2.00 / 2.50", "4.95", "213", "372 images"):
        assert part in text
    assert "…" not in text, "nothing may be cut off"


def test_names_in_the_table_are_no_markup_and_move_no_cursor(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[link=x]a\x1b[2J\r"
    rows = tuple(dataclasses.replace(r, model=name, runtime=name) for r in report.rows)
    print_table(dataclasses.replace(report, rows=rows, notes=(name,)))
    text = capsys.readouterr().out
    assert text.count("[link=x]a\\x1b[2J\\r") >= 8
    assert "\x1b" not in text


def test_dollars_in_names_are_no_formula_and_no_link_is_followed(report: Report, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / f".benchmark.html.{os.getpid()}").symlink_to(tmp_path / "other")
    rows = tuple(dataclasses.replace(r, model=r"$\frac$", runtime="$^$") for r in report.rows)
    write_report(dataclasses.replace(report, rows=rows), tmp_path)
    assert (tmp_path / "other").read_text() == "mine"
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_many_batches_are_not_cut_off_in_a_file(report: Report, capsys) -> None:
    timing = report.rows[1].latency[8]
    batches = [1, 8, 32, 64]
    rows = tuple(
        dataclasses.replace(
            r, latency=dict.fromkeys(batches, timing), cpu_speedup=dict.fromkeys(batches, (2.0, 1.9, 2.1))
        )
        for r in report.rows
    )
    wide = dataclasses.replace(report, rows=rows, settings={**report.settings, "batches": batches})
    print_table(wide)
    assert "…" not in capsys.readouterr().out


def test_json_and_csv(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    values = json.loads((tmp_path / "benchmark.json").read_text())
    assert values["schema"] == 3
    assert values["machine"] == MACHINE
    first, fake, int8 = values["rows"]
    assert first["sqnr_db"] is None
    assert fake["file_bytes"] is None
    assert int8["batches"][1]["speedup_cpu"] == {"ratio": 2.5, "low": 2.4, "high": 2.6}
    with (tmp_path / "benchmark.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert (lines[5]["runtime"], lines[5]["batch"], float(lines[5]["cpu_ms"])) == (
        "onnxruntime",
        "8",
        8 * 4.6,
    )
    assert (lines[5]["top1_low"], lines[5]["processor"]) == ("83.0", "Some CPU")


def test_plot_is_a_picture(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    paths = write_report(report, tmp_path)
    assert [p.suffix for p in paths] == [".json", ".csv", ".html", ".png"]
    picture = Image.open(paths[3]).convert("RGB")
    assert picture.width > 800
    assert len(picture.getcolors(10**6)) > 50, "blank"


def test_labels_of_the_plot_are_ratios_of_its_bars(report: Report) -> None:
    """Bars are wall time; a ratio of CPU times beside them would contradict their lengths."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    rows = [
        row("onnxruntime", "float32", 9.0, 9.0, wall_speedup={1: (1.0, 1.0, 1.0)}),
        row(
            "onnxruntime",
            "int8",
            3.0,
            4.5,
            wall_speedup={1: (3.0, 2.9, 3.1)},
            cpu_speedup={1: (2.0, 1.9, 2.1)},
        ),
    ]
    _panel(axes, rows, 1, labelled=True)
    widths = [bar.get_width() for bar in axes.patches]
    labels = [text.get_text().strip() for text in axes.texts]
    assert labels == [f"{widths[0] / width:.2f}x" for width in widths]
    assert "wall time" in axes.get_xlabel()


def test_without_matplotlib(report: Report, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qzoo.bench.report.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'qzoo\[plot\]'"):
        paths = write_report(report, tmp_path)
    assert len(paths) == 3


def test_a_busy_machine_is_said(report: Report) -> None:
    """Short calls may all be quick while most of the time goes to other processes: the total tells."""
    assert report.warnings() == []
    torn = {1: Timing(3.0, 3.1, 3.0, 3.1, 30, wall_over_cpu=3.0)}
    busy = Report(
        (row("onnxruntime", "int8", 3.0, 3.0, latency=torn),), report.date, report.settings, MACHINE
    )
    assert "3.0 times" in footnotes(busy)[-1]
    threads = row("onnxruntime", "int8", 3.0, 3.0, latency=torn, clock="wall")
    assert Report((threads,), report.date, report.settings, MACHINE).warnings() == []


def test_speedups_are_by_the_clock_that_fits(report: Report, tmp_path: Path, capsys) -> None:
    """CPU time of one thread; wall time of several, whose CPU time adds up."""
    assert any("in the same runtime, by CPU time" in line for line in footnotes(report))
    rows = tuple(dataclasses.replace(r, clock="wall") for r in report.rows)
    several = dataclasses.replace(report, rows=rows, settings={**report.settings, "threads": 2})
    assert any("in the same runtime, by wall time" in line for line in footnotes(several))
    print_table(several)
    assert "2.10 / 2.60" in capsys.readouterr().out
    assert several.to_dict()["rows"][2]["clock"] == "wall"


def test_an_uneven_machine_is_said(report: Report) -> None:
    uneven = row("onnxruntime", "int8", 9.0, 9.0, latency={1: Timing(9.0, 20.0, 9.0, 18.0, 30)})
    (warning,) = Report((uneven,), report.date, report.settings, MACHINE).warnings()
    assert "at least 2.0 times as long as the median" in warning
    threads = dataclasses.replace(uneven, clock="wall", latency={1: Timing(9.0, 27.0, 9.0, 9.0, 30)})
    (warning,) = Report((threads,), report.date, report.settings, MACHINE).warnings()
    assert "at least 3.0 times as long" in warning, "wall time, with several threads"
    slow_clock = Report(
        report.rows, report.date, report.settings, {**MACHINE, "frequency governor": "powersave"}
    )
    assert "'powersave'" in slow_clock.warnings()[0]


def test_speed_against_peers_and_notes_are_said(report: Report) -> None:
    ours = row(
        "onnxruntime",
        "int8",
        4.7,
        4.6,
        against=(PeerSpeedup("quantize_static", "onnxruntime", 8, 1.07, 1.05, 1.1),),
    )
    peer = row("onnxruntime", "int8", 4.9, 4.9, source="quantize_static")
    full = Report((ours, peer), report.date, report.settings, MACHINE, ("torchvision has none",))
    lines = footnotes(full)
    assert lines[-1] == "torchvision has none"
    assert lines[-2].endswith("times as fast as quantize_static: 1.07 [1.05, 1.10] at batch 8")
    assert full.to_dict()["rows"][0]["against"][0]["ratio"] == 1.07
