"""Frechet distance between two sets of features, through mergeable moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """count, mean [d] and scatter [d, d] = sum (f - mean)(f - mean)^T, in float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        if self.count < 2:
            raise ValueError(f"features: a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together, exactly (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        outer = torch.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + outer)


def moments(features: Tensor) -> Moments:
    """features [n, d]."""
    f = features.double()
    mean = f.mean(0)
    centred = f - mean
    return Moments(len(f), mean, centred.T @ centred)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (1706.08500).

    The trace of the root is the sum of roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric: no complex
    part to discard.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)
