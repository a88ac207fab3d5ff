"""Zip files, with and without EDM's dataset.json, and what can be wrong with them."""

import json
import struct
import zipfile

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from pictures import array, encoded, errors, good, load, png, read
from PIL import Image

from workflows.dataset.readers import list_source
from workflows.errors import UserError


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return path


def edm(path, labels="labels"):
    members = {f"00000/img{i:08}.png": png(i) for i in range(10)}
    pairs = [[name, i % 3] for i, name in enumerate(members)] if labels else None
    return zipped(path, members | {"dataset.json": json.dumps({"labels": pairs})})


def test_edms_zip_has_its_labels(tmp_path):
    listing, items = load(edm(tmp_path / "x.zip"))
    assert (listing.kind, listing.count, listing.classes) == ("zip", 10, ("0", "1", "2"))
    assert listing.labelled == "dataset.json"
    assert [item.label for item in items] == [i % 3 for i in range(10)]
    assert items[3].key == "x.zip#00000/img00000003.png"
    assert items[3].image == png(3)


def test_null_labels_are_none(tmp_path):
    listing, items = load(edm(tmp_path / "x.zip", labels=None))
    assert (listing.classes, {item.label for item in items}) == ((), {None})
    assert listing.notes == ("no labels in dataset.json: all are empty or -1",)


def test_folders_in_a_zip_and_several_zips(tmp_path):
    for part in "ab":
        zipped(
            tmp_path / f"{part}.zip", {f"set/{name}/{part}{i}.PNG": png(i) for name in ("cat", "dog") for i in range(3)}
        )
    listing, items = load(tmp_path / "a.zip")
    assert (listing.classes, [item.label for item in items]) == (("cat", "dog"), [0, 0, 0, 1, 1, 1])
    listing, items = load(tmp_path, labels="none", unit_bytes=1000)
    assert listing.count == 12
    assert {key.partition("#")[0] for key in good(items)} == {"a.zip", "b.zip"}


def test_parts_of_an_archive_are_no_classes(tmp_path):
    for part in "ab":
        zipped(tmp_path / f"{part}.zip", {f"{name}/{part}{i}.png": png(i) for name in ("cat", "dog") for i in range(3)})
    listing, items = load(tmp_path)
    assert (listing.classes, [item.label for item in items]) == (("cat", "dog"), [0, 0, 0, 1, 1, 1] * 2)
    for part in "ab":
        zipped(tmp_path / f"{part}.zip", {f"{part}{i}.png": png(i) for i in range(3)})
    listing, _ = load(tmp_path)
    assert (listing.labelled, listing.notes) == ("", ("no labels: if the zip files are the classes: --labels folders",))
    listing, items = load(tmp_path, labels="folders")
    assert (listing.classes, [item.label for item in items]) == (("a.zip", "b.zip"), [0, 0, 0, 1, 1, 1])


def test_one_split_must_be_named(tmp_path):
    for part in ("train", "test"):
        zipped(tmp_path / f"{part}.zip", {f"{i}.png": png(i) for i in range(3)})
    with pytest.raises(UserError, match=r"more than one split: test \(test.zip\), train \(train.zip\)") as caught:
        list_source(str(tmp_path))
    assert load(caught.value.hint.removeprefix("name one: "))[0].count == 3
    zipped(tmp_path / "both.zip", {f"{part}/{i}.png": png(i) for part in ("train", "test") for i in range(3)})
    with pytest.raises(UserError, match="holds the splits test, train") as caught:
        list_source(str(tmp_path / "both.zip"))
    assert caught.value.hint == "unpack one of them; or --labels none"


def test_the_limit_is_spread_over_all_zips(tmp_path):
    for part in "ab":
        zipped(tmp_path / f"{part}.zip", {f"{i}.png": png(i) for i in range(10)})
    for unit_bytes in (1, 1000, 10**9):
        listing, items = load(tmp_path, limit=5, unit_bytes=unit_bytes)
        assert listing.count == 5
        assert [item.key for item in items] == [
            "a.zip#0.png",
            "a.zip#4.png",
            "a.zip#8.png",
            "b.zip#2.png",
            "b.zip#6.png",
        ]
        assert [item.image for item in items] == [png(i) for i in (0, 4, 8, 2, 6)]


def test_labels_and_captions_in_files(tmp_path):
    zipped(tmp_path / "x.zip", {f"{i}.png": png(i) for i in range(4)})
    (tmp_path / "l.json").write_text(json.dumps({f"{i}.png": "ab"[i % 2] for i in range(4)}))
    (tmp_path / "c.csv").write_text("file_name,caption\n" + "".join(f'{i}.png,"one, {i}"\n' for i in range(4)))
    options = {"labels": str(tmp_path / "l.json"), "captions": str(tmp_path / "c.csv")}
    listing, items = load(tmp_path / "x.zip", **options, limit=2)
    assert (listing.classes, [(item.label, item.caption) for item in items]) == (
        ("a", "b"),
        [(0, "one, 0"), (0, "one, 2")],
    )


def test_names_that_lead_outside_are_only_names(tmp_path):
    names = [
        "../../up.png",
        "/above.png",
        "C:\\win\\a.png",
        "a/./b//c.png",
        "ok\n.png",
        "__MACOSX/._x.png",
        ".hidden/x.png",
    ]
    zipped(tmp_path / "x.zip", {name: png(i) for i, name in enumerate(names)})
    before = sorted(tmp_path.parent.rglob("*"))
    _, items = load(tmp_path / "x.zip", labels="none")
    assert [item.key for item in items] == [
        "x.zip#up.png",
        "x.zip#above.png",
        "x.zip#win/a.png",
        "x.zip#a/b/c.png",
        "x.zip#ok\\x0a.png",
    ]
    assert not errors(items)
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice(tmp_path):
    zipped(tmp_path / "x.zip", [("a.png", png(0)), ("b.png", png(1)), ("../a.png", png(2)), ("a.png", png(3))])
    _, items = load(tmp_path / "x.zip", labels="none", unit_bytes=1)
    assert good(items)["x.zip#a.png"].image == png(0)
    assert errors(items) == {f"x.zip#a.png~{i}": "the zip has the name a.png twice" for i in (2, 3)}


def test_members_that_are_broken_encrypted_or_too_large(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.zip", {f"{i}.png": png(i) for i in range(4)})
    content = bytearray(path.read_bytes())
    content[content.index(png(1)) + 50] ^= 255
    directory = content.index(b"PK\x01\x02")
    third = directory
    for _ in range(2):
        third = content.index(b"PK\x01\x02", third + 4)
    content[third + 8] |= 1  # says that it is encrypted
    path.write_bytes(content)
    assert {key: text[:25] for key, text in errors(load(path)[1]).items()} == {
        "x.zip#1.png": "broken in the zip: Bad CR",
        "x.zip#2.png": "encrypted",
    }
    monkeypatch.setattr("workflows.dataset.readers.zips.MAX_BYTES", 100)
    path = path.rename(tmp_path / "y.zip")
    assert set(errors(load(path)[1])) == {f"y.zip#{i}.png" for i in range(4)}


def test_a_bomb_is_refused_by_what_it_declares(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.zip", {f"{i}.png": b"\0" * 10**6 for i in range(3)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("workflows.dataset.readers.zips.MAX_BYTES", 10**6)
    with pytest.raises(UserError, match=r"x.zip declares 3,000,000 bytes within [0-9,]+: a zip bomb\?"):
        list_source(str(path))


def test_no_more_is_read_than_was_declared(tmp_path):
    """A member whose real size is a thousand times the declared one."""
    path = zipped(tmp_path / "x.zip", {"a.png": b"\0" * 10**6}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(mark) + at
        content[start : start + 4] = struct.pack("<I", 1000)
    path.write_bytes(content)
    assert list(errors(load(path)[1]).values()) == ["broken in the zip: Bad CRC-32 for file 'a.png'"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is not a zip file"),
        (b"<html>no such page</html>", "it is not a zip file"),
        (None, "it is not a zip file"),
    ],
)
def test_a_file_that_is_no_zip_is_a_line(tmp_path, content, said):
    path = edm(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=f"x.zip in .*: {said}"):
        list_source(str(path))


def test_a_zip_without_images_is_a_line(tmp_path):
    zipped(tmp_path / "x.zip", {"a.txt": "x", "b.npy": "x", "c.npy": "x"})
    with pytest.raises(UserError, match=r"has no images; the zip files hold \.npy \(2\), \.txt \(1\)"):
        list_source(str(tmp_path / "x.zip"))


def test_a_zip_that_is_gone_or_another_when_it_is_read(tmp_path):
    listing = list_source(str(edm(tmp_path / "x.zip")), unit_bytes=1000)
    zipped(tmp_path / "x.zip", {"a.png": png(0), "b.png": png(1)})
    items = read(listing)
    assert len(items) == 10
    assert set(list(errors(items).values())) == {"changed since it was listed"}
    listing = list_source(str(edm(tmp_path / "y.zip")))
    (tmp_path / "y.zip").unlink()
    assert set(errors(read(listing)).values()) == {"it is no longer there"}


def test_edms_labels_below_a_top_folder(tmp_path):
    names = [f"0000{i // 5}/img{i:08}.png" for i in range(10)]
    members = {f"mydata/{name}": png(i) for i, name in enumerate(names)}
    told = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]})
    zipped(tmp_path / "x.zip", members | {"mydata/dataset.json": told, "__MACOSX/mydata/._dataset.json": b"\0"})
    listing, items = load(tmp_path / "x.zip")
    assert (listing.labelled, listing.classes, listing.left_out) == ("dataset.json", ("0", "1", "2"), ())
    assert [item.label for item in items] == [i % 3 for i in range(10)]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (lambda i: [float(i == c) for c in range(3)], "not a list of 3 values, such as one-hot or several classes"),
        (lambda i: i / 2, "not 0.5, which is neither a name nor a whole number"),
        (lambda i: {"cat": 1}, "which is neither a name nor a whole number"),
    ],
)
def test_labels_that_are_none_are_refused_for_what_they_are(tmp_path, label, said):
    names = [f"{i}.png" for i in range(6)]
    told = json.dumps({"labels": [[name, label(i)] for i, name in enumerate(names)]})
    zipped(tmp_path / "x.zip", {name: png(i) for i, name in enumerate(names)} | {"dataset.json": told})
    with pytest.raises(UserError, match="a name or a whole number is expected for ") as caught:
        list_source(str(tmp_path / "x.zip"))
    assert said in str(caught.value)


def test_captions_metadata_and_other_files_in_a_zip(tmp_path):
    jpeg = encoded(Image.fromarray(array(3)), "JPEG")
    members = {f"top/{c}/{i}.PNG": png(i) for c in "ab" for i in range(3)} | {"top/a/no_suffix": jpeg}
    others = {"top/readme.md": b"x", "top/a/x.heic": b"x", ".DS_Store": b"x", "top/b/tool": b"#!/bin/sh"}
    asides = {f"top/{c}/{i}.txt": f"\ufeff{c} {i}" for c in "ab" for i in range(2)}
    for part in "pq":
        zipped(tmp_path / f"{part}.zip", members | others | asides)
    for source, expected in ((tmp_path / "p.zip", 1), (tmp_path, 2)):
        listing, items = load(source, unit_bytes=700, labels="none")
        captions = [item.caption for item in items]
        assert captions == (["a 0", "a 1", None, "b 0", "b 1", None, None]) * expected
        assert listing.captioned == ".txt files"
        counts = {".md": expected, ".heic": expected, "no suffix": expected}
        assert {what: n for what, _, n in listing.left_out} == counts
    assert load(tmp_path / "p.zip")[0].classes == ("a", "b")
    rows = "file_name,label,text\n" + "".join(f"{i}.PNG,c {i % 2},{i:03}\n" for i in range(3))
    zipped(tmp_path / "m.zip", {f"a/{i}.PNG": png(i) for i in range(3)} | {"a/metadata.csv": rows})
    listing, items = load(tmp_path / "m.zip")
    assert [(listing.classes[item.label], item.caption) for item in items] == [
        (f"c {i % 2}", f"{i:03}") for i in range(3)
    ]


def test_archives_of_two_stores_are_told_apart(tmp_path):
    stores = []
    for name, value in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        zipped(tmp_path / name / "x.zip", {"0.png": png(value)})
        stores.append(DirFileSystem(str(tmp_path / name)))
    listing = list_source("x.zip", filesystem=stores[0])
    assert [[item.image for item in read(listing, store)] for store in stores] == [[png(0)], [png(1)]]
