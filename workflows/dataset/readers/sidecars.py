"""Files beside an image that hold its label or its caption: 0001.png and 0001.txt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from workflows.dataset.readers.files import clean, suffix
from workflows.dataset.readers.text import NotText, are_names, captions_of, json_of, label_of, text_of, written_label
from workflows.errors import UserError

LABELS = ("label", "labels", "class", "class_name", "cls", "fine_label")
CAPTIONS = ("caption", "text", "prompt", "txt")
"""What the columns may be called when the user names none."""
CAPTION_FILES = (".txt", ".caption", ".text", ".prompt", ".json")
LABEL_FILES = (".cls", ".label", ".class", ".json")


@dataclass(frozen=True)
class Ask:
    """What the user asked for: the options of `list_source`."""

    labels: str | None = None
    captions: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    unit_bytes: int = 64 * 2**20
    limit: int | None = None

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """Those that may hold a caption, the first first."""
        return (self.caption_column,) if self.caption_column else ("txt", *CAPTIONS[:-1])


@dataclass(frozen=True)
class Asides:
    """Of each image the label, and the name of the file that holds the caption; () where none has one. label_files: what was read
    for the labels.
    """

    labels: tuple[str | int | None, ...] = ()
    labelled: str = ""
    label_files: tuple[str, ...] = ()
    captions: tuple[str | None, ...] = ()
    captioned: str = ""


def find_asides(
    others: Sequence[str],
    images: Sequence[str],
    ask: Ask,
    read: Callable[[Sequence[str]], Iterator[bytes | str]],
    *,
    labels: bool,
) -> Asides:
    """What lies beside the images. Captions are left to be read with them; labels are read now, as all of them make the classes.

    Raises UserError for a file of a label that can't be read.
    """
    by_end: dict[tuple[str, str], str] = {}
    ends = {*CAPTION_FILES, *LABEL_FILES, *(f".{c.lower()}" for c in (ask.label_column, ask.caption_column) if c)}
    for name in others:
        if (end := suffix(name)) in ends:
            by_end[os.path.splitext(name)[0], end] = name
    if not by_end:
        return Asides()
    there = {end for _, end in by_end}
    label_ends = _ends(ask.label_column, LABEL_FILES, there)
    caption_ends = _ends(ask.caption_column, CAPTION_FILES, there)
    wanted = labels and ask.labels not in ("none", "folders")
    by_json = ".json" in there and (wanted or caption_ends == (".json",))
    fields = _fields(
        [n for n in (_beside(by_end, image, (".json",)) for image in images) if n] if by_json else [], read
    )
    # One that is broken has its say when it is read, with its image.
    told = {n for n, values in fields.items() if values is None or caption_in(values, ask.caption_columns)}
    captions = tuple(_beside(by_end, image, caption_ends, told) for image in images)
    out = Asides(captions=captions, captioned=_said(captions)) if any(captions) else Asides()
    if not wanted:
        return out
    usual = (ask.label_column,) if ask.label_column else LABELS
    labelled = {n for n, values in fields.items() if values and any(values.get(c) is not None for c in usual)}
    labelled |= {n for n, values in fields.items() if values is None} if labelled else set()
    files = tuple(_beside(by_end, image, label_ends, labelled) for image in images)
    if not any(files):
        return out
    values = _labels([name for name in files if name], fields, usual, read)
    return Asides(
        labels=tuple(values[name] if name else None for name in files),
        labelled=_said(files),
        label_files=tuple(name for name in files if name),
        captions=out.captions,
        captioned=out.captioned,
    )


def _ends(column: str | None, usual: tuple[str, ...], there: set[str]) -> tuple[str, ...]:
    """Suffixes of the files that may hold it, of those that there are."""
    ends = (f".{column.lower()}", ".json") if column else usual
    return tuple(end for end in ends if end in there)


def _beside(
    by_end: dict[tuple[str, str], str], image: str, ends: Sequence[str], of_json: set[str] | None = None
) -> str | None:
    """The first of these files of an image, 0.txt or 0.png.txt; a JSON file if it is one of `of_json`, where that is given."""
    for end in ends:
        for stem in (os.path.splitext(image)[0], image):
            name = by_end.get((stem, end))
            if name is not None and (end != ".json" or of_json is None or name in of_json):
                return name
    return None


def _fields(
    names: Sequence[str], read: Callable[[Sequence[str]], Iterator[bytes | str]]
) -> dict[str, dict[str, Any] | None]:
    """The objects in JSON files; None of a file that can't be read. What is no object says nothing."""
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
    names: Sequence[str],
    fields: dict[str, dict[str, Any] | None],
    usual: Sequence[str],
    read: Callable[[Sequence[str]], Iterator[bytes | str]],
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
            raise UserError(f"{clean(name)}: the label can't be taken: {error}") from error
    if are_names(set(out.values()) - {None, -1}):
        return {name: None if value in (None, -1) else str(value) for name, value in out.items()}
    return out


def caption_in(values: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The captions in the first of these fields that has one."""
    for column in columns:
        try:
            if found := captions_of(values.get(column)):
                return found
        except ValueError:
            continue
    return []


def caption_of(name: str, content: bytes, columns: Sequence[str]) -> list[str]:
    """The captions in a file beside an image: its text, or a field of its JSON. Raises NotText, which names it."""
    said = f"{clean(name)}: the caption"
    if suffix(name) == ".json":
        values = json_of(content, said)
        return caption_in(values, columns) if isinstance(values, dict) else []
    return captions_of(text_of(content, said).strip())


def _said(names: Sequence[str | None]) -> str:
    """Where they come from, in words: ".txt files"."""
    return f"{', '.join(sorted({suffix(name) for name in names if name}))} files"
