"""Images in tar files as WebDataset lays them out: neighbours of the same name are a sample. Streamed, nothing is unpacked."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

from workflows.ingest.columns import label_number
from workflows.ingest.decode import MAX_BYTES, SUFFIXES
from workflows.ingest.files import File, Files, clean, inside, line
from workflows.ingest.labels import CAPTIONS, LABELS, Ask, caption_table, label_table, numbered
from workflows.ingest.listing import Item, Listing, Unit
from workflows.ingest.spread import grouped
from workflows.ingest.tables import Table, open_table, parse_table
from workflows.runtime.errors import UserError

MAX_SIBLING = 2**20
"""Bytes of a .cls, .txt or .json, and of a tar's own long headers."""
MOST_IMAGES = 1000
"""Of one sample: frames of a video, such as clip.0001.jpg, have one name up to the first dot."""
TEXTS = ("cls", "txt", "json", "text", "caption", "label", "class", "prompt")
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BrokenTar(tarfile.ReadError):
    """The tar is cut, or not a tar."""


class Header(tarfile.TarInfo):
    """A tar's header that says when it is broken: tarfile itself takes what it can't read, after the first, for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in HEADERS and header.size > MAX_SIBLING:
            raise BrokenTar(f"a header of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark
                raise
            ends = type(error).__name__ == "EmptyHeaderError"
            raise BrokenTar("it ends without its end mark" if ends else str(error)) from error


@dataclass
class Sample:
    """Neighbours in a tar whose names are the same up to the first dot. images, texts: by what follows it, in small letters.
    size: bytes of all that is held. error: why one of them can't be read.
    """

    key: str
    images: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    error: str = ""


@contextmanager
def _opened(files: Files, name: str) -> Iterator[tuple[tarfile.TarFile, bool]]:
    """(the tar, read forward only; whether it is compressed)."""
    with files.open(name) as stream:
        compressed = stream.read(3).startswith((b"\x1f\x8b", b"BZh", b"\xfd7z"))
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as archive:
            yield archive, compressed


def samples(files: Files, name: str) -> Iterator[Sample]:
    """The samples of a tar, one in memory at a time. A tar that is cut, or not one, ends with a sample that is an error."""
    sample: Sample | None = None
    stop = ""
    try:
        with _opened(files, name) as (archive, compressed):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all headers
                name_ = inside(member.name)
                if member.isdir() or any(part.startswith(".") for part in name_.split("/")):
                    continue
                key, extension = _split(name_)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                if member.size > MAX_BYTES and compressed:
                    raise BrokenTar(f"{name_} has {member.size:,} bytes; what follows in a compressed tar is not read")
                _add(sample, archive, member, name_, extension)
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        stop = f"the tar is broken or cut here: {line(error)}"
    except OSError as error:
        stop = files.lost(error)
    if sample is not None and (sample.images or sample.error or not stop):
        yield sample
    if stop:
        yield Sample("", error=stop)


def _add(sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, extension: str) -> None:
    is_image = f".{extension.rpartition('.')[2]}" in SUFFIXES
    if not is_image and extension not in TEXTS:
        return
    most = MAX_BYTES if is_image else MAX_SIBLING
    if extension in sample.images or extension in sample.texts:
        sample.error = f"{name} is there twice"
    elif not member.isreg() or member.issparse():
        sample.error = f"{name} is a link, or no plain file"
    elif member.size > most:
        sample.error = f"{name} has {member.size:,} bytes, more than {most:,}"
    elif sample.size + member.size > MAX_BYTES or len(sample.images) >= MOST_IMAGES:
        sample.error = (
            f"the files {sample.key}.* are more than {MOST_IMAGES:,} images, or than {MAX_BYTES:,} bytes together"
        )
    else:
        stream = archive.extractfile(member)
        assert stream is not None
        content = stream.read()
        sample.size += len(content)
        if is_image:
            sample.images[extension] = name, content
        else:
            sample.texts[extension] = content


def _split(name: str) -> tuple[str, str]:
    """(all up to the first dot of the last part, what follows it in small letters)."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


def list_tars(files: Files, chosen: Sequence[File], ask: Ask) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """(the Listing's fields that depend on what the tars hold, contents of label files). Where labels and captions are is found in
    the first sample with an image; how many classes there are can't be known unless a file tells.

    Raises UserError where no tar can be read, or a column is named that the sample doesn't have.
    """
    if ask.labels == "folders":
        hint = '--labels FILE with the list of classes (["...", ...] in JSON)'
        raise UserError("labels by folder are for images in folders; a tar has no list of its folders", hint=hint)
    labels, label_bytes = label_table(files, ask)
    captions, caption_bytes = caption_table(files, ask)
    first = _first(files, chosen)
    out: dict[str, Any] = {"image_column": ask.image_column, "classes": labels.classes if labels else ()}
    if labels and labels.values:
        out["classes"], _ = numbered(list(labels.values.values()), labels.classes, labels.name)
        out |= {"label_file": ask.labels, "labelled": labels.name, "label_column": ask.label_column}
    elif ask.labels != "none":
        out |= _labels_within(files, first, ask, out["classes"])
    if captions:
        out |= {"caption_file": ask.captions, "captioned": captions.name, "caption_column": ask.caption_column}
    elif ask.captions != "none":
        column = _column(first, ask.caption_column, ("txt", *CAPTIONS), "caption")
        out |= {"caption_column": column, "captioned": column or ""}
    units = []
    for a, b in grouped([file.size or 0 for file in chosen], ask.unit_bytes):
        part = chosen[a:b]
        size = sum(file.size or 0 for file in part)
        units.append(Unit("tar", tuple(file.name for file in part), size=size))
    return out | {"units": tuple(units)}, (label_bytes, caption_bytes)


def _labels_within(files: Files, first: Sample, ask: Ask, classes: tuple[str, ...]) -> dict[str, Any]:
    column = _column(first, ask.label_column, LABELS, "label")
    if column is None:
        if classes:
            raise UserError(f"{ask.labels} lists classes, but the first sample, {first.key}, has no label")
        return {}
    value = _label(first, column)
    if not isinstance(value, str) or classes:
        return {"label_column": column, "labelled": column}
    said = f"the labels of {column} are names, such as {clean(value)[:60]}"
    if ask.label_column:
        hint = '--labels FILE with the list of classes (["...", ...] in JSON)'
        raise UserError(f"{files.source}: {said}, and which there are is not told", hint=hint)
    return {"notes": (f"no labels: {said}, and no list of classes is given",)}


def read_tars(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    of = {name: i for i, name in enumerate(listing.classes)}
    labels = _table(files, listing, listing.label_file, listing.label_column, LABELS)
    captions = _table(files, listing, listing.caption_file, listing.caption_column, CAPTIONS)
    for name in unit.files:
        seen: set[bytes] = set()
        for sample in samples(files, name):
            if not (sample.images or sample.texts or sample.error):
                continue  # a README, or what else lies there
            item = _item(listing, sample, of, labels, captions)
            mark = blake2b(item.key.encode(), digest_size=8).digest()
            if mark in seen and sample.key:
                error = item.error or f"the tar has the name {item.key} twice"
                item = Item(f"{item.key}~{len(seen)}", None, error=error)
                mark = blake2b(item.key.encode(), digest_size=8).digest()
            seen.add(mark)
            yield replace(item, key=f"{clean(name)}#{item.key}")


def _item(listing: Listing, sample: Sample, of: dict[str, int], labels: Table | None, captions: Table | None) -> Item:
    """The item of a sample; its key without the tar's name."""
    wanted = (listing.image_column or "").lower().lstrip(".")
    plain = [extension for extension in sample.images if "." not in extension]
    fit = [wanted] if wanted in sample.images else plain or list(sample.images) if not wanted else []
    key, image = sample.images[fit[0]] if fit else (sample.key or "~end", None)
    if sample.error:
        return Item(key, None, error=sample.error)
    if image is None:
        found, wanted = ", ".join([*sample.images, *sample.texts]), wanted and f" {wanted}"
        return Item(key, None, error=f"no image{wanted} beside {found}: a sample's files lie next to each other")
    if len(fit) > 1:
        return Item(key, None, error=f"which is the image? {', '.join(fit)}: name one as the image column")
    number: int | str | None = None
    caption: Any = None
    try:
        if listing.labelled:
            value = _label(sample, str(listing.label_column)) if labels is None else _by_name(labels, key, sample.key)
            number = label_number(value, of, listing)
        if listing.captioned:
            caption = (
                _value(sample, str(listing.caption_column)) if captions is None else _by_name(captions, key, sample.key)
            )
    except (KeyError, ValueError) as error:
        return Item(key, None, error=str(error.args[0]) if isinstance(error, KeyError) else f"broken: {line(error)}")
    if isinstance(number, str):
        return Item(key, None, error=number)
    return Item(key, image, number, caption if isinstance(caption, str) else None)


def _by_name(table: Table, *names: str) -> str | int:
    for name in names:
        if name in table.values:
            return table.values[name]
    raise KeyError(f"{table.name} has nothing for {names[0]}")


def _value(sample: Sample, column: str) -> Any:
    """A sibling of this extension, or a field of the JSON. Raises KeyError with what is said to the user."""
    if column in sample.texts:
        return sample.texts[column].decode().strip()
    fields = json.loads(sample.texts["json"]) if "json" in sample.texts else {}
    if not isinstance(fields, dict) or column not in fields:
        raise KeyError(f"no {column} beside the image")
    return fields[column]


def _label(sample: Sample, column: str) -> int | str | None:
    value = _value(sample, column)
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        return int(value)
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""):
        return value
    raise KeyError(f"{column} is {clean(str(value))[:40]!r}, no label")


def _column(sample: Sample, named: str | None, defaults: Sequence[str], what: str) -> str | None:
    """What the user named, or the first of the usual names that this sample has a value for."""
    for column in [named] if named else defaults:
        try:
            if isinstance(_value(sample, column), (str, int)):
                return column
        except (KeyError, ValueError):
            continue
    if named:
        raise UserError(
            f"no {what} {named} in the first sample, {sample.key}, which has {', '.join(sample.texts) or 'none'}"
        )
    return None


def _first(files: Files, chosen: Sequence[File]) -> Sample:
    """The first sample with an image. Raises UserError where no tar has one."""
    error = ""
    for file in chosen:
        for sample in islice(samples(files, file.name), 100):
            if sample.images:
                return sample
            error = error or (f"; {clean(file.name)}: {sample.error}" if sample.error else "")
    raise UserError(f"{files.source}: no tar has an image{error}")


_tables: dict[tuple[str, ...], Table] = {}
"""Files of labels and captions that this process has read."""


def _table(
    files: Files, listing: Listing, where: str | None, column: str | None, defaults: Sequence[str]
) -> Table | None:
    if where is None:
        return None
    key = (files.root, listing.fingerprint, where, column or "")
    if key not in _tables:
        name, content = open_table(files, where)
        if len(_tables) > 1:
            _tables.clear()
        _tables[key] = parse_table(name, content, column=column, defaults=defaults)
    return _tables[key]
