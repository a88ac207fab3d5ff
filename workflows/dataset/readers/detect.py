"""The entry points of the readers: detecting the kind of a source, listing it, and reading its units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.arrow import list_arrow, read_arrow
from workflows.dataset.readers.bundled_tables import is_metadata
from workflows.dataset.readers.files import File, Files, LeftOut, clean, common_suffixes, fingerprint, suffix
from workflows.dataset.readers.huggingface import DESCRIBED, arrow_files, class_names, one_split
from workflows.dataset.readers.image_files import NOT_IMAGES, images_among, is_image, list_images, read_images
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.parquet import list_parquet, read_parquet
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
    if reader == "arrow":
        chosen = arrow_files(files, found, chosen)
    if reader != "images":
        one_split(files, chosen)
    taken = {file.name for file in chosen}
    others = [file.name for file in found if file.name not in taken]
    if reader in ("parquet", "arrow"):
        fields, contents, used = _tables(reader, files, found, chosen, ask)
    elif reader == "tar":
        fields, contents = list_tars(files, chosen, ask)
        used = set()
    else:
        fields, contents, used = _named(reader, files, others, chosen, ask)
    why = NOT_IMAGES if reader == "images" else f"beside the {KIND_NAMES[reader]}"
    files.leave_files((name for name in others if name not in used | {ask.labels, ask.captions}), why)
    available = fields.get("available")
    listing = Listing(
        source=files.source,
        root=files.root,
        count=available if available is None or limit is None else min(available, limit),
        limit=limit,
        fingerprint=fingerprint(found, contents=contents),
        content=fingerprint(found, versions=False),
        left_out=tuple((what, why, count) for (what, why), count in sorted(files.left_out.items())),
        **fields,
    )
    return _first_ones(listing, files) if limit is not None and available is None else listing


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
    """Makes the caption encodable as UTF-8. A lone surrogate, such as JSON has for a cut emoji, becomes a question mark."""
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
            f"{files.source} has no images; its files are {common_suffixes(file.name for file in found)}",
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


Fields = tuple[dict[str, Any], tuple[bytes, ...], set[str]]
"""Fields of a Listing, the contents of the files that the user named, and the other files of the source that are used."""


def _named(reader: str, files: Files, others: list[str], chosen: Sequence[File], ask: Ask) -> Fields:
    """Lists a source of image files or zips, where every image has a known name."""
    if reader == "zip":
        units, available, about = list_zips(files, chosen, ask)
        used = set[str]()  # what is used is in the archives
    else:
        units, available, about = list_images(files, others, chosen, ask)
        used = about.used
    fields = {
        "kind": "huggingface" if any(map(is_metadata, used)) else reader,
        "units": units,
        "available": available,
        "classes": about.classes,
        "labelled": about.labelled,
        "captioned": about.captioned,
        "caption_columns": ask.caption_columns,
        "notes": about.notes,
    }
    return fields, about.tables, used


def _tables(reader: str, files: Files, found: Sequence[File], chosen: Sequence[File], ask: Ask) -> Fields:
    """Lists a source of Parquet or Arrow files."""
    names = class_names(files, found)
    tables = {"parquet": list_parquet, "arrow": list_arrow}[reader](files, chosen, ask, names or {})
    columns = tables.columns
    files.leave_columns(columns.others)
    folders = (folder for file in chosen for folder in file.name.split("/")[:-1])
    for column in dict.fromkeys(folder.partition("=")[0] for folder in folders if "=" in folder):
        files.leave(f"column {clean(column)}", "in the folders' names")
    fields = {
        "kind": "huggingface" if names is not None or columns.described or reader == "arrow" else "parquet",
        "units": tables.units,
        "available": tables.available,
        "classes": columns.classes,
        "labelled": f"column {columns.label}" if columns.label else "",
        "captioned": f"column {columns.caption}" if columns.caption else "",
        "image_column": columns.image,
        "label_column": columns.label,
        "caption_column": columns.caption,
        "notes": tables.notes,
    }
    return fields, (tables.table,), {file.name for file in found if file.name.rpartition("/")[2] in DESCRIBED}


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
