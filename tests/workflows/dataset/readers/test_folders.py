"""Folders of images: kinds, labels and captions by folder and file, the limit, and what can be wrong."""

import json
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from pictures import array, encoded, errors, good, load, png
from PIL import Image

from workflows.dataset.readers import list_source, read_unit
from workflows.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images."""
    root = tmp_path / "images"
    for c, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for i in range(5):
            (root / name / f"{i}.png").write_bytes(png(10 * c + i))
    (root / ".hidden.png").write_text("not an image")
    (root / "notes.txt").write_text("neither")
    return root


def refused(source, **options):
    """The line of the UserError, and its hint."""
    with pytest.raises(UserError) as caught:
        list_source(str(source), **options)
    assert "\n" not in str(caught.value) + caught.value.hint
    return f"{caught.value} [{caught.value.hint}]"


def test_each_folder_is_a_class(folder):
    listing, items = load(folder)
    assert (listing.kind, listing.count, listing.classes, listing.labelled) == (
        "images",
        10,
        ("cats", "dogs"),
        "folders",
    )
    assert [item.key for item in items] == [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(5)]
    assert [item.label for item in items] == [0] * 5 + [1] * 5
    assert items[7].image == (folder / "dogs" / "2.png").read_bytes()
    assert {item.caption for item in items} == {None}


def test_labels_that_are_not_wanted(folder):
    listing, items = load(folder, labels="none")
    assert (listing.classes, listing.labelled, {item.label for item in items}) == ((), "", {None})


def test_the_class_is_the_first_folder_in_which_images_differ(folder, tmp_path):
    (folder / "dogs" / "small").mkdir()
    (folder / "dogs" / "small" / "x.PNG").write_bytes(png(3))
    listing, items = load(tmp_path)
    assert listing.classes == ("cats", "dogs")
    assert good(items)["images/dogs/small/x.PNG"].label == 1


def test_one_folder_is_no_class_and_loose_images_leave_none(folder):
    listing, _ = load(folder / "cats")
    assert (listing.classes, listing.notes) == ((), ())
    assert "labels by folder need at least two folders" in refused(folder / "cats", labels="folders")
    (folder / "loose.png").write_bytes(png(1))
    listing, _ = load(folder)
    assert (listing.classes, listing.notes) == ((), ("no labels: loose.png is not in a class folder",))
    assert "loose.png is not in a class folder" in refused(folder, labels="folders")


def test_splits_are_no_classes(folder):
    (folder / "cats").rename(folder / "train")
    (folder / "dogs").rename(folder / "test")
    said = refused(folder)
    assert "holds the splits test, train, which are not classes" in said
    assert "/test; or --labels none" in said
    assert load(folder, labels="none")[0].count == 10
    for split in ("train", "test"):
        (folder / split / "metadata.csv").write_text(
            "file_name,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(5))
        )
    assert "holds the splits test, train, which are not classes" in refused(folder)
    assert load(folder / "train")[0].classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", lambda of: json.dumps(of)),
        ("labels.json", lambda of: json.dumps({"labels": [[path, name] for path, name in of.items()]})),
        ("labels.json", lambda of: json.dumps([{"file_name": path, "label": name} for path, name in of.items()])),
        ("labels.jsonl", lambda of: "\n".join(json.dumps({"path": p, "label": n, "x": 1}) for p, n in of.items())),
        ("labels.csv", lambda of: "file_name,label\n" + "".join(f"./{path},{name}\n" for path, name in of.items())),
        ("labels.csv", lambda of: "".join(f"{path},{name}\r\n" for path, name in of.items())),
    ],
)
@pytest.mark.parametrize("numbers", [False, True])
def test_labels_in_a_file(folder, tmp_path, name, text, numbers):
    of = {f"{c}/{i}.png": i % 3 if numbers else f"kind {i % 3}" for c in ("cats", "dogs") for i in range(5)}
    file = tmp_path / name
    file.write_text(text(of))
    listing, items = load(folder, labels=str(file))
    assert listing.classes == (("0", "1", "2") if numbers else ("kind 0", "kind 1", "kind 2"))
    assert [item.label for item in items] == [0, 1, 2, 0, 1] * 2
    before = listing.fingerprint
    file.write_text(text(of | {"cats/0.png": of["cats/1.png"]}))
    assert load(folder, labels=str(file))[0].fingerprint != before
    shutil.copy(file, folder / name)  # found within the source as well
    assert load(folder, labels=name)[1][0].label == 1


def test_a_class_list_puts_folders_in_its_order(folder, tmp_path):
    for name, text in (("classes.json", '["dogs", "fish", "cats"]'), ("classes.txt", "dogs\nfish\ncats\n")):
        (tmp_path / name).write_text(text)
        listing, items = load(folder, labels=str(tmp_path / name))
        assert listing.classes == ("dogs", "fish", "cats")
        assert [item.label for item in items] == [2] * 5 + [0] * 5
    (tmp_path / "classes.json").write_text('["dogs", "fish"]')
    assert "label cats is not a name in the class list, which has 2: dogs, fish" in refused(
        folder, labels=str(tmp_path / "classes.json")
    )


def test_a_caption_with_half_an_emoji_can_be_written(folder, tmp_path):
    of = {f"{c}/{i}.png": "a cat \ud83d" for c in ("cats", "dogs") for i in range(5)} | {
        "cats/0.png": "a cat \U0001f408"
    }
    (tmp_path / "captions.json").write_text(json.dumps(of))
    _, items = load(folder, captions=str(tmp_path / "captions.json"))
    assert [item.caption for item in items] == ["a cat \U0001f408"] + ["a cat ?"] * 9


def test_captions_in_a_file(folder, tmp_path):
    of = {f"{c}/{i}.png": f"a {c}, the {i}." for c in ("cats", "dogs") for i in range(5)}
    (tmp_path / "captions.json").write_text(json.dumps(of))
    listing, items = load(folder, captions=str(tmp_path / "captions.json"))
    assert (listing.captioned, listing.classes) == (str(tmp_path / "captions.json"), ("cats", "dogs"))
    assert {item.key: item.caption for item in items} == of
    (tmp_path / "captions.json").write_text(json.dumps(of | {"cats/0.png": {"en": "a cat"}}))
    assert "a text is expected for cats/0.png, not {'en': 'a cat'}, which is not text" in refused(
        folder, captions=str(tmp_path / "captions.json")
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "l.json",
            '{"cats/0.png": "a", "birds/0.png": "b", "x.png": "b"}',
            "2 of its 3 images are not in .*birds/0.png",
        ),
        ("l.json", '{"cats/0.png": "a"}', "no label for 9 of 10 images of .*, such as cats/1.png"),
        ("l.json", '{"cats/0.png": 1.5}', "a whole number is expected for cats/0.png, not 1.5"),
        ("l.json", '{"cats/0.png": [0, 1]}', "is expected for cats/0.png, not a list of 2 values, such as one-hot"),
        ("l.json", '{"cats/0.png": ', r"l.json can't be read: it is not JSON \(Expecting value"),
        ("l.json", '{"cats/0.png": "a", "cats/0.png": "b"}', "it has two values for 'cats/0.png'"),
        ("l.json", "3", "an object or a list is expected, not int"),
        ("l.json", '["a", "a"]', "the class a is listed twice"),
        ("l.csv", "file_name,a,b\nx.png,1,2\n", "no column label or .*; there are a, b"),
        ("l.csv", "a,b,c\nx.png,1,2\n", "no column of paths among a, b, c"),
        ("l.jsonl", "".join(f'{{"{i}.png": 1}}\n' for i in range(25)), "among 0.png, .*, 19.png, and 5 more"),
        ("l.csv", "a| b| c\nx.png| 1| 2, 3\n", "no column of paths among a| b| c".replace("|", "[|]")),
        (
            "l.csv",
            "file_name,label\ncats/0.png,a cat, asleep\n",
            r"line 2 has 3 cells, but the first line has 2: put a text that contains ','",
        ),
        (
            "l.csv",
            'file_name,label\ncats/0.png,"a\ncats/1.png,b\n',
            "line 3: put the cell in quotes, and double a quote inside it",
        ),
        (
            "l.tsv",
            'file_name\tlabel\ncats/0.png\t"a" b\n',
            "line 2: put the cell in quotes, and double a quote inside it",
        ),
        ("l.csv", "file_name,label\ncats/0.png,a\ncats/0.png,b\n", "two values for cats/0.png: a and b"),
        (
            "l.csv",
            "file_name,label\ncats/0.png,\xe9\n",
            r"l.csv can't be read: it is not UTF-8 text \(byte 0xe9 in line 2\)",
        ),
        ("l.csv", "\xff\xfe", "l.csv: it holds no labels"),
        ("missing.json", None, "missing.json does not exist, neither below .* nor as a path of its own"),
        ("l.xlsx", None, "l.xlsx is not a file of labels"),
    ],
)
def test_a_file_of_labels_that_will_not_do(folder, tmp_path, name, text, said):
    import re

    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    where = str(tmp_path / name) if text is not None else name
    assert re.search(said, refused(folder, labels=where))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (lambda i: i + 1, "labels are numbers up to 10, but no image has 0"),
        (lambda i: -5, "one is -5"),
        (lambda i: i if i else "zero", "some labels are names (zero), others are numbers (1)"),
        (lambda i: 2 * i, "labels are numbers up to 18, but no image has 1"),
    ],
)
def test_numbers_that_are_no_class_list(folder, tmp_path, labels, said):
    names = [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(5)]
    (tmp_path / "l.json").write_text(json.dumps({name: labels(i) for i, name in enumerate(names)}))
    assert said in refused(folder, labels=str(tmp_path / "l.json"))


def test_numbers_with_gaps_and_a_class_list(folder, tmp_path):
    names = [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(5)]
    values = {"classes": [f"c{i}" for i in range(19)], "labels": {name: 2 * i for i, name in enumerate(names)}}
    (tmp_path / "l.json").write_text(json.dumps(values))
    listing, items = load(folder, labels=str(tmp_path / "l.json"))
    assert (len(listing.classes), [item.label for item in items]) == (19, list(range(0, 20, 2)))
    values["classes"] = values["classes"][:18]
    (tmp_path / "l.json").write_text(json.dumps(values))
    assert "label 18 is not a number in the class list, which has 18: c0, c1, c2, ..." in refused(
        folder, labels=str(tmp_path / "l.json")
    )


def test_edms_dataset_json(folder):
    labels = [[f"{c}/{i}.png", i] for c in ("cats", "dogs") for i in range(5)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    listing, items = load(folder)
    assert (listing.labelled, listing.classes) == ("dataset.json", tuple("01234"))
    assert [item.label for item in items] == [0, 1, 2, 3, 4] * 2
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    assert load(folder)[0].classes == ()
    assert load(folder, labels="folders")[0].classes == ("cats", "dogs")


def test_the_limit_is_spread_evenly(folder):
    listing, items = load(folder, limit=4)
    assert (listing.count, listing.available) == (4, 10)
    assert [item.key for item in items] == ["cats/0.png", "cats/2.png", "dogs/0.png", "dogs/2.png"]
    assert [item.label for item in items] == [0, 0, 1, 1]
    assert load(folder, limit=40)[0].count == 10
    assert "limit: 0; it must be at least 1" in refused(folder, limit=0)


def test_units_have_about_as_many_bytes_as_asked_for(folder):
    each = (folder / "cats" / "0.png").stat().st_size
    listing, _ = load(folder, unit_bytes=3 * each)
    assert [len(unit.files) for unit in listing.units] == [3, 3, 3, 1]
    assert len(load(folder, unit_bytes=1)[0].units) == 10


def test_another_fingerprint_when_the_source_changes(folder):
    before = load(folder)[0].fingerprint
    assert load(folder, limit=3, unit_bytes=1)[0].fingerprint == before
    os.utime(folder / "cats" / "0.png", (1, 1))
    touched = load(folder)[0].fingerprint
    (folder / "cats" / "0.png").rename(folder / "cats" / "00.png")
    assert len({before, touched, load(folder)[0].fingerprint}) == 3


def test_broken_files_are_items_with_an_error(folder, monkeypatch):
    listing = list_source(str(folder))
    (folder / "cats" / "0.png").unlink()
    (folder / "cats" / "1.png").write_bytes(b"longer than it was before" * 100)
    items = [item for unit in listing.units for item in read_unit(listing, unit)]
    assert len(items) == 10
    found = errors(items)
    assert found.pop("cats/0.png") == "it is no longer there"
    assert found.pop("cats/1.png").startswith("changed since it was listed: ")
    assert not found
    (folder / "cats" / "link.png").symlink_to(folder / "nothing")
    monkeypatch.setattr("workflows.dataset.readers.files.MAX_BYTES", 2000)
    assert errors(load(folder)[1]) == {
        "cats/1.png": "a file of 2,500 bytes, more than 2,000",
        "cats/link.png": "it is no longer there",
    }


def test_linked_folders_are_followed_and_loops_are_not(folder, tmp_path):
    shutil.move(folder / "dogs", tmp_path / "elsewhere")
    (folder / "dogs").symlink_to(tmp_path / "elsewhere")
    (folder / "dogs" / "back").symlink_to(folder)
    os.mkfifo(folder / "dogs" / "pipe.png")  # reading it would wait for ever
    listing, items = load(folder)
    assert listing.classes == ("cats", "dogs")
    assert {item.key for item in items if item.label == 1} == {f"dogs/{i}.png" for i in range(5)}


def test_names_that_no_screen_can_show(folder):
    strange = os.fsencode(folder) + b"/cats/\xff\n\x1b[31m.png"
    with open(strange, "wb") as file:
        file.write(png(1))
    _, items = load(folder)
    (key,) = (item.key for item in items if "31m" in item.key)
    assert key == r"cats/\udcff\x0a\x1b[31m.png"
    key.encode("utf-8")


@pytest.fixture
def nobody():
    """What is not allowed is not allowed to these tests either, though root may run them."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    was = os.geteuid()
    try:
        yield root, lambda: os.seteuid(65534) if was == 0 else None
    finally:
        if was == 0:
            os.seteuid(0)
        for path in root.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(root)


def test_files_and_folders_that_may_not_be_read(nobody):
    root, drop = nobody
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "0.png").write_bytes(png(1))
    (root / "a" / "0.png").chmod(0)
    drop()
    assert errors(load(root)[1]) == {"a/0.png": "it can't be read: permission denied"}
    if os.geteuid() == 65534:
        os.seteuid(0)
    (root / "b").chmod(0)
    drop()
    assert "can't be read: " in refused(root)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{root}/nowhere", "nowhere does not exist"),
        ("{root}/empty", "empty has no files"),
        ("{root}/texts", r"texts has no images; its files are .txt (2), no suffix (1) [known: images, zip files,"),
        ("nothing://x", "nothing://x: Protocol not known: nothing"),
        ("memory://nowhere", "memory://nowhere does not exist"),
        ("https://user:hidden@127.0.0.1:9/x.zip?signature=hidden", "https://127.0.0.1:9/x.zip"),
    ],
)
def test_a_source_that_can_not_be_used_is_a_line(tmp_path, source, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt", "README"):
        (tmp_path / "texts" / name).write_text("x")
    line = refused(source.format(root=tmp_path))
    assert said in line
    assert "hidden" not in line


def test_two_kinds_are_refused_and_both_are_named(folder):
    (folder / "more.tar").write_bytes(b"")
    said = refused(folder)
    assert f"{folder} holds both images (cats/0.png) and tar files (more.tar)" in said
    assert "name the folder, the files or a pattern of one kind" in said


def test_patterns_and_single_files(folder):
    listing, items = load(f"{folder}/*/1.png")
    assert ([item.key for item in items], listing.classes) == (["cats/1.png", "dogs/1.png"], ("cats", "dogs"))
    listing, items = load(folder / "cats" / "3.png")
    assert ([item.key for item in items], listing.classes) == (["3.png"], ())


def test_another_filesystem_of_fsspec(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({f"/box/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*.png")})
    try:
        for source, filesystem in (("memory://box", None), ("memory://box", memory), ("/box", memory)):
            listing, items = load(source, filesystem) if filesystem else load(source)
            assert listing.classes == ("cats", "dogs")
            assert len(good(items)) == 10
    finally:
        memory.rm("/box", recursive=True)


# What the world's folders hold besides images


def flat(root, n=6):
    """n images in one folder, each of its own."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (root / f"{i:03}.png").write_bytes(png(i))
    return root


def left(listing):
    return {(what, why): count for what, why, count in listing.left_out}


def test_images_are_known_by_their_content_where_their_names_say_nothing(tmp_path):
    flat(tmp_path)
    jpeg = encoded(Image.fromarray(array(7)), "JPEG")
    names = [
        "a.JPG",
        "b.jfif",
        "c.jpe",
        "d.jpg_large",
        "no_suffix",
        "e.jpg.download",
        "f.JPG.part",
        "2024.01.02 at noon",
    ]
    for name in names:
        (tmp_path / name).write_bytes(jpeg)
    for i, name in enumerate(("x.HEIC", "y.heic", "z.dng", "LICENSE", "notes.TXT", "t.unknown")):
        (tmp_path / name).write_bytes(b"II*\0" * 9 if name == "z.dng" else b"text %d" % i)
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "Desktop.ini",
        "__MACOSX/a.png",
        "@eaDir/000.png/THUMB.png",
        "$RECYCLE.BIN/b.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(png(1))
    listing, items = load(tmp_path)
    assert sorted(good(items)) == sorted([f"{i:03}.png" for i in range(6)] + names)
    counts = {".heic": 2, ".dng": 1, "no suffix": 1, ".txt": 1, ".unknown": 1}
    assert left(listing) == {(what, "not images"): n for what, n in counts.items()}
    only = tmp_path / "only"
    only.mkdir()
    (only / "photo").write_bytes(jpeg)
    assert list(good(load(only)[1])) == ["photo"]


@pytest.mark.parametrize("end", [".txt", ".TXT", ".png.txt", ".caption", ".prompt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_files_beside_the_images(tmp_path, end, encoding):
    flat(tmp_path)
    for i in range(5):
        (tmp_path / f"{i:03}{end}").write_text(f"a bëar, number {i}\n", encoding=encoding)
    (tmp_path / "README.md").write_text("a word")
    listing, items = load(tmp_path, unit_bytes=700)
    assert [item.caption for item in items] == [f"a bëar, number {i}" for i in range(5)] + [None]
    assert listing.captioned == f"{Path('a' + end).suffix.lower()} files"
    assert left(listing) == {(".md", "not images"): 1}
    assert {item.caption for item in load(tmp_path, captions="none")[1]} == {None}
    assert [item.caption for item in load(tmp_path, limit=2)[1]] == ["a bëar, number 0", "a bëar, number 3"]


def test_boxes_beside_the_images_are_no_captions(tmp_path):
    flat(tmp_path)
    for i in range(5):
        (tmp_path / f"{i:03}.txt").write_text("a bear" if i == 4 else "" if i == 3 else f"{i} 0.5 0.5 0.25 0.25\n" * 2)
    listing, counted = list_source(str(tmp_path)), Counter()
    items = [item for unit in listing.units for item in read_unit(listing, unit, left_out=counted)]
    assert [item.caption for item in items] == [None] * 4 + ["a bear", None]
    assert counted == {(".txt", "boxes, not captions"): 3}


def test_a_caption_beside_an_image_that_is_no_text_names_its_file(tmp_path):
    flat(tmp_path)
    (tmp_path / "002.txt").write_bytes("it\x92s one".encode("latin-1"))
    (tmp_path / "003.txt").write_text(" \n")
    (tmp_path / "004.txt").write_text("four")
    _, items = load(tmp_path)
    assert errors(items) == {"002.png": "002.txt: the caption is not UTF-8 text (byte 0x92 in line 1)"}
    assert [item.caption for item in items] == [None] * 4 + ["four", None]


def test_labels_and_captions_in_json_beside_the_images(tmp_path):
    flat(tmp_path)
    for i in range(6):
        fields = {"caption": None if i == 1 else [f"one {i}", f"two {i}"], "label": float(i % 2), "url": "x"}
        (tmp_path / f"{i:03}.json").write_text(json.dumps(fields))
    listing = list_source(str(tmp_path))
    counted = Counter()
    items = [item for unit in listing.units for item in read_unit(listing, unit, left_out=counted)]
    assert (listing.labelled, listing.classes, listing.captioned) == (".json files", ("0", "1"), ".json files")
    assert [item.label for item in items] == [0, 1] * 3
    assert [item.caption for item in items] == [None if i == 1 else f"one {i}" for i in range(6)]
    assert counted == {("captions", "beyond the first of an image"): 5}
    assert left(listing) == {}
    items = load(tmp_path, caption_column="url", labels="none")[1]
    assert [(item.caption, item.label) for item in items] == [("x", None)] * 6
    (tmp_path / "002.json").write_text('{"caption": ')
    (tmp_path / "004.json").write_text('["no object"]')
    assert "002.json: the label can't be read: it is not JSON (Expecting value" in refused(tmp_path)
    listing, items = load(tmp_path, labels="none")
    assert errors(items)["002.png"].startswith("002.json: the caption is not JSON (Expecting value")
    assert (items[4].caption, left(listing)) == (None, {(".json", "not images"): 2})


def test_labels_in_files_beside_the_images(tmp_path):
    flat(tmp_path)
    for i in range(6):
        (tmp_path / f"{i:03}.cls").write_text(f"{['001', '010', '100'][i % 3]}\n", encoding="utf-8-sig")
    listing, items = load(tmp_path)
    assert (listing.labelled, listing.classes) == (".cls files", ("001", "010", "100"))
    assert [item.label for item in items] == [0, 1, 2] * 2
    (tmp_path / "003.cls").write_bytes(b"\xff")
    assert "003.cls: the label can't be read: it is not UTF-8 text" in refused(tmp_path)


def test_class_folders_that_are_numbers(tmp_path):
    for c in (0, 1, 2, 10, 11):
        flat(tmp_path / str(c), 1)
    listing, items = load(tmp_path)
    assert listing.classes == ("0", "1", "2", "10", "11")
    assert {item.key.partition("/")[0]: listing.classes[item.label] for item in items} == {
        c: c for c in listing.classes
    }


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "captions", "labels"),
    [
        ("metadata.csv", "file_name,text\n000.png,00001\n001.png,\n002.png,2\n", ["00001", None, "2"], None),
        ("metadata.csv", "file_name;text\n000.png;a, b\n001.png;c\n002.png;d\n", ["a, b", "c", "d"], None),
        ("metadata.csv", "file_name\ttext\n000.png\ta\n001.png\tb\n002.png\tc\n", ["a", "b", "c"], None),
        ("metadata.tsv", "file_name\ttext\n000.png\ta\n001.png\tb\n002.png\tc\n", ["a", "b", "c"], None),
        ("metadata.csv", 'file_name,text\r\n000.png,"a\nb"\r\n001.png,"a ""c"""\r\n', ["a\nb", 'a "c"', None], None),
        ("metadata.csv", "file_name,label\n000.png,1.0\n001.png,0.0\n002.png,\n", None, [1, 0, None]),
        ("metadata.csv", "file_name,label\n000.png,1\n001.png,0\n002.png,NaN\n", None, [1, 0, None]),
        ("metadata.csv", "file_name,label\n000.png,None\n001.png,a\n002.png,b\n", None, [0, 1, 2]),
        ("metadata.csv", "file_name, label\n000.png, a \n001.png, b\n002.png, -1\n", None, [0, 1, None]),
        ("metadata.csv", "file_name,label,\n000.png,a,\n001.png,b, ,\n002.png\n", None, [0, 1, None]),
        ("metadata.csv", "file_name,label\n000.png,010\n001.png,002\n002.png,001\n", None, [2, 1, 0]),
        ("metadata.csv", "file_name,label\n000.png,10 cm\n001.png,a dog\n002.png,10 cm\n", None, [0, 1, 0]),
        (
            "metadata.jsonl",
            json_lines({"file_name": "000.png", "text": "a\u2028b\x85c"})
            + "\n \n"
            + json_lines({"file_name": "001.png", "text": None}),
            ["a\u2028b\x85c", None, None],
            None,
        ),
        (
            "metadata.jsonl",
            json_lines({"file_name": "000.png"}, {"file_name": "001.png", "text": ["b", "c"]}),
            [None, "b", None],
            None,
        ),
        ("metadata.jsonl", json_lines(*({"file_name": "000.png", "text": t} for t in "ab")), ["a", None, None], None),
        (
            "metadata.jsonl",
            json_lines(*({"file_name": n, "text": "a"} for n in ("000.png", "gone.png"))),
            ["a", None, None],
            None,
        ),
        (
            "metadata.jsonl",
            json_lines(*({"file_name": f"{i:03}.png", "label": v} for i, v in enumerate((True, False, [1])))),
            None,
            [1, 0, 1],
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_metadata_as_it_is_written(tmp_path, name, text, captions, labels, encoding):
    flat(tmp_path, 3)
    (tmp_path / name).write_bytes(text.encode(encoding))
    listing, items = load(tmp_path)
    assert [item.caption for item in items] == (captions or [None] * 3)
    assert [item.label for item in items] == (labels or [None] * 3)
    further = ("captions", "beyond the first of an image") in left(listing)
    gone = (f"rows of {name}", "their images are not there") in left(listing)
    assert (further, gone) == ('["b", "c"]' in text or text.count("000.png") == 2, "gone.png" in text)


def test_metadata_of_other_images_alone_is_refused(tmp_path):
    flat(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\nb.png,y\n")
    assert "metadata.csv: 2 of its 2 images are not in" in refused(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\n000.png,caf\xe9\n".encode("latin-1"))
    assert "metadata.csv can't be read: metadata.csv is not UTF-8 text (byte 0xe9 in line 2)" in refused(tmp_path)


def test_metadata_that_tell_neither_label_nor_caption_are_left_out_like_any_file(tmp_path):
    flat(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,author\n000.png,me\n")
    listing, items = load(tmp_path)
    assert ({item.caption for item in items}, left(listing)) == ({None}, {(".csv", "not images"): 1})
    assert [item.caption for item in load(tmp_path, caption_column="author")[1]] == ["me", None, None]


def test_further_columns_of_metadata_are_told(tmp_path):
    flat(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,breed,url\n" + "".join(f"00{i}.png,a,collie,x\n" for i in range(3))
    )
    why = "neither image, label nor caption"
    assert left(load(tmp_path)[0]) == {("column breed", why): 1, ("column url", why): 1}
    assert load(tmp_path, label_column="breed")[0].classes == ("collie",)
    listing, _ = load(tmp_path, label_column="url", captions="none", labels="none")
    assert left(listing) == {(".csv", "not images"): 1}


def test_a_table_that_holds_none_is_told(folder, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"cats/0.png": "", "dogs/0.png": None}))
    assert "captions.json: it holds no captions" in refused(folder, captions=str(tmp_path / "captions.json"))
    rows = "".join(f"{c}/{i}.png,,a {c}\n" for c in ("cats", "dogs") for i in range(5))
    (folder / "metadata.csv").write_text("file_name,label,text\n" + rows)
    listing, items = load(folder)
    assert listing.notes == ("no labels in metadata.csv: all are empty or -1",)
    assert ({item.label for item in items}, items[0].caption) == ({None}, "a cats")


@pytest.mark.parametrize("text", ['{"name": "x", "info": {"a": 1}}', '{"name": "x", "version": 1}', "[1,"])
def test_what_the_user_does_not_want_is_no_hindrance(folder, text):
    (folder / "dataset.json").write_text(text)
    (folder / "metadata.csv").write_text("file_name,label\n000.png,a,b\n")
    assert "metadata.csv can't be read: line 2 has 3 cells" in refused(folder)
    (folder / "metadata.csv").unlink()
    said = refused(folder)
    assert said.startswith("dataset.json")
    assert "[to ignore it: --labels none, or --labels folders]" in said
    for labels in ("none", "folders"):
        listing, _ = load(folder, labels=labels)
        assert left(listing) == {(".json", "not images"): 1, (".txt", "not images"): 1}


def test_a_named_column_that_nothing_has_is_refused(folder):
    said = refused(folder, label_column="breed")
    assert "no breed for labels: neither in a metadata file nor in files beside the images" in said
    assert "[--labels FILE names a file that has this column]" in said
    assert "no words for captions" in refused(folder, caption_column="words")
    assert load(folder, labels="none", label_column="breed")[0].classes == ()


def test_two_labels_for_one_image_are_refused_however_it_is_written(folder, tmp_path):
    of = {f"{c}/{i}.png": c for c in ("cats", "dogs") for i in range(5)} | {"./cats/0.png": "dogs"}
    (tmp_path / "labels.json").write_text(json.dumps(of))
    assert "two values for cats/0.png: cats and dogs" in refused(folder, labels=str(tmp_path / "labels.json"))


def test_metadata_with_old_line_ends_and_paths_from_where_it_lies(tmp_path):
    flat(tmp_path / "a", 3)
    (tmp_path / "a" / "metadata.csv").write_bytes(b"file_name;text\r./000.png;x\r.\\001.png;y\r/002.png;z\r")
    assert [item.caption for item in load(tmp_path)[1]] == ["x", "y", "z"]


@pytest.mark.parametrize("there", ["NFC", "NFD"])
def test_names_with_accents_and_of_windows_are_matched(tmp_path, there):
    names = [f"é/ü{i}.png" for i in range(4)] + ["é/ lead.png"]
    for i, name in enumerate(names):
        path = tmp_path / unicodedata.normalize(there, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    for form in ("NFC", "NFD"):
        for slash in ("/", "\\"):
            told = {unicodedata.normalize(form, name).replace("/", slash): i % 2 for i, name in enumerate(names)}
            (tmp_path / "labels.json").write_text(json.dumps(told))
            listing, items = load(tmp_path, labels="labels.json")
            expected = {unicodedata.normalize(there, name): i % 2 for i, name in enumerate(names)}
            assert {item.key: item.label for item in items} == expected
            assert listing.left_out == ()


def test_dataset_json_below_a_top_folder(tmp_path):
    names = [f"0000{i % 2}/{i // 2:03}.png" for i in range(6)]
    flat(tmp_path / "top" / "00000", 3)
    flat(tmp_path / "top" / "00001", 3)
    labels = {"labels": [[name, float(i % 3)] for i, name in enumerate(names)]}
    (tmp_path / "top" / "dataset.json").write_text(json.dumps(labels))
    listing, items = load(tmp_path)
    assert (listing.labelled, listing.classes, listing.left_out) == ("dataset.json", ("0", "1", "2"), ())
    assert {item.key: item.label for item in items} == {f"top/{name}": i % 3 for i, name in enumerate(names)}


def test_a_copy_has_other_times_and_the_same_content(folder):
    before = load(folder)[0]
    os.utime(folder / "cats" / "0.png", (1, 1))
    after = load(folder)[0]
    assert before.fingerprint != after.fingerprint
    assert before.content == after.content
