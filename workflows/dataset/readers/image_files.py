"""Reader of image files below a folder or a prefix of an object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from workflows.dataset.readers.decode import START, SUFFIXES, starts_as_image, words
from workflows.dataset.readers.files import File, Files, clean, suffix, suffix_shown
from workflows.dataset.readers.labels import BOXES, FURTHER, Described, Named, describe
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.sidecars import Ask, caption_of
from workflows.dataset.readers.spread import evenly, grouped
from workflows.dataset.readers.text import NotText, are_boxes

MOST = 10_000
"""Maximum number of files per unit."""
OTHER = words(
    """
    .txt .caption .text .prompt .cls .label .class .json .jsonl .csv .tsv .xml
    .yaml .yml .md .rst .html .htm .pdf .doc .docx .xls .xlsx .log .py .sh
    .npy .npz .pt .pth .pkl .bin .safetensors .mat .h5 .hdf .fit .fits .db
    .zip .tar .gz .tgz .bz2 .xz .7z .rar .parquet .arrow .sha256 .md5
    .mp4 .mov .avi .mkv .webm .mpg .mpeg .mp3 .wav .flac .ogg
    .heic .heif .svg .eps .ps .ai .wmf .emf .exr .hdr .jxl
    .arw .cr2 .cr3 .dng .nef .orf .pef .raf .raw .rw2 .srw .xmp
    """
)
"""Suffixes of files that are not readable images. They include raw photographs, whose first bytes look like a TIFF."""
NOT_IMAGES = "not images"


def is_image(name: str) -> bool:
    """Whether the suffix is that of an image format."""
    return suffix(name) in SUFFIXES


def may_be_image(name: str) -> bool:
    """Whether the suffix says nothing and the content must be checked: `photo`, `photo.jpg_large`, `photo.jpg.download`."""
    return suffix(name) not in SUFFIXES and suffix(name) not in OTHER


def images_among(files: Files, found: Sequence[File]) -> list[File]:
    """Returns the files that are images by their suffix, or by their first bytes where the suffix says nothing."""
    unsure = [file.name for file in found if may_be_image(file.name)]
    starts = zip(unsure, files.starts(unsure, START), strict=True)
    by_content = {name for name, start in starts if starts_as_image(start)}
    return [file for file in found if is_image(file.name) or file.name in by_content]


def list_images(
    files: Files, others: list[str], chosen: Sequence[File], ask: Ask
) -> tuple[tuple[Unit, ...], int, Described]:
    """Returns (units, number of images in the whole source, labels and captions).

    A unit has neighbouring files of about `ask.unit_bytes`. Only files within `ask.limit` are included.
    """
    about = describe(files, Named([file.name for file in chosen], others, files.read_many), ask)
    index = evenly(len(chosen), ask.limit).tolist()
    units = []
    for first, last in grouped([chosen[i].size or 0 for i in index], ask.unit_bytes, count=MOST):
        part = index[first:last]
        units.append(
            Unit(
                kind="images",
                files=tuple(chosen[i].name for i in part),
                last=len(part),
                size=sum(chosen[i].size or 0 for i in part),
                sizes=tuple(chosen[i].size for i in part),
                labels=picked(about.labels, part),
                captions=picked(about.captions, part),
                caption_files=picked(about.caption_files, part),
            )
        )
    return tuple(units), len(chosen), about


def read_images(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields one item per file of the unit."""
    sidecars = [name for name in unit.caption_files if name]
    texts = zip(sidecars, files.read_many(sidecars), strict=True)
    for i, content in enumerate(files.read_many(unit.files, unit.sizes)):
        sidecar = next(texts) if at(unit.caption_files, i) else None
        yield named_item(listing, unit, i, clean(unit.files[i]), content, sidecar, files)


def named_item(
    listing: Listing,
    unit: Unit,
    i: int,
    key: str,
    content: bytes | str,
    sidecar: tuple[str, bytes | str] | None,
    files: Files,
) -> Item:
    """Returns item number i of a unit. content: the bytes of the image, or why there are none. sidecar: name and content of the
    sidecar file that holds its caption, if any.
    """
    image, error = (None, content) if isinstance(content, str) else (content, None)
    caption = at(unit.captions, i)
    if sidecar:
        caption, wrong = _sidecar_caption(*sidecar, listing, files)
        image, error = (None, error or wrong) if wrong else (image, error)
    return Item(key, image, at(unit.labels, i), caption, error)


def _sidecar_caption(name: str, content: bytes | str, listing: Listing, files: Files) -> tuple[str | None, str | None]:
    """Returns (the caption in a sidecar file, why it can't be read). content: the bytes, or why there are none."""
    if isinstance(content, str):
        return None, f"{clean(name)}: the caption can't be read: {content}"
    try:
        found = caption_of(name, content, listing.caption_columns)
    except NotText as error:
        return None, str(error)
    if suffix(name) != ".json" and found and are_boxes(found[0]):
        files.leave(suffix_shown(name), BOXES)
        return None, None
    return first_caption(found, files), None


def first_caption(found: Sequence[str], files: Files) -> str | None:
    """Returns the first caption of an image, and counts the others as left out."""
    if len(found) > 1:
        files.leave("captions", FURTHER, len(found) - 1)
    return found[0] if found else None


def picked(values: Sequence[Any], index: Sequence[int]) -> tuple[Any, ...]:
    """Returns the values at these indices; () if there are no values."""
    return tuple(values[i] for i in index) if values else ()


def at(values: Sequence[Any], i: int) -> Any:
    """Returns value i, or None if there are no values."""
    return values[i] if values else None
