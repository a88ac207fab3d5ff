"""What a source holds, before any image is read: units of work for tasks, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflows.dataset.readers.spread import evenly

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Item:
    """One image of a source, undecoded.

    key      its name, which no other item of the source has: `cats/0.png`, `a.parquet#123`, `shard-000.tar#0001.jpg`
    image    the file's bytes; None where it could not be read, and `error` tells in one line why
    label    its number in the class list; None where the source gives none
    """

    key: str
    image: bytes | None
    label: int | None = None
    caption: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Unit:
    """What one task reads.

    kind      the reader: images | zip | parquet | tar | arrow
    files     names below the source's root
    first     of its one file (zip, parquet: the first member or row; tar, arrow: 0), and `last`, which is not taken.
              None: to the end. `images` has one item a file
    offset    how many items of the source lie before it (zip, parquet)
    size      bytes, estimated
    sizes     images: of each file. None where the store doesn't tell
    labels, captions   images and zip: of each item that is taken; () where there are none
    asides    images and zip: the file beside each item that holds its caption, if one does; () where none do
    """

    kind: str
    files: tuple[str, ...]
    first: int = 0
    last: int | None = None
    offset: int = 0
    size: int = 0
    sizes: tuple[int | None, ...] = ()
    labels: tuple[int | None, ...] = ()
    captions: tuple[str | None, ...] = ()
    asides: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Listing:
    """A source as its files tell it. `read_unit` needs all but `units`: hand `replace(listing, units=())` to tasks.

    kind           images | parquet | webdataset | huggingface | zip
    units          in an order that is the same every time; all of them together are the source, or its `limit`
    count          items of all units, where known without reading everything; broken ones are among them
    classes        names in label order. () with `labelled`: labels are the source's own numbers, not known before all is read
    fingerprint    changes with names, sizes and versions (ETag, time of change) of the files, those of labels and captions
                   included; not with the options
    content        as the fingerprint, but for the versions: a copy of the source has the same, and so may other images
    labelled       where labels come from, in words; "" without labels. `captioned` likewise
    available      items of the whole source, where known; `limit` takes some of them
    image_column, label_column, caption_column     parquet, arrow; tar: the siblings or fields of a sample's JSON
    caption_columns                                tar, and files beside images: those that may hold a caption, the first first
    class_depth                                    tar: which folder of a member's name is its class
    label_file, caption_file                       tar: files of labels and captions, by the members' names
    label_names                                    tar: labels are names, also those that look like numbers
    left_out       (what, why, how many) of the files and columns that are not taken, as far as the listing tells
    notes          what the user should be told, a line each
    """

    source: str
    root: str
    kind: str
    units: tuple[Unit, ...]
    count: int | None
    classes: tuple[str, ...]
    fingerprint: str
    content: str = ""
    labelled: str = ""
    captioned: str = ""
    available: int | None = None
    limit: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    class_depth: int | None = None
    label_names: bool = False
    label_file: str | None = None
    caption_file: str | None = None
    left_out: tuple[tuple[str, str, int], ...] = ()
    notes: tuple[str, ...] = ()


def taken(listing: Listing, unit: Unit) -> np.ndarray:
    """Which members or rows of its file a unit reads, of a source that tells how many items it has."""
    assert unit.last is not None
    assert listing.available is not None
    last = unit.offset + unit.last - unit.first
    return evenly(listing.available, listing.limit, first=unit.offset, last=last) - unit.offset + unit.first
