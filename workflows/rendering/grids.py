"""Arranges samples as a grid in one picture."""

from __future__ import annotations

from typing import Any

import numpy as np


def _scale(width: int) -> int:
    return max(1, round(48 / width))


def cell_of(width: int, gap: int = 2) -> int:
    """Distance in screen pixels from one image of a grid to the next."""
    return width * _scale(width) + gap


def image_grid(images: np.ndarray, *, columns: int, pixel: int | None = None, gap: int = 2) -> Any:
    """Images [n, c, h, w] in [-1, 1], with c 1 or 3 -> a PIL image of a grid with white edges.

    pixel  screen pixels for each pixel of an image; default: as many as make an image about 48 wide
    """
    from PIL import Image

    n, channels, height, width = images.shape
    scale = pixel or _scale(width)
    bytes_ = ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    bytes_ = bytes_.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, np.uint8)
    for i, image in enumerate(bytes_):
        top, left = gap + (i // columns) * cell_h, gap + (i % columns) * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
