"""What a preparation says of labels, captions and what it left out; and what makes two sources the same. Without Ray."""

import io
import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from workflows.dataset.manifest import read_manifest, write_manifest
from workflows.dataset.readers import list_source
from workflows.dataset.shards import decode, load_shard
from workflows.errors import UserError
from workflows.ingest import prepare as ingest
from workflows.ingest.options import Preparation
from workflows.ingest.summary import kind_of, summary_line
from workflows.rendering.screen import Screen


def png(i):
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def folder(root, classes=("a", "b"), n=60):
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(n):
            (root / c / f"{i:03}.png").write_bytes(png(1000 * classes.index(c) + i))
    return root


def prepared(source, dest, **options):
    """The manifest, by the very steps of a preparation, in this process."""
    p = Preparation(str(source), str(dest), 8, **options)
    listing = list_source(p.source, labels=p.labels, captions=p.captions, limit=p.limit)
    bare = replace(listing, units=())
    tally = ingest.Tally({i: ingest.write_part(p, bare, "plan", i, [u]) for i, u in enumerate(listing.units)})
    ingest._check_bad(p, listing, tally, whole=True)
    manifest = ingest._manifest(p, listing, {}, tally)
    write_manifest(p.dest, manifest)
    assert read_manifest(p.dest) == manifest
    return manifest


def test_the_line_says_what_was_taken_and_what_was_left_out(tmp_path):
    source = folder(tmp_path / "source")
    for i in range(30):
        (source / "a" / f"{i:03}.txt").write_text(f"an a, {i}")
    for name in ("a/x.heic", "a/y.HEIC", "b/notes.md", "LICENSE"):
        (source / name).write_bytes(b"x")
    (source / "b" / "000.png").write_bytes(b"no image")
    manifest = prepared(source, tmp_path / "set")
    assert manifest.taken["said"] == (
        "labels: 2 classes by folders (a, b); captions: 30 by .txt files, 89 images have none; "
        "left out: 1 image (not an image that can be read); 2 .heic, 1 .md, 1 without a suffix (not images)"
    )
    assert manifest.taken["labels"] == {"by": "folders", "classes": 2}
    assert manifest.taken["captions"] == {"by": ".txt files", "images": 30}
    assert {"what": ".heic", "why": "not images", "count": 2} in manifest.taken["left_out"]
    assert (manifest.classes, manifest.columns) == (("a", "b"), {"caption": {"from": ".txt files"}})
    rows = [decode(load_shard(tmp_path / "set", shard), manifest, ["key", "caption"]) for shard in manifest.shards]
    captions = {key: caption for part in rows for key, caption in zip(part["key"], part["caption"], strict=True)}
    assert captions == {f"{c}/{i:03}.png": f"an a, {i}" if c == "a" and i < 30 else None for c in "ab" for i in range(60)
                        if (c, i) != ("b", 0)}  # fmt: skip


def test_what_only_reading_tells_is_told_too(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i in range(110):
            members = {"png": png(i), "npy": b"x", "cls": b"%d" % (i % 3)} | ({"txt": b"a word"} if i == 109 else {})
            if i == 7:
                del members["cls"]
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i:03}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    manifest = prepared(tmp_path / "x.tar", tmp_path / "set")
    assert manifest.taken["said"] == (
        "labels: 3 classes by cls; captions: 1 by files beside the images, 108 images have none; "
        "left out: 1 image (has no label); 110 .npy (not images)"
    )
    assert (manifest.count, manifest.num_classes) == (109, 3)
    assert manifest.skipped["listed"] == [{"path": "x.tar#007.png", "reason": "has no label"}]


def test_captions_of_other_images_than_a_tar_has_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i in range(110):
            info = tarfile.TarInfo(f"{i:03}.png")
            info.size = len(png(i))
            archive.addfile(info, io.BytesIO(png(i)))
    (tmp_path / "captions.csv").write_text("file_name,caption\nx.png,a\ny.png,b\n")
    with pytest.raises(UserError, match=r"captions.csv: none of its captions belongs to an image of .*x.tar"):
        prepared(tmp_path / "x.tar", tmp_path / "set", captions=str(tmp_path / "captions.csv"))


def test_nothing_left_out_and_nothing_taken_are_said(tmp_path):
    manifest = prepared(folder(tmp_path / "source", classes=("a",), n=100), tmp_path / "set")
    assert manifest.taken["said"] == "labels: none; captions: none; left out: nothing"
    assert manifest.columns == {}


def test_names_of_classes_make_no_lines(tmp_path):
    manifest = prepared(folder(tmp_path / "source", classes=("a\nb", os.fsdecode(b"caf\xe9"))), tmp_path / "set")
    assert manifest.taken["said"].startswith("labels: 2 classes by folders (a\\x0ab, caf\\udce9); captions")


def test_images_without_labels_are_refused_as_such(tmp_path):
    source = folder(tmp_path / "source")
    told = {f"{c}/{i:03}.png": None if c == "a" else i % 2 for c in "ab" for i in range(60)}
    (tmp_path / "labels.json").write_text(json.dumps(told))
    asked = {"labels": str(tmp_path / "labels.json")}
    with pytest.raises(
        UserError, match=r"60 of 120 images have no label, more than 1.000%; such as a/000.png"
    ) as caught:
        prepared(source, tmp_path / "set", **asked)
    assert caught.value.hint.startswith(
        "use --labels none for a data set without classes, or leave them out with --max-bad"
    )
    few = told | {f"a/{i:03}.png": 1 for i in range(60) if i}
    (tmp_path / "labels.json").write_text(json.dumps(few))
    manifest = prepared(source, tmp_path / "set", **asked)
    assert (manifest.count, "left out: 1 image (has no label)" in manifest.taken["said"]) == (119, True)


def test_files_with_new_times_are_the_same_source_and_other_bytes_are_not(tmp_path):
    source = folder(tmp_path / "source")
    there = prepared(source, tmp_path / "set")
    p = Preparation(str(source), str(tmp_path / "set"), 8)

    def same(**changes):
        return ingest._is_same(replace(p, **changes), list_source(p.source), {}, there, Screen())

    assert same()
    for path in source.rglob("*.png"):
        os.utime(path, (1, 1))
    assert same()
    assert not same(crop="random")
    path = source / "a" / "000.png"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    assert not same()
    path.write_bytes(content)
    assert same()
    path.rename(source / "b" / "x.png")
    assert not same()


def test_long_lists_are_cut():
    taken = {
        "labels": {"by": "column label", "classes": 7},
        "captions": {"by": "column text", "images": 9},
        "left_out": [{"what": f".{c}", "why": "not images", "count": 1000} for c in "abcdefg"]
        + [{"what": "column url", "why": "not asked for", "count": 1}],
    }
    assert summary_line(taken, list("tuvwxyz"), 10) == (
        "labels: 7 classes by column label (t, u, v, w, x, and 2 more); captions: 9 by column text, 1 image has none; "
        "left out: 1,000 .a, 1,000 .b, 1,000 .c, 1,000 .d, 1,000 .e, and 2 more (not images); column url (not asked for)"
    )


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("broken: image file is truncated (3 bytes not processed)", "broken"),
        ("10000x9000: more than 89,478,485 pixels", "more than ... pixels"),
        ("005.txt: the caption is not UTF-8 text (byte 0x92 in line 1)", "the caption is not UTF-8 text"),
        ("not an image that can be read (BMP, GIF)", "not an image that can be read"),
        ("an empty file", "an empty file"),
    ],
)
def test_reasons_are_counted_by_kind(reason, kind):
    assert kind_of(reason) == kind
