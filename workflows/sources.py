"""Data sets by name. What is known before loading stands beside the loader, so that a configuration can be checked against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Source:
    """`load` gives images [n, c, h, w] in [0, 1] and labels [n]; `shape` is (c, h, w); `num_classes` 0: no labels."""

    shape: tuple[int, int, int]
    num_classes: int
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits of 8x8 pixels, 10 classes, from scikit-learn's package: nothing is downloaded."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images[:, None] / 16.0, bunch.target


SOURCES: dict[str, Source] = {"digits": Source(shape=(1, 8, 8), num_classes=10, load=_digits)}
