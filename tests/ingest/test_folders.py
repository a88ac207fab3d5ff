"""Folders of images: kinds, labels and captions by folder and file, the limit, and what can be wrong."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from pictures import errors, good, load, png

from workflows.ingest import list_source, read_unit
from workflows.runtime.errors import UserError


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
    assert "labels by folder need two folders" in refused(folder / "cats", labels="folders")
    (folder / "loose.png").write_bytes(png(1))
    listing, _ = load(folder)
    assert (listing.classes, listing.notes) == ((), ("no labels: loose.png lies in no class's folder",))
    assert "loose.png lies in no class's folder" in refused(folder, labels="folders")


def test_splits_are_no_classes(folder):
    (folder / "cats").rename(folder / "train")
    (folder / "dogs").rename(folder / "test")
    said = refused(folder)
    assert "holds the splits test, train, which are no classes" in said
    assert "/test; or --labels none" in said
    assert load(folder, labels="none")[0].count == 10


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
    assert "label cats is no name of the class list, which has 2: dogs, fish" in refused(
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
    assert "a text is expected for cats/0.png, not {'en': 'a cat'}, which is no text" in refused(
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
        ("l.json", '{"cats/0.png": ', r"l.json can't be read: it is no JSON \(Expecting value"),
        ("l.json", "3", "an object or a list is expected, not int"),
        ("l.json", '["a", "a"]', "the class a is there twice"),
        ("l.csv", "file_name,a,b\nx.png,1,2\n", "no column label or .*; there are a, b"),
        ("l.csv", "a,b,c\nx.png,1,2\n", "no column of paths among a, b, c"),
        ("l.csv", "file_name,label\ncats/0.png,a\ncats/0.png,b\n", "two values for cats/0.png: a and b"),
        (
            "l.csv",
            "file_name,label\ncats/0.png,\xe9\n",
            r"l.csv can't be read: it is no UTF-8 text \(byte 0xe9 in line 2\)",
        ),
        ("l.csv", "\xff\xfe", "l.csv: there are no labels in it"),
        ("missing.json", None, "missing.json is not there, neither below .* nor by itself"),
        ("l.xlsx", None, "l.xlsx is no file of labels"),
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
        (lambda i: i if i else "zero", "labels are names (zero) and numbers (1)"),
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
    assert "label 18 is no number of the class list, which has 18: c0, c1, c2, ..." in refused(
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
    assert "limit: 0 images are none" in refused(folder, limit=0)


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
    monkeypatch.setattr("workflows.ingest.files.MAX_BYTES", 2000)
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
    assert errors(load(root)[1]) == {"a/0.png": "it may not be read: permission denied"}
    if os.geteuid() == 65534:
        os.seteuid(0)
    (root / "b").chmod(0)
    drop()
    assert "may not be read: " in refused(root)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{root}/nowhere", "nowhere is not there"),
        ("{root}/empty", "empty has no files"),
        ("{root}/texts", r"texts has no images; its files are .txt (2), no suffix (1) [known: images, zip files,"),
        ("nothing://x", "nothing://x: Protocol not known: nothing"),
        ("memory://nowhere", "memory://nowhere is not there"),
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
