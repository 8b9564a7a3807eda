"""``torchrun -m qzoo train``: two processes by command, one of them killed, and the same command again."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import write_splits
from test_distributed import environment

from qzoo.config import WEIGHTS, read_config
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.options import TrainOptions
from qzoo.pipeline.train_job import TrainJob
from qzoo.pipeline.tune import tune_checkpoint
from qzoo.zoo.request import new_config


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("data") / "pets", train=16, val=4, size=28)


def command(data: Path, root: Path, *options: object) -> list[str]:
    """resnet20.pets in two processes: four steps an epoch, the state saved after each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "qzoo", "train", "resnet20.pets", "--dataset", "folders", "--data", str(data), "-q"]
    places = ["--runs", str(root / "runs"), "--out", str(root / "out"), "--timeout", "60"]
    steps = ["--batch-size", "8", "--save-every", "1", "--lr", "0.02"]
    return [*launcher, *train, *steps, *places, *map(str, options)]


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_trains_in_two_processes(pets: Path, tmp_path: Path) -> None:
    done = run(command(pets, tmp_path, "--epochs", 1))
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    assert done.stdout.split() == [str(tmp_path / "out")]  # rank 0 alone prints
    config = read_config(tmp_path / "out")
    assert config.training is not None
    assert (config.training["processes"], config.training["batch_size"]) == (2, 8)
    assert config.metrics[0].images == 8
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_batch_that_can_not_be_shared_ends_the_run(pets: Path, tmp_path: Path) -> None:
    done = run(command(pets, tmp_path, "--epochs", 1, "--batch-size", 7))
    assert done.returncode != 0
    assert "7 images can't be shared out equally to 2 processes" in done.stderr
    assert "terminate called" not in done.stderr
    assert not (tmp_path / "out").exists()


def workers(launcher: int) -> dict[int, int]:
    """Process id by rank of the processes that torchrun has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        content = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        values = dict(item.split(b"=", 1) for item in content if b"=" in item)
        if b"RANK" in values:
            found[int(values[b"RANK"])] = int(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_it_goes_on(rank: int, pets: Path, tmp_path: Path) -> None:
    whole = run(command(pets, tmp_path / "whole", "--epochs", 6))
    assert whole.returncode == 0, whole.stderr

    line = command(pets, tmp_path / "parts", "--epochs", 6)
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    state = tmp_path / "parts" / "runs" / "resnet20.pets" / "state.pt"
    end = time.monotonic() + 120
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(workers(process.pid)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert "terminate called" not in errors
    saved = torch.load(state)
    assert len(saved["log"]) < 6
    assert not (tmp_path / "parts" / "out").exists()

    again = run(line)
    assert again.returncode == 0, again.stderr
    first, second = (tmp_path / name / "out" / WEIGHTS for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_tuning_in_two_processes(tmp_path: Path) -> None:
    """Low bits, learned ranges, a teacher; the recorded ranges are those of one process."""
    script = [
        "train", "resnet20.fmnist-w4a4_qat", "--subset", "0:256", "--evaluation-subset", "0:64", "--epochs", "1",
        "--method", "lsq", "--distill", "0.5", "--lr", "0", "--batch-size", "32", "--freeze-bn", "1", "-q",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "two")]
    done = run([*launcher, "-m", "qzoo", *script, *places])
    assert done.returncode == 0, done.stderr
    job = TrainJob(
        subset="0:256",
        evaluation_subset="0:64",
        batch_size=32,
        runs=tmp_path / "one-runs",
        out=tmp_path / "one",
        progress=False,
    )
    options = TrainOptions(epochs=1, lr=0.0, method="lsq", distill=0.5, freeze_bn=1.0)
    tune_checkpoint("resnet20.fmnist-w4a4_qat", options, job)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert read_config(tmp_path / "one").metrics == read_config(tmp_path / "two").metrics


@pytest.mark.slow
def test_a_trained_checkpoint_is_built_in_two_processes(tmp_path: Path) -> None:
    """From a stream; called again, by one process, nothing is trained or measured once more."""
    images, labels = fashion_mnist("test")
    np.savez(tmp_path / "some.npz", images=images[:60].numpy()[:, 0], labels=labels[:60].numpy())
    name, out = "resnet20.fmnist-w4a4_qat", tmp_path / "out"
    training = {"epochs": 1, "lr": 0.01, "method": "lsq", "batch_size": 8, "target": "onnxruntime"}
    out.mkdir()
    (out / "config.json").write_text(dataclasses.replace(new_config(name), training=training).to_json())
    command = ["-m", "qzoo", "build", name, "--data", f"npz:{tmp_path / 'some.npz'}", "--out", str(out)]
    command += ["--runs", str(tmp_path / "runs")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, *command])
    assert done.returncode == 0, done.stderr
    config = read_config(out)
    assert config.training is not None
    assert (config.training["processes"], config.training["subset"]) == (2, "0:48")
    assert [(row.subset, row.images) for row in config.metrics] == [("48:60", 12)] * 3
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run([sys.executable, *command])
    assert again.returncode == 0, again.stderr
    assert "train and measure: done before" in again.stdout
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
