"""Latencies from a benchmark's report to config.json, card, table and verify."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import qzoo
from qzoo.__main__ import main
from qzoo.bench.latency import record_latency, speedup_text
from qzoo.bench.results import Report, Row
from qzoo.bench.timing import Timing
from qzoo.cards.card import card
from qzoo.config import Config, Measurement, read_config
from qzoo.errors import QzooError
from qzoo.release import tables
from qzoo.zoo import hub

NAME = "resnet20.fmnist-w8a8"
MACHINE = {
    "qzoo": "0.1.0",
    "processor": "Some CPU",
    "instruction sets": "avx2",
    "onnxruntime": "1.99",
    "torch": "2.99",
}


def row(runtime: str, precision: str, wall: float, **changes: object) -> Row:
    ratio = (8.0 / wall, 0.9 * 8.0 / wall, 1.1 * 8.0 / wall)
    values: dict[str, object] = {
        "latency": {
            b: Timing(wall=b * wall, cpu=b * wall, wall_p90=b * wall * 1.5, cpu_p90=b * wall * 1.5, calls=9)
            for b in (1, 8)
        },
        "cpu_speedup": dict.fromkeys((1, 8), ratio),
        "wall_speedup": dict.fromkeys((1, 8), (99.0, 98.0, 99.9)),
    }
    values |= {"model": NAME, "images": 9, "top1": 1.0, "top1_interval": (0.0, 2.0), "agreement": 9.0}
    values |= {"sqnr_db": 9.0, "file_bytes": 9, "load_seconds": 9.0, "first_ms": 9.0}
    return Row(runtime=runtime, precision=precision, **{**values, **changes})


def report(*rows: Row) -> Report:
    settings = {"threads": 1, "batches": [1, 8], "seconds": 1.0, "compare": []}
    return Report(rows, "2031-02-03T04:05:06+00:00", settings, MACHINE)


ROWS = (
    row("pytorch", "float32", 16.0),
    row("pytorch", "int8", 32.0),
    row("onnxruntime", "float32", 8.0),
    row("onnxruntime", "int8", 4.0),
    row("onnxruntime", "int8", 5.0, source="quantize_static"),
    row("onnxruntime", "int8", 1.0, model="another"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkpoint in a store of its own."""
    source = hub.embedded()[NAME]
    (tmp_path / "cards" / NAME).mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / "cards" / NAME / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "cards")
    monkeypatch.setattr(hub, "pins", dict)
    return tmp_path / "cards" / NAME


def test_own_rows_are_recorded_with_machine_versions_and_date(folder: Path) -> None:
    before = read_config(folder)
    record_latency(folder, report(*ROWS).to_dict())
    config = read_config(folder)
    assert dataclasses.replace(config, latency=()) == dataclasses.replace(before, latency=())
    got = [
        (r.runtime, r.precision, r.target, r.batch, r.median_ms, r.p90_ms, r.speedup) for r in config.latency
    ]
    assert got == [
        ("torch", "float", None, 1, 16.0, 24.0, None),
        ("torch", "float", None, 8, 128.0, 192.0, None),
        ("onnxruntime", "float", None, 1, 8.0, 12.0, None),
        ("onnxruntime", "float", None, 8, 64.0, 96.0, None),
        ("onnxruntime", "w8a8", "onnxruntime", 1, 4.0, 6.0, 2.0),
        ("onnxruntime", "w8a8", "onnxruntime", 8, 32.0, 48.0, 2.0),
    ]
    quantized = config.latency[-1]
    assert quantized.speedup_interval == pytest.approx((1.8, 2.2))
    assert (quantized.machine, quantized.date, quantized.threads) == ("Some CPU (avx2)", "2031-02-03", 1)
    assert quantized.versions == "qzoo 0.1.0, onnxruntime 1.99"
    text = (folder / "README.md").read_text()
    assert text == card(config)
    assert "| ONNX Runtime | w8a8 | 1 | 1 | 4.00 | 6.00 | 2.00 (1.80 to 2.20) |" in text
    assert "Some CPU (avx2); qzoo 0.1.0, onnxruntime 1.99; 2031-02-03" in text


def test_the_command_and_where_it_shows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(report(*ROWS).to_dict()))
    assert main(["card", str(folder), "--benchmark", str(path)]) == 0
    assert "6 latencies" in capsys.readouterr().out
    assert speedup_text(read_config(folder)) == "2.00 (batch 1, 1 thread)"
    text = tables.zoo_table(tables.embedded_configs())
    assert "speed-up in ONNX Runtime" in text
    assert "| 2.00 (batch 1, 1 thread) |" in text
    assert main(["verify", NAME, "-q"]) == 0
    assert "speed-up 2.00 (batch 1, 1 thread)" in capsys.readouterr().out


def test_the_command_refuses_a_report_of_other_models(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "config.json").read_bytes()
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(report(ROWS[-1]).to_dict()))
    assert main(["card", str(folder), "--benchmark", str(path)]) == 2
    assert f"times another; it has no latencies of {NAME}" in capsys.readouterr().err
    assert main(["card", "--readme", str(tmp_path / "README.md"), "--benchmark", str(path)]) == 2
    assert "no FOLDER is given" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before


def test_reports_that_are_refused(folder: Path, tmp_path: Path) -> None:
    before = (folder / "config.json").read_bytes()
    good = report(*ROWS).to_dict()
    slow = Timing(wall=9.0, cpu=4.0, wall_p90=9.0, cpu_p90=4.0, calls=9, wall_over_cpu=2.25)
    busy = report(row("onnxruntime", "int8", 4.0, latency={1: slow, 8: slow})).to_dict()
    assert busy["warnings"]
    tail = Timing(wall=4.0, cpu=4.0, wall_p90=8.0, cpu_p90=4.0, calls=9)
    (tmp_path / "torn.json").write_text('{"schema":')
    for wrong, message in (
        (good | {"schema": 2}, "schema 2"),
        (busy, "machine was busy"),
        (
            report(row("onnxruntime", "int8", 4.0, latency={1: tail, 8: tail})).to_dict(),
            "2.0 times the median",
        ),
        (report(ROWS[-1]).to_dict(), f"times another, not {NAME}"),
        ({"schema": good["schema"], "warnings": []}, "no report"),
        (good | {"rows": [{"model": NAME}]}, "no report"),
        (tmp_path / "torn.json", "can't be read"),
        (tmp_path / "none.json", "can't be read"),
    ):
        with pytest.raises(QzooError, match=message):
            record_latency(folder, wrong)
    assert (folder / "config.json").read_bytes() == before
    assert record_latency(folder, busy, busy=True).latency[0].median_ms == 9.0


def test_which_clock_a_speedup_is_of(folder: Path) -> None:
    """By wall time with several threads, and in configs that were written before the field was there."""
    config = record_latency(folder, report(*ROWS).to_dict())
    assert config.latency[-1].speedup_clock == "cpu"
    assert "in the same runtime, by CPU time:" in card(config)
    several = report(*(dataclasses.replace(r, clock="wall") for r in ROWS))
    config = record_latency(
        folder, dataclasses.replace(several, settings={**several.settings, "threads": 2}).to_dict()
    )
    assert config.latency[-1].speedup == 99.0
    assert speedup_text(config) == "99.00 (batch 1, 2 threads, wall time)"
    assert "in the same runtime, by wall time:" in card(config)
    text = config.to_json()
    assert "speedup_clock" not in text, "the default, as in older files"
    assert Config.from_json(text) == config
    with pytest.raises(QzooError, match=r"speedup_clock must be one of 'cpu', 'wall'"):
        Config.from_json(text.replace('"speedup_interval"', '"speedup_clock": "sun",\n"speedup_interval"'))


def test_no_speedup_is_claimed_where_none_is_recorded() -> None:
    config = read_config(hub.embedded()[NAME])
    assert isinstance(config.metrics[0], Measurement)
    bare = dataclasses.replace(config, latency=())
    assert speedup_text(bare) == ""
    assert "speed-up" not in tables.zoo_table([bare]).lower()
    assert qzoo.__version__ in tables.zoo_table([bare])
