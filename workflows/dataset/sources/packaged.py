"""Images that come with the packages scikit-learn and scikit-image; nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from workflows.dataset.readers.decode import square
from workflows.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PHOTOGRAPHS = (
    "sklearn.datasets/images/china.jpg",
    "sklearn.datasets/images/flower.jpg",
    "skimage.data/astronaut.png",
    "skimage.data/chelsea.png",
    "skimage.data/coffee.png",
    "skimage.data/hubble_deep_field.jpg",
    "skimage.data/ihc.png",
    "skimage.data/motorcycle_left.png",
    "skimage.data/retina.jpg",
    "skimage.data/rocket.jpg",
)
"""Colour photographs, as package/file."""


def photograph_names() -> tuple[str, ...]:
    return tuple(Path(name).stem for name in PHOTOGRAPHS)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns 1,797 handwritten digits of 8x8 pixels in 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images[:, None] / 16.0, bunch.target


def photos(*, size: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `each` square crops of every photograph; the label is the number of the photograph.

    The side of a crop lies between a quarter of the photograph's shorter side and all of it, so that a crop shows something. No
    crop is enlarged. Raises UserError if scikit-image is not installed.
    """
    import numpy as np
    from PIL import Image

    if find_spec("skimage") is None:
        raise UserError("the photographs need scikit-image", hint="pip install 'mmdistill[photos]'")
    images, rng = np.empty((len(PHOTOGRAPHS) * each, 3, size, size), np.float32), np.random.default_rng(0)
    for i, name in enumerate(PHOTOGRAPHS):
        with Image.open(_path(name)) as opened:
            photograph = opened.convert("RGB")
        width, height = photograph.size
        for j in range(each):
            side = min(width, height) * 4.0 ** -rng.random()
            left, top = rng.random(2) * (width - side, height - side)
            pixels = square(photograph, size, (left, top, left + side, top + side))
            images[i * each + j] = np.asarray(pixels, np.float32) / 255
    return images, np.repeat(np.arange(len(PHOTOGRAPHS)), each)


def _path(name: str) -> Path:
    package, _, file = name.partition("/")
    spec = find_spec(package)
    assert spec is not None
    return Path(spec.origin or "").parent / file
