"""``train``: it learns, it resumes to the bit, and it leaves whole files behind."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qzoo.data.epochs import Epochs
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.data.folders import FolderLoader
from qzoo.data.tensors import TensorLoader, crop_flip_erase
from qzoo.distributed import Group
from qzoo.errors import BrokenImageError, CheckpointError, DataError, QzooError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import TensorQuantizer
from qzoo.scheme import Scheme
from qzoo.training.loop import TrainOptions, _Run, train

PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))


def loader(images: int = 128, **options: object) -> TensorLoader:
    pixels, labels = fashion_mnist("test")
    arguments: dict = {"batch_size": 32, "shuffle": True, "augment": crop_flip_erase, **options}
    return TensorLoader(pixels[:images], labels[:images], PREPROCESSING, **arguments)


def model(quantize: Scheme | None = None) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(1, in_channels=1, quantize=quantize)


def assert_equal_state(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Stopped(TensorLoader):
    """Stops in the middle of an epoch, as a kill would."""

    stop_at, stop_after = 2, 2

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if self.epoch == self.stop_at and i == self.stop_after:
                raise KeyboardInterrupt
            yield batch


def test_it_learns(tmp_path: Path) -> None:
    net = model()
    test = loader(256, shuffle=False, augment=None, batch_size=128)
    log = train(
        net, loader(256, augment=None), TrainOptions(epochs=5), out=tmp_path, eval_loader=test, progress=False
    )
    assert [row["epoch"] for row in log] == [0, 1, 2, 3, 4]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert log[-1]["top1"] > 60  # of the very images it learned
    assert not net.training


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    options = TrainOptions(epochs=4, lr=0.05, seed=3)
    whole = model()
    expected = train(whole, loader(), options, out=tmp_path / "whole", progress=False)

    pixels, labels = fashion_mnist("test")
    broken = Stopped(
        pixels[:128], labels[:128], PREPROCESSING, batch_size=32, shuffle=True, augment=crop_flip_erase
    )
    with pytest.raises(KeyboardInterrupt):
        train(model(), broken, options, out=tmp_path / "parts", progress=False)
    torch.manual_seed(77)  # what the process drew before must not matter
    resumed = CifarResNet(1, in_channels=1)
    log = train(resumed, loader(), options, out=tmp_path / "parts", progress=False)
    assert_equal_state(resumed, whole)
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]
    assert [row["lr"] for row in log] == [row["lr"] for row in expected]


def droppy() -> nn.Module:
    """A model that draws from torch's generator."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(28 * 28, 10))


def test_saved_within_an_epoch_it_goes_on_there(tmp_path: Path) -> None:
    """Also where a model draws random numbers, and without a second look at finished batches."""
    options = TrainOptions(epochs=4, lr=0.05, seed=3, accumulate=2)
    whole = droppy()
    data = loader(batch_size=16)
    expected = train(whole, data, options, out=tmp_path / "whole", progress=False, save_every=1)

    pixels, labels = fashion_mnist("test")
    broken = Stopped(pixels[:128], labels[:128], PREPROCESSING, 16, shuffle=True, augment=crop_flip_erase)
    broken.stop_after = 5  # of eight: two steps are done, and half of the third
    with pytest.raises(KeyboardInterrupt):
        train(droppy(), broken, options, out=tmp_path / "parts", progress=False, save_every=1)
    state = torch.load(tmp_path / "parts" / "state.pt")
    assert (len(state["log"]), state["done"]) == (2, 4)
    torch.rand(5)
    seen: list[int] = []

    class Counted(TensorLoader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(self.epoch)
                yield batch

    again = Counted(pixels[:128], labels[:128], PREPROCESSING, 16, shuffle=True, augment=crop_flip_erase)
    resumed = droppy()
    log = train(resumed, again, options, out=tmp_path / "parts", progress=False, save_every=1)
    assert seen == [2] * 4 + [3] * 8
    assert_equal_state(resumed, whole)
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]


class Photos(Dataset[tuple[Tensor, int]]):
    """Images of which every fifth does not decode."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index % 5 == 0:
            raise BrokenImageError(f"{index}.png can't be read")
        return torch.full((1, 28, 28), index / 40), index % 10


class StoppedPhotos(FolderLoader):
    """Stops before the last batch of the last epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(super().__iter__()):
            if self.epoch == 1 and i == 3:
                raise KeyboardInterrupt
            yield batch


def test_broken_images_are_counted_across_a_stop(tmp_path: Path) -> None:
    """Each epoch has all 40 images, 8 of which are broken; the log of a run that was stopped says the same."""
    options = TrainOptions(epochs=2, lr=0.05)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(
        droppy(),
        FolderLoader(Photos(), 10, skip_broken=True),
        options,
        out=whole,
        progress=False,
        save_every=1,
    )
    stopped = StoppedPhotos(Photos(), 10, skip_broken=True)
    with pytest.raises(KeyboardInterrupt):
        train(droppy(), stopped, options, out=parts, progress=False, save_every=1)
    again = FolderLoader(Photos(), 10, skip_broken=True)
    log = train(droppy(), again, options, out=parts, progress=False, save_every=1)
    assert [row["skipped"] for row in log] == [row["skipped"] for row in expected] == [8, 8]
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]
    assert 0 < len(again.broken) < 8
    with pytest.raises(DataError, match=r"\d+.png can't be read"):
        train(droppy(), FolderLoader(Photos(), 10), options, progress=False)


def test_other_batches_are_refused_and_older_states_are_read(tmp_path: Path) -> None:
    options = TrainOptions(epochs=2)
    train(droppy(), loader(64), options, out=tmp_path, progress=False)
    with pytest.raises(QzooError, match=r"2 batches an epoch, not 4: another batch size, or other images"):
        train(droppy(), loader(128), options, out=tmp_path, progress=False)
    state = torch.load(tmp_path / "state.pt")
    for key in ("batches", "done", "totals", "skipped", "seconds", "scaler"):
        del state[key]
    del state["options"]["fp16"]
    torch.save(state, tmp_path / "state.pt")
    assert len(train(droppy(), loader(64), options, out=tmp_path, progress=False)) == 2


_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_loop import six_epochs
six_epochs(sys.argv[1])
"""


def six_epochs(out: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(model(), loader(), TrainOptions(epochs=6, seed=1), out=out, progress=False)
    torch.set_num_threads(threads)


def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL after some epoch has been saved, then the same again, in another process."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(tests=str(Path(__file__).parent)))
    six_epochs(tmp_path / "whole")

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, str(script), str(tmp_path / "killed")], env=environment)
    state = tmp_path / "killed" / "state.pt"
    end = time.monotonic() + 120
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 1 <= len(torch.load(state)["log"]) <= 6
    six_epochs(tmp_path / "killed")
    first, second = (torch.load(tmp_path / name / "state.pt")["model"] for name in ("whole", "killed"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    options = TrainOptions(epochs=1)
    first = model()
    train(first, loader(), options, out=tmp_path, progress=False)
    again = CifarResNet(1, in_channels=1)
    (tmp_path / "log.csv").unlink()  # as if it had been killed before it wrote the last line
    log = train(again, loader(), options, out=tmp_path, progress=False)
    assert len(log) == 1
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    assert_equal_state(first, again)


def test_a_run_with_other_options_is_refused(tmp_path: Path) -> None:
    train(model(), loader(64), TrainOptions(epochs=1), out=tmp_path, progress=False)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(QzooError, match="other options"):
        train(model(), loader(64), TrainOptions(epochs=2), out=tmp_path, progress=False)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_log_file_and_no_leftovers(tmp_path: Path) -> None:
    log = train(
        model(),
        loader(64),
        TrainOptions(epochs=2),
        out=tmp_path / "deep" / "folder",
        eval_loader=loader(64, shuffle=False, augment=None),
        progress=False,
    )
    folder = tmp_path / "deep" / "folder"
    assert {path.name for path in folder.iterdir()} == {"state.pt", "log.csv"}
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == log


def test_a_failing_write_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(model(), loader(64), TrainOptions(epochs=1), out=tmp_path, progress=False)
    before = (tmp_path / "state.pt").read_bytes()
    saved = torch.load(tmp_path / "state.pt")
    saved["options"]["epochs"] = 2
    torch.save(saved, tmp_path / "state.pt")

    def half_written(state: object, file: IO[bytes]) -> None:
        file.write(before[:1000])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(QzooError, match=r"can't be written: disk full\. Make room"):
        train(model(), loader(64), TrainOptions(epochs=2), out=tmp_path, progress=False)
    assert len(torch.load(tmp_path / "state.pt")["log"]) == 1


def test_the_schedule() -> None:
    options = TrainOptions(lr=0.4, warmup=0.1)
    rates = [options.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    for step in range(10, 100):
        expected = 0.2 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert rates[step] == pytest.approx(expected)
    assert max(rates) == pytest.approx(0.4)
    assert rates[-1] < 0.001
    assert TrainOptions(lr=1.0, warmup=0.0).rate(0, 10) == 1.0


class Recorder(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(28 * 28, 10)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.fc(x.flatten(1))


def test_the_optimizer_is_sgd_with_nesterov_without_decay_of_biases(tmp_path: Path) -> None:
    """Two steps by hand on a linear model."""
    torch.manual_seed(0)
    net = Recorder()
    data = loader(64)
    options = TrainOptions(epochs=1, lr=0.1, momentum=0.9, weight_decay=0.01, warmup=0.0)
    weight, bias = net.fc.weight.detach().double().clone(), net.fc.bias.detach().double().clone()
    train(net, data, options, out=tmp_path, progress=False)
    data.set_epoch(0)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, (images, labels) in enumerate(data):
        x = images.flatten(1).double()
        error = torch.softmax(x @ weight.T + bias, 1) - torch.nn.functional.one_hot(labels, 10)
        gradients = [error.T @ x / len(x) + 0.01 * weight, error.mean(0)]
        for i, parameter in enumerate((weight, bias)):
            velocity[i] = 0.9 * velocity[i] + gradients[i]
            parameter -= options.rate(step, 2) * (gradients[i] + 0.9 * velocity[i])
    torch.testing.assert_close(net.fc.weight.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net.fc.bias.double(), bias, rtol=1e-4, atol=1e-6)


def test_quantized_training_keeps_ranges_and_moves_weights(tmp_path: Path) -> None:
    net = model(Scheme(4, 4))
    calibrate(net, [next(iter(loader()))], progress=False)
    ranges = {n: m.amax.clone() for n, m in net.named_modules() if isinstance(m, TensorQuantizer)}
    weight = net.layer1[0].conv1.weight.detach().clone()
    log = train(net, loader(), TrainOptions(epochs=3, lr=0.02), out=tmp_path, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    assert not torch.equal(net.layer1[0].conv1.weight, weight)
    for name, module in net.named_modules():
        if isinstance(module, TensorQuantizer):
            assert torch.equal(module.amax, ranges[name]), name


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    net = model()
    net.conv1.weight.requires_grad_(False)
    before = net.conv1.weight.clone()
    train(net, loader(64), TrainOptions(epochs=1), out=tmp_path, progress=False)
    assert torch.equal(net.conv1.weight, before)


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(QzooError, match=r"loss of epoch 1 is .*lower lr"):
        train(model(), loader(64), TrainOptions(epochs=1, lr=1e30), out=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16(tmp_path: Path) -> None:
    net = model()
    log = train(net, loader(64), TrainOptions(epochs=2, bf16=True), out=tmp_path, progress=False)
    assert math.isfinite(log[-1]["loss"])
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_float16_scales_the_loss_and_keeps_the_scale(tmp_path: Path) -> None:
    """The loop alone, on the CPU, where ``train`` refuses it: torch's scaler works there, too."""
    options, data = TrainOptions(epochs=2, lr=0.05, fp16=True), Epochs(loader(128))
    plain = TrainOptions(epochs=2, lr=0.05)

    def started(options: TrainOptions, name: str) -> _Run:
        run = _Run(droppy(), options, None, Group())
        run.resume(tmp_path / name, len(data), {})
        return run

    run, exact = started(options, "half.pt"), started(plain, "float.pt")
    assert run.epoch(data, 0, False, 0) == pytest.approx(exact.epoch(data, 0, False, 0), rel=1e-2)
    for a, b in zip(run.model.parameters(), exact.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-3)
    before = run.scaler.state_dict()
    assert before["_growth_tracker"] == 4  # one for each step
    run.log.append({"epoch": 0})
    run.save(0)
    again = started(options, "half.pt")
    assert again.scaler.state_dict() == before
    # A step whose gradients overflow is left out, and the scale halved.
    weights = [p.clone() for p in again.model.parameters()]
    for parameter in again.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    again.scaler.scale(torch.ones(()))
    again._step()
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), weights, strict=True))
    assert again.scaler.get_scale() == before["scale"] / 2


# ---- any loader ----


def test_a_data_loader_trains_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """Its order is drawn by torch's global generator: the same for the same seed and epoch, whoever drew before."""
    images, labels = next(iter(loader(64, batch_size=64)))
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=16, shuffle=True
    )
    options = TrainOptions(epochs=3, lr=0.05)
    whole, seen = droppy(), []
    expected = train(whole, _Seen(data, seen), options, progress=False)  # nothing is written
    assert sorted(map(tuple, seen[0])) != sorted(map(tuple, seen[1]))  # another order each epoch
    with pytest.raises(KeyboardInterrupt):
        train(droppy(), _Seen(data, [], stop=2), options, out=tmp_path, progress=False)
    torch.rand(7)
    resumed = droppy()
    log = train(resumed, _Seen(data, []), options, out=tmp_path, progress=False)
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]
    assert_equal_state(resumed, whole)


class _Seen:
    """An iterable without a length that notes the labels of each pass; the first pass only counts."""

    def __init__(self, data: object, seen: list, stop: int | None = None) -> None:
        self.data, self.seen, self.stop, self.passes = data, seen, stop, -1

    def __iter__(self):
        self.passes += 1
        if self.passes == self.stop:
            raise KeyboardInterrupt
        if self.passes:
            self.seen.append([])
        for images, labels in self.data:
            if self.passes:
                self.seen[-1].append(tuple(labels.tolist()))
            yield images, labels


def test_lists_and_generators_train_alike() -> None:
    batches = list(loader(64))
    options = TrainOptions(epochs=2)
    first, second = droppy(), droppy()
    train(first, batches, options, progress=False)
    train(second, (batch for batch in batches), options, progress=False)
    assert_equal_state(first, second)


def test_loaders_that_can_not_be_trained_on() -> None:
    class Longer(list):
        def __len__(self) -> int:
            return super().__len__() + self.more

    options = TrainOptions(epochs=1)
    batches = list(loader(64))
    with pytest.raises(TypeError, match=r"iterable of \(images, labels\), such as a DataLoader, not int"):
        train(droppy(), 3, options, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"gave a Tensor; expected two tensors"):
        train(droppy(), [images for images, _ in batches], options, progress=False)
    with pytest.raises(DataError, match=r"gave a list of \(Tensor, list\)"):
        train(droppy(), [[images, labels.tolist()] for images, labels in batches], options, progress=False)
    for more in (-1, 1):
        wrong = Longer(batches)
        wrong.more = more
        with pytest.raises(DataError, match="its length says"):
            train(droppy(), wrong, options, progress=False)
    with pytest.raises(ValueError, match=r"save_every=1 needs a loader with set_epoch"):
        train(droppy(), batches, options, progress=False, save_every=1)
    images = batches[0][0]
    for data, said in (
        ([], "gives no batches"),
        (
            [(images, torch.full((len(images),), 99))],
            "Target 99 is out of bounds.*expected one class index an image, 0 to",
        ),
        ([(images, torch.rand(len(images)))], "torch.float32 labels"),
        ([((255 * images).byte(), batches[0][1])], "can't take uint8 images"),
    ):
        with pytest.raises(DataError, match=said):
            train(droppy(), data, options, progress=False)


# ---- what can go wrong on disk ----

FULL = """
import resource, sys
import torch
from qzoo.training.loop import TrainOptions, train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
batches = [(torch.randn(8, 1, 28, 28), torch.arange(8))]
train(model, batches, TrainOptions(epochs=2), out=sys.argv[1], progress=False)
"""


@pytest.mark.parametrize(("limit", "file"), [(20_000, "state.pt"), (10, "state.pt")])
def test_a_file_that_can_not_be_written(tmp_path: Path, limit: int, file: str) -> None:
    """A limit on a file's size stands for a full disk: the system refuses the same calls."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, str(limit)], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"qzoo.errors.QzooError: {tmp_path / file} can't be written"), done.stderr
    assert "it goes on from the state that was saved last" in last
    assert list(tmp_path.iterdir()) == []


def test_one_training_at_a_time_in_a_folder(tmp_path: Path) -> None:
    class Second(TensorLoader):
        def __iter__(self):
            with pytest.raises(QzooError, match=rf"another training runs in {tmp_path}; wait"):
                train(droppy(), loader(64), TrainOptions(epochs=1), out=tmp_path, progress=False)
            yield from super().__iter__()

    pixels, labels = fashion_mnist("test")
    data = Second(pixels[:64], labels[:64], PREPROCESSING, 32, shuffle=True)
    assert len(train(droppy(), data, TrainOptions(epochs=1), out=tmp_path, progress=False)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "log.csv"}


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    options, path = TrainOptions(epochs=2), tmp_path / "state.pt"
    train(droppy(), loader(64), options, out=tmp_path, progress=False)
    whole = path.read_bytes()
    content = torch.load(path)
    flipped = bytearray(whole)
    flipped[whole.index(content["model"]["2.weight"].numpy().tobytes()) + 5] ^= (
        1  # in the middle of the weights
    )
    damaged = [b"", b"\0" * 100, whole[: len(whole) // 2], whole[:-1], bytes(flipped)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged .*remove it"):
            train(droppy(), loader(64), options, out=tmp_path, progress=False)
    for state in ([], {}, {**content, "model": None}, {**content, "log": [3]}):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged .*remove it"):
            train(droppy(), loader(64), options, out=tmp_path, progress=False)
    few = dict(list(content["model"].items())[1:])
    for state in ({**content, "model": few}, {**content, "optimizer": {}}):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=r"state\.pt is of another model, or damaged"):
            train(droppy(), loader(64), options, out=tmp_path, progress=False)
