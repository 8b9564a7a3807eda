"""The site builds without a warning, needs no network, and its made pages say what the tables and configs say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qzoo.registry import list_architectures
from qzoo.release.tables import embedded_configs, quantized_row
from qzoo.runtimes.operators import OPERATORS
from qzoo.scheme import TARGETS

pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A link to a page or heading that is not there is a warning, which strict makes an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


def rows(page: str) -> list[list[str]]:
    """The rows of all tables of a page, as texts."""
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


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


def test_reference_shows_types_and_examples(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text(encoding="utf-8"))
    assert re.search(r"export_onnx\(\s*model: Module,\s*path: str \| Path", text)
    assert "&gt;&gt;&gt; " in text
    assert ":class:" not in text


def test_llms_txt_names_pages_that_exist(site: Path) -> None:
    links = re.findall(r"^- \[(.+)\]\((.+)\)$", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(links) > 10
    for title, url in links:
        assert (site / url / "index.html").is_file(), title
        assert not title.endswith(".md")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (of Debian)")
def test_browser_filters_in_a_browser(site: Path) -> None:
    page = f"{(site / 'models' / 'index.html').as_uri()}?filter=fmnist+w4a4"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [row[0] for row in rows(dom) if row] == ["resnet20.fmnist-w4a4_qat", "resnet32.fmnist-w4a4_qat"]
    assert dom.count('<tr hidden="">') > 20
