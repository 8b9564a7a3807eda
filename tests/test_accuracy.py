"""Fidelity against NumPy, its sums over batches, and what NaN counts as."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity, decibel, evaluate, sqnr
from qzoo.errors import ArgumentError, CalibrationError, DataError, NonFiniteError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.options import RANGES
from qzoo.ptq import Recipe, best_recipe
from qzoo.ptq.ranges import calibrate
from qzoo.quant import quantize_
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import set_target
from qzoo.runtimes.pytorch import logits_of
from qzoo.scheme import Scheme


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(23, 7, generator=generator)
    return expected + 0.4 * torch.randn(23, 7, generator=generator), expected


def test_against_numpy(pair) -> None:
    found = Fidelity.of(*pair)
    x, r = (t.double().numpy() for t in pair)
    assert found.images == 23
    assert found.agreement == pytest.approx(100 * (x.argmax(1) == r.argmax(1)).mean())
    assert 0 < found.agreement < 100
    assert found.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((x - r) ** 2).sum()))
    assert sqnr(pair[1], pair[0]) == pytest.approx(found.sqnr_db)


def test_batches_add_up_in_any_order(pair) -> None:
    logits, expected = (t.split(5) for t in pair)
    parts = [Fidelity.of(a, b) for a, b in zip(logits, expected, strict=True)]
    total = Fidelity.total(parts)
    assert total == Fidelity.total(parts[::-1])
    whole = Fidelity.of(*pair)
    assert (total.images, total.agreement) == (whole.images, whole.agreement)
    assert total.sqnr_db == pytest.approx(whole.sqnr_db)


def test_equal_and_silent() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert (Fidelity.of(x, x).sqnr_db, Fidelity.of(x, x).agreement) == (math.inf, 100)
    assert Fidelity.of(x, 0 * x).sqnr_db == -math.inf
    assert decibel(25.0, 0.25) == pytest.approx(20)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "reference", "both"])
def test_what_is_not_finite_is_the_worst(pair, value: float, where: str) -> None:
    logits, expected = (t.clone() for t in pair)
    if where != "reference":
        logits[4, 2] = value
    if where != "logits":
        expected[4, 2] = value
    found = Fidelity.of(logits, expected)
    assert (found.sqnr_db, found.finite) == (-math.inf, False)
    if math.isnan(value):
        others = torch.arange(23) != 4
        assert found.agreeing == Fidelity.of(pair[0][others], pair[1][others]).agreeing, (
            "NaN agrees with nothing"
        )
    sound = Fidelity.of(*pair)
    assert Fidelity.total([sound, found]).sqnr_db == -math.inf, "a sound batch does not hide it"
    assert sqnr(expected, logits) == -math.inf


def test_shapes_that_do_not_match() -> None:
    with pytest.raises(DataError, match=r"\[2, 3\].*\[2, 4\]"):
        Fidelity.of(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"\[B, classes\]"):
        Fidelity.of(torch.zeros(2), torch.zeros(2))


# What models can't take, and what they return


class Pair(nn.Module):
    """Two inputs, or what ``output`` makes of the result."""

    def __init__(self, output: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 4, 3), output

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y.mean((2, 3)) if self.output is None else self.output(y)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


IMAGES = torch.randn(2, 3, 6, 6)
LABELS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        (TwoInputs(), IMAGES, r"TwoInputs takes 2 inputs \(left, right\)"),
        (Pair(), (IMAGES * 50).to(torch.uint8), r"Pair can't take uint8 images \[2, 3, 6, 6\]; preprocess"),
        (Pair(), IMAGES.double(), r"float64, the weights of Pair float32"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten(), nn.Linear(4, 4)),
            IMAGES[0],
            r"batches \[B, C, H, W\]",
        ),
        (Pair(lambda y: {"out": y}), IMAGES, r"Pair returned a dict of 'out'"),
        (Pair(lambda y: (y, y)), IMAGES, r"Pair returned a tuple of 2"),
        (Pair(lambda y: y), IMAGES, r"Pair returned a tensor \[2, 4, 4, 4\] for 2 images"),
        (Pair(lambda y: y.mean((2, 3))[:1]), IMAGES, r"tensor \[1, 4\] for 2 images"),
    ],
)
def test_a_model_and_images_that_do_not_fit(model: nn.Module, images: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        logits_of(model, images)
    with pytest.raises(DataError, match=words):
        evaluate(model, [(images, torch.zeros(len(images), dtype=torch.int64))], progress=False)


def test_other_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="to have 3 channels") as caught:
        logits_of(Pair(), IMAGES[:, :1])
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize("study", ["calibrate", "auto", "sensitivity", "inspect", "best_recipe"])
@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        (TwoInputs(), IMAGES, r"takes 2 inputs"),
        (Pair(), (IMAGES * 50).to(torch.uint8), "uint8"),
    ],
)
def test_all_say_so(study: str, model: nn.Module, images: Tensor, words: str) -> None:
    model = nn.Sequential(model) if isinstance(model, Pair) else model
    model.extra = TensorQuantizer()
    model.extra.amax = 1.0
    quantize_(model)
    studies = {
        "calibrate": lambda: calibrate(model, [images], progress=False),
        "auto": lambda: calibrate(model, [images], method="auto", progress=False),
        "sensitivity": lambda: qzoo.sensitivity(model, [images], progress=False),
        "inspect": lambda: qzoo.inspect(model, [images]),
        "best_recipe": lambda: best_recipe(model, [images], progress=False),
    }
    with pytest.raises(DataError, match=words):
        studies[study]()


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES.numpy(), LABELS, "images as a ndarray"),
        (IMAGES, LABELS.numpy(), "labels as a ndarray"),
        (IMAGES, [0, 3], "labels as a list"),
        (IMAGES, LABELS + 1, r"labels from 1 to 4 for a model of 4 classes \(0 to 3\)"),
        (IMAGES, LABELS - 100, r"labels from -100 to -97"),
        (IMAGES, torch.zeros(2, 6, 6, dtype=torch.int64), r"\[2, 6, 6\]; expected one class index an image"),
        (IMAGES, LABELS > 0, r"torch\.bool"),
        (IMAGES, LABELS[:1], "2 images with 1 labels"),
    ],
)
def test_labels_that_can_not_be_measured(images: Any, labels: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluate(Pair(), [(images, labels)], progress=False)


def test_labels_of_any_integer_type() -> None:
    model = Pair()
    results = [
        evaluate(model, [(IMAGES, LABELS.to(kind))], progress=False).loss
        for kind in (torch.int64, torch.int32, torch.uint8)
    ]
    assert results == [results[0]] * 3


# What uses it


class NanWhen(nn.Module):
    """Passes its input on, or NaN where the condition holds at the time of the call."""

    def __init__(self, broken: Callable[[], bool]) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        return x * math.nan if self.broken() else x


@pytest.fixture
def images() -> Tensor:
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 0] = 40.0  # so that the methods find different ranges
    return x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(*layers)
    quantize_(model)
    return model.eval()


def test_auto_never_chooses_nan(images: Tensor) -> None:
    """The method that would win has NaN in its logits."""
    model = network()
    best = calibrate(model, [images], method="auto", progress=False).candidates[0].method
    quantizer, winner = model[0]._input_quantizer, model[0]._input_quantizer.amax.item()
    model.append(NanWhen(lambda: quantizer._if_quant and quantizer.amax == winner))
    found = calibrate(model, [images], method="auto", progress=False)
    rows = {c.method: c for c in found.candidates}
    assert set(rows) == set(RANGES)
    assert (rows[best].sqnr_db, rows[best].agreement) == (-math.inf, 0)
    assert found.method != best
    assert math.isfinite(found.candidates[0].sqnr_db)
    assert bool(torch.isfinite(model(images)).all())


def test_auto_refuses_a_model_whose_logits_are_nan_anyway(images: Tensor) -> None:
    model = network().append(NanWhen(lambda: True))
    with pytest.raises(NonFiniteError, match="output of Sequential holds NaN"):
        calibrate(model, [images], method="auto", progress=False)
    assert all(m.amax is None for m in model.modules() if isinstance(m, TensorQuantizer)), "nothing is set"


class NanAtSmallRanges(nn.Sequential):
    """NaN where the first input's range is not the largest value, 40."""

    def forward(self, x: Tensor) -> Tensor:
        quantizer: Any = self[0]._input_quantizer
        broken = quantizer._if_quant and quantizer.amax is not None and quantizer.amax < 39
        return super().forward(x) * (math.nan if broken else 1.0)


def test_best_recipe_leaves_nan_out(images: Tensor) -> None:
    recipes = (Recipe(method="percentile", percentile=90), Recipe(method="max"))
    found = best_recipe(NanAtSmallRanges(*network()), [images], recipes=recipes, progress=False)
    assert [c.method for c in found.candidates] == ["max"]
    with pytest.raises(CalibrationError, match=r"no recipe could be applied.*NaN"):
        best_recipe(network().append(NanWhen(lambda: True)), [images], recipes=recipes, progress=False)


def test_sensitivity_ranks_nan_first() -> None:
    torch.manual_seed(0)
    model = set_target(CifarResNet(1, in_channels=1, quantize=Scheme()).eval(), "onnxruntime")
    images = torch.randn(6, 1, 12, 12)
    calibrate(model, [images], progress=False)
    culprit = model.layer2[0].conv1
    culprit.register_forward_hook(lambda m, _, y: y * math.nan if m._weight_quantizer._if_quant else y)
    found = qzoo.sensitivity(model, [images], progress=False)
    first = found.layers[0]
    assert (first.name, first.sqnr_db, first.agreement) == ("layer2.0.conv1", -math.inf, 0)
    assert first.sqnr_without_db > 0, "without it the rest is sound"
    assert found.sqnr_db == -math.inf
    assert "nan" not in str(found)


def test_evaluate_counts_nan_as_wrong() -> None:
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0]])
    batch = (torch.zeros(3, 1), torch.tensor([0, 0, 0]))
    found = evaluate(
        lambda x: logits, [batch], reference=lambda x: torch.nan_to_num(logits, 1.0), progress=False
    )
    assert found.top1 == pytest.approx(100 / 3)
    assert found.agreement == pytest.approx(200 / 3)
    assert found.sqnr_db == -math.inf


def test_features_against_numpy() -> None:
    """Cosine similarity, and which of the other images are the nearest, by hand."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(30, 6, generator=generator)
    noise = 0.5 * torch.randn(30, 6, generator=generator)
    found = qzoo.compare_features(
        lambda x: x + noise[: len(x)], [images], reference=nn.Identity(), neighbours=4, progress=False
    )
    exact, near = images.double().numpy(), (images + noise).double().numpy()
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (exact, near)]
    cosines = (units[0] * units[1]).sum(1)
    sets = []
    for unit in units:
        order = [
            sorted((j for j in range(30) if j != i), key=lambda j: -unit[i] @ unit[j]) for i in range(30)
        ]
        sets.append([set(row[:4]) for row in order])
    common = [len(a & b) / 4 for a, b in zip(*sets, strict=True)]
    assert found.images == 30
    assert found.cosine == pytest.approx(cosines.mean())
    assert found.lowest_cosine == pytest.approx(cosines.min())
    assert found.neighbour_agreement == pytest.approx(100 * np.mean(common))
    assert 20 < found.neighbour_agreement < 100
    assert found.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / ((near - exact) ** 2).sum()))


def test_features_that_are_not_finite_are_the_worst() -> None:
    images = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    broken = images.clone()
    broken[2, 0] = torch.nan
    found = qzoo.compare_features(
        lambda x: broken, [images], reference=nn.Identity(), neighbours=2, progress=False
    )
    assert found.lowest_cosine == -1
    assert found.neighbour_agreement < 100 * 7 / 8 + 1e-9
    assert found.sqnr_db == -math.inf


def test_features_that_cannot_be_compared() -> None:
    images, same = torch.randn(4, 5), nn.Identity()
    with pytest.raises(DataError, match="4 images, of which none has 5 neighbours"):
        qzoo.compare_features(same, [images], reference=same, progress=False)
    with pytest.raises(DataError, match=r"\[4, 3\] can't be compared"):
        qzoo.compare_features(lambda x: x[:, :3], [images], reference=same, neighbours=2, progress=False)
    with pytest.raises(ArgumentError, match="at least 1"):
        qzoo.compare_features(same, [images], reference=same, neighbours=0, progress=False)
