"""Kernel distance ("KID"): an unbiased squared maximum mean discrepancy, sound for few samples (Binkowski et al., 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor


def _sum(a: Tensor, b: Tensor, *, rows: int) -> float:
    """The sum of k(x, y) = (x . y / d + 1)^3 over all pairs of a [n, d] and b [m, d]."""
    return sum((((part @ b.T) / a.shape[1] + 1) ** 3).sum().item() for part in a.split(rows))


def _mmd(real: Tensor, fake: Tensor, *, rows: int) -> float:
    """mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)."""
    within = 0.0
    for a in (real, fake):
        own = ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum().item()
        within += (_sum(a, a, rows=rows) - own) / (len(a) * (len(a) - 1))
    return within - 2 * _sum(real, fake, rows=rows) / (len(real) * len(fake))


def kernel_distance(
    *,
    real: Tensor,
    fake: Tensor,
    subsets: int = 0,
    size: int = 1000,
    rng: torch.Generator | None = None,
    rows: int = 1024,
) -> float:
    """real [n, d], fake [m, d]. Over all pairs, or, as is usual, the mean over `subsets` random subsets of `size` (a smaller set is
    used whole). Both have the same expectation, which is 0 for equal distributions, and both may be negative. All pairs vary less.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"features: at least 2 samples of each set are needed, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    if not subsets:
        return _mmd(real, fake, rows=rows)
    parts = [[f[torch.randperm(len(f), generator=rng)[:size]] for f in (real, fake)] for _ in range(subsets)]
    return sum(_mmd(a, b, rows=rows) for a, b in parts) / subsets
