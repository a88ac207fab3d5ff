"""Arranges samples in one picture: a grid, or one line for each model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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


def lines(grids: Mapping[str, Path], *, of: int, width: int, gap: int = 2) -> Any:
    """Grids by title -> a PIL image with the first samples of each in one line, behind its title. A cell of all these grids holds
    the sample of the same noise, so the samples in a column belong together.

    of     lines of each grid that become one line
    width  of an image, in its own pixels
    """
    from PIL import Image, ImageDraw, ImageFont

    cell, sheets = cell_of(width, gap), [Image.open(path).convert("RGB") for path in grids.values()]
    columns, font = (sheets[0].width - gap) // cell, ImageFont.load_default(size=15)
    left = 24 + round(max(font.getlength(title) for title in grids))
    picture = Image.new("RGB", (left + of * columns * cell + gap, len(sheets) * cell + gap), "white")
    draw = ImageDraw.Draw(picture)
    for i, (title, sheet) in enumerate(zip(grids, sheets, strict=True)):
        draw.text((left - 12, round((i + 0.5) * cell)), title, "#22262b", font, anchor="rm")
        for j in range(of):
            line = sheet.crop((gap, gap + j * cell, sheet.width, gap + (j + 1) * cell))
            picture.paste(line, (left + j * columns * cell, gap + i * cell))
    return picture
