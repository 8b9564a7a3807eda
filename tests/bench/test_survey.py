"""``qzoo survey``: it measures what runs, says why something does not, and goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qzoo
from qzoo import list_models, registry
from qzoo.__main__ import main
from qzoo.bench.survey import (
    Cost,
    Survey,
    SurveyOptions,
    SurveyRow,
    _latencies,
    random_pair,
    read_survey,
    survey,
)
from qzoo.bench.survey_report import HEAD, rows, write_survey
from qzoo.errors import ArgumentError, QzooError
from qzoo.quantizers import quantizers
from qzoo.registry import architecture, import_models
from qzoo.release.zoo_page import page_at
from qzoo.zoo.request import new_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = SurveyOptions(seconds=0.02, limit=120)
MODELS = """
from torch import nn

from qzoo.models.layers import activation_quantizer, conv2d, linear
from qzoo.registry import FloatWeights, register_model
from qzoo.preprocessing import Preprocessing


class Tiny(nn.Module):
    def __init__(self, width, options):
        super().__init__()
        self.conv = conv2d(options["in_channels"], width, 3, quantize=options["quantize"])
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.pool_quantizer = activation_quantizer(options["quantize"], "pool", nonnegative=True)
        self.fc = linear(width, options["num_classes"], quantize=options["quantize"], nonnegative=True)
        self.output_quantizer = activation_quantizer(options["quantize"], "output")

    def forward(self, x):
        x = self.pool_quantizer(self.relu(self.norm(self.conv(x)))).mean([2, 3])
        return self.output_quantizer(self.fc(x))


def weights(top1):
    return {"mine": FloatWeights(("https://example.org/t",), preprocessing=Preprocessing((3, 32, 32)), top1=top1)}


@register_model(weights(50.0))
def tiny_narrow(**options):
    return Tiny(8, options)


@register_model(weights(60.0))
def tiny_wide(**options):
    return Tiny(64, options)


@register_model()
def tiny_broken(**options):
    if options["quantize"] is not None:
        raise RuntimeError("no quantized form\\nand more")
    return Tiny(8, options)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("models") / "tiny_models_of_the_survey.py"
    path.write_text(MODELS)
    list_models()  # the zoo's own are there before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", dict(registry._entries))
        import_models(str(path))
        yield str(path)


def cost(ms: float) -> Cost:
    return Cost(ms, 1.1 * ms, ms, 1.0, 30, 1000, None)


def entry(name: str, top1: float | None, exact: float, int8: float) -> SurveyRow:
    ratio = exact / int8
    return SurveyRow(
        name,
        "tiny",
        f"{name}.mine",
        top1,
        (3, 32, 32),
        1000,
        1.0,
        "",
        cost(exact),
        cost(int8),
        (ratio, ratio, ratio),
    )


def by_hand(*entries: SurveyRow) -> Survey:
    machine = {"processor": "Some CPU </script>", "qzoo": "0.1.0", "onnxruntime": "1.2"}
    return Survey(TINY, machine, "2026-01-02T03:04:05+00:00", entries)


FOUND = by_hand(
    entry("slow", 70.0, 30.0, 10.0),
    entry("fast", 60.0, 9.0, 3.0),
    entry("beaten", 59.0, 12.0, 4.0),
    entry("unknown", None, 1.0, 0.5),
    SurveyRow("broken", "tiny", "", None, (3, 32, 32), 1000, 1.0, "RuntimeError: why"),
)


def test_latencies_of_one_model(models: str, tmp_path: Path) -> None:
    found = _latencies("tiny_wide", TINY, tmp_path)
    assert found["float32"]["calls"] >= 5
    assert 0 < found["int8"]["wall_ms"] < 1000
    assert found["int8"]["file_bytes"] != found["float32"]["file_bytes"]
    ratio, low, high = found["speedup"]
    assert 0 < low <= ratio <= high


def test_random_weights_are_sane_and_the_same_in_both(models: str) -> None:
    quantized, reference, image = random_pair("tiny_wide", "openvino")
    assert image.shape == (1, 3, 32, 32)
    assert all(
        torch.equal(reference.state_dict()[key], quantized.state_dict()[key])
        for key in reference.state_dict()
    )
    assert all(q.amax is not None and 1e-3 < q.amax.max() < 1e3 for q in quantizers(quantized).values())
    with torch.inference_mode():
        x = reference.norm(reference.conv(image))
        assert 0.5 < x.std() < 2


@pytest.mark.parametrize("name", ["resnet20", "lcnet_050"])
def test_the_pair_is_the_network_of_the_default_weights(name: str) -> None:
    """Their channels and classes, and zero points where the family has them."""
    quantized, reference, image = random_pair(name, "onnxruntime")
    tag = architecture(name).default_tag
    plan = new_config(f"{name}.{tag}-w8a8")
    assert image.shape[1:] == plan.preprocessing.input_size
    assert reference(image).shape == quantized(image).shape == (1, plan.arguments.num_classes)
    assert plan.scheme is not None
    found = {q.affine for q in quantizers(quantized).values() if q.role == "input"}
    assert (True in found) == plan.scheme.affine == (name == "lcnet_050")


def test_a_model_that_fails_says_why_and_one_that_is_done_is_not_measured_again(
    models: str, tmp_path: Path
) -> None:
    begun = dataclasses.replace(by_hand(entry("tiny_narrow", 50.0, 2.0, 1.0)), machine=described())
    (tmp_path / "survey.json").write_text(json.dumps(begun.to_dict()))
    report: list[SurveyRow] = []
    found = survey(
        ["tiny_narrow", "tiny_broken"],
        TINY,
        out=tmp_path,
        imports=[models],
        progress=False,
        report=report.append,
    )
    assert [model.model for model in report] == ["tiny_broken"]
    assert report[0].error == "RuntimeError: no quantized form"
    assert [model.model for model in found.models] == ["tiny_broken", "tiny_narrow"]
    assert found.models[1] == begun.models[0]
    assert read_survey(tmp_path / "survey.json") == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["survey.json"]
    with pytest.raises(ArgumentError, match="another machine, other versions or options"):
        survey("tiny_narrow", SurveyOptions(seconds=9), out=tmp_path, progress=False)


def described() -> dict[str, str]:
    from qzoo.bench.environment import describe

    return describe()


def test_front_and_table() -> None:
    assert FOUND.front("int8") == {"slow", "fast"}
    assert FOUND.front("float32") == {"slow", "fast"}
    assert [row[0] for row in rows(FOUND)] == ["unknown", "fast *", "beaten", "slow *"]
    assert rows(FOUND)[1] == ("fast *", "60.00", "32", "0.0", "9.00", "3.00", "3.00 [3.00, 3.00]")


def test_files_and_the_page_of_the_zoo(tmp_path: Path) -> None:
    folder = tmp_path / "survey"
    folder.mkdir()
    (folder / "survey.json").write_text(json.dumps(FOUND.to_dict()))
    paths = write_survey(FOUND, folder)
    assert [path.name for path in paths][:3] == ["survey.json", "survey.csv", "survey.html"]
    assert all(path.stat().st_size > 500 for path in paths)
    lines = {line["model"]: line for line in csv.DictReader((folder / "survey.csv").read_text().splitlines())}
    assert lines["fast"]["int8_wall_ms"] == "3.0"
    assert lines["broken"]["error"] == "RuntimeError: why"
    assert (
        "</script>"
        not in (folder / "survey.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    )
    page = page_at(tmp_path / "zoo.md")
    assert f"| {' | '.join(HEAD)} |" in page
    assert "| fast * | 60.00 |" in page
    assert "## Latency of all architectures" not in page_at(tmp_path / "elsewhere" / "zoo.md")


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match="no architecture matches 'nonet"):
        survey("nonet*", out=tmp_path)
    with pytest.raises(ArgumentError, match="pytorch runs no ONNX files"):
        survey("resnet20", SurveyOptions("pytorch"), out=tmp_path)
    with pytest.raises(ArgumentError, match="positive numbers"):
        survey("resnet20", SurveyOptions(seconds=-1), out=tmp_path)
    sound = FOUND.to_dict()
    for damaged, reason in (
        ({"schema": 1}, "field options is missing"),
        ({**sound, "machine": None}, "machine must be an object, not null"),
        ({**sound, "models": 5}, "models must be a list, not a whole number"),
        ({**sound, "models": [{**sound["models"][0], "top1": "70"}]}, "top1 must be a number, not a text"),
        ([], "can't be read as a survey"),
    ):
        (tmp_path / "survey.json").write_text(json.dumps(damaged))
        with pytest.raises(QzooError, match=reason):
            survey("resnet20", TINY, out=tmp_path)
    (tmp_path / "survey.json").write_text('{"schema": 0}')
    assert main(["survey", "resnet20", "--out", str(tmp_path)]) == 2
    assert "has schema 0; this qzoo reads schema 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (of Debian)")
@pytest.mark.slow
def test_the_page_draws_it(tmp_path: Path) -> None:
    write_survey(FOUND, tmp_path)
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*command, (tmp_path / "survey.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "4 architectures, 1 failed" in dom
    assert dom.count('class="point"') == 2 * 3
    assert dom.count('class="joined"') == 3
    assert "broken failed: RuntimeError: why" in dom


@pytest.mark.slow
def test_killed_and_started_again(models: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "survey",
        "tiny_narrow",
        "tiny_wide",
        "--seconds",
        "0.02",
        "--import",
        models,
        "--out",
        str(tmp_path),
    ]
    results = tmp_path / "survey.json"
    child = subprocess.Popen([sys.executable, "-m", "qzoo", *words], start_new_session=True)
    while not results.exists():
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = read_survey(results).models
    assert [model.model for model in before] == ["tiny_narrow"]
    assert main(words) == 0
    after = read_survey(results).models
    assert [model.model for model in after] == ["tiny_narrow", "tiny_wide"]
    assert after[0] == before[0]
    assert all(model.error == "" for model in after)
    printed = capfd.readouterr()
    assert "tiny_wide: float" in printed.err
    assert "tiny_narrow" in printed.out
    found = survey(
        "tiny_wide",
        dataclasses.replace(TINY, limit=0.5),
        out=tmp_path / "late",
        imports=[models],
        progress=False,
    )
    assert found.models[0].error == "not done within 0.5 s"


def test_help_needs_no_torch() -> None:
    code = "import sys; from qzoo.__main__ import main\ntry: main(['survey', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(qzoo.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "--runtime" in done.stdout
