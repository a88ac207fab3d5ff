"""Pictures of samples: each stands where its noise has its place."""

import numpy as np
from PIL import Image

from workflows.rendering.grids import cell_of, image_grid, lines


def test_a_line_for_each_model_has_the_first_samples_of_its_grid_in_order(tmp_path):
    """Image i of the model m is grey of the value 10 m + i, on 24 screen pixels a side and more."""
    files = {}
    for m, title in enumerate(("teacher, 256 steps", "student, 1 step")):
        values = np.arange(20, dtype=np.float32) + 10 * (m + 1)
        images = np.broadcast_to(values[:, None, None, None] / 127.5 - 1, (20, 1, 8, 8))
        files[title] = tmp_path / f"{m}.png"
        image_grid(images, columns=5).save(files[title])
    picture = np.asarray(lines(files, of=2, width=8).convert("L"))
    cell = cell_of(8)
    assert picture.shape[0] == 2 * cell + 2
    left = picture.shape[1] - 2 - 10 * cell
    assert left > 100, "room for the titles"
    for m in range(2):
        row = picture[2 + m * cell + cell // 2, left + cell // 2 :: cell][:10]
        assert row.tolist() == [10 * (m + 1) + i for i in range(10)]
        assert (picture[m * cell : (m + 1) * cell, :left] < 128).any(), "its title"


def test_colour_stays_colour(tmp_path):
    images = np.full((10, 3, 32, 32), -1, np.float32)
    images[:, 1] = 1
    image_grid(images, columns=10).save(tmp_path / "a.png")
    picture = lines({"a": tmp_path / "a.png"}, of=1, width=32)
    assert picture.getpixel((picture.width - 20, 20)) == (0, 255, 0)
    assert isinstance(picture, Image.Image)
