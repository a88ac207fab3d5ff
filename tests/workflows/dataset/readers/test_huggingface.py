"""Folders of Hugging Face data sets: Parquet with a card, images with metadata, and what save_to_disk writes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import errors, load, png

from workflows.dataset.readers import list_source
from workflows.errors import UserError

CARD = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': plane
          '1': car
          '2': bird
  splits:
  - name: train
---
# A data set
"""
INFO = {"features": {"label": {"names": ["plane", "car", "bird"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}


def rows(first, last):
    images = [{"bytes": png(i), "path": None} for i in range(first, last)]
    return pa.table({"image": images, "label": [i % 3 for i in range(first, last)]})


@pytest.mark.parametrize("card", [("README.md", CARD), ("dataset_info.json", json.dumps(INFO))])
def test_parquet_with_class_names_beside_it(tmp_path, card):
    (tmp_path / "data").mkdir()
    for i in range(2):
        pq.write_table(rows(5 * i, 5 * i + 5), tmp_path / "data" / f"train-{i:05}-of-00002.parquet")
    (tmp_path / card[0]).write_text(card[1])
    listing, items = load(tmp_path)
    assert (listing.kind, listing.count, listing.classes) == ("huggingface", 10, ("plane", "car", "bird"))
    assert [item.label for item in items] == [i % 3 for i in range(10)]
    assert items[7].key == "data/train-00001-of-00002.parquet#2"


@pytest.mark.parametrize("number", ["a", "5"])
def test_a_card_that_does_not_number_its_classes_names_none(tmp_path, number):
    pq.write_table(rows(0, 6), tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(CARD.replace("'1': car", f"{number}: car"))
    assert load(tmp_path)[0].classes == ("0", "1", "2")


def test_one_split_must_be_named(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(rows(0, 3), tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(UserError, match=r"more than one split: test .*, train ") as caught:
        list_source(str(tmp_path))
    (hint,) = caught.value.hint.removeprefix("name one: ").split()
    assert hint == f"{tmp_path}/data/test-*.parquet"
    listing, items = load(hint)
    assert (listing.count, items[0].key) == (3, "test-00000-of-00001.parquet#0")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_images_with_metadata(tmp_path, kind):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        fields = [(f"{i}.png", f'a "{folder}", {i}', f"kind {i % 2}") for i in range(3)]
        for name, _, _ in fields:
            (tmp_path / folder / name).write_bytes(png(ord(folder) + int(name[0])))
        if kind == "csv":
            quoted = ['{},"{}",{}'.format(name, text.replace('"', '""'), label) for name, text, label in fields]
            text = "file_name,text,label\n" + "\n".join(quoted) + "\n"
        else:
            text = "".join(json.dumps({"file_name": n, "text": t, "label": label}) + "\n" for n, t, label in fields)
        (tmp_path / folder / f"metadata.{kind}").write_text(text)
    listing, items = load(tmp_path)
    assert (listing.kind, listing.classes) == ("huggingface", ("kind 0", "kind 1"))
    assert [(item.key, item.label, item.caption) for item in items] == [
        (f"{folder}/{i}.png", i % 2, f'a "{folder}", {i}') for folder in "ab" for i in range(3)
    ]
    (tmp_path / "a" / "9.png").write_bytes(png(9))
    with pytest.raises(UserError, match=r"a/metadata.*: no label for 1 of 7 images of .*, such as a/9.png"):
        list_source(str(tmp_path))
    assert load(tmp_path, labels="folders", captions="none")[0].classes == ("a", "b")


def saved(folder, first, last, *, schema_info=True, batch=2, label=None):
    """A folder as save_to_disk leaves it, with a cache that is none of its data."""
    folder.mkdir(parents=True)
    table = rows(first, last) if label is None else rows(first, last).set_column(1, "label", [label])
    if schema_info:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": INFO})})
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    middle = (last - first) // 2
    for name, part in zip(names, (table.slice(0, middle), table.slice(middle)), strict=True):
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(part, max_chunksize=batch)
    with pa.ipc.new_stream(str(folder / "cache-0123.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps(INFO if not schema_info else {}))
    return folder


@pytest.mark.parametrize("schema_info", [True, False])
def test_what_save_to_disk_wrote(tmp_path, schema_info):
    listing, items = load(saved(tmp_path / "d", 0, 9, schema_info=schema_info))
    assert (listing.kind, listing.count, listing.classes) == ("huggingface", None, ("plane", "car", "bird"))
    assert [(item.image, item.label) for item in items] == [(png(i), i % 3) for i in range(9)]
    assert items[5].key == "data-00001-of-00002.arrow#1"
    listing, items = load(tmp_path / "d", limit=6)
    assert (listing.count, [item.image for item in items]) == (6, [png(i) for i in range(6)])


def test_a_dictionary_of_splits(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / split, 0, 4)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"more than one split: test .*, train "):
        list_source(str(tmp_path))
    assert len(load(tmp_path / "train")[1]) == 4


def test_names_in_a_stream_need_a_list_of_classes(tmp_path):
    folder = saved(tmp_path / "d", 0, 4, schema_info=False, label=["b", "a", "b", "c"])
    (folder / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="labels in column label are names, but there is no list of them"):
        list_source(str(folder))
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    _, items = load(folder, labels=str(tmp_path / "classes.json"))
    assert [item.label for item in items] == [1, 0, 1, 2]
    assert {item.label for item in load(folder, labels="none")[1]} == {None}


def test_a_stream_that_is_cut_and_one_that_is_none(tmp_path):
    folder = saved(tmp_path / "d", 0, 12)
    first = folder / "data-00000-of-00002.arrow"
    first.write_bytes(first.read_bytes()[: int(first.stat().st_size * 0.6)])
    (folder / "data-00001-of-00002.arrow").write_text("<html>")
    _, items = load(folder)
    found = errors(items)
    assert [key.partition("#")[0] for key in found] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert all(text.startswith("broken") for text in found.values())
    assert 0 < len(items) - len(found) < 6
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is missing, though state.json lists it"):
        list_source(str(folder))
