"""The script that compares two result files: on files of pytest-benchmark's form and of `qzoo benchmark`."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SPEC = spec_from_file_location("compare", Path(__file__).parents[2] / "benchmarks" / "compare.py")
compare = module_from_spec(SPEC)
SPEC.loader.exec_module(compare)
main = compare.main


def write(path: Path, medians: dict[str, float], processor: str = "Some CPU") -> str:
    cases = [{"fullname": name, "stats": {"median": median}} for name, median in medians.items()]
    path.write_text(json.dumps({"machine_info": {"cpu": {"brand_raw": processor}}, "benchmarks": cases}))
    return str(path)


def test_slower_and_faster(tmp_path: Path, capsys) -> None:
    before = write(tmp_path / "a.json", {"same": 1.0, "slow": 1.0, "fast": 1.0, "gone": 1.0})
    after = write(tmp_path / "b.json", {"same": 1.05, "slow": 1.3, "fast": 0.5, "new": 1.0})
    assert main([before, after]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["slow", "same", "fast", "gone", "new"]
    assert lines[1].endswith("1.300  SLOWER")
    assert lines[2].endswith("1.050")
    assert lines[3].endswith("0.500  faster")
    assert lines[4].endswith("only in the first file")
    assert main([before, after, "--slower", "1.5"]) == 0


def test_benchmark_json_and_another_machine(tmp_path: Path, capsys) -> None:
    def report(path: Path, cpu: float, processor: str) -> str:
        batches = [{"batch": 1, "cpu_ms": cpu}]
        row = {
            "model": "m",
            "runtime": "onnxruntime",
            "precision": "int8",
            "source": "qzoo",
            "batches": batches,
        }
        path.write_text(json.dumps({"schema": 3, "machine": {"processor": processor}, "rows": [row]}))
        return str(path)

    assert main([report(tmp_path / "a.json", 2.0, "A"), report(tmp_path / "b.json", 1.0, "B")]) == 0
    out = capsys.readouterr().out
    assert "m, onnxruntime int8 qzoo, batch 1" in out
    assert "0.500  faster" in out
    assert "The machines differ: 'A' and 'B'." in out


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "c.json")] * 2)
