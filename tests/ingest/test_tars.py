"""WebDataset tars: samples, labels and captions beside the images, compressed ones, and what can be wrong."""

import gzip
import io
import json
import re
import tarfile
import tracemalloc

import pytest
from pictures import errors, good, load, png, read

from workflows.ingest import list_source, read_unit
from workflows.runtime.errors import UserError


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
    said = "is no class: they are numbers from 0 to 99,999"
    wrong = {1: "1234567890", 3: "100000", 5: "-2", 6: "9" * 20}
    assert errors(items) == {f"x.tar#{i}.png": f"label {label} {said}" for i, label in wrong.items()}


def test_labels_and_captions_by_name_in_files(tmp_path):
    tarred(tmp_path / "x.tar", samples(0, 4, cls=None))
    (tmp_path / "l.json").write_text(json.dumps({f"{i:04}.png": "ba"[i % 2] for i in range(3)}))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"key": f"{i:04}", "caption": f"c{i}"}) for i in range(4)))
    options = {"labels": str(tmp_path / "l.json"), "captions": str(tmp_path / "c.jsonl")}
    listing, items = load(tmp_path / "x.tar", **options)
    assert listing.classes == ("a", "b")
    assert [(item.label, item.caption) for item in items[:3]] == [(1, "c0"), (0, "c1"), (1, "c2")]
    assert errors(items) == {"x.tar#0003.png": f"{tmp_path}/l.json has nothing for 0003.png"}


def test_the_limit_takes_the_first_ones_and_says_so(tmp_path):
    for shard in range(3):
        tarred(tmp_path / f"{shard}.tar", samples(5 * shard, 5 * shard + 5))
    for unit_bytes in (1, 10**9):
        listing, items = load(tmp_path, limit=7, unit_bytes=unit_bytes)
        assert listing.count == 7
        assert listing.notes == ("the first 7 images: how many there are is not known before all is read",)
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
        "x.tar#text": "no image beside cls: a sample's files lie next to each other",
        "x.tar#two.jpg": "which is the image? jpg, png: name one as the image column",
        "x.tar#word.png": "label cat is not in the class list",
        "x.tar#again.png": "again.png is there twice",
        "x.tar#link": "link.png is a link, or no plain file",
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
    monkeypatch.setattr("workflows.ingest.tars.MAX_BYTES", 200_000)
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
    monkeypatch.setattr("workflows.ingest.tars.MAX_BYTES", 200_000)
    monkeypatch.setattr("workflows.ingest.tars.MOST_IMAGES", images)
    frames = [(f"video.f{i:04}.jpg", bytes([i % 256]) * size) for i in range(400)]
    tarred(tmp_path / "x.tar", [*samples(0, 1, cls=None), *frames, *samples(1, 2, cls=None)])
    listing = list_source(str(tmp_path))
    tracemalloc.start()
    items = read(listing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # the frames are 4 MB
    said = f"the files video.* are more than {images:,} images, or than 200,000 bytes together"
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
    """Peaks of allocation (deterministic, no clock): that of 4,000 members is that of 500."""
    peaks = []
    for count in (500, 4000):
        path = tarred(tmp_path / f"{count}.tar", ((f"{i}.png", bytes([i % 256]) * 5000) for i in range(count)))
        listing = list_source(str(path))
        tracemalloc.start()
        assert sum(1 for unit in listing.units for _ in read_unit(listing, unit)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3500 * 200  # a mark of each name is kept; a header would be 1,000 bytes or more


def test_a_tar_that_is_gone(tmp_path):
    listing = list_source(str(tarred(tmp_path / "x.tar", samples(0, 2))))
    (tmp_path / "x.tar").unlink()
    assert errors(read(listing)) == {"x.tar#~end": "it is no longer there"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "folders"}, "labels by folder need two folders, and all images lie in one"),
        ({"labels": "{here}/classes.txt"}, "lists classes, but the first sample, a, has no label"),
        ({"caption_column": "txt"}, "no caption txt in the first sample, a, which has none"),
    ],
)
def test_what_a_tar_does_not_have(tmp_path, options, said):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    tarred(tmp_path / "x.tar", [("a.png", png(0))])
    options = {name: value.format(here=tmp_path) for name, value in options.items()}
    assert said in refused(tmp_path / "x.tar", **options)
