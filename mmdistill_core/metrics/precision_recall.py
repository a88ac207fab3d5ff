"""Improved precision and recall: fidelity and diversity apart (Kynkaanniemi et al., 1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor


def _inside(points: Tensor, manifold: Tensor, radius: Tensor, *, rows: int) -> float:
    """Share of points that lie in at least one ball of `radius` [n] around `manifold` [n, d]."""
    hits = [(torch.cdist(part, manifold) <= radius).any(dim=1) for part in points.split(rows)]
    return torch.cat(hits).double().mean().item()


def _radius(features: Tensor, k: int, *, rows: int) -> Tensor:
    """Distance of each sample to its k-th nearest other, [n]."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(rows)])


def precision_recall(*, real: Tensor, fake: Tensor, k: int = 3, rows: int = 1024) -> tuple[float, float]:
    """real [n, d], fake [m, d] -> (share of fakes within the real manifold, share of reals within the fake one)."""
    precision = _inside(fake, real, _radius(real, k, rows=rows), rows=rows)
    recall = _inside(real, fake, _radius(fake, k, rows=rows), rows=rows)
    return precision, recall
