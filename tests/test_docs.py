"""What the README, docs and cards print runs as printed: Python is executed, commands are parsed, cheap ones executed.

A page may use, without making them, a ``model``, its ``images``, a ``loader`` and a ``test_loader``: see ``reader``.
"""

# ruff: noqa: F811 - fixtures of another file are arguments here

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import torchvision
from PIL import Image
from test_calibrated import serve_resnet50
from test_hub import server  # noqa: F401 - a fixture
from torch import nn
from torch.distributed.run import get_args_parser

import qzoo
from qzoo import __main__
from qzoo.cards.card import card
from qzoo.config import FloatSource, read_config
from qzoo.zoo import floats, hub

ROOT, EMBEDDED = Path(__file__).parent.parent, hub.EMBEDDED
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
NAME = "resnet20.fmnist-w8a8"
STAND_INS = {
    "NAME": NAME,
    "NAME...": NAME,
    "DIR": "data",
    "IMAGENET": "data",
    "ORG/NAME": "org/name",
    "FILE": "x.onnx",
}
SLOW = {"README.md", "docs/migration.md", "docs/guide/resnet50.md"}  # ResNet-50, exported
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / name).read_text()


def run(text: str, names: dict[str, Any]) -> None:
    """Execute the Python blocks of a page, one after the other; a text block right behind one is what it prints."""
    for block, _, expected in re.findall(
        r"^```python\n(.*?)^```$(\n\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL
    ):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed) if expected else contextlib.nullcontext():
            exec(compile(block, "printed", "exec"), names)
        if expected:
            same = doctest.OutputChecker().check_output(expected, printed.getvalue(), _FLAGS)
            assert same, f"{block}\nprints\n{printed.getvalue()}\nand not\n{expected}"


def pages_with_python() -> list[Any]:
    names = [name for name in PAGES if blocks(page(name), "python")]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the reader of a page has at hand, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 28, 28, generator=generator)
    loader = [(images, torch.tensor([3, 5]))]
    return {"model": qzoo.create_model(NAME, True), "images": images, "loader": loader, "test_loader": loader}


def test_pages_have_code() -> None:
    assert len(pages_with_python()) >= 5
    assert len(commands()) >= 30


@pytest.mark.parametrize("name", [name for name in pages_with_python() if isinstance(name, str)])
def test_python_of_the_docs(name: str, reader: dict[str, Any]) -> None:
    run(page(name), reader)


@pytest.mark.slow
def test_python_of_the_guide_to_resnet50(
    reader: dict[str, Any], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights in place of a publisher's, and small images."""

    def weights(weights: Any, name: str, *rest: Any) -> tuple[dict[str, torch.Tensor], FloatSource]:
        network = getattr(torchvision.models, name.split(".")[0])()
        return network.state_dict(), FloatSource(weights.sources[0], "1", "0" * 64, weights.license)

    monkeypatch.setattr(floats, "load_float_weights", weights)
    monkeypatch.setattr(hub, "EMBEDDED", EMBEDDED)
    loader = [(torch.randn(2, 3, 64, 64), torch.tensor([3, 5]))]
    run(page("docs/guide/resnet50.md"), {"loader": loader, "test_loader": loader})


@pytest.mark.slow
def test_python_of_the_readme(reader: dict[str, Any], server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the publisher's layout on a Hub of its own, and small images."""
    serve_resnet50(server, monkeypatch, 64)
    monkeypatch.setattr(hub, "EMBEDDED", EMBEDDED)
    loader = [(torch.randn(2, 3, 64, 64), torch.tensor([3, 5]))]
    with pytest.warns(
        UserWarning, match="resnet50.tv_in1k-w8a8: calibrated from its float weights without images"
    ):
        run(page("README.md"), {"loader": loader, "test_loader": loader})
    assert "org/my-resnet50" in server.repos


@pytest.mark.slow
def test_python_of_the_migration_page(reader: dict[str, Any]) -> None:
    model = qzoo.resnet50(quantize=True)
    qzoo.calibrate(model, [torch.randn(2, 3, 64, 64)], progress=False)
    torch.save(model.state_dict(), "quant_resnet50-calibrated.pth")
    run(page("docs/migration.md"), reader)


def new_lines(name: str) -> list[list[str]]:
    """What stands in backticks in the last column of a page's tables of old and new lines, row by row."""
    (*_, text) = (
        "",
        *re.findall(r"^\| old line \| new line \|\n\|.*\n((?:\|.*\n)+)", page(name), re.MULTILINE),
    )
    rows = [row.strip("| \n").rpartition(" | ")[2] for row in text.splitlines()]
    return [re.findall(r"`([^`]+)`", cell) for cell in rows]


COMING_FROM = [name for name in PAGES if new_lines(name)]


@pytest.mark.parametrize("name", COMING_FROM)
def test_new_lines_run(name: str, reader: dict[str, Any]) -> None:
    """Row after row, for a network of the reader's own; commands are parsed, and names are known by then."""
    if name.endswith("nncf.md"):
        pytest.importorskip("openvino")
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    names = {**reader, "network": network.eval(), "qzoo": qzoo, "torch": torch}
    ran = 0
    for row in new_lines(name):
        for module in [line for line in row if re.fullmatch(r"qzoo\.\w+", line) and line != "qzoo.quantize"]:
            found = importlib.import_module(module)
            names.update((key, value) for key, value in vars(found).items() if not key.startswith("_"))
        for line in row:
            if line.startswith("qzoo "):
                assert callable(__main__._parser().parse_args(words(line)[1:]).command)
            elif re.search(r" = |\w\(|^import |^from ", line):
                exec(compile(line, name, "exec"), names)
                ran += 1
    assert ran >= 5


CARDS = ("resnet20.fmnist", "resnet20.fmnist-w8a8")


@pytest.mark.parametrize(
    "name",
    [
        *CARDS,
        *(
            pytest.param(path.name, marks=pytest.mark.slow)
            for path in sorted(EMBEDDED.iterdir())
            if path.name not in CARDS and (path / "README.md").exists()
        ),
    ],
)
def test_python_of_the_cards(name: str, reader: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), "teal").save("photo.jpg")
    run((EMBEDDED / name / "README.md").read_text(), {})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_python_of_the_card_of_ones_own_checkpoint(
    reader: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), "teal").save("photo.jpg")
    folder = reader["model"].save_pretrained("mine")
    text = card(read_config(folder), "org/mine").replace('"org/mine"', '"mine"')
    assert 'load_pretrained("mine"' in text
    run(text, {})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def commands() -> list[str]:
    """Every command of the shell blocks, and of the table of commands."""
    lines = [line for name in PAGES for block in blocks(page(name), "bash") for line in block.splitlines()]
    table = [line for line in page("docs/commands.md").splitlines() if line.startswith("|")]
    inline = [code for line in table for code in re.findall(r"`((?:qzoo|torchrun) [^`]*)`", line)]
    parts = [part.strip() for line in (*lines, *inline) for part in line.split("&&")]
    return sorted({part for part in parts if part})


def words(command: str) -> list[str]:
    """The command's words, with values in place of the capitals that stand for them."""
    found = [STAND_INS.get(word, word) for word in shlex.split(command, comments=True)]
    return [word for word in found if word != "..."]


@pytest.mark.parametrize("command", commands())
def test_commands_are_parsed(command: str) -> None:
    first, *rest = words(command)
    if first == "torchrun":
        launched = get_args_parser().parse_args(rest)
        assert launched.module
        assert launched.training_script == "qzoo"
        first, rest = "qzoo", launched.training_script_args
    if first == "qzoo":
        assert callable(__main__._parser().parse_args(rest).command)
    elif first == "pip":
        (extras,) = re.findall(r"^\.\[(.*)\]$", rest[-1])
        declared = tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"]
        assert rest[:2] == ["install", "-e"]
        assert set(extras.split(",")) <= set(declared)
    elif first == "python":
        assert importlib.util.find_spec(rest[1]) is not None
    else:
        assert first in ("python3", ".", "pytest", "ruff", "mypy"), command


def parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in __main__._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


def test_options_in_sentences_exist() -> None:
    """``qzoo NAME --option`` within a sentence may be part of a command; its words exist."""
    known = parsers()
    for name in PAGES:
        for command in re.findall(r"`qzoo ([a-z][^`]*)`", page(name)):
            subcommand, *rest = command.replace("[", "").replace("]", "").split()
            options = {word.rstrip(".,") for word in rest if word.startswith("--")}
            assert subcommand in known, (name, command)
            assert options <= set(known[subcommand]._option_string_actions), (name, command)


CHEAP = (
    "qzoo list",
    "qzoo env",
    "qzoo inspect NAME",
    "qzoo export NAME model.onnx --target onnxruntime",
    "qzoo lint model.onnx --target onnxruntime",
)


def test_cheap_commands_run(reader: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for command in CHEAP:
        assert command in commands()
        assert __main__.main(words(command)[1:]) in ((0, 1) if " lint " in command else (0,)), command
        assert capsys.readouterr().out, command


def test_excerpts_of_the_source_are_true() -> None:
    """A block that starts with a file's name holds lines of that file, in their order; "..." leaves some out."""
    excerpts = blocks(page("docs/architecture.md"), "py")
    assert len(excerpts) >= 4
    for excerpt in excerpts:
        first, *quoted = excerpt.splitlines()
        name = first.removeprefix("# ")
        source = iter((ROOT / name).read_text().splitlines())
        for line in quoted:
            assert line.strip() == "..." or line in source, f"{name} has no such line there: {line}"


def test_tree_of_the_architecture_page_is_the_package() -> None:
    (tree,) = blocks(page("docs/architecture.md"), "text")
    package = ROOT / "qzoo"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    files = [path.stem for path in package.glob("*.py")]
    assert not [room for room in rooms if f" {room}/" not in tree]
    assert not [file for file in files if not re.search(rf"\b{file}\b", tree)]
