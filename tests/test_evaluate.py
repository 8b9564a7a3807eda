"""``evaluate`` against hand-computed figures and published values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qzoo.accuracy import evaluate, wilson_interval
from qzoo.distributed import Group
from qzoo.errors import DataError, DistributedError

Batch = tuple[Tensor, Tensor]


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_of_a_published_table(
    successes: int, trials: int, interval: tuple[float, float]
) -> None:
    low, high = wilson_interval(successes, trials)
    assert (round(low / 100, 4), round(high / 100, 4)) == interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 10), (9421, 10_000), (10_000, 10_000)])
def test_wilson_bounds_solve_the_score_equation(successes: int, trials: int) -> None:
    """The bounds are the p with |share - p| = z sqrt(p (1 - p) / n)."""
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        p = bound / 100
        assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / trials), abs=1e-7)


def test_wilson_interval_refuses_what_is_no_share() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="is no share"):
            wilson_interval(successes, trials)


class Table(nn.Module):
    """Logits looked up by the image's only value."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.logits[x.flatten(1)[:, 0].long()]


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, list[Batch]]:
    """Logits [23, 8] of a model and of its reference, labels, and batches of 10, 10 and 3."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(23, 8, generator=generator)
    logits = reference + 0.4 * torch.randn(23, 8, generator=generator)
    labels = torch.randint(0, 8, (23,), generator=generator)
    images = torch.arange(23.0).view(-1, 1, 1, 1)
    return logits, reference, labels, list(zip(images.split(10), labels.split(10), strict=True))


def test_every_figure_against_numpy(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    logits, reference, labels, batches = case
    result = evaluate(Table(logits), batches, reference=Table(reference), progress=False)
    x, r, y = logits.double().numpy(), reference.double().numpy(), labels.numpy()
    ranks = (x > x[np.arange(23), y][:, None]).sum(1)
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (ranks == 0).mean())
    assert result.top5 == pytest.approx(100 * (ranks < 5).mean())
    assert result.top1 < result.top5 < 100
    assert result.top1_interval == wilson_interval(int((ranks == 0).sum()), 23)
    assert result.top5_interval == wilson_interval(int((ranks < 5).sum()), 23)
    losses = np.log(np.exp(x).sum(1)) - x[np.arange(23), y]
    assert result.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert result.agreement == pytest.approx(100 * (x.argmax(1) == r.argmax(1)).mean())
    assert 0 < result.agreement < 100
    assert result.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((r - x) ** 2).sum()), rel=1e-5)
    assert result.reference is not None
    assert result.reference.top1 == pytest.approx(100 * (r.argmax(1) == y).mean())
    assert result.images_per_second > 0


def test_batches_do_not_matter(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    """A mean over batches would weigh the images of the last, smaller one more."""
    logits, reference, labels, batches = case
    whole = [(torch.cat([images for images, _ in batches]), labels)]
    parts = evaluate(Table(logits), batches, reference=Table(reference), progress=False)
    once = evaluate(Table(logits), whole, reference=Table(reference), progress=False)
    for field in ("top1", "top5", "loss", "agreement", "sqnr_db"):
        assert getattr(parts, field) == pytest.approx(getattr(once, field), rel=1e-5), field


def test_itself_as_reference(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    logits, _, _, batches = case
    result = evaluate(Table(logits), batches, reference=Table(logits), progress=False)
    assert (result.agreement, result.sqnr_db) == (100.0, math.inf)
    alone = evaluate(Table(logits), batches, progress=False)
    assert (alone.agreement, alone.sqnr_db, alone.reference) == (None, None, None)


def test_fewer_classes_than_five() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    batch = (torch.arange(3.0).view(-1, 1, 1, 1), torch.tensor([0, 0, 0]))
    result = evaluate(Table(logits), [batch], progress=False)
    assert (result.top1, result.top5) == (pytest.approx(200 / 3), 100.0)


def test_eval_mode_within_and_the_old_mode_afterwards(
    case: tuple[Tensor, Tensor, Tensor, list[Batch]],
) -> None:
    logits, reference, _, batches = case
    model, other = Table(logits).train(), Table(reference).eval()
    evaluate(model, batches, reference=other, progress=False)
    assert not any(model.modes)
    assert (model.training, other.training) == (True, False)


def test_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(3, 2).train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))], progress=False)
    assert model.training


def test_frozen_parts_of_a_training_model_stay_in_eval_mode(
    case: tuple[Tensor, Tensor, Tensor, list[Batch]],
) -> None:
    logits, _, _, batches = case
    model = nn.Sequential(Table(logits), nn.BatchNorm1d(8)).train()
    model[1].eval()
    evaluate(model, batches, progress=False)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_any_callable_and_half_precision(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    logits, reference, _, batches = case
    table = Table(logits)
    result = evaluate(lambda x: table(x).half(), batches, reference=Table(reference), progress=False)
    expected = evaluate(table, batches, reference=Table(reference), progress=False)
    assert result.loss == pytest.approx(expected.loss, rel=1e-2)
    assert result.agreement == expected.agreement


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))]])
def test_no_images(batches: list[Batch]) -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(nn.Identity(), batches, progress=False)


def test_the_result_is_ready_for_json(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    logits, reference, _, batches = case
    result = evaluate(Table(logits), batches, reference=Table(reference), progress=False)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["reference"]["images"] == 23
    assert values["top1_interval"] == list(result.top1_interval)


def test_a_reference_of_zeros_has_no_signal() -> None:
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))]
    result = evaluate(lambda x: x + 1, batches, reference=lambda x: x, progress=False)
    assert result.sqnr_db == -np.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["sqnr_db"] is None


def test_recorded_logits_stand_for_the_reference(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    """Equal to the reference itself, in batches of any size; its speed alone is not known."""
    logits, reference, _, batches = case
    found = evaluate(Table(logits), batches, reference=reference, progress=False)
    expected = evaluate(Table(logits), batches, reference=Table(reference), progress=False)
    for field in ("agreement", "sqnr_db", "top1", "loss"):
        assert getattr(found, field) == getattr(expected, field)
    assert found.reference.top1 == expected.reference.top1
    one_by_one = [(images[i : i + 1], y[i : i + 1]) for images, y in batches for i in range(len(images))]
    again = evaluate(Table(logits), one_by_one, reference=reference, progress=False)
    assert (again.agreement, again.images) == (expected.agreement, 23)


@pytest.mark.parametrize(("count", "given"), [(22, 23), (24, 23), (8, 10), (0, 10)])
def test_recorded_logits_of_other_images_are_refused(
    case: tuple[Tensor, Tensor, Tensor, list[Batch]], count: int, given: int
) -> None:
    logits, reference, _, batches = case
    recorded = torch.cat([reference, reference])[:count]
    with pytest.raises(DataError, match=rf"are of {count} images, and the loader gave {given}"):
        evaluate(Table(logits), batches, reference=recorded, progress=False)


def test_recorded_logits_are_not_dealt_out(case: tuple[Tensor, Tensor, Tensor, list[Batch]]) -> None:
    logits, reference, _, batches = case
    with pytest.raises(DistributedError, match="to 2 processes: pass the model"):
        evaluate(Table(logits), batches, reference=reference, group=Group(0, 2), progress=False)
