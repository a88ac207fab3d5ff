"""Data sets by name. A source returns images [n, c, h, w] in [0, 1], labels [n] and the number of classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def digits() -> tuple[np.ndarray, np.ndarray, int]:
    """1,797 handwritten digits of 8x8 pixels, 10 classes, from scikit-learn's package: nothing is downloaded."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images[:, None] / 16.0, bunch.target, 10


SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray, int]]] = {"digits": digits}
