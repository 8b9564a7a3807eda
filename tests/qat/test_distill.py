"""The distillation loss against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qzoo.qat import distillation_loss


def test_it_is_the_divergence_of_softened_probabilities() -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 6, 10)) * 3

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher / 2.5), softmax(student / 2.5)
    expected = 2.5**2 * (p * np.log(p / q)).sum(1).mean()
    got = distillation_loss(torch.tensor(student), torch.tensor(teacher), 2.5)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_equal_logits_cost_nothing_and_the_teacher_gets_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    student = torch.randn(3, 5, requires_grad=True)
    assert distillation_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    distillation_loss(student, logits).backward()
    assert logits.grad is None
    assert student.grad is not None


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
