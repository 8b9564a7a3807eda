"""The site builds without a warning, needs no network, and its made pages say what the tables and configs say."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import qzoo
from qzoo.__main__ import _parser
from qzoo.registry import list_architectures, parse_name
from qzoo.release.tables import embedded_configs, quantized_row
from qzoo.runtimes.operators import OPERATORS
from qzoo.scheme import TARGETS

pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A link to a page or heading that is not there is a warning, which strict makes an error; so is
    a notebook that raises."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows(page: str) -> list[list[str]]:
    """The rows of all tables of a page, as texts."""
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


def dump(page: str, *options: str) -> str:
    """The document that a browser makes of a page; it resolves no names, so that nothing comes from elsewhere."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    command = [str(CHROMIUM), *flags, *options, "--dump-dom", page]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for path in pages:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="?(https?:)?//', text)
        fetched += re.findall(
            r'<link[^>]*rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?(https?:)?//', text
        )
        assert not fetched, path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?https?:", path.read_text(encoding="utf-8")), path


def test_search_finds_pages_of_every_kind(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    places = {entry["location"].partition("#")[0] for entry in entries}
    assert {"ptq/", "support/", "models/resnet50/", "api/qzoo.ptq/", "cards/resnet20.fmnist-w8a8/"} <= places


def test_support_matrix_has_every_operator_as_each_runtime_takes_it(site: Path) -> None:
    table = {
        row[0]: row for row in rows((site / "support" / "index.html").read_text(encoding="utf-8")) if row
    }
    for name, operator in OPERATORS.items():
        assert table[name][2:5] == [operator.on(target) for target in TARGETS], name
    assert table["branch"][1:] == ["", "quantized", ""]
    assert table["non-negative activations"][1:] == ["int8", "uint8", "uint8"]
    fp8 = next(row for name, row in table.items() if "E4M3" in name)
    assert fp8[1] == fp8[2] == "opset 19"
    assert "OpenVINO" in fp8[3]


def test_browser_has_every_checkpoint_and_every_architecture_a_page(site: Path) -> None:
    browser = rows((site / "models" / "index.html").read_text(encoding="utf-8"))
    named = {row[0]: row for row in browser if row}
    for config in embedded_configs():
        row = quantized_row(config) if config.scheme else config.metrics[0]
        assert f"{row.top1:.2f}" in named[config.name], config.name
        assert (site / "cards" / config.name / "index.html").is_file()
    for arch in list_architectures():
        assert f"def {arch}(" in re.sub(
            r"<[^>]+>", "", (site / "models" / arch / "index.html").read_text(encoding="utf-8")
        )


def test_pages_of_architectures_have_their_pictures_and_commands_that_parse(site: Path) -> None:
    measured = sorted((ROOT / "docs" / "sensitivity").glob("*.json"))
    assert len(measured) == 5
    for path in measured:
        page = (site / "models" / parse_name(path.stem).arch / "index.html").read_text(encoding="utf-8")
        assert f"figures/sensitivity-{path.stem}.svg" in page
        assert (site / "figures" / f"sensitivity-{path.stem}.svg").is_file()
        (command,) = re.findall(r"Reproduce: <code>(qzoo sensitivity [^<]*)</code>", page)
        assert path.stem in command
    for arch in list_architectures():
        text = (site / "models" / arch / "index.html").read_text(encoding="utf-8")
        commands = re.findall(r"^qzoo .*$", html.unescape(re.sub(r"<[^>]+>", "", text)), re.MULTILINE)
        assert len(commands) >= 3, arch
        for command in commands:
            words = command.split()[1:]
            assert callable(_parser().parse_args(words).command)
            assert parse_name(words[1]).arch == arch


def test_reference_shows_types_and_examples(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text(encoding="utf-8"))
    assert re.search(r"export_onnx\(\s*model: Module,\s*path: str \| Path", text)
    assert "&gt;&gt;&gt; " in text
    assert ":class:" not in text


def test_pictures_show_the_figures_of_the_guide(site: Path) -> None:
    """The ranges in the histogram are those that the example of the chapter prints."""
    printed = re.findall(
        r"^(max|percentile|mse|entropy) +([\d.]+)$", _source("guide/calibration.md"), re.MULTILINE
    )
    picture = (site / "figures" / "histogram.svg").read_text(encoding="utf-8")
    assert len(printed) == 4
    assert re.findall(r">((?:max|percentile|mse|entropy) [\d.]+)<", picture) == [
        " ".join(pair) for pair in printed
    ]
    for page in ("guide/post-training", "guide/calibration", "guide/export", "how/accuracy-dropped", "."):
        text = (site / page / "index.html").read_text(encoding="utf-8")
        assert re.search(r'<img [^>]*src="(?:\.\./)*figures/\w+\.svg"', text), page


def _source(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_notebooks_are_committed_without_output_and_shown_with_it(site: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert names == ["first_model", "own_model", "qat_low_bits"]
    for name in names:
        cells = json.loads(_source(f"notebooks/{name}.ipynb"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), name
        assert (site / "notebooks" / f"{name}.ipynb").is_file()
        assert (site / "notebooks" / f"{name}-0.png").read_bytes().startswith(b"\x89PNG")
    text = re.sub(
        r"<[^>]+>", "", (site / "notebooks" / "qat_low_bits" / "index.html").read_text(encoding="utf-8")
    )
    reached = {
        kind: float(top1)
        for kind, top1 in re.findall(r"(?:w2a2 )?(float|calibrated|trained) ([\d.]+) %", text)
    }
    assert reached["calibrated"] < 40 < 75 < reached["trained"] < reached["float"]


def test_llms_txt_names_pages_that_exist(site: Path) -> None:
    links = re.findall(r"^- \[(.+)\]\((.+)\)$", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(links) > 10
    for title, url in links:
        assert (site / url / "index.html").is_file(), title
        assert not title.endswith(".md")


class DemoServer(ThreadingHTTPServer):
    """The site over HTTP, and a page around its demo that is loaded only when the demo has said something."""

    FRAME = """<iframe src="/demo/?image={name}"></iframe><img src="/hold"><script>
    const frame = document.querySelector("iframe");
    const timer = setInterval(() => {{
      const box = frame.contentDocument.getElementById("demo");
      const failed = box && box.querySelector("[role=status]").textContent.startsWith("It did not run");
      if (!box || !(failed || box.querySelector("li"))) return;
      clearInterval(timer);
      fetch("/done", {{ method: "POST", body: box.innerHTML }});
    }}, 100);
    </script>"""

    def __init__(self, site: Path) -> None:
        self.site, self.done, self.said = site, threading.Event(), ""
        super().__init__(("127.0.0.1", 0), DemoHandler)


class DemoHandler(SimpleHTTPRequestHandler):
    server: DemoServer

    def __init__(self, request: Any, client: Any, server: DemoServer) -> None:
        super().__init__(request, client, server, directory=str(server.site))

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith("/frame/"):
            self.answer(200, self.server.FRAME.format(name=self.path.rpartition("/")[2]).encode())
        elif self.path == "/hold":
            self.server.done.wait(200)
            self.answer(404)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.server.said = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.done.set()
        self.answer(200)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (of Debian)")
@pytest.mark.parametrize("name", ["cat", "espresso"])
def test_demo_labels_as_python_does(site: Path, name: str) -> None:
    """The int8 file in a browser, with nothing but the site's own files, against the same file in ONNX Runtime."""
    if not (site / "demo" / "model.onnx").exists():
        pytest.skip("the site was built without npm")
    with DemoServer(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dump(f"http://127.0.0.1:{server.server_port}/frame/{name}")
        server.shutdown()
    shown = {
        html.unescape(label): float(share) / 100
        for label, share in re.findall(r"<li>([^<]+): ([\d.]+) %</li>", server.said)
    }
    photo = ROOT / "docs" / "assets" / "demo" / f"{name}.jpg"
    expected = dict(qzoo.predict(photo, "tf_efficientnet_lite0.in1k-w8a8", k=1000))
    assert len(shown) == 5, server.said
    assert {label for label, share in expected.items() if share > 0.05} <= set(shown)
    for label, share in shown.items():
        assert share == pytest.approx(expected[label], abs=0.1), label


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (of Debian)")
def test_browser_filters_in_a_browser(site: Path) -> None:
    page = (site / "models" / "index.html").as_uri()
    dom = dump(f"{page}?filter=resnet+fmnist+drop%3C0.1+size%3C0.3")
    assert [row[0] for row in rows(dom) if row] == ["resnet20.fmnist-w8a8"]
    dom = dump(f"{page}?filter=fmnist+w4a4")
    assert [row[0] for row in rows(dom) if row] == ["resnet20.fmnist-w4a4_qat", "resnet32.fmnist-w4a4_qat"]
    assert dom.count('<tr hidden="">') > 20
