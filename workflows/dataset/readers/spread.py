"""Even subsampling of indices, and grouping of neighbours by size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def evenly(n: int, limit: int | None, *, first: int = 0, last: int | None = None) -> np.ndarray:
    """Spreads at most `limit` indices evenly over n (i n / limit for i < limit), and returns those in [first, last)."""
    import numpy as np

    last = n if last is None else last
    if limit is None or limit >= n:
        return np.arange(first, last)
    return np.arange(-(-first * limit // n), -(-last * limit // n)) * n // limit


def grouped(sizes: list[int], most: int, *, count: int | None = None) -> list[tuple[int, int]]:
    """Groups neighbours into non-empty ranges [first, last). A range ends once it has `most` bytes or `count` elements."""
    groups: list[tuple[int, int]] = []
    first, held = 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= most or i + 1 - first == count:
            groups.append((first, i + 1))
            first, held = i + 1, 0
    return [*groups, (first, len(sizes))] if first < len(sizes) else groups
