"""``build --all --engine ray``: a real local Ray, a worker that is killed, and the files of a plain build."""

from __future__ import annotations

import dataclasses
import io
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from qzoo.__main__ import main
from qzoo.config import CalibrationRecord
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.pipeline.build_all import build_all, is_complete
from qzoo.pipeline.cluster import Cluster, _Table
from qzoo.pipeline.plan import BuildJob
from qzoo.zoo.request import new_config

build_all_module = import_module("qzoo.pipeline.build_all")
NAMES = ("resnet20.fmnist-w8a8", "resnet20.fmnist-w4a8")
BROKEN = "resnet32.fmnist-w4a8"  # its recipe needs more images than there are


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """100 images; and recipes that calibrate on 20 of them, where both builds look for them."""
    images, labels = fashion_mnist("test")
    np.savez(tmp_path / "some.npz", images=images[:100].numpy()[:, 0], labels=labels[:100].numpy())
    calibration = CalibrationRecord("max", "Fashion-MNIST test", "0:20", 20)
    recipes = [dataclasses.replace(new_config(name), calibration=calibration) for name in NAMES]
    broken = dataclasses.replace(calibration, subset="0:200")
    recipes.append(dataclasses.replace(new_config(BROKEN), calibration=broken))
    monkeypatch.setattr(build_all_module, "recipes", lambda: recipes)
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "gathered"):
        for recipe in recipes:
            (tmp_path / folder / recipe.name).mkdir(parents=True)
            (tmp_path / folder / recipe.name / "config.json").write_text(recipe.to_json())
    return f"npz:{tmp_path / 'some.npz'}"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for name in NAMES for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Imported by the workers: the first that is about to evaluate kills its own process, once.
DEADLY = """
import os, signal
from pathlib import Path
from qzoo.pipeline import measure

evaluate, mark = measure.evaluate, Path({mark!r})

def die_once(*args, **kwargs):
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return evaluate(*args, **kwargs)
    mark.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)

if evaluate.__name__ != "die_once":
    measure.evaluate = die_once
"""


@pytest.mark.slow
def test_a_killed_worker_goes_on_and_the_files_are_those_of_a_plain_build(data: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    said: list[str] = []
    (tmp_path / "deadly.py").write_text(DEADLY.format(mark=str(tmp_path / "mark")))
    job = BuildJob(data=data, out=Path("gathered"), runs=Path("ray-runs"), progress=False)
    cluster = Cluster(threads=1, imports=(str(tmp_path / "deadly.py"),))
    failed = build_all(job, report=said.append, cluster=cluster)
    assert failed.keys() == {BROKEN}
    assert "'0:200' does not fit 100 images" in failed[BROKEN]
    killed = (tmp_path / "mark").read_text()
    (name,) = (
        line.partition(":")[0] for line in said if line.endswith(f"process {killed}") and BROKEN not in line
    )
    assert sum(line.startswith(f"{name}: begun on") for line in said) == 2
    assert f"{name}: calibrate: done before" in said
    assert len({re.sub(".*process", "", line) for line in said if "begun on" in line}) >= 2  # two at a time
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = dataclasses.replace(job, out=Path("plain"), runs=Path("runs"))
    assert build_all(plain, report=lambda line: None).keys() == {BROKEN}
    torch.set_num_threads(before)
    assert len(contents(Path("plain"))) == 8
    assert contents(Path("gathered")) == contents(Path("plain"))
    assert all(is_complete(Path("gathered") / name) for name in NAMES)
    again: list[str] = []
    assert build_all(job, report=again.append).keys() == {BROKEN}
    assert [line for line in again if line.endswith(": complete")] == [f"{name}: complete" for name in NAMES]


def test_the_table_says_what_each_checkpoint_does() -> None:
    said: list[str] = []
    with _Table(("one-w8a8", "two-w8a8", "three-w8a8"), said.append, show=False) as table:
        table.add("one-w8a8", "begun on host-a, process 7")
        table.add("one-w8a8", "calibrate")
        table.add("two-w8a8", "begun on host-a, process 8")
        table.add("two-w8a8", "begun on host-b, process 9")
        table.end("two-w8a8", "no such weights")
    console = Console(width=100, file=io.StringIO())
    console.print(table.render())
    rows = {
        words[0]: words[1:-1]
        for line in console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        if (words := [word.strip() for word in line.strip("│").split("│")])[0].endswith("w8a8")
    }
    assert rows == {
        "one-w8a8": ["calibrate", "host-a", "1"],
        "two-w8a8": ["no such weights", "host-b", "2"],
        "three-w8a8": ["waits", "", ""],
    }
    assert said[1] == "one-w8a8: calibrate"
    assert said[-1] == "two-w8a8: no such weights"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resnet20.fmnist-w8a8", "--engine", "ray"], "--engine ray is for --all"),
        (["--all", "--address", "auto"], "--address is for --engine ray"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_one_line(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    command = ["build", "--all", "--engine", "ray", "--address", "127.0.0.1:1", "--out", "gathered"]
    assert main([*command, "--data", data]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "the Ray cluster 127.0.0.1:1 can't be reached" in lines[-1]
