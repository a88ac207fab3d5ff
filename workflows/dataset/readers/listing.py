"""The types that describe a source before its images are read: items, units of work, and the listing. All are plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflows.dataset.readers.spread import evenly

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Item:
    """One image of a source, undecoded.

    key      the name, unique in the source: `cats/0.png`, `a.parquet#123`, `shard-000.tar#0001.jpg`
    image    the bytes of the file; None if it could not be read, and `error` says why in one line
    label    the number of its class in the class list; None if the source gives no label
    """

    key: str
    image: bytes | None
    label: int | None = None
    caption: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Unit:
    """The part of a source that one task reads.

    kind      the reader: images | zip | parquet | tar | arrow
    files     names below the root of the source
    first     zip, parquet: the first member or row of its one file; tar, arrow: 0. `images` has one item per file
    last      the end of that range, exclusive; None: to the end
    offset    zip, parquet: number of items of the source before this unit
    size      estimated bytes
    sizes     images: size of each file; None where the store does not say
    labels, captions   images, zip: one for each item that is read; () if there are none
    caption_files      images, zip: the sidecar file that holds the caption of each item, if any; () if there are none
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
    caption_files: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a source holds. `read_unit` does not need `units`: pass `replace(listing, units=())` to tasks.

    kind           images | parquet | webdataset | huggingface | zip
    units          in a fixed order; together they are the source, or `limit` items of it
    count          number of items in all units, broken ones included; None if only reading everything would tell
    classes        class names in label order. () although `labelled` is set: labels are numbers, known only after reading
    fingerprint    changes with the names, sizes and versions (ETag, modification time) of the files, including those of labels and
                   captions; not with the options
    content        like the fingerprint, but without versions: equal for a copy of the source, and possibly for other images
    labelled       where labels come from, as text; "" without labels. `captioned` likewise
    available      number of items in the whole source, if known; `limit` takes some of them
    image_column, label_column, caption_column     parquet, arrow: columns; tar: extensions, or fields of the JSON of a sample
    caption_columns                                tar, sidecar files: extensions or fields that may hold a caption, by priority
    class_depth                                    tar: index of the folder in a member's name that is the class
    label_file, caption_file                       tar: files of labels and captions by member name
    label_names                                    tar: all labels are names, even those that look like numbers
    left_out       (what, why, how many) of files and columns that are not used, as far as the listing knows
    notes          lines to show to the user
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


def indices_of(listing: Listing, unit: Unit) -> np.ndarray:
    """Returns the indices of the members or rows that a unit reads from its file. `listing.available` must be known."""
    assert unit.last is not None
    assert listing.available is not None
    last = unit.offset + unit.last - unit.first
    return evenly(listing.available, listing.limit, first=unit.offset, last=last) - unit.offset + unit.first
