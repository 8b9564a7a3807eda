"""What QAT adds to :func:`qzoo.train`: every option resumes to the bit, and does what its name says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.data.tensors import TensorLoader
from qzoo.errors import ArgumentError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import TensorQuantizer
from qzoo.scheme import Scheme
from qzoo.training.loop import TrainOptions, train
from qzoo.training.state import load_state, plot_log, write_tensorboard

PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
EVERYTHING = TrainOptions(
    epochs=3,
    lr=0.02,
    method="lsq",
    distill=0.5,
    freeze_bn=0.34,
    ema=0.9,
    accumulate=2,
    range_lr=0.5,
    bf16=True,
)


def loader(batch_size: int = 32) -> TensorLoader:
    pixels, labels = fashion_mnist("test")
    return TensorLoader(pixels[:160], labels[:160], PREPROCESSING, batch_size, shuffle=True)


class Stopped(TensorLoader):
    """Stops in the middle of the second epoch, as a kill would."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if self.epoch == 1 and i == 3:
                raise KeyboardInterrupt
            yield batch


def models(scheme: str = "w3a3") -> tuple[CifarResNet, CifarResNet]:
    """A calibrated model and its float teacher."""
    torch.manual_seed(0)
    teacher = CifarResNet(1, in_channels=1)
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse(scheme, "onnxruntime"))
    model.load_state_dict(teacher.state_dict())
    calibrate(model, [next(iter(loader()))[0]], progress=False)
    return model, teacher


@pytest.mark.parametrize("method", ["lsq", "pact", "ste"])
def test_a_stopped_run_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    options = replace(EVERYTHING, method=method)
    whole, teacher = models()
    expected = train(whole, loader(), options, out=tmp_path / "whole", teacher=teacher, progress=False)

    broken, _ = models()
    part = loader()
    stopped = Stopped(part.images, part.labels, PREPROCESSING, 32, shuffle=True)
    with pytest.raises(KeyboardInterrupt):
        train(broken, stopped, options, out=tmp_path / "parts", teacher=teacher, progress=False)
    resumed, _ = models()
    log = train(resumed, loader(), options, out=tmp_path / "parts", teacher=teacher, progress=False)
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]
    first, second = whole.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert not any("learner" in name for name in first)


def test_learned_ranges_move_and_frozen_ones_do_not(tmp_path: Path) -> None:
    for method, moved in (("lsq", True), ("ste", False)):
        model, _ = models()
        before = copy.deepcopy(model)
        train(model, loader(), TrainOptions(epochs=1, method=method), out=tmp_path / method, progress=False)
        ranges = [
            (a.amax, b.amax)
            for a, b in zip(before.modules(), model.modules(), strict=True)
            if isinstance(a, TensorQuantizer) and isinstance(b, TensorQuantizer)
        ]
        assert ranges
        assert all((not torch.equal(a, b)) is moved for a, b in ranges if a is not None and b is not None)


def test_batchnorm_keeps_its_statistics_once_frozen(tmp_path: Path) -> None:
    model, _ = models()
    before = copy.deepcopy(model.bn1)
    train(model, loader(), TrainOptions(epochs=1, freeze_bn=1.0), out=tmp_path, progress=False)
    assert torch.equal(model.bn1.running_mean, before.running_mean)
    assert not torch.equal(model.bn1.weight, before.weight)


def test_accumulated_batches_step_as_one_of_their_size(tmp_path: Path) -> None:
    """Without BatchNorm, whose statistics are a batch's, the gradients are the same up to rounding."""

    class Net(nn.Sequential):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(784, 10))

    one, two = Net(), Net()
    train(one, loader(32), TrainOptions(epochs=1), out=tmp_path / "one", progress=False)
    train(two, loader(16), TrainOptions(epochs=1, accumulate=2), out=tmp_path / "two", progress=False)
    torch.testing.assert_close(one[1].weight, two[1].weight, rtol=1e-4, atol=1e-5)


def test_the_average_is_the_recursive_formula(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    seen: list[torch.Tensor] = []
    net[1].register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    plain = copy.deepcopy(net)
    train(net, loader(), TrainOptions(epochs=1, ema=0.8), out=tmp_path / "a", progress=False)
    train(plain, loader(), TrainOptions(epochs=1), out=tmp_path / "b", progress=False)
    weights = [*seen[1:5], plain[1].weight.detach()]  # after each of five steps
    average = weights[0]
    for weight in weights[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(net[1].weight.detach(), average, rtol=1e-5, atol=1e-6)


def test_a_pure_student_follows_the_teacher(tmp_path: Path) -> None:
    model, teacher = models("w8a8")
    log = train(
        model, loader(), TrainOptions(epochs=4, lr=0.05, distill=1.0, temperature=2.0),
        out=tmp_path, teacher=teacher, progress=False,
    )  # fmt: skip
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'adaround'"):
        TrainOptions(method="adaround")
    with pytest.raises(ValueError, match="distill must be 0 to 1"):
        TrainOptions(distill=2.0)
    with pytest.raises(ValueError, match="accumulate"):
        TrainOptions(accumulate=0)
    for name, value in {
        "lr": -1.0,
        "weight_decay": math.nan,
        "momentum": 1.5,
        "label_smoothing": 3.0,
    }.items():
        with pytest.raises(ArgumentError, match=rf"TrainOptions\.{name} must be 0 .*, not {value}"):
            TrainOptions(**{name: value})
    with pytest.raises(ArgumentError, match="temperature must be above 0, not 0"):
        TrainOptions(temperature=0.0)
    with pytest.raises(ArgumentError, match="seed must fit in 64 bits"):
        TrainOptions(seed=1 << 64)
    with pytest.raises(ValueError, match="teacher"):
        train(models()[0], loader(), TrainOptions(distill=0.5), out=tmp_path, progress=False)


def test_other_options_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    train(net, loader(), TrainOptions(epochs=1), out=tmp_path, progress=False)
    with pytest.raises(Exception, match=r"other options \(lr, method\)"):
        load_state(tmp_path / "state.pt", {"lr": 1.0, "method": "lsq"})


LOG = [{"epoch": i, "loss": 1 / (i + 1), "lr": 0.1, "top1": 50.0 + i, "seconds": 1.0} for i in range(3)]


def test_the_learning_curve_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(plot_log(tmp_path / "log.png", LOG, "net")) as image:
        assert len(image.convert("L").getcolors(1 << 16)) > 20


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_tensorboard(tmp_path, LOG[:1])
    write_tensorboard(tmp_path, LOG)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("top1")] == [50.0, 51.0, 52.0]
