"""Two processes, started with the real torchrun, against one."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from qzoo.__main__ import main
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.distributed import Group, joined
from qzoo.errors import DistributedError

TESTS = Path(__file__).parent / "training"
QUANTIZED = "resnet20.fmnist-w8a8"


def environment(**more: str) -> dict[str, str]:
    """One thread a process, no accelerator, and none of the variables of a launcher around the tests."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun(
    *command: object, processes: int = 2, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    line = [*launcher, str(processes), *map(str, command)]
    given = {"env": environment(**more), "cwd": cwd, "timeout": 300}
    return subprocess.run(line, capture_output=True, text=True, **given)  # type: ignore[call-overload]


_SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
import torch
import qzoo
from qzoo.ptq.ranges import calibrate
from qzoo.quantizers import require_quantizers
from qzoo.config import config_of
from qzoo.data import load_data
from qzoo.distributed import joined
from qzoo.accuracy import evaluate

out = Path(sys.argv[1])
with joined(60) as group:
    model = qzoo.create_model("resnet20.fmnist-w8a8", pretrained="float", target="onnxruntime")
    config = config_of(model)
    images = load_data(config.preprocessing, config.labels, subset="0:220", batch_size=32)
    found, ranges = {}, {}
    for method in ("max", "entropy", "auto"):
        found[method] = calibrate(model, images, method=method, progress=False, group=group).to_dict()
        ranges[method] = {name: q.amax.clone() for name, q in require_quantizers(model).items()}
    small = [batch for batch in images][5:6]
    found["one batch"] = calibrate(model, small, method="mse", progress=False, group=group).to_dict()
    ranges["one batch"] = {name: q.amax.clone() for name, q in require_quantizers(model).items()}
    reference = qzoo.create_model("resnet20.fmnist", pretrained=True)
    test = load_data(config.preprocessing, config.labels, subset="100:433", batch_size=50)
    measured = evaluate(model, test, reference=reference, progress=False, group=group).to_dict()
    torch.save(ranges, out / f"ranges{group.rank}.pt")
    (out / f"found{group.rank}.json").write_text(json.dumps({"found": found, "measured": measured}))
"""


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Without the figures that depend on the clock."""
    for measured in (results["measured"], results["measured"]["reference"]):
        assert measured.pop("images_per_second") > 0
    return results


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as a process of torchrun has here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_the_ranges_and_metrics_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranges bit for bit, all figures of calibration and evaluation exactly, in each process.

    220 and 333 images are no multiple of the batch, seven batches none of two; a single batch leaves one
    process without any.
    """
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(one)])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runpy.run_path(str(script))
    done = torchrun(script, two)
    assert done.returncode == 0, done.stderr
    expected = timeless(json.loads((one / "found0.json").read_text()))
    assert expected["found"]["auto"]["images"] == 220
    assert expected["measured"]["images"] == 333
    ranges = torch.load(one / "ranges0.pt")
    assert len(ranges["max"]) > 60
    assert any(not torch.equal(ranges["max"][name], ranges["entropy"][name]) for name in ranges["max"])
    for rank in (0, 1):
        assert timeless(json.loads((two / f"found{rank}.json").read_text())) == expected
        theirs = torch.load(two / f"ranges{rank}.pt")
        for method, of_method in ranges.items():
            assert theirs[method].keys() == of_method.keys()
            unequal = [
                name for name, amax in of_method.items() if not torch.equal(theirs[method][name], amax)
            ]
            assert unequal == [], method


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_command_prints_once_what_one_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", QUANTIZED, "--subset", "0:200", "-q"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(command) == 0
    one = capsys.readouterr().out
    two = torchrun("-m", "qzoo", *command)
    assert two.returncode == 0, two.stderr

    def figures(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("speed")]

    assert figures(two.stdout) == figures(one)
    assert f"{QUANTIZED}, 200 images" in two.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_build_the_files_of_one_and_go_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte, figures, ONNX and card, and either kind of run takes the other's finished steps over."""
    images, labels = fashion_mnist("test")
    np.savez(tmp_path / "some.npz", images=images[:100].numpy()[:, 0], labels=labels[:100].numpy())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    command = ["build", QUANTIZED, "--data", f"npz:{tmp_path / 'some.npz'}", "--calibration-subset", ":35"]

    def places(name: str) -> list[str]:
        return ["--method", "max", "--out", name, "--runs", f"{name}-runs"]

    assert main([*command, *places("one"), "-q"]) == 0
    two = torchrun("-m", "qzoo", *command, *places("two"), cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    files = {path.relative_to("one"): path.read_bytes() for path in Path("one").rglob("*") if path.is_file()}
    assert len(files) == 4
    assert {p.relative_to("two"): p.read_bytes() for p in Path("two").rglob("*") if p.is_file()} == files
    said = [line for line in two.stdout.splitlines() if line.startswith(("calibrate", "export", "evaluate"))]
    assert len(said) == 6  # rank 0 alone prints
    again = Path("two-runs") / QUANTIZED / "steps.json"
    steps = json.loads(again.read_text())
    for name in ("evaluate w8a8 in torch for tensorrt", "evaluate w8a8 in onnxruntime for onnxruntime"):
        del steps[name]
    again.write_text(json.dumps(steps))
    capsys.readouterr()
    assert main([*command, *places("two")]) == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert {p.relative_to("two"): p.read_bytes() for p in Path("two").rglob("*") if p.is_file()} == files


_ENDS = """
import os, signal, sys
import torch
from qzoo.distributed import joined
from qzoo.errors import DistributedError

with joined(float(sys.argv[2])) as group:
    group.gather(group.rank)
    if group.rank == 1:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    try:
        group.gather(group.rank)
    except DistributedError as error:
        print(f"explained: {error}", flush=True)
        sys.exit(3)
"""


def test_a_rank_that_is_killed_ends_the_run_with_an_explanation(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_ENDS)
    done = torchrun(script, "SIGKILL", 120)
    assert done.returncode != 0
    # Either the survivor noticed by itself, or torchrun was faster and ended it.
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode  : -9" in done.stderr
    assert "explained: rank 0 of 2 lost the others" in done.stdout or "Sending process" in done.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_ENDS)
    done = torchrun(script, "SIGSTOP", 5)
    assert done.returncode != 0
    assert "explained: rank 0 of 2 lost the others" in done.stdout
    assert "did not answer within 5 s" in done.stdout


@pytest.mark.slow
def test_an_error_in_one_rank_is_reported_and_ends_the_run(tmp_path: Path) -> None:
    done = torchrun("-m", "qzoo", "evaluate", "resnet20.fmnist-w9a9", "-q")
    assert done.returncode != 0
    assert "qzoo: Scheme.weight_bits must be 2 to 8, not 9" in done.stderr


_TRAIN = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_loop import loader, model
from qzoo.ptq.ranges import calibrate
from qzoo.distributed import joined
from qzoo.scheme import Scheme
from qzoo.training.loop import TrainOptions, train

out, runs = Path(sys.argv[2]), sys.argv[3].split(",")
with joined(120) as group:
    def run(name, net, options):
        test = loader(40, shuffle=False, augment=None, batch_size=16)
        log = train(net, loader(96), options, out=out / name, eval_loader=test, progress=False, group=group)
        torch.save((net.state_dict(), log), out / f"{name}{group.rank}.pt")

    if "frozen" in runs:
        run("frozen", model(), TrainOptions(epochs=1, freeze_bn=1.0, lr=0.02))
    if "lsq" in runs:
        quantized = model(Scheme(4, 4))
        calibrate(quantized, loader(64, shuffle=False, augment=None), method="mse", progress=False, group=group)
        options = TrainOptions(epochs=2, lr=0.01, method="lsq", freeze_bn=0.5, ema=0.9, accumulate=2)
        run("lsq", quantized, options)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the whole batch: with BatchNorm fixed, the weights of one process up to rounding. Learned ranges,
    averaged weights and BatchNorm's statistics: the same in both processes, to the bit."""
    script = tmp_path / "script.py"
    script.write_text(_TRAIN)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(TESTS), str(one), "frozen"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runpy.run_path(str(script))
    done = torchrun(script, TESTS, two, "frozen,lsq")
    assert done.returncode == 0, done.stderr

    for name in ("frozen", "lsq"):
        first, log = torch.load(two / f"{name}0.pt")
        second, other = torch.load(two / f"{name}1.pt")
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
        timeless = (
            [{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (log, other)
        )
        assert next(timeless) == next(timeless)
        assert {path.name for path in (two / name).iterdir()} == {"state.pt", "log.csv"}
    expected, alone = torch.load(one / "frozen0.pt")
    found, together = torch.load(two / "frozen0.pt")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert together[0]["top1"] == alone[0]["top1"]


# Without processes: how batches are dealt out


class Rows:
    """A sized loader that is no list and no DataLoader."""

    def __len__(self) -> int:
        return 7

    def __iter__(self):
        return iter(range(7))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(20.0))


def loaders() -> list[Any]:
    return [
        list(range(7)),
        Rows(),
        DataLoader(TensorDataset(torch.arange(20.0)), batch_size=3),
        DataLoader(Stream(), batch_size=3),
    ]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_every_batch_goes_to_one_process(which: int, world: int, start: int) -> None:
    dealt: dict[int, Any] = {}
    for rank in range(world):
        group, loader = Group(rank, world), loaders()[which]
        mine = dict(group.deal(loader, start))
        assert group.share(loader, start) == (None if which == 3 else len(mine))
        assert dealt.keys().isdisjoint(mine)
        dealt |= mine
    expected = list(loaders()[which])
    assert sorted(dealt) == list(range(start, 7))
    for number, batch in dealt.items():
        wanted = expected[number]
        assert (
            torch.equal(torch.as_tensor(batch[0]), torch.as_tensor(wanted[0]))
            if which > 1
            else batch == wanted
        )


def test_a_dataloader_reads_its_own_images_only() -> None:
    class Counted(TensorDataset):
        reads: list[int] = []  # noqa: RUF012 - the test looks at it

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            self.reads.append(index)
            return super().__getitem__(index)

    state = torch.random.get_rng_state()
    assert len(list(Group(1, 2).deal(DataLoader(Counted(torch.arange(10.0)), batch_size=2)))) == 2
    assert Counted.reads == [2, 3, 6, 7]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_parts_of_a_batch() -> None:
    batch = torch.arange(12.0)
    assert torch.equal(torch.cat([Group(rank, 3).part(batch) for rank in range(3)]), batch)
    assert [len(Group(rank, 4).part(batch)) for rank in range(4)] == [3, 3, 3, 3]
    with pytest.raises(DistributedError, match="12 images can't be shared out equally to 5 processes"):
        Group(0, 5).part(batch)


def test_only_errors_of_the_connection_are_explained() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, Group(0, 2).talking():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, DistributedError)
    with pytest.raises(DistributedError, match="rank 1 of 2 lost the others"), Group(1, 2).talking():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_what_can_not_be_dealt_out_is_refused() -> None:
    group = Group(0, 2)
    with pytest.raises(DistributedError, match="generator"):
        group.deal(x for x in range(3))
    with pytest.raises(DistributedError, match="at random"):
        group.deal(DataLoader(TensorDataset(torch.arange(4.0)), shuffle=True))
    assert group.share(x for x in range(3)) is None


def test_a_group_of_one_passes_values_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert (group.rank, group.world, group.first) == (0, 1, True)
        value = object()
        assert group.gather(value) == [value]
        assert group.broadcast(value) is value
        with group.first_alone():
            assert group.device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="as it is"), group.talking():
            raise RuntimeError("as it is")
        assert list(group.deal(x for x in "ab")) == [(0, "a"), (1, "b")]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="cpu, cuda or auto, not 'tpu'"), joined(device="tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(DistributedError, match="1 processes but 0 GPUs"), joined(device="cuda"):
            pass
        with joined(device="auto") as group:
            assert group.device.type == "cpu"


def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"), joined():
        pass
