"""The table at the end of build, train and calibrate says what config.json says, and its last line runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import qzoo
from qzoo.__main__ import main
from qzoo.config import config_of, read_config
from qzoo.pipeline.summary import summary
from qzoo.zoo import hub
from qzoo.zoo.store import checkpoint_folder


def lines_of(text: str) -> dict[str, str]:
    """The lines by their first word."""
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


@pytest.mark.parametrize("name", ["resnet20.fmnist-w8a8", "resnet20.fmnist", "resnet20.fmnist-w4a4_qat"])
def test_it_says_what_the_config_says(name: str) -> None:
    if name not in hub.embedded():
        pytest.skip(f"{name} is not embedded")
    folder = hub.embedded()[name]
    config, text = read_config(folder), summary(folder)
    for row in config.metrics:
        low, high = row.top1_interval
        line = next(
            line for line in text.splitlines() if re.search(rf"^{row.precision}, .*{row.top1:.2f}", line)
        )
        assert f"{low:.2f} to {high:.2f}" in line
        if row.precision != "float":
            assert f"{config.metrics[0].top1 - row.top1:.2f}" in line
            assert f"{row.agreement:.2f}" in line
    assert f"{config.metrics[0].images:,}: {config.metrics[0].data}" in text
    assert ("drop" in text) == (config.scheme is not None)
    for candidate in config.calibration.candidates if config.calibration else ():
        assert f"{candidate.agreement:6.2f} %  {candidate.method}" in text
    used = eval(lines_of(text)["use"].removeprefix("use").strip(), {"qzoo": qzoo})
    assert config_of(used).name == name


def test_in_the_store_it_is_used_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QZOO_HOME", str(tmp_path))
    name = "resnet20.fmnist-w8a8"
    folder = checkpoint_folder(name)
    shutil.copytree(hub.embedded()[name], folder)
    assert lines_of(summary(folder))["use"].endswith(f'qzoo.create_model("{name}", pretrained=True)')


def test_calibrate_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No images: the recipe that needs none, and what to do for figures."""
    argv = [
        "calibrate",
        "resnet20.fmnist-w8a8",
        "--method",
        "batchnorm",
        "--out",
        str(tmp_path / "made"),
        "-q",
    ]
    assert main(argv) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines["recipe"].split(maxsplit=1)[1] == "batchnorm, on no images"
    assert "not measured yet; `qzoo evaluate` does" in lines["images"]
    assert "MB, 2" in lines["size"]
    assert lines["use"] == f'use     qzoo.load_pretrained("{tmp_path / "made"}")'
