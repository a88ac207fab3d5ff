"""Sidecar files: each holds the label or caption of the image next to it, such as 0001.txt for 0001.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from workflows.dataset.readers.files import Read, clean, suffix
from workflows.dataset.readers.text import NotText, are_names, captions_of, json_of, label_of, text_of, written_label
from workflows.errors import UserError

LABELS = ("label", "labels", "class", "class_name", "cls", "fine_label")
CAPTIONS = ("caption", "text", "prompt", "txt")
"""Names of columns that are tried in this order if the user names none."""
USUAL = {"label": LABELS, "caption": CAPTIONS}
CAPTION_FILES = (".txt", ".caption", ".text", ".prompt", ".json")
LABEL_FILES = (".cls", ".label", ".class", ".json")
WITHOUT = "to ignore it: --labels none, or --labels folders"


@dataclass(frozen=True)
class Ask:
    """The options of `list_source`, as the user gave them."""

    labels: str | None = None
    captions: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    unit_bytes: int = 64 * 2**20
    limit: int | None = None

    @property
    def labels_in_files(self) -> bool:
        """Whether labels may come from files or columns, rather than from folders or not at all."""
        return self.labels not in ("none", "folders")

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Columns, fields or extensions that may hold a caption, by priority."""
        return (self.caption_column,) if self.caption_column else ("txt", *CAPTIONS[:-1])


@dataclass(frozen=True)
class Sidecars:
    """What the sidecar files give for each image; () if no image has any.

    labels           the label, from `label_files`; `labelled` says where labels come from, as text
    caption_files    the name of the file that holds the caption; `captioned` likewise
    """

    labels: tuple[str | int | None, ...] = ()
    labelled: str = ""
    label_files: tuple[str, ...] = ()
    caption_files: tuple[str | None, ...] = ()
    captioned: str = ""


def find_sidecars(others: Sequence[str], images: Sequence[str], ask: Ask, read: Read, *, labels: bool) -> Sidecars:
    """Finds the sidecar files of `images` among the files `others`, which `read` reads.

    Labels are read now, because all of them are needed for the class list; `labels=False` skips them. Captions are read later, each
    with its image. Raises UserError for a label file that can't be read.
    """
    by_end: dict[tuple[str, str], str] = {}
    ends = {*CAPTION_FILES, *LABEL_FILES, *(f".{c.lower()}" for c in (ask.label_column, ask.caption_column) if c)}
    for name in others:
        if (end := suffix(name)) in ends:
            by_end[os.path.splitext(name)[0], end] = name
    if not by_end:
        return Sidecars()
    there = {end for _, end in by_end}
    label_ends = _ends(ask.label_column, LABEL_FILES, there)
    caption_ends = _ends(ask.caption_column, CAPTION_FILES, there)
    wanted = labels and ask.labels_in_files
    by_json = ".json" in there and (wanted or caption_ends == (".json",))
    json_files = [_sidecar(by_end, image, (".json",)) for image in images] if by_json else []
    fields = _fields([name for name in json_files if name], read)
    # A broken file counts as captioned here: its error is reported when it is read with its image.
    with_caption = {n for n, values in fields.items() if values is None or caption_in(values, ask.caption_columns)}
    caption_files = tuple(_sidecar(by_end, image, caption_ends, with_caption) for image in images)
    if not any(caption_files):
        caption_files = ()
    out = Sidecars(caption_files=caption_files, captioned=_described(caption_files))
    if not wanted:
        return out
    usual = (ask.label_column,) if ask.label_column else LABELS
    labelled = {n for n, values in fields.items() if values and any(values.get(c) is not None for c in usual)}
    labelled |= {n for n, values in fields.items() if values is None} if labelled else set()
    files = tuple(_sidecar(by_end, image, label_ends, labelled) for image in images)
    if not any(files):
        return out
    label_files = tuple(name for name in files if name)
    values = _labels(label_files, fields, usual, read)
    labels_ = tuple(values[name] if name else None for name in files)
    return replace(out, labels=labels_, labelled=_described(files), label_files=label_files)


def _ends(column: str | None, usual: tuple[str, ...], there: set[str]) -> tuple[str, ...]:
    """Returns the suffixes of files that may hold the label or caption, out of those that occur in the source."""
    ends = (f".{column.lower()}", ".json") if column else usual
    return tuple(end for end in ends if end in there)


def _sidecar(
    by_end: dict[tuple[str, str], str], image: str, ends: Sequence[str], of_json: set[str] | None = None
) -> str | None:
    """Returns the first sidecar file of an image with one of these suffixes, such as 0.txt or 0.png.txt. JSON files must be in
    `of_json`, if that is given.
    """
    for end in ends:
        for stem in (os.path.splitext(image)[0], image):
            name = by_end.get((stem, end))
            if name is not None and (end != ".json" or of_json is None or name in of_json):
                return name
    return None


def _fields(names: Sequence[str], read: Read) -> dict[str, dict[str, Any] | None]:
    """Reads JSON files. Returns the object in each, or None for a file that can't be read. Other JSON values are left out."""
    out: dict[str, dict[str, Any] | None] = {}
    for name, content in zip(names, read(names), strict=True):
        try:
            values = json_of(content, "it") if isinstance(content, bytes) else None
        except NotText:
            values = None
        if values is None or isinstance(values, dict):
            out[name] = values
    return out


def _labels(
    names: Sequence[str], fields: dict[str, dict[str, Any] | None], usual: Sequence[str], read: Read
) -> dict[str, str | int | None]:
    out: dict[str, str | int | None] = {}
    texts = [name for name in names if not fields.get(name)]
    contents = dict(zip(texts, read(texts), strict=True))
    for name in names:
        content, values = contents.get(name, b""), fields.get(name)
        try:
            if isinstance(content, str):
                raise ValueError(content)
            if values:
                out[name] = label_of(next((v for c in usual if (v := values.get(c)) is not None), None))
            elif name in fields:
                json_of(content, "it")
            else:
                out[name] = written_label(text_of(content, "it"))
        except ValueError as error:
            raise UserError(f"{clean(name)}: the label can't be read: {error}") from error
    if are_names(set(out.values()) - {None, -1}):
        return {name: None if value in (None, -1) else str(value) for name, value in out.items()}
    return out


def caption_in(values: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Returns the captions in the first of these fields that has any."""
    for column in columns:
        try:
            if found := captions_of(values.get(column)):
                return found
        except ValueError:
            continue
    return []


def caption_of(name: str, content: bytes, columns: Sequence[str]) -> list[str]:
    """Returns the captions in a sidecar file: its text, or a field of its JSON. Raises NotText, with the name of the file."""
    what = f"{clean(name)}: the caption"
    if suffix(name) == ".json":
        values = json_of(content, what)
        return caption_in(values, columns) if isinstance(values, dict) else []
    return captions_of(text_of(content, what).strip())


def _described(names: Sequence[str | None]) -> str:
    """Describes these files for the user, such as ".txt files"; "" if there are none."""
    ends = sorted({suffix(name) for name in names if name})
    return f"{', '.join(ends)} files" if ends else ""
