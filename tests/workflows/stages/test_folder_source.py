"""`data.source=folder`: a folder of images becomes a data set as with `mmdistill prepare`; errors name the recipe's fields."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from workflows.config.loading import load_config
from workflows.dataset.shards import read_all
from workflows.errors import UserError
from workflows.ingest.prepare import prepare_data_set
from workflows.rendering.screen import Screen
from workflows.stages.prepare import folder_fingerprint, in_terms_of_the_recipe, preparation_of


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images each, each of a single grey, and two files that are not images."""
    root = tmp_path / "images"
    for c, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((30, 20, 3), 40 * i + c, np.uint8)).save(root / name / f"{i}.png")
    (root / ".hidden.png").write_text("not an image")
    (root / "notes.txt").write_text("neither")
    return root


def section(folder, *overrides):
    settings = ["data.source=folder", "data.extractor=pixels", "data.image_size=8", f"data.path={folder}", *overrides]
    return load_config("digits", settings).data


def prepared(folder, dest, *overrides):
    """(images, labels, manifest, the text on the screen)."""
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=200, highlight=False))
    manifest = prepare_data_set(preparation_of(section(folder, *overrides), str(dest)), screen)
    rows = read_all(str(dest))
    return np.asarray(rows.images), np.asarray(rows.labels), manifest, shown.getvalue()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_with_and_without_classes(folder, tmp_path):
    for i in range(300):  # one shard holds 512 rows
        Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(folder / "dogs" / f"more{i:03}.png")
    images, labels, manifest, said = prepared(folder, tmp_path / "two", "data.num_classes=2")
    assert images.shape == (310, 3, 8, 8)
    assert (np.bincount(labels).tolist(), manifest.classes, len(manifest.shards)) == ([5, 305], ("cats", "dogs"), 1)
    assert sorted(set(images[labels == 0].ravel().tolist())) == [0, 40, 80, 120, 160]
    assert "labels: 2 classes by folders (cats, dogs); captions: none; left out: 1 .txt (not images)" in said
    settings = ["data.channels=1", "data.limit=120", "data.holdout=0.5", "data.shard_rows=8"]
    images, labels, manifest, said = prepared(folder, tmp_path / "one", *settings)
    assert (images.shape, manifest.num_classes, set(labels.tolist())) == ((120, 1, 8, 8), 0, {0})
    assert max(shard.rows for shard in manifest.shards) == 8
    assert 0 < manifest.held_out < 120


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_too_many_broken_images_are_a_line_without_options_of_another_command(folder, tmp_path):
    (folder / "cats" / "0.png").write_bytes(b"broken")
    match = r"data.path: .*1 of 10 images can't be read.* such as cats/0.png"
    with pytest.raises(UserError, match=match) as caught, in_terms_of_the_recipe():
        prepared(folder, tmp_path / "out", "data.num_classes=2")
    assert "--" not in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=null"], "this recipe needs a folder of images"),
        (["data.path=/nowhere"], "/nowhere is not a folder"),
        (["data.path={empty}"], "data.path: .*empty.* no "),
        (["data.num_classes=3"], "data.num_classes: 3, but .* has 2 folders with images: cats, dogs"),
        (["data.path={cats}", "data.num_classes=2"], "labels by folder need at least two folders"),
        (["data.path={loose}", "data.num_classes=2"], "loose.png is not in a class folder"),
    ],
)
def test_a_folder_that_will_not_do_is_a_line(folder, overrides, said, tmp_path):
    (tmp_path / "empty").mkdir()
    loose = shutil.copytree(folder, tmp_path / "loose")
    shutil.copy(folder / "cats" / "0.png", loose / "loose.png")
    names = {"empty": tmp_path / "empty", "cats": folder / "cats", "loose": loose}
    with pytest.raises(UserError, match=said) as caught:
        folder_fingerprint(section(folder, *(text.format(**names) for text in overrides)), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert "--labels" not in caught.value.hint


def test_another_fingerprint_when_a_folder_changes(folder, tmp_path):
    def fingerprint():
        return folder_fingerprint(section(folder, "data.num_classes=2"), str(tmp_path))

    before = fingerprint()
    assert fingerprint() == before
    (folder / "cats" / "0.png").unlink()
    assert fingerprint() != before
