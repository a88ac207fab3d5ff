"""Sources: what they promise, and a user's folder with everything that can be wrong with it."""

import shutil

import numpy as np
import pytest
from PIL import Image

from workflows.config.loading import load_config
from workflows.dataset.sources import SOURCES, source_of
from workflows.dataset.sources.folder import listing
from workflows.errors import ConfigError, UserError


@pytest.mark.parametrize("name", SOURCES)
def test_images_have_the_shape_range_and_labels_that_are_promised(name):
    source = SOURCES[name]
    images, labels = source.load(pytest.fail)
    assert images.shape == (len(labels), *source.shape)
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    assert set(labels.tolist()) == set(range(source.num_classes))
    assert len(images) >= 1797
    assert min(np.bincount(labels)) > 0.8 * len(labels) / source.num_classes


def test_photographs_are_the_same_every_time_and_show_something():
    from workflows.dataset.sources.packaged import photos

    (a, labels), (b, _) = (photos(pytest.fail, size=32, each=40) for _ in range(2))
    assert np.array_equal(a, b)
    contrast = a.std(axis=(1, 2, 3))
    assert np.mean(contrast > 0.04) > 0.97
    means = np.stack([a[labels == c].mean(axis=(0, 2, 3)) for c in range(10)])
    assert np.linalg.norm(means[:, None] - means[None], axis=-1)[~np.eye(10, dtype=bool)].min() > 0.02


def test_the_ring_is_the_mixture_whose_denoiser_is_exact():
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.networks.exact import ring_of_gaussians
    from workflows.dataset.sources.drawn import RING

    images, labels = SOURCES["gmm"].load(pytest.fail)
    x = images[:, :, 0, 0] * 2 - 1
    means = ring_of_gaussians(**RING, schedule=Cosine()).means.detach().numpy()
    assert abs(x).max() < 1  # none at the edge: nothing was clipped
    error = 5 * np.sqrt(RING["variance"] / np.bincount(labels).min())
    for c in range(8):
        assert x[labels == c].mean(0) == pytest.approx(means[c], abs=error)
    assert (x - means[labels]).var() == pytest.approx(RING["variance"], rel=5 * np.sqrt(1 / len(x)))


def test_limit_takes_images_from_all_over():
    images, _ = source_of(load_config("gmm", ["data.limit=100"]).data).load(pytest.fail)
    everything, _ = SOURCES["gmm"].load(pytest.fail)
    assert np.array_equal(images[:3], everything[[0, 81, 163]])
    assert len(images) == 100


def test_scikit_image_missing_is_a_line(monkeypatch):
    import workflows.dataset.sources.packaged as packaged

    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="need scikit-image") as caught:
        SOURCES["photos32"].load(pytest.fail)
    assert "mmdistill[photos]" in caught.value.hint


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images each: gradients, 20 wide and 30 high."""
    root = tmp_path / "images"
    for c, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((30, 20, 3), 40 * i + c, np.uint8)).save(root / name / f"{i}.png")
    (root / ".hidden.png").write_text("not an image")
    (root / "notes.txt").write_text("neither")
    return root


def only_the_notes(line):
    """What is said of `folder`, and nothing else."""
    assert line == "left out: 1 .txt (not images)"


def load(folder, *overrides, say=only_the_notes):
    settings = ["data.source=folder", "data.extractor=pixels", "data.image_size=8", f"data.path={folder}", *overrides]
    return source_of(load_config("digits", settings).data).load(say)


def test_a_folder_with_and_without_classes(folder):
    images, labels = load(folder, "data.num_classes=2")
    assert images.shape == (10, 3, 8, 8)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert images[7] == pytest.approx(np.full((3, 8, 8), 81 / 255))
    images, labels = load(folder, "data.channels=1", "data.limit=10")
    assert images.shape == (10, 1, 8, 8)
    assert set(labels) == {0}


def test_classes_that_are_numbers_are_in_their_order_and_names_are_kept(tmp_path):
    for c in range(11):
        (tmp_path / str(c)).mkdir()
        content = Image.new("RGB", (9, 9), (20 * c,) * 3)
        content.save(tmp_path / str(c) / "a.png")
        content.save(tmp_path / str(c) / "no_suffix", "JPEG", quality=100)
    said = []
    images, labels = load(tmp_path, "data.num_classes=11", say=said.append)
    assert (sorted(labels.tolist()), said) == (sorted([*range(11)] * 2), [])
    assert images[:, 0, 0, 0] == pytest.approx(np.array(labels) * 20 / 255, abs=0.01)
    settings = ["data.source=folder", "data.image_size=8", "data.num_classes=11", f"data.path={tmp_path}"]
    assert source_of(load_config("digits", settings).data).classes() == tuple(map(str, range(11)))


def test_a_link_into_a_folder_above_adds_no_images(folder, tmp_path):
    shutil.move(folder / "dogs", tmp_path / "elsewhere")
    (folder / "dogs").symlink_to(tmp_path / "elsewhere")
    (folder / "cats" / "loop").symlink_to(folder / "cats")
    images, labels = load(folder, "data.num_classes=2")
    assert (len(images), labels.tolist()) == (10, [0] * 5 + [1] * 5)


def test_an_image_is_turned_upright_cut_in_its_centre_and_antialiased(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60:2] = 255  # in the centre, stripes a pixel wide: grey when antialiased
    pixels[:, :20], pixels[:, 60:] = (255, 0, 0), (0, 255, 0)  # beside it, what a centre crop leaves out
    pixels[:20, 20:60] //= 2  # darker at the top
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a" / "turned.png", exif=exif)
    images, _ = load(tmp_path, "data.num_classes=0", "data.image_size=8")
    bottom, top = images[0][:, 5:].mean(), images[0][:, :3].mean()
    assert bottom == pytest.approx(0.25, abs=0.03)
    assert top == pytest.approx(0.5, abs=0.03)
    assert abs(images[0][0] - images[0][1]).max() < 0.1  # no red, no green


def test_few_broken_images_are_skipped_and_counted_many_stop(folder):
    for i in range(190):
        Image.fromarray(np.full((30, 20, 3), i, np.uint8)).save(folder / "dogs" / f"more{i:03}.png")
    (folder / "cats" / "0.png").write_bytes(b"broken")
    (folder / "cats" / "1.png").write_bytes((folder / "cats" / "2.png").read_bytes()[:60])
    said = []
    images, labels = load(folder, "data.num_classes=2", say=said.append)
    assert (len(images), labels.tolist()) == (198, [0] * 3 + [1] * 195)
    notes, broken = said
    assert notes == "left out: 1 .txt (not images)"
    assert broken.startswith("2 of 200 images can't be read and are left out, such as ")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "cats" / "3.png")
    with pytest.raises(UserError, match=r"3 of 200 images can't be read in .*, such as .*0\.png"):
        load(folder, "data.num_classes=2")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=null"], "this recipe needs a folder of images"),
        (["data.path=/nowhere"], "/nowhere is not a folder"),
        (["data.path={empty}"], "no images in"),
        (["data.num_classes=3"], "data.num_classes: 3, but .* has 2 subfolders with images: cats, dogs"),
        (["data.path={cats}", "data.num_classes=2"], "in no subfolder, so it has no class"),
    ],
)
def test_a_folder_that_will_not_do_is_a_line(folder, overrides, said, tmp_path):
    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "cats": folder / "cats"}
    with pytest.raises(UserError, match=said) as caught:
        load(folder, *(text.format(**names) for text in overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.source=digit"], "'digit' is not one of digits, gmm"),
        (["data.image_size=8"], "image_size does not belong to source digits"),
        (["data.source=folder"], "image_size: the source folder needs one"),
        (["data.source=made", "data.image_size=8", "data.path=x"], "path does not belong to source made"),
        (
            ["data.source=folder", "data.extractor=pixels", "data.image_size=10"],
            "network.patch: 4 does not divide the image size 10",
        ),
    ],
)
def test_a_section_that_can_not_be_is_a_line(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config("digits", overrides)


def test_another_listing_when_a_folder_changes(folder):
    before = listing(str(folder))
    assert listing(str(folder)) == before
    (folder / "cats" / "0.png").unlink()
    assert listing(str(folder)) != before


@pytest.mark.parametrize(
    ("images", "said", "hint"),
    [
        (np.full((100, 3, 8, 8), 255.0), r"values in \[0, 1\] are expected, got \[255, 255\]", "divide them by 255"),
        (np.full((100, 3, 8, 8), -1.0), r"got \[-1, -1\]", ""),
        (np.full((100, 3, 8, 8), np.nan), r"got \[nan, nan\]", ""),
        (np.zeros((100, 8, 8)), r"images \[n, c, h, w\] are expected, got \[100, 8, 8\]", ""),
        (np.zeros((99, 1, 8, 8)), "99 images; at least 100 are needed", ""),
    ],
)
def test_images_that_will_not_do_are_a_line(images, said, hint, tmp_path):
    from workflows.dataset.shards import write_shards

    labels = np.zeros(len(images), int)
    with pytest.raises(UserError, match=f"mine: .*{said}") as caught:
        write_shards(tmp_path, source="mine", images=images, labels=labels, num_classes=0, holdout=0.2, rows=10)
    assert caught.value.hint == hint
