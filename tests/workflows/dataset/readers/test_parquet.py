"""Parquet files: which columns, which classes, row groups, and what can be wrong."""

import json
import re
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import errors, load, png, read

from workflows.dataset.readers import list_source, read_unit
from workflows.errors import UserError


def table(first, last, **columns):
    return pa.table({"image": [png(i) for i in range(first, last)], **columns})


def written(path, rows, group=4):
    pq.write_table(rows, path, row_group_size=group)
    return path


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        list_source(str(source), **options)
    assert "\n" not in str(caught.value) + caught.value.hint
    return str(caught.value)


def test_bytes_and_whole_numbers(tmp_path):
    for name, first in (("a", 0), ("b", 10)):
        written(tmp_path / f"{name}.parquet", table(first, first + 10, label=[i % 3 for i in range(10)]))
    listing, items = load(tmp_path)
    assert (listing.kind, listing.count, listing.classes) == ("parquet", 20, ("0", "1", "2"))
    assert (listing.labelled, listing.captioned) == ("column label", "")
    assert [item.key for item in items] == [f"{name}.parquet#{i}" for name in "ab" for i in range(10)]
    assert [item.label for item in items] == [i % 3 for i in range(10)] * 2
    assert [item.image for item in items] == [png(i) for i in range(20)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_names_and_captions(tmp_path, kind):
    names = pa.array(["dog", "cat", None, "eel"], pa.string()).cast(kind)
    written(tmp_path / "a.parquet", table(0, 4, label=names, text=["one", "two", None, "four"]))
    listing, items = load(tmp_path)
    assert listing.classes == ("cat", "dog", "eel")
    assert [item.label for item in items] == [1, 0, None, 2]
    assert (listing.captioned, [item.caption for item in items]) == ("column text", ["one", "two", None, "four"])


def test_hugging_faces_columns_and_class_names(tmp_path):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    images[3] = {"bytes": None, "path": "elsewhere/3.png"}
    rows = pa.table({"photo": images, "thumb": [b"x"] * 5, "fine": [2, 0, -1, 1, 5], "id": list(range(5))})
    features = {"photo": {"_type": "Image"}, "fine": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    written(tmp_path / "train.parquet", rows)
    listing, items = load(tmp_path)
    assert (listing.kind, listing.classes) == ("huggingface", ("a", "b", "c"))
    assert (listing.image_column, listing.label_column) == ("photo", "fine")
    assert [item.label for item in items if not item.error] == [2, 0, None]
    assert errors(items) == {
        "train.parquet#3": "the image is not in the table but at elsewhere/3.png",
        "train.parquet#4": "label 5 is not among the 3 classes",
    }


def test_columns_that_the_user_names(tmp_path):
    rows = pa.table({"a": [png(0)], "b": [png(1)], "kind": ["x"], "said": ["hello"]})
    written(tmp_path / "a.parquet", rows)
    assert "which column is the image? a, b" in refused(tmp_path)
    listing, (item,) = load(tmp_path, image_column="b", label_column="kind", caption_column="said")
    assert (item.image, item.label, item.caption, listing.classes) == (png(1), 0, "hello", ("x",))


def test_a_list_of_classes(tmp_path):
    written(tmp_path / "a.parquet", table(0, 3, label=[0, 2, 5]))
    assert "labels are numbers up to 5, but no image has 1" in refused(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    listing, items = load(tmp_path / "a.parquet", labels=str(tmp_path / "classes.txt"))
    assert listing.classes == ("a", "b", "c")
    assert errors(items) == {"a.parquet#2": "label 5 is not among the 3 classes"}
    written(tmp_path / "a.parquet", table(0, 3, label=["b", "d", "a"]))
    _, items = load(tmp_path / "a.parquet", labels=str(tmp_path / "classes.txt"))
    assert ([item.label for item in items], errors(items)) == (
        [1, None, 0],
        {"a.parquet#1": "label d is not in the class list"},
    )


@pytest.mark.parametrize("unit_bytes", [1, 3000, 10**9])
def test_the_limit_is_spread_over_all_rows(tmp_path, unit_bytes):
    for name, first in (("a", 0), ("b", 10)):
        written(tmp_path / f"{name}.parquet", table(first, first + 10))
    listing, items = load(tmp_path, limit=5, unit_bytes=unit_bytes)
    assert (listing.count, listing.available) == (5, 20)
    assert [item.key for item in items] == [f"a.parquet#{i}" for i in (0, 4, 8)] + [f"b.parquet#{i}" for i in (2, 6)]
    assert [item.image for item in items] == [png(i) for i in (0, 4, 8, 12, 16)]


def test_units_are_whole_row_groups(tmp_path):
    written(tmp_path / "a.parquet", table(0, 10))
    listing, _ = load(tmp_path, unit_bytes=1)
    assert [(unit.first, unit.last) for unit in listing.units] == [(0, 4), (4, 8), (8, 10)]


def test_large_row_groups_are_not_held_whole(tmp_path):
    """Rows come before the rest of their row group was read."""
    import fsspec

    noise = [bytes(range(256)) * 400 + i.to_bytes(4, "big") for i in range(400)]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 8}  # which is a page here
    pq.write_table(pa.table({"image": noise}), tmp_path / "a.parquet", **options)
    size = (tmp_path / "a.parquet").stat().st_size
    filesystem, reads = fsspec.filesystem("file"), []
    opened = filesystem.open

    def counting(*args, **options):
        file = opened(*args, **options)
        read, file.read = file.read, lambda n=-1: reads.append(n) or read(n)
        return file

    listing = list_source(str(tmp_path / "a.parquet"))
    filesystem.open = counting
    try:
        from workflows.dataset.readers import read_unit

        first = next(read_unit(listing, listing.units[0], filesystem))
    finally:
        del filesystem.open
    assert first.image == noise[0]
    assert sum(reads) < size / 4


def test_a_file_that_is_no_parquet_is_as_many_broken_items_as_its_size_says(tmp_path):
    content = written(tmp_path / "a.parquet", table(0, 40)).read_bytes()
    (tmp_path / "b.parquet").write_text("<html>no such page</html>")
    (tmp_path / "c.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "d.parquet").write_bytes(b"")
    listing, items = load(tmp_path)
    assert (listing.count, listing.available, len(items)) == (62, 62, 62)
    lost = [f"{name}.parquet#{i}" for name, rows in (("b", 1), ("c", 20), ("d", 1)) for i in range(rows)]
    assert {key: text.partition(":")[0] for key, text in errors(items).items()} == dict.fromkeys(
        lost, "it is not a Parquet file"
    )
    listing, items = load(tmp_path, limit=31)
    assert (listing.count, len(items)) == (31, 31)
    assert list(errors(items)) == lost[::2]
    (tmp_path / "a.parquet").unlink()
    assert re.search(r"no file can be read; b.parquet: it is not a Parquet file", refused(tmp_path))


def test_rows_of_a_broken_row_group_are_errors_and_the_others_are_not(tmp_path):
    path = written(tmp_path / "a.parquet", table(0, 12))
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    _, items = load(tmp_path)
    assert [item.key for item in items] == [f"a.parquet#{i}" for i in range(12)]
    assert sorted(errors(items)) == [f"a.parquet#{i}" for i in range(4, 8)]
    assert all(text.startswith("broken: ") for text in errors(items).values())


def test_files_that_change_after_they_were_listed(tmp_path):
    written(tmp_path / "a.parquet", table(0, 10))
    written(tmp_path / "b.parquet", table(0, 2))
    listing = list_source(str(tmp_path))
    written(tmp_path / "a.parquet", table(0, 6))
    (tmp_path / "b.parquet").unlink()
    items = read(listing)
    assert errors(items) == {f"a.parquet#{i}": "changed since it was listed" for i in range(6, 10)} | {
        f"b.parquet#{i}": "it is no longer there" for i in range(2)
    }
    written(tmp_path / "a.parquet", table(0, 10).rename_columns(["picture"]))
    assert len(errors(read(listing))) == 12


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (pa.table({"x": [1]}), {}, r"a.parquet: no column holds the bytes of images; there are x \(int64\)"),
        (
            pa.table({"image": ["text"]}),
            {"image_column": "image"},
            "column image is string; the bytes of an image file",
        ),
        (table(0, 1), {"label_column": "kind"}, r"no column kind for labels; there are image \(binary\)"),
        (
            table(0, 1, label=[0.5]),
            {"label_column": "label"},
            "column label holds 0.5, which is neither a name nor a whole number",
        ),
        (table(0, 1, text=[1]), {"caption_column": "text"}, "column text is int64, not text"),
        (table(0, 1), {"labels": "folders"}, "labels by folder are for images in folders"),
        (table(0, 1), {"labels": "{here}/of.json"}, "labels by path are for images that have names"),
        (table(0, 1), {"labels": "{here}/classes.txt"}, "a class list is given, but there is no label column"),
        (table(0, 1).slice(1), {}, "the files have no rows"),
    ],
)
def test_tables_that_will_not_do(tmp_path, rows, options, said):
    (tmp_path / "of.json").write_text('{"a.png": 1}')
    (tmp_path / "classes.txt").write_text("a\nb\n")
    written(tmp_path / "a.parquet", rows)
    options = {name: value.format(here=tmp_path) for name, value in options.items()}
    assert re.search(said, refused(tmp_path / "a.parquet", **options))


def test_files_of_different_columns(tmp_path):
    written(tmp_path / "a.parquet", table(0, 3, label=[0, 1, 2]))
    written(tmp_path / "b.parquet", table(0, 3))
    assert "b.parquet has no column label, which a.parquet has" in refused(tmp_path)
    written(tmp_path / "b.parquet", table(0, 3, label=["a", "b", "c"]))
    assert "column label is string in b.parquet and int64 in a.parquet" in refused(tmp_path)
    twice = pa.table([table(0, 3)["image"], [0, 1, 2], [2, 1, 0]], names=["image", "label", "label"])
    written(tmp_path / "a.parquet", twice)
    assert "a.parquet has the column label twice" in refused(tmp_path / "a.parquet")
    written(tmp_path / "a.parquet", table(0, 3))
    assert "a.parquet has no column label, which b.parquet has" in refused(tmp_path)
    assert load(tmp_path, labels="none")[0].left_out == (("column label", "neither image, label nor caption", 1),)


def test_files_whose_classes_have_other_names(tmp_path):
    for name, classes in (("a", None), ("b", ["cat", "dog"]), ("c", ["dog", "cat"])):
        feature = {"label": {"_type": "ClassLabel", "names": classes}} if classes else {}
        described = {"huggingface": json.dumps({"info": {"features": feature}})}
        written(tmp_path / f"{name}.parquet", table(0, 2, label=[0, 1]).replace_schema_metadata(described))
    said = "the class names of column label differ between the files, such as cat, dog in b.parquet and dog, cat in c.parquet"
    assert said in refused(tmp_path)
    (tmp_path / "c.parquet").unlink()
    assert load(tmp_path)[0].classes == ("cat", "dog")


def test_columns_in_the_folders_names_are_told(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"label={name}").mkdir()
        written(tmp_path / f"label={name}" / "0.parquet", table(0, 2))
    listing, items = load(tmp_path)
    assert (listing.labelled, len(items)) == ("", 4)
    assert listing.left_out == (("column label", "in the folders' names", 1),)


# As pandas, polars and datasets write them


def test_a_column_that_is_empty_in_one_file_is_not_so_in_all(tmp_path):
    for empty in (0, 1):
        parts = [[None] * 4, [f"number {i}" for i in range(4)]]
        labels = [[None] * 4, [i % 2 for i in range(4)]]
        if empty:
            parts, labels = parts[::-1], labels[::-1]
        for part in (0, 1):
            rows = table(4 * part, 4 * part + 4, caption=parts[part], label=labels[part])
            written(tmp_path / f"{part}.parquet", rows)
        listing, items = load(tmp_path)
        assert (listing.captioned, listing.labelled, listing.classes) == ("column caption", "column label", ("0", "1"))
        assert [item.caption for item in items] == parts[0] + parts[1]
        assert [item.label for item in items] == labels[0] + labels[1]


def test_a_column_that_is_empty_in_all_is_told(tmp_path):
    written(tmp_path / "a.parquet", table(0, 4, caption=[None] * 4, label=pa.array([-1, None, -1, -1])))
    listing, items = load(tmp_path)
    assert (listing.captioned, listing.labelled, {item.label for item in items}) == ("", "", {None})
    assert listing.notes == ("no labels in column label: all are empty or -1",)
    assert [what for what, _, _ in listing.left_out] == ["column caption", "column label"]
    assert "no labels in column label" in refused(tmp_path, label_column="label")


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (pa.array([0.0, 1.0, 2.0, None]), "012", [0, 1, 2, None]),
        (pa.array([0.0, 1.0, 2.0, float("nan")]), "012", [0, 1, 2, None]),
        (pa.array([1.0, 0.0, 2.0, 1.0], pa.float16()), "012", [1, 0, 2, 1]),
        (pa.array([True, False, None, True]), "01", [1, 0, None, 1]),
        (pa.array([2, 0, 1, None], pa.uint64()), "012", [2, 0, 1, None]),
        (pa.array([2, 0, 1, 0], pa.int8()), "012", [2, 0, 1, 0]),
        (pa.array([Decimal("2.00"), Decimal("0.00"), Decimal("1.00"), None]), "012", [2, 0, 1, None]),
        (pa.array([2, 0, 1, None]).dictionary_encode(), "012", [2, 0, 1, None]),
        (pa.array(["b c", None, "a", "b c"]).dictionary_encode(), ("a", "b c"), [1, None, 0, 1]),
        (pa.array(["10", "9", "", "2"]), ("2", "9", "10"), [2, 1, None, 0]),
        (pa.array(["b", "a", None, "b"], pa.string_view()), "ab", [1, 0, None, 1]),
        (pa.array([[2], [0], [1], []]), "012", [2, 0, 1, None]),
        (pa.array([[1.0], [0.0], None, [1.0]], pa.large_list(pa.float32())), "01", [1, 0, None, 1]),
        (pa.array([["b"], ["a"], ["b"], ["a"]], pa.list_(pa.string(), 1)), "ab", [1, 0, 1, 0]),
    ],
)
@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_of_any_type(tmp_path, labels, classes, numbers, column):
    written(tmp_path / "a.parquet", table(0, 4, **{column: labels}))
    listing, items = load(tmp_path)
    assert listing.classes == tuple(classes)
    assert [item.label for item in items] == numbers
    assert not errors(items)


def test_types_that_differ_between_files_are_read_as_one(tmp_path):
    kinds = [pa.int64(), pa.int32(), pa.uint8(), pa.float64()]
    for part, kind in enumerate(kinds):
        rows = table(3 * part, 3 * part + 3, label=pa.array([0, 1, 2]).cast(kind))
        written(tmp_path / f"{part}.parquet", rows)
    listing, items = load(tmp_path)
    assert (listing.classes, [item.label for item in items]) == (("0", "1", "2"), [0, 1, 2] * 4)
    texts = [pa.string(), pa.large_string(), pa.string_view()]
    for part, kind in enumerate(texts):
        rows = pa.table({"image": pa.array([png(part)], [pa.binary(), pa.large_binary(), pa.binary_view()][part])})
        written(tmp_path / f"{part}.parquet", rows.append_column("text", pa.array(["a"]).cast(kind)))
    (tmp_path / "3.parquet").unlink()
    _, items = load(tmp_path)
    assert [(item.image, item.caption) for item in items] == [(png(i), "a") for i in range(3)]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            pa.array([[0.0, 1.0], [1.0, 0.0]]),
            "column label holds a list of 2 values, such as one-hot or several classes",
        ),
        (pa.array([0.25, 1.0]), "column label holds 0.25, which is neither a name nor a whole number"),
    ],
)
def test_labels_that_are_none_are_refused_for_what_they_are(tmp_path, labels, said):
    written(tmp_path / "a.parquet", table(0, 2, label=labels))
    assert said in refused(tmp_path)


def test_captions_in_lists_and_columns_that_are_not_taken(tmp_path):
    rows = table(0, 3, caption=[["", "a", "b"], [], ["c"]], url=["x"] * 3, **{"second caption": ["y"] * 3})
    written(tmp_path / "a.parquet", rows)
    (tmp_path / "notes.txt").write_text("x")
    listing = list_source(str(tmp_path))
    left = Counter()
    items = [item for unit in listing.units for item in read_unit(listing, unit, left_out=left)]
    assert [item.caption for item in items] == ["a", None, "c"]
    assert left == {("captions", "beyond the first of an image"): 1}
    assert listing.left_out == (
        (".txt", "beside the Parquet files", 1),
        ("column second caption", "neither image, label nor caption", 1),
        ("column url", "neither image, label nor caption", 1),
    )
