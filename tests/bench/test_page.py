"""The benchmark's page in a real browser: it draws, without a script error, what the JSON holds, on a phone too."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_rows
import torch
from PIL import Image

from qzoo.bench.layers import model_details
from qzoo.bench.options import Options
from qzoo.bench.report import write_report
from qzoo.bench.results import PeerSpeedup, Report, Row
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.scheme import Scheme

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (of Debian)")
NODES = [
    {"name": f"layer.{i}.conv", "op": "QLinearConv", "precision": "int8", "micros": 10.0 + i}
    for i in range(40)
]


def row(model: str, runtime: str, precision: str, wall: float, **changes: Any) -> Row:
    top1, interval = 90 - 1 / wall, (87.0 - 1 / wall, 92.0)
    values = {"model": model, "top1": top1, "top1_interval": interval, "peak_rss_bytes": 90_000_000}
    return report_rows.row(runtime, precision, wall, wall, **{**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of two models, one with the details of its layers, written as ``--out`` does."""
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme()).eval()
    images = torch.randn(8, 1, 12, 12)
    calibrate(model, [images], progress=False)
    details = model_details("first-w8a8", model, images, [], Options(progress=False))
    details["profiles"] = [
        {"runtime": "onnxruntime", "precision": "int8", "source": "qzoo", "batch": 1, "nodes": NODES}
    ]
    against = (PeerSpeedup("quantize_static", "onnxruntime", 1, 1.07, 1.05, 1.1),)
    rows = (
        row("first-w8a8", "pytorch", "float32", 9.0, sqnr_db=float("inf"), agreement=100.0),
        row("first-w8a8", "onnxruntime", "int8", 3.0, against=against),
        row("first-w8a8", "onnxruntime", "int8", 4.0, source="quantize_static"),
        row("second </script><b>-w8a8", "openvino", "int8", 2.0, sqnr_db=float("-inf")),
    )
    machine = {"processor": "Some CPU", "qzoo": "0.1.0", "torch": "2.14.1"}
    settings = {"threads": 1, "batches": [1, 8], "seconds": 2.0, "compare": []}
    report = Report(rows, "2026-01-02T03:04:05+00:00", settings, machine, ("a note",), (details,))
    out = tmp_path_factory.mktemp("report")
    write_report(report, out)
    return out


def chromium(*arguments: str) -> str:
    """What Chromium prints. Its profile is its own; the network is out of its reach."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--proxy-server=http://127.0.0.1:9", "--virtual-time-budget=5000", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dom(folder: Path) -> str:
    return chromium("--window-size=1200,900", "--dump-dom", (folder / "benchmark.html").as_uri())


class Cells(HTMLParser):
    """The text of the cells of the tables with class ``rows``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = ("class", "rows") in attrs if tag == "table" else self.inside
        self.cell = self.inside and tag == "td"
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_data_are_those_of_the_json(folder: Path) -> None:
    page = (folder / "benchmark.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data) == json.loads((folder / "benchmark.json").read_text())


def test_needs_no_network(folder: Path) -> None:
    page = (folder / "benchmark.html").read_text()
    shell = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=|@import|fetch\(|XMLHttp", shell)
    assert re.findall(r"https?://[^\"' ]*", shell) == ["http://www.w3.org/2000/svg"]


@browser
def test_draws_without_an_error(dom: str) -> None:
    (state,) = re.findall(r'<p id="status"[^>]*>.*?</p>', dom, re.S)
    assert 'data-state="ready"' in state, state
    assert "7 charts of 2 models, 4 rows" in state
    assert dom.count('class="pareto"') == 4
    assert dom.count('class="point"') == 8
    assert dom.count('class="bin"') == 64
    assert dom.count('class="amax"') == 2, "a signed input: the range on both sides"
    assert "<b>-w8a8" not in dom, "names are text"


@browser
def test_table_equals_the_json(folder: Path, dom: str) -> None:
    rows = json.loads((folder / "benchmark.json").read_text())["rows"]
    shown = [cells for cells in Cells(dom).rows if cells]
    assert len(shown) == len(rows)
    for cells, entry in zip(shown, rows, strict=True):
        assert cells[1] == f"{entry['top1']:.2f}"
        without = "exact" if entry["agreement"] == 100 else "not finite"
        assert cells[4] == (without if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.2f}")
        assert float(cells[5]) == pytest.approx(entry["batches"][0]["wall_ms"], rel=0.01)
        assert cells[8] == "2.00 [1.90, 2.10]"
        assert float(cells[-3]) == pytest.approx(entry["peak_rss_bytes"] / 1e6, rel=0.01)
    text = html.unescape(dom)
    assert "1.07 [1.05, 1.10] times as fast as quantize_static" in text
    assert "a note" in text


@browser
def test_bars_are_as_long_as_the_times(dom: str) -> None:
    widths = [float(w) for w in re.findall(r'<rect class="bar"[^>]*width="([\d.]+)"', dom)][: len(NODES)]
    times = [node["micros"] for node in NODES]
    np.testing.assert_allclose(np.array(widths) / max(widths), np.array(times) / max(times), rtol=1e-3)


@browser
@pytest.mark.parametrize("width", [390, 1200])
def test_screenshot_and_width(folder: Path, tmp_path: Path, width: int) -> None:
    """A frame of that width, as browsers refuse such narrow windows; the page in it must not be wider."""
    page = (folder / "benchmark.html").as_uri()
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<body style="margin:0"><iframe id="f" src="{page}" style="width:{width}px;height:3000px;border:0"></iframe>'
        '<p id="out"></p><script>f.onload = () => { const d = f.contentDocument; out.textContent = JSON.stringify({'
        "state: d.getElementById('status').dataset.state, inner: f.contentWindow.innerWidth,"
        "scroll: d.documentElement.scrollWidth, charts: d.querySelectorAll('.chart svg').length, chosen: choose(d)});};"
        "function choose(d) { const s = [...d.querySelectorAll('select')].pop(); s.value = 1;"
        "s.dispatchEvent(new Event('change')); return [s.selectedOptions[0].text, d.querySelectorAll('.amax').length]}"
        "</script>"
    )
    arguments = ("--allow-file-access-from-files", f"--window-size={max(width, 500)},3000")
    found = json.loads(
        re.findall(r'<p id="out">(.*?)</p>', chromium(*arguments, "--dump-dom", wrapper.as_uri()))[0]
    )
    assert (found["state"], found["inner"], found["charts"]) == ("ready", width, 7)
    assert found["scroll"] <= width, "wider than the screen"
    assert found["chosen"] == ["conv1._weight_quantizer", 4], (
        "another histogram: largest and smallest channel"
    )
    shot = tmp_path / "shot.png"
    chromium(*arguments, f"--screenshot={shot}", wrapper.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:, :width]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30, "blank"
    for colour in ((0, 114, 178), (0, 158, 115), (213, 94, 0)):  # int8, peer, mark: the plots are there
        assert (pixels == colour).all(axis=2).sum() > 50, colour


@browser
def test_dark(folder: Path, tmp_path: Path) -> None:
    shot = tmp_path / "dark.png"
    page = (folder / "benchmark.html").as_uri()
    chromium("--blink-settings=preferredColorScheme=0", "--window-size=800,600", f"--screenshot={shot}", page)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert np.median(pixels) < 60, "a dark page on a dark system"
