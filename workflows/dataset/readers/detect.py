"""The entry points of the readers: detecting the kind of a source, listing it, and reading its units."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from workflows.dataset.readers.arrow import list_arrow, read_arrow
from workflows.dataset.readers.bundled_tables import own_tables
from workflows.dataset.readers.files import File, Files, LeftOut, called, clean, fingerprint, kinds, suffix
from workflows.dataset.readers.huggingface import (
    DESCRIBED,
    arrow_files,
    class_names,
    is_huggingface,
    is_metadata,
    one_split,
)
from workflows.dataset.readers.image_files import NOT_IMAGES, image_units, images_among, is_image, read_images
from workflows.dataset.readers.labels import Described, Own, describe
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.parquet import Tables, list_parquet, read_parquet
from workflows.dataset.readers.sidecars import Ask
from workflows.dataset.readers.tars import list_tars, read_tars
from workflows.dataset.readers.zips import list_zips, read_zip
from workflows.errors import UserError

if TYPE_CHECKING:
    from workflows.dataset.readers.files import AbstractFileSystem

READERS = {"images": read_images, "zip": read_zip, "parquet": read_parquet, "tar": read_tars, "arrow": read_arrow}
KIND_NAMES = {
    "images": "images",
    "zip": "zip files",
    "parquet": "Parquet files",
    "tar": "tar files",
    "arrow": "Arrow files",
}
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def list_source(
    source: str,
    *,
    labels: str | None = None,
    captions: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    unit_bytes: int = 64 * 2**20,
    limit: int | None = None,
    filesystem: AbstractFileSystem | None = None,
) -> Listing:
    """Lists `source`: a folder, a prefix of a store, a file, or a pattern, of images, zips, Parquet, Arrow or tar files.

    labels       None: those that the source has (in its tables, columns or sidecar files, else two or more folders); "none";
                 "folders"; or a file (.json, .jsonl, .csv, .tsv) of labels by path. A file that only lists classes (.txt as well)
                 names the labels that the source has
    captions     None: those that the source has; "none"; or a file of captions by path
    *_column     the column of a table or of such a file, or, in tars, an extension or a field of the JSON
    unit_bytes   approximate bytes per unit; a tar, an Arrow file and a row group of a Parquet file are not divided
    limit        number of images: spread evenly if the source tells how many it has, else the first ones, which a note says

    The files of labels and captions may be in the source or elsewhere. Raises UserError if the source can't be used.
    """
    assert unit_bytes > 0, unit_bytes
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit}; it must be at least 1")
    ask = Ask(labels, captions, label_column, image_column, caption_column, unit_bytes, limit)
    files = Files(source, filesystem)
    found = files.find()
    reader, chosen = _detect(files, found)
    content = fingerprint(found, versions=False)
    listing = Listing(files.source, files.root, reader, (), None, (), fingerprint(found), content, limit=limit)
    if reader in ("parquet", "arrow"):
        listing = _tables(listing, reader, files, found, chosen, ask)
    elif reader == "tar":
        one_split(files, chosen)
        fields, contents = list_tars(files, chosen, ask)
        listing = replace(listing, kind="webdataset", fingerprint=_with(listing, contents), **fields)
        taken = {file.name for file in chosen}
        _leave(files, [file.name for file in found if file.name not in taken], {ask.labels, ask.captions}, reader)
    else:
        listing = _named(listing, reader, files, found, chosen, ask)
    left_out = tuple((what, why, count) for (what, why), count in sorted(files.left_out.items()))
    listing = replace(listing, left_out=left_out)
    return _first_ones(listing, files) if limit is not None and listing.available is None else listing


def read_unit(
    listing: Listing, unit: Unit, filesystem: AbstractFileSystem | None = None, left_out: LeftOut | None = None
) -> Iterator[Item]:
    """Yields the images of a unit one by one, always in the same order. A broken image is an Item with an error.

    left_out: counts what is not used, beyond what the listing says. An outage of the store is raised rather than recorded, as it
    says nothing about an image.
    """
    files = Files(listing.source, filesystem, root=listing.root)
    files.left_out = Counter() if left_out is None else left_out
    items = map(_writable, READERS[unit.kind](listing, unit, files))
    return islice(items, unit.last) if unit.kind in ("tar", "arrow") else items


def _writable(item: Item) -> Item:
    """Makes the caption encodable as UTF-8. A lone surrogate, as JSON has it for a cut emoji, becomes a question mark."""
    return replace(item, caption=item.caption.encode("utf-8", "replace").decode()) if item.caption else item


def _detect(files: Files, found: list[File]) -> tuple[str, list[File]]:
    """Returns (reader, its files). Raises UserError if there is nothing to read, or more than one kind of files."""
    of: dict[str, list[File]] = {}
    for file in found:
        kind = _kind(file.name)
        if kind:
            of.setdefault(kind, []).append(file)
    if set(of) <= {"images"} and (images := images_among(files, found)):
        of = {"images": images}
    if not of:
        raise UserError(
            f"{files.source} has no images; its files are {kinds(file.name for file in found)}",
            hint=f"known: {', '.join(KIND_NAMES.values())}",
        )
    if set(of) == {"tar", "parquet"} and {_stem(file.name) for file in of["parquet"]} <= {
        _stem(file.name) for file in of["tar"]
    }:
        del of["parquet"]  # tables about the tars, written by img2dataset
    if len(of) > 1:
        first, second, *_ = sorted(of)
        shown = " and ".join(f"{KIND_NAMES[kind]} ({clean(of[kind][0].name)})" for kind in (first, second))
        raise UserError(
            f"{files.source} holds both {shown}", hint="name the folder, the files or a pattern of one kind"
        )
    return next(iter(of.items()))


def _kind(name: str) -> str | None:
    low = name.lower()
    if low.endswith(TARS):
        return "tar"
    return "images" if is_image(low) else {".zip": "zip", ".parquet": "parquet", ".arrow": "arrow"}.get(suffix(low))


def _stem(name: str) -> str:
    """Returns a name without all its suffixes: 00000 for 00000.tar.gz."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _named(listing: Listing, reader: str, files: Files, found: list[File], chosen: list[File], ask: Ask) -> Listing:
    """Lists a source of image files or zips, where every image has a known name."""
    taken = {file.name for file in chosen}
    others = [file.name for file in found if file.name not in taken]
    if reader == "zip":
        one_split(files, chosen)
        units, available, about = list_zips(files, chosen, ask)
        tables: frozenset[str] = frozenset()
    else:
        labels, captions, tables, columns = own_tables(others, files.whole, ask)
        files.leave_columns(columns)
        if any(is_metadata(name) for name in tables):
            listing = replace(listing, kind="huggingface")
        names = [file.name for file in chosen]
        about = describe(files, names, ask, Own(others, files.read_small, labels, captions))
        units, available = image_units(chosen, about, ask), len(chosen)
    _leave(files, others, {*tables, *about.used, ask.labels, ask.captions}, reader)
    listing = replace(listing, caption_columns=ask.caption_columns)
    return _counted(listing, units, available, about)


def _leave(files: Files, others: Sequence[str], used: Collection[str | None], reader: str) -> None:
    """Counts the files that are not read as left out."""
    why = NOT_IMAGES if reader == "images" else f"beside the {KIND_NAMES[reader]}"
    for name in others:
        if name not in used:
            files.leave(called(name), why)


def _counted(listing: Listing, units: tuple[Unit, ...], available: int, about: Described) -> Listing:
    return replace(
        listing,
        units=units,
        count=_at_most(available, listing.limit),
        available=available,
        classes=about.classes,
        labelled=about.labelled,
        captioned=about.captioned,
        fingerprint=_with(listing, about.tables),
        notes=about.notes,
    )


def _tables(listing: Listing, reader: str, files: Files, found: list[File], chosen: list[File], ask: Ask) -> Listing:
    own = is_huggingface(files, found)
    names = class_names(files, found) if own else {}
    if reader == "arrow":
        chosen = arrow_files(files, found, chosen)
    one_split(files, chosen)
    tables: Tables = {"parquet": list_parquet, "arrow": list_arrow}[reader](files, chosen, ask, names)
    taken = {file.name for file in chosen}
    others = [file.name for file in found if file.name not in taken and file.name.rpartition("/")[2] not in DESCRIBED]
    _leave(files, others, {ask.labels, ask.captions}, reader)
    files.leave_columns(tables.columns.others)
    for column in dict.fromkeys(
        part.partition("=")[0] for name in taken for part in name.split("/")[:-1] if "=" in part
    ):
        files.leave(f"column {clean(column)}", "in the folders' names")
    return replace(
        listing,
        kind="huggingface" if own or tables.columns.described or reader == "arrow" else "parquet",
        units=tables.units,
        count=None if tables.available is None else _at_most(tables.available, listing.limit),
        available=tables.available,
        classes=tables.classes,
        labelled=tables.labelled,
        captioned=f"column {tables.columns.caption}" if tables.columns.caption else "",
        image_column=tables.columns.image,
        label_column=tables.columns.label,
        caption_column=tables.columns.caption,
        fingerprint=_with(listing, (tables.table,)),
        notes=tables.notes,
    )


def _first_ones(listing: Listing, files: Files) -> Listing:
    """Limits a source of unknown length to its first `limit` items. The files that hold them are read once, to count."""
    assert listing.limit is not None
    units: list[Unit] = []
    count = 0
    for unit in listing.units:
        for name in unit.files:
            if count == listing.limit:
                break
            one = replace(unit, files=(name,), size=unit.size // len(unit.files))
            items = READERS[unit.kind](listing, one, files)
            last = sum(1 for _ in islice(items, listing.limit - count))
            count += last
            units.append(replace(one, last=last))
    note = f"the first {count:,} images: the total is not known before everything is read"
    return replace(listing, units=tuple(units), count=count, notes=(*listing.notes, note))


def _at_most(available: int, limit: int | None) -> int:
    return available if limit is None else min(available, limit)


def _with(listing: Listing, contents: tuple[bytes, ...]) -> str:
    """Returns the fingerprint of the listing, extended by the contents of the files that the user named."""
    if not any(contents):
        return listing.fingerprint
    parts = [listing.fingerprint, *(hashlib.sha256(content).hexdigest() for content in contents)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
