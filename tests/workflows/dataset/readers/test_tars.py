"""WebDataset tars: samples, labels and captions beside the images, compressed ones, and what can be wrong."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from pictures import array, encoded, errors, good, load, png, read
from PIL import Image

from workflows.dataset.readers import list_source, read_unit
from workflows.errors import UserError


def tarred(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first, last, cls="{c}", **siblings):
    """Members of images with a class, and more siblings by extension; {i} is the number, {c} the class."""
    for i in range(first, last):
        yield f"{i:04}.png", png(i)
        for extension, text in ({"cls": cls} if cls else {}).items() | siblings.items():
            yield f"{i:04}.{extension}", text.replace("{i}", str(i)).replace("{c}", str(i % 3))


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        list_source(str(source), **options)
    assert "\n" not in str(caught.value) + caught.value.hint
    return str(caught.value)


def test_what_webdatasets_own_writer_wrote(tmp_path):
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"shard-{shard:03}.tar")) as writer:
            for i in range(5 * shard, 5 * shard + 5):
                writer.write(
                    {"__key__": f"a/{i:04}", "png": png(i), "cls": i % 3, "txt": f"number {i}", "npy": b"other"}
                )
    listing, items = load(tmp_path, unit_bytes=1)
    assert (listing.kind, listing.count, listing.classes) == ("webdataset", None, ())
    assert (listing.labelled, listing.captioned, len(listing.units)) == ("cls", "txt", 2)
    assert [item.key for item in items] == [f"shard-{i // 5:03}.tar#a/{i:04}.png" for i in range(10)]
    assert [(item.label, item.caption) for item in items] == [(i % 3, f"number {i}") for i in range(10)]
    assert [item.image for item in items] == [png(i) for i in range(10)]
    assert len(load(tmp_path)[0].units) == 1


def test_what_img2dataset_wrote(tmp_path):
    """A table of each tar's rows lies beside it."""
    for shard in ("00000", "00001"):
        tarred(
            tmp_path / f"{shard}.tar", samples(0, 5, cls=None, txt="number {i}", json='{"caption": "x", "url": "y"}')
        )
        pq.write_table(pa.table({"url": ["y"] * 5, "caption": ["x"] * 5}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    listing, items = load(tmp_path)
    assert (listing.kind, listing.captioned, len(items)) == ("webdataset", "txt", 10)
    assert [item.caption for item in items] == [f"number {i}" for i in range(5)] * 2
    assert listing.left_out == ((".json", "beside the tar files", 2), (".parquet", "beside the tar files", 2))
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "more.parquet")
    assert "holds both Parquet files (00000.parquet) and tar files (00000.tar)" in refused(tmp_path)


def test_one_split_must_be_named(tmp_path):
    for i, split in enumerate(("train", "train", "validation")):
        tarred(tmp_path / f"imagenet1k-{split}-000{i}.tar", samples(3 * i, 3 * i + 3))
    with pytest.raises(UserError, match=r"more than one split: train \(.*\), validation \(.*\)") as caught:
        list_source(str(tmp_path))
    assert caught.value.hint == f"name one: {tmp_path}/imagenet1k-train-*.tar"
    assert len(load(f"{tmp_path}/imagenet1k-train-*.tar")[1]) == 6


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar.bz2", "w:bz2"), ("x.tar", "w")]
)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_compressed_ones_and_long_names(tmp_path, name, mode, form):
    long = "d/" * 40 + "é" * (10 if form == tarfile.USTAR_FORMAT else 90)
    members = [(f"{long}.png", png(0)), (f"{long}.cls", "7"), ("b.png", png(1)), ("b.cls", "2")]
    tarred(tmp_path / name, members, mode, format=form)
    _, items = load(tmp_path)
    assert [(item.key, item.image, item.label) for item in items] == [
        (f"{name}#{long}.png", png(0), 7),
        (f"{name}#b.png", png(1), 2),
    ]


def test_fields_of_json(tmp_path):
    text = json.dumps({"label": "kind {c}", "caption": "number {i}", "other": None})
    tarred(tmp_path / "x.tar", samples(0, 6, cls=None, json=text))
    listing, items = load(tmp_path)
    assert (listing.labelled, listing.captioned, listing.classes) == (
        "label",
        "caption",
        ("kind 0", "kind 1", "kind 2"),
    )
    assert [item.label for item in items] == [i % 3 for i in range(6)]
    (tmp_path / "classes.json").write_text('["kind 2", "kind 1", "kind 0"]')
    listing, items = load(tmp_path / "x.tar", labels=str(tmp_path / "classes.json"), label_column="label")
    assert [(item.label, item.caption) for item in items] == [(2 - i % 3, f"number {i}") for i in range(6)]
    assert "no label kind in the first 6 samples, 0000 to 0005, which have json" in refused(
        tmp_path, label_column="kind"
    )


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("[0, 1, 0]", "0000: label holds a list of 3 values, such as one-hot or several classes"),
        ("0.5", "0000: label holds 0.5, which is neither a name nor a whole number"),
        ('{"id": 1}', "0000: label holds {'id': 1}, which is neither"),
    ],
)
def test_labels_that_are_none_are_refused_for_what_they_are(tmp_path, label, said):
    tarred(tmp_path / "x.tar", samples(0, 6, cls=None, json=f'{{"label": {label}}}'))
    for column in (None, "label"):
        assert said in refused(tmp_path, label_column=column)
    assert {item.label for item in load(tmp_path, labels="none")[1]} == {None}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_compressed_in_several_pieces(tmp_path, pack):
    content = tarred(tmp_path / "0", samples(0, 9)).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(b"".join(pack(content[i : i + 5000]) for i in range(0, len(content), 5000)))
    _, items = load(tmp_path / "x.tar.gz")
    assert [item.label for item in items] == [i % 3 for i in range(9)]
    (tmp_path / "x.tar.gz").write_bytes(pack(content) * 2)
    assert list(errors(load(tmp_path / "x.tar.gz")[1])) == ["x.tar.gz#~end"]


def test_what_follows_the_end_mark_is_told(tmp_path):
    parts = [tarred(tmp_path / f"{i}", samples(3 * i, 3 * i + 3)).read_bytes() for i in (0, 1)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    _, items = load(tmp_path / "x.tar")
    assert len(good(items)) == 3
    said = "the data after the tar's end mark is not read; does the file hold several tars?"
    assert errors(items) == {"x.tar#~end": said}
    (tmp_path / "x.tar").write_bytes(parts[0] + b"\0" * 3 * 2**20)
    assert not errors(load(tmp_path / "x.tar")[1])


def test_boxes_are_no_captions(tmp_path):
    tarred(tmp_path / "x.tar", samples(0, 6, cls=None, txt="0 0.5 0.5 0.25 0.25\n"))
    listing, counted = list_source(str(tmp_path)), Counter()
    items = [item for unit in listing.units for item in read_unit(listing, unit, left_out=counted)]
    assert (listing.captioned, {item.caption for item in items}) == ("", {None})
    assert counted == {(".txt", "boxes, not captions"): 6}
    tarred(tmp_path / "x.tar", samples(0, 6, cls=None, txt="0 0.5 0.5 0.25 0.25\n", json='{"caption": "a {i}"}'))
    assert [item.caption for item in load(tmp_path)[1]] == [f"a {i}" for i in range(6)]


def test_a_caption_in_json_with_half_an_emoji_can_be_written(tmp_path):
    tarred(tmp_path / "x.tar", samples(0, 2, cls=None, json=json.dumps({"caption": "a cat \ud83d"})))
    assert [item.caption for item in load(tmp_path)[1]] == ["a cat ?"] * 2


def test_a_list_of_classes_holds_the_numbers(tmp_path):
    tarred(tmp_path / "x.tar", samples(0, 6))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    listing, items = load(tmp_path / "x.tar", labels=str(tmp_path / "classes.txt"))
    assert listing.classes == ("a", "b")
    assert errors(items) == {f"x.tar#{i:04}.png": "label 2 is not among the 2 classes" for i in (2, 5)}
    assert {item.label for item in load(tmp_path / "x.tar", labels="none")[1]} == {None}


def test_numbers_that_are_no_classes(tmp_path):
    """Where no list of classes is given: an identifier for a label would be a class list of a billion."""
    labels = ["0", "1234567890", "99999", "100000", "-1", "-2", "9" * 400]
    members = [(f"{i}.{kind}", c) for i, label in enumerate(labels) for kind, c in (("png", png(i)), ("cls", label))]
    tarred(tmp_path / "x.tar", members)
    _, items = load(tmp_path)
    assert {item.key: item.label for item in good(items).values()} == {
        "x.tar#0.png": 0,
        "x.tar#2.png": 99_999,
        "x.tar#4.png": None,
    }
    said = "is not a class: classes are numbers from 0 to 99,999"
    wrong = {1: "1234567890", 3: "100000", 5: "-2", 6: "9" * 20}
    assert errors(items) == {f"x.tar#{i}.png": f"label {label} {said}" for i, label in wrong.items()}


def test_labels_and_captions_by_name_in_files(tmp_path):
    tarred(tmp_path / "x.tar", samples(0, 4, cls=None))
    (tmp_path / "l.json").write_text(json.dumps({f"{i:04}.png": "ba"[i % 2] for i in range(3)}))
    rows = [{"key": f"./{i:04}", "caption": c} for i in range(3) for c in (f"c{i}", "further")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"labels": str(tmp_path / "l.json"), "captions": str(tmp_path / "c.jsonl")}
    listing, items = load(tmp_path / "x.tar", **options)
    assert listing.classes == ("a", "b")
    assert [(item.label, item.caption) for item in items[:3]] == [(1, "c0"), (0, "c1"), (1, "c2")]
    assert errors(items) == {"x.tar#0003.png": f"{tmp_path}/l.json has no label for 0003.png"}
    assert listing.left_out == (("captions", "beyond the first of an image", 3),)
    assert [item.caption for item in load(tmp_path / "x.tar", captions=options["captions"])[1]] == [
        "c0",
        "c1",
        "c2",
        None,
    ]


def test_tables_of_two_stores_are_told_apart(tmp_path):
    """Their paths are the same, as are those of two servers that a process reads in turn."""
    stores = []
    for name, label in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        tarred(tmp_path / name / "x.tar", samples(0, 2, cls=None))
        (tmp_path / name / "l.json").write_text(json.dumps({"0000.png": label, "0001.png": 1 - label}))
        stores.append(DirFileSystem(str(tmp_path / name)))
    listing = list_source("x.tar", labels="l.json", filesystem=stores[0])
    assert [[item.label for item in read(listing, store)] for store in stores] == [[0, 1], [1, 0]]


def test_the_limit_takes_the_first_ones_and_says_so(tmp_path):
    for shard in range(3):
        tarred(tmp_path / f"{shard}.tar", samples(5 * shard, 5 * shard + 5))
    for unit_bytes in (1, 10**9):
        listing, items = load(tmp_path, limit=7, unit_bytes=unit_bytes)
        assert listing.count == 7
        assert listing.notes == ("the first 7 images: the total is not known before everything is read",)
        assert [item.image for item in items] == [png(i) for i in range(7)]
    assert load(tmp_path, limit=99)[0].count == 15


def test_samples_that_are_not_whole(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *samples(0, 2),
        ("README.md", "not a sample"),
        ("._0003.png", "Apple's"),
        ("text.cls", "1"),
        ("two.jpg", png(5)),
        ("two.png", png(6)),
        ("two.cls", "0"),
        ("bare.png", png(7)),
        ("word.png", png(8)),
        ("word.cls", "cat"),
        ("again.png", png(9)),
        ("again.png", png(9)),
        ("again.cls", "1"),
        ("link.png", link),
        ("0001.png", png(10)),
        ("0001.cls", "1"),
    ]
    tarred(tmp_path / "x.tar", members)
    _, items = load(tmp_path)
    assert sorted(good(items)) == ["x.tar#0000.png", "x.tar#0001.png", "x.tar#bare.png"]
    assert good(items)["x.tar#bare.png"].label is None
    assert errors(items) == {
        "x.tar#text": "no image beside cls: the files of a sample must be adjacent in the tar",
        "x.tar#two.jpg": "which is the image? jpg, png: name one as the image column",
        "x.tar#word.png": "label cat is not in the class list",
        "x.tar#again.png": "again.png occurs twice",
        "x.tar#link": "link.png is a link, or not a regular file",
        "x.tar#0001.png~8": "the tar has the name 0001.png twice",
    }
    _, items = load(tmp_path, image_column="jpg")
    assert sorted(good(items)) == ["x.tar#two.jpg"]


def test_a_picture_among_several(tmp_path):
    tarred(tmp_path / "x.tar", [("a.mask.png", png(0)), ("a.jpg", png(1)), ("b.crop.png", png(2))])
    _, items = load(tmp_path)
    assert [(item.key, item.image) for item in items] == [("x.tar#a.jpg", png(1)), ("x.tar#b.crop.png", png(2))]


def test_names_that_lead_outside_are_only_names(tmp_path):
    members = [("../../up.png", png(0)), ("/etc/passwd.png", png(1)), ("C:/x.png", png(2)), ("./a//b.png", png(3))]
    tarred(tmp_path / "x.tar", members)
    before = sorted(tmp_path.parent.rglob("*"))
    _, items = load(tmp_path)
    assert [item.key for item in items] == [
        f"x.tar#{name}" for name in ("up.png", "etc/passwd.png", "x.png", "a/b.png")
    ]
    assert not errors(items)
    assert sorted(tmp_path.parent.rglob("*")) == before


def cut(content, how):
    """A tar of five samples, damaged; how many of them are left."""
    if how == "in the middle of an image":
        return content[: content.index(png(3)) + 100], 3
    if how == "in a header":
        return content[: content.index(b"0003.png") + 100], 3
    if how == "between two members":
        return content[: content.index(b"0003.png")], 3
    if how == "a header that is none":
        at = content.index(b"0003.png")
        return content[:at] + b"\xff" * 512 + content[at + 512 :], 3
    assert how == "compressed"
    small = gzip.compress(content, 1)
    return small[: int(len(small) * 0.75)], None


@pytest.mark.parametrize(
    "how",
    ["in the middle of an image", "in a header", "between two members", "a header that is none", "compressed"],
)
def test_a_tar_that_is_cut_gives_what_is_whole_and_says_so(tmp_path, how):
    content = tarred(tmp_path / "x.tar", samples(0, 5, cls=None)).read_bytes()
    damaged, left = cut(content, how)
    (tmp_path / "x.tar").write_bytes(damaged)
    tarred(tmp_path / "y.tar", samples(5, 8, cls=None))
    _, items = load(tmp_path)
    assert [key for key in errors(items)] == ["x.tar#~end"]
    assert errors(items)["x.tar#~end"].startswith("the tar is broken or cut here: ")
    found = [item.image for item in items if item.image]
    if left is not None:
        assert found == [png(i) for i in (*range(left), *range(5, 8))]
    assert 3 < len(found) < 8


@pytest.mark.parametrize("content", [b"", b"<html>no such page</html>" * 100, b"\0" * 10240, b"\x1f\x8b\x08broken"])
def test_a_file_that_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    said = refused(tmp_path)
    assert "no tar has an image" in said
    tarred(tmp_path / "b.tar", samples(0, 2))
    _, items = load(tmp_path)
    assert len(good(items)) == 2
    assert list(errors(items)) == (
        [] if content[:1] == b"\0" else ["a.tar#~end"]
    )  # an empty tar is two blocks of zeros


def test_members_that_are_too_large(tmp_path, monkeypatch):
    members = [*samples(0, 2), ("big.png", b"\0" * 300_000), ("big.cls", "1"), *samples(2, 4)]
    monkeypatch.setattr("workflows.dataset.readers.tars.MAX_BYTES", 200_000)
    tarred(tmp_path / "x.tar", members)
    _, items = load(tmp_path)
    assert (len(good(items)), list(errors(items).values())) == (4, ["big.png has 300,000 bytes, more than 200,000"])
    (tmp_path / "x.tar").unlink()
    tarred(tmp_path / "x.tar.gz", members, "w:gz")
    _, items = load(tmp_path)
    assert len(good(items)) == 2
    assert re.search("big.png has 300,000 bytes; what follows in a compressed tar is not read", str(errors(items)))


@pytest.mark.parametrize(("size", "images"), [(10_000, 1000), (10, 20)])
def test_a_sample_is_bounded_however_many_siblings_it_has(tmp_path, monkeypatch, size, images):
    """Frames of a video gather in one sample: what is past its bytes or its number is not kept."""
    monkeypatch.setattr("workflows.dataset.readers.tars.MAX_BYTES", 200_000)
    monkeypatch.setattr("workflows.dataset.readers.tars.MOST_IMAGES", images)
    frames = [(f"video.f{i:04}.jpg", bytes([i % 256]) * size) for i in range(400)]
    tarred(tmp_path / "x.tar", [*samples(0, 1, cls=None), *frames, *samples(1, 2, cls=None)])
    listing = list_source(str(tmp_path))
    tracemalloc.start()
    items = read(listing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # the frames are 4 MB
    said = f"the files video.* are more than {images:,} images, or more than 200,000 bytes together"
    assert errors(items) == {"x.tar#video.f0000.jpg": said}
    assert len(good(items)) == 2


def test_a_bomb_in_the_headers(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 10**9
    content = tarred(tmp_path / "x.tar", samples(0, 2)).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        end = archive.getmembers()[-1].offset_data + 512  # of a class, in a block
    (tmp_path / "x.tar").write_bytes(content[:end] + header.tobuf(tarfile.USTAR_FORMAT) + bytes(10**6))
    _, items = load(tmp_path)
    assert (len(good(items)), list(errors(items).values())) == (
        2,
        ["the tar is broken or cut here: a header of 1,000,000,000 bytes"],
    )


def test_memory_is_that_of_one_sample_whatever_the_tar_has(tmp_path):
    """Peaks of allocation (deterministic, no clock): that of 1,500 members is that of 200."""
    peaks = []
    for count in (200, 1500):
        path = tarred(tmp_path / f"{count}.tar", ((f"{i}.png", bytes([i % 256]) * 5000) for i in range(count)))
        listing = list_source(str(path))
        tracemalloc.start()
        assert sum(1 for unit in listing.units for _ in read_unit(listing, unit)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1300 * 200  # a mark of each name is kept; a header would be 1,000 bytes or more


def test_a_tar_that_is_gone(tmp_path):
    listing = list_source(str(tarred(tmp_path / "x.tar", samples(0, 2))))
    (tmp_path / "x.tar").unlink()
    assert errors(read(listing)) == {"x.tar#~end": "it is no longer there"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "folders"}, "labels by folder need at least two folders, but all images are in one"),
        ({"labels": "{here}/classes.txt"}, "lists classes, but the first sample, a, has no label"),
        ({"caption_column": "txt"}, "no caption txt in the first sample, a, which has none"),
    ],
)
def test_what_a_tar_does_not_have(tmp_path, options, said):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    tarred(tmp_path / "x.tar", [("a.png", png(0))])
    options = {name: value.format(here=tmp_path) for name, value in options.items()}
    assert said in refused(tmp_path / "x.tar", **options)


# Tars as people make them


def made(path, n=9, **siblings):
    """A tar of n images; `siblings` by extension give the content of each, None for no file. {} stands for the number in names."""
    members = []
    for i in range(n):
        members.append((f"{i:03}.png", png(i)))
        for extension, of in siblings.items():
            if (content := of(i)) is not None:
                members.append((f"{i:03}.{extension}", content))
    return tarred(path, members)


def counted(listing):
    """What reading it leaves out, beyond what the listing tells."""
    left = Counter()
    for unit in listing.units:
        for _ in read_unit(listing, unit, left_out=left):
            pass
    return dict(left)


@pytest.mark.parametrize("first", [1, 60])
def test_one_sample_does_not_decide_for_all(tmp_path, first):
    made(
        tmp_path / "x.tar",
        70,
        cls=lambda i: f"{i % 3}" if i >= first else None,
        txt=lambda i: f"number {i}" if i >= first else None,
    )
    listing, items = load(tmp_path)
    assert (listing.labelled, listing.captioned) == ("cls", "txt")
    assert [item.label for item in items] == [i % 3 if i >= first else None for i in range(70)]
    assert [item.caption for item in items] == [f"number {i}" if i >= first else None for i in range(70)]
    assert not errors(items)


def test_captions_that_come_after_all_that_is_looked_at_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("workflows.dataset.readers.tars.LOOKED", 5)
    made(tmp_path / "x.tar", txt=lambda i: f"number {i}" if i > 6 else None)
    listing, items = load(tmp_path)
    assert (listing.captioned, bool(listing.caption_columns)) == ("", True)
    assert [item.caption for item in items] == [None] * 7 + ["number 7", "number 8"]
    assert {item.caption for item in load(tmp_path, captions="none")[1]} == {None}


@pytest.mark.parametrize(
    "name",
    ["{i:03}.05", "photo.{i:03}", "photo.{i}.final", "a.b{i}", "dir.v1/{i}", "2024-01-{i:02}.12.30.45", "v1.{i}_2.{i}"],
)
def test_keys_with_dots(tmp_path, name):
    members = [
        (f"{name.format(i=i)}.{kind}", content)
        for i in range(12)
        for kind, content in (("png", png(i)), ("cls", f"{i % 3}"), ("txt", f"number {i}"))
    ]
    tarred(tmp_path / "x.tar", members)
    _, items = load(tmp_path)
    assert not errors(items)
    assert [item.key for item in items] == [f"x.tar#{name.format(i=i)}.png" for i in range(12)]
    assert [(item.image, item.label, item.caption) for item in items] == [
        (png(i), i % 3, f"number {i}") for i in range(12)
    ]


def test_several_images_of_a_sample_are_still_one(tmp_path):
    members = [
        (f"{i:03}.{kind}", content)
        for i in range(4)
        for kind, content in (("jpg", png(i)), ("seg.png", png(9)), ("cls", f"{i % 2}"), ("npy", b"x"))
    ]
    listing, items = load(tarred(tmp_path / "x.tar", members))
    assert [(item.image, item.label) for item in items] == [(png(i), i % 2) for i in range(4)]
    assert counted(listing) == {(".seg.png", "further images of a sample"): 4, (".npy", "not images"): 4}
    both = [(f"{i:03}.{kind}.png", png(i)) for i in range(4) for kind in ("img", "mask")]
    (tmp_path / "x.tar").unlink()
    _, items = load(tarred(tmp_path / "y.tar", both))
    assert set(errors(items).values()) == {"which is the image? img.png, mask.png: name one as the image column"}
    assert len(good(load(tmp_path, image_column="img.png")[1])) == 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_the_encoding(tmp_path, encoding):
    made(
        tmp_path / "x.tar",
        cls=lambda i: f"{i % 3}".encode(encoding),
        json=lambda i: json.dumps({"caption": f"é {i}"}, ensure_ascii=False).encode(encoding),
    )
    _, items = load(tmp_path)
    assert [(item.label, item.caption) for item in items] == [(i % 3, f"é {i}") for i in range(9)]


def test_a_caption_in_another_encoding_names_its_member(tmp_path):
    made(tmp_path / "x.tar", txt=lambda i: b"it\x92s one" if i == 5 else b"plain")
    _, items = load(tmp_path)
    assert errors(items) == {"x.tar#005.png": "005.txt: the caption is not UTF-8 text (byte 0x92 in line 1)"}
    assert len(good(items)) == 8


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("{c}/{i:03}", ("cat", "dog", "eel")),
        ("set/{c}/{i:03}", ("cat", "dog", "eel")),
        ("./set/{c}/deep/{i:03}", ("cat", "dog", "eel")),
        ("{n}/{i:03}", ("2", "9", "10")),
    ],
)
def test_class_folders(tmp_path, names, classes):
    order = classes[::-1]
    keys = [names.format(c=order[i % 3], n=order[i % 3], i=i) for i in range(12)]
    for part in range(2):
        tarred(tmp_path / f"{part}.tar", [(f"{keys[i]}.png", png(i)) for i in range(part, 12, 2)])
    listing, items = load(tmp_path)
    assert (listing.labelled, listing.classes) == ("folders", classes)
    assert {item.image: classes[item.label] for item in items} == {png(i): order[i % 3] for i in range(12)}
    (tmp_path / "classes.json").write_text(json.dumps(["zebra", *order]))
    listing, items = load(f"{tmp_path}/*.tar", labels=str(tmp_path / "classes.json"))
    assert {item.image: listing.classes[item.label] for item in items} == {png(i): order[i % 3] for i in range(12)}
    assert {item.label for item in load(f"{tmp_path}/*.tar", labels="none")[1]} == {None}


def test_folders_of_images_with_captions_are_classes_only_if_asked(tmp_path):
    """Shards of captioned images often lie in folders that mean nothing."""
    members = [m for i in range(8) for m in ((f"{i // 4:05}/{i}.png", png(i)), (f"{i // 4:05}/{i}.txt", "a word"))]
    tarred(tmp_path / "x.tar", members)
    listing, items = load(tmp_path)
    assert listing.notes == (
        "no labels: the images have captions; if their folders (00000, 00001, ...) are classes: --labels folders",
    )
    assert {item.label for item in items} == {None}
    assert [item.label for item in load(tmp_path, labels="folders")[1]] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("label", "classes", "numbers"),
    [
        (lambda i: json.dumps({"label": float(i % 3)}), (), [0, 1, 2]),
        (lambda i: json.dumps({"label": [i % 3]}), (), [0, 1, 2]),
        (lambda i: json.dumps({"label": i % 3 == 1}), (), [0, 1, 0]),
        (
            lambda i: json.dumps({"class_name": ["golden retriever", "a cat", "10"][i % 3]}),
            ("10", "a cat", "golden retriever"),
            [2, 1, 0],
        ),
        (lambda i: json.dumps({"label": ["001", "020", "100"][i % 3]}), ("001", "020", "100"), [0, 1, 2]),
        (lambda i: json.dumps({"label": None if i == 4 else i % 3}), (), [0, 1, 2]),
    ],
)
def test_labels_as_programs_write_them(tmp_path, label, classes, numbers):
    made(tmp_path / "x.tar", json=label)
    listing, items = load(tmp_path)
    missing = [4] if "null" in label(4) else []
    assert listing.classes == classes
    assert [item.label for item in items] == [None if i in missing else numbers[i % 3] for i in range(9)]


def test_labels_of_several_classes_are_refused_for_what_they_are(tmp_path):
    made(tmp_path / "x.tar", json=lambda i: json.dumps({"label": [i % 3, 5] if i else 0}))
    _, items = load(tmp_path)
    assert len(errors(items)) == 8
    assert "its label is a list of 2 values, such as one-hot or several classes" in errors(items)["x.tar#001.png"]


def test_images_without_a_suffix_in_a_tar(tmp_path):
    jpeg = encoded(Image.fromarray(array(3)), "JPEG")
    tarred(
        tmp_path / "x.tar", [("a/one", jpeg), ("a/two.jpg_large", jpeg), ("a/LICENSE", b"text"), ("a/b.xyz", b"text")]
    )
    listing, items = load(tmp_path, labels="none")
    assert [item.image for item in items] == [jpeg, jpeg]
    assert counted(listing) == {("no suffix", "not images"): 1, (".xyz", "not images"): 1}


def test_labels_and_captions_that_are_not_taken_are_counted(tmp_path, monkeypatch):
    made(tmp_path / "x.tar", cls=lambda i: f"{i % 2}", txt=lambda i: "" if i == 2 else "a", caption=lambda i: "b")
    listing, items = load(tmp_path)
    assert [item.caption for item in items] == ["a", "a", "b"] + ["a"] * 6
    assert counted(listing) == {(".caption", "not taken for labels or captions"): 8}
    assert counted(list_source(str(tmp_path), captions="none")) == {
        (kind, "not taken for labels or captions"): 9 for kind in (".txt", ".caption")
    }
    monkeypatch.setattr("workflows.dataset.readers.tars.LOOKED", 3)
    made(tmp_path / "x.tar", cls=lambda i: f"{i % 2}" if i > 4 else None)
    assert counted(list_source(str(tmp_path))) == {(".cls", "not taken for labels or captions"): 4}
    made(tmp_path / "x.tar", json=lambda i: json.dumps({"caption": {"en": "a"}}))
    assert "the caption in caption is {'en': 'a'}, which is not text" in errors(load(tmp_path)[1]).values()


def test_captions_in_lists_and_further_ones(tmp_path):
    made(tmp_path / "x.tar", json=lambda i: json.dumps({"caption": ["", "one", "two"] if i % 2 else []}))
    listing, items = load(tmp_path)
    assert [item.caption for item in items] == [None, "one"] * 4 + [None]
    assert counted(listing) == {("captions", "beyond the first of an image"): 4}
