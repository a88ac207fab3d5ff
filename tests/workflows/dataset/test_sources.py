"""Sources: what they promise, and a user's folder with everything that can be wrong with it."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from workflows.config.loading import load_config
from workflows.dataset.shards import read_all, write_shards
from workflows.dataset.sources import SOURCES, emoji, source_of
from workflows.errors import ConfigError, UserError


def fetched():
    """Whether the emoji are here, or can be had."""
    return shutil.which("npm") is not None or emoji.kept().exists()


EMOJI = pytest.param("emoji32", marks=pytest.mark.skipif(not fetched(), reason="the emoji come by npm"))


@pytest.mark.parametrize("name", [EMOJI if name == "emoji32" else name for name in SOURCES])
def test_images_have_the_shape_range_and_labels_that_are_promised(name):
    source = SOURCES[name]
    images, labels = source.load()
    assert images.shape == (len(labels), *source.shape)
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    assert set(labels.tolist()) == set(range(source.num_classes))
    assert len(images) >= 1797
    assert min(np.bincount(labels)) > (0.8 * len(labels) / source.num_classes if name != "emoji32" else 80)


def test_photographs_are_the_same_every_time_and_show_something():
    from workflows.dataset.sources.packaged import photos

    (a, labels), (b, _) = (photos(size=32, each=40) for _ in range(2))
    assert np.array_equal(a, b)
    contrast = a.std(axis=(1, 2, 3))
    assert np.mean(contrast > 0.04) > 0.97
    means = np.stack([a[labels == c].mean(axis=(0, 2, 3)) for c in range(10)])
    assert np.linalg.norm(means[:, None] - means[None], axis=-1)[~np.eye(10, dtype=bool)].min() > 0.02


def test_the_ring_is_the_mixture_whose_denoiser_is_exact():
    from mmdistill_core.diffusion.schedules import Cosine
    from mmdistill_core.networks.exact import ring_of_gaussians
    from workflows.dataset.sources.drawn import RING

    images, labels = SOURCES["gmm"].load()
    x = images[:, :, 0, 0] * 2 - 1
    means = ring_of_gaussians(**RING, schedule=Cosine()).means.detach().numpy()
    assert abs(x).max() < 1  # none at the edge: nothing was clipped
    error = 5 * np.sqrt(RING["variance"] / np.bincount(labels).min())
    for c in range(8):
        assert x[labels == c].mean(0) == pytest.approx(means[c], abs=error)
    assert (x - means[labels]).var() == pytest.approx(RING["variance"], rel=5 * np.sqrt(1 / len(x)))


def test_limit_takes_images_from_all_over():
    images, _ = source_of(load_config("gmm", ["data.limit=100"]).data).load()
    everything, _ = SOURCES["gmm"].load()
    assert np.array_equal(images[:3], everything[[0, 81, 163]])
    assert len(images) == 100


def test_scikit_image_missing_is_a_line(monkeypatch):
    import workflows.dataset.sources.packaged as packaged

    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="need scikit-image") as caught:
        SOURCES["photos32"].load()
    assert "mmdistill[photos]" in caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.source=digit"], "'digit' is not one of digits, emoji32"),
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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(entries) is a package of emoji like npm's; an image of each, of one colour, transparent in its corners."""

    def made(entries):
        path = tmp_path / emoji.ARCHIVE
        with tarfile.open(path, "w:gz") as tar:

            def add(name, content):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

            add("package/emoji.json", json.dumps(entries).encode())
            images = [one["image"] for e in entries for one in (e, *e.get("skin_variations", {}).values())]
            for i, name in enumerate(reversed(images)):
                picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                picture.paste((10 * i, 0, 0, 255), (16, 16, 48, 48))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                add(f"package/img/twitter/64/{name}", buffer.getvalue())
            add("package/img/twitter/64/stray.png", b"")
        monkeypatch.setattr(emoji, "archive", lambda: path)
        return path

    return made


HAND = {"name": "HAND", "unified": "1F91A", "image": "hand.png", "category": "People & Body", "has_img_twitter": True,
        "skin_variations": {"1F3FB": {"unified": "1F91A-1F3FB", "image": "light.png", "has_img_twitter": True}}}  # fmt: skip
FLAG = {"name": "FLAG", "unified": "1F6A9", "image": "flag.png", "category": "Flags", "has_img_twitter": True}
SKIN = {"name": "SKIN", "unified": "1F3FB", "image": "skin.png", "category": "Component", "has_img_twitter": True}


def test_emoji_are_drawn_over_white_and_their_tones_belong_together(package):
    package([HAND, SKIN, FLAG, FLAG | {"image": "none.png", "has_img_twitter": False}])
    images, labels = emoji.twemoji(size=32)
    assert labels.tolist() == [emoji.CATEGORIES.index(name) for name in ("People & Body", "People & Body", "Flags")]
    assert emoji.emoji_groups() == ["1F91A", "1F91A", "1F6A9"]
    assert np.all(images[:, :, 0, 0] == 1)
    assert (images[:, 0, 16, 16] * 255).round().tolist() == [40, 30, 10], "each has its own picture"


def test_an_unknown_category_of_emoji_is_a_line(package):
    package([HAND | {"category": "Vehicles"}])
    with pytest.raises(UserError, match=r"emoji: HAND is of the category 'Vehicles', which is none of those known"):
        emoji.twemoji(size=32)


def test_emoji_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="and npm is not here") as caught:
        emoji.archive()
    assert caught.value.hint == f"npm pack {emoji.PACKAGE} --pack-destination {tmp_path}/mmdistill"
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match=r"npm can.t download .*: npm error network"):
        emoji.archive()
    emoji.kept().write_bytes(b"another")
    with pytest.raises(UserError, match="not the file of"):
        emoji.archive()


def test_images_of_a_group_are_held_out_together(tmp_path):
    images, groups = np.zeros((200, 1, 4, 4)), [str(i // 4) for i in range(200)]
    manifest = write_shards(
        tmp_path,
        source="x",
        images=images,
        labels=np.arange(200) % 2,
        num_classes=2,
        holdout=0.3,
        rows=70,
        groups=groups,
    )
    held = read_all(tmp_path).holdout.reshape(50, 4)
    assert (held.all(1) | ~held.any(1)).all()
    assert 0 < manifest.held_out < 120
