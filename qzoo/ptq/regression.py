"""Fit weights to the wanted outputs by ridge regression on accumulated moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Ridges that are tried, as shares of the mean variance of the inputs."""


@dataclass
class CrossMoments:
    """Sums over samples of one layer's inputs x [n] and wanted outputs y [rows], by group; float64.

    Attributes:
        count: number of samples.
        x, y: sums, [groups, n] and [groups, rows].
        xx, yx, yy: sums of products, [groups, n, n], [groups, rows, n], [groups, rows].
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> CrossMoments:
        """Take the moments of samples: x [groups, samples, n] and y [groups, samples, rows]."""
        return cls(
            x.shape[1],
            x.sum(1).double(),
            y.sum(1).double(),
            (x.transpose(1, 2) @ x).double(),
            (y.transpose(1, 2) @ x).double(),
            y.double().square().sum(1),
        )

    def __add__(self, other: CrossMoments) -> CrossMoments:
        return CrossMoments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.yx + other.yx,
            self.yy + other.yy,
        )

    def __sub__(self, other: CrossMoments) -> CrossMoments:
        return CrossMoments(
            self.count - other.count,
            self.x - other.x,
            self.y - other.y,
            self.xx - other.xx,
            self.yx - other.yx,
            self.yy - other.yy,
        )

    @property
    def groups(self) -> int:
        return self.x.shape[0]

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def covariance(self) -> Tensor:
        """Compute the covariance of x, [groups, n, n]."""
        mean = self.x / self.count
        return self.xx / self.count - mean.unsqueeze(2) * mean.unsqueeze(1)

    def cross_covariance(self) -> Tensor:
        """Compute the covariance of y and x, [groups, rows, n]."""
        return self.yx / self.count - (self.y / self.count).unsqueeze(2) * (self.x / self.count).unsqueeze(1)

    def power(self) -> Tensor:
        """Compute the variance of y, [groups, rows]."""
        return self.yy / self.count - (self.y / self.count).square()

    def error(self, weight: Tensor) -> Tensor:
        """Compute the variance of ``weight x - y``, [groups, rows]; weight [groups, rows, n]."""
        w = weight.double()
        cross = (w * self.cross_covariance()).sum(2)
        return self.power() - 2 * cross + (torch.matmul(w, self.covariance()) * w).sum(2)

    def error_of_mean(self, weight: Tensor) -> Tensor:
        """Compute the mean of ``weight x - y``, [groups, rows]."""
        return torch.einsum("grn,gn->gr", weight.double(), self.x / self.count) - self.y / self.count


def wanted_weights(weight: Tensor, parts: list[CrossMoments]) -> Tensor:
    """Solve the ridge regression towards ``weight``: weights [groups, rows, n], float32.

    Each row has the strength that errs least on parts that it was not fitted to, or stays as it is.

    Args:
        weight: [groups, rows, n].
        parts: the moments of each part of the images; with one part nothing can be checked, and all stays.
    """
    if len(parts) < 2:
        return weight.clone()
    total = sum(parts[1:], start=parts[0])
    errors = torch.zeros(1 + len(STRENGTHS), *weight.shape[:2], dtype=torch.float64, device=weight.device)
    for part in parts:
        errors[0] += part.error(weight) * part.count
        for i, change in enumerate(_changes(weight, total - part)):
            errors[1 + i] += part.error(weight + change) * part.count
    best = errors.argmin(0)
    result = weight.clone()
    for i, change in enumerate(_changes(weight, total)):
        result += change * (best == 1 + i).unsqueeze(2)
    return result


def _changes(weight: Tensor, moments: CrossMoments) -> list[Tensor]:
    """``cov(y - weight x, x) (H + strength)^-1`` for each strength."""
    h = moments.covariance()
    left = (moments.cross_covariance() - torch.matmul(weight.double(), h)).float().transpose(1, 2)
    level = h.diagonal(dim1=1, dim2=2).clamp(min=0).mean(1).clamp(min=1e-20)
    unit = torch.eye(moments.n, dtype=torch.float64, device=h.device)
    changes = []
    for strength in STRENGTHS:
        ridge = h + (strength * level).reshape(-1, 1, 1) * unit
        factor, failed = torch.linalg.cholesky_ex(ridge.float())
        if failed.any():  # rounding: singular to float32's eye
            changes.append(torch.zeros_like(weight))
        else:
            changes.append(torch.cholesky_solve(left, factor).transpose(1, 2))
    return changes
