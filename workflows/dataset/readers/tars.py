"""Images in tar files as WebDataset lays them out: neighbours of the same name are a sample. Streamed, nothing is unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

from workflows.dataset.readers.columns import label_number
from workflows.dataset.readers.decode import MAX_BYTES, START, SUFFIXES, starts_as_image
from workflows.dataset.readers.files import NO_SUFFIX, File, Files, clean, hidden, inside, line
from workflows.dataset.readers.image_files import NOT_IMAGES, may_be_image, one_of
from workflows.dataset.readers.labels import (
    BOXES,
    FURTHER,
    MOST_CLASSES,
    caption_table,
    class_depth,
    label_table,
    numbered,
)
from workflows.dataset.readers.listing import Item, Listing, Unit
from workflows.dataset.readers.sidecars import CAPTIONS, LABELS, Ask
from workflows.dataset.readers.spread import grouped
from workflows.dataset.readers.tables import Table, What, open_table, parse_table
from workflows.dataset.readers.text import (
    NotText,
    alike,
    are_boxes,
    are_names,
    captions_of,
    json_of,
    label_of,
    text_of,
    written_label,
)
from workflows.errors import UserError

MAX_SIBLING = 2**20
"""Bytes of a .cls, .txt or .json, and of a tar's own long headers."""
MOST_IMAGES = 1000
"""Of one sample: frames of a video, such as clip.0001.jpg, have one name up to the first dot."""
TEXTS = ("cls", "txt", "json", "text", "caption", "label", "class", "prompt")
PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7z": lzma.LZMAFile,
}
"""What reads a compressed tar, by its first bytes."""
LOOKED = 100
"""Samples that tell where labels and captions are."""
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
    """Neighbours in a tar with the same key. images, texts: (name, content) by what follows the key in the name, in small letters.
    size: bytes of all that is held. error: why one of them can't be read.
    """

    key: str
    images: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    texts: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    size: int = 0
    error: str = ""

    def parts(self) -> list[Sample]:
        """Itself; or, where all names have a further word before their suffix (dr.no.png, dr.no.txt, dr.who.png), which is then a
        part of the key, a sample for each: if some text tells that they aren't several images of one sample.
        """
        words = list(dict.fromkeys(extension.rpartition(".")[0] for extension in (*self.images, *self.texts)))
        if self.error or not all(words) or not self.images or (len(words) > 1 and not self.texts):
            return [self]
        out = {word: Sample(f"{self.key}.{word}") for word in words}
        for extension, image in self.images.items():
            word, _, last = extension.rpartition(".")
            out[word].images[last] = image
        for extension, text in self.texts.items():
            word, _, last = extension.rpartition(".")
            out[word].texts[last] = text
        return list(out.values())

    def whole(self, word: str) -> bool:
        """Whether what has this word before its suffix is a sample of its own, which has its image and a text."""
        return all(
            any(e.rpartition(".")[0] == word for e in held) and all(e.rpartition(".")[0] for e in held)
            for held in (self.images, self.texts)
        )


class Unpacked:
    """A compressed stream that gives what it has before it finds that it is cut."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        content: bytes = self.stream.read1(size)
        return content


@contextmanager
def _opened(files: Files, name: str) -> Iterator[tuple[tarfile.TarFile, bool]]:
    """(the tar, read forward only; whether it is compressed). tarfile's own decompressors end with the first of several streams, as
    pbzip2, bgzip and cat write them.
    """
    with files.open(name) as stream:
        start = stream.read(3)
        stream.seek(0)
        unpacked: Any = next(
            (Unpacked(opened(stream)) for mark, opened in PACKED.items() if start.startswith(mark)), None
        )
        with tarfile.open(fileobj=unpacked or stream, mode="r|", tarinfo=Header) as archive:
            yield archive, unpacked is not None


def samples(files: Files, name: str, image: str = "") -> Iterator[Sample]:
    """The samples of a tar, one in memory at a time. A tar that is cut, or not one, ends with a sample that is an error. `image`:
    the extension of the image that is wanted, where samples have several.
    """
    sample: Sample | None = None
    stop = ""
    try:
        with _opened(files, name) as (archive, compressed):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all headers
                name_ = inside(member.name)
                if member.isdir() or hidden(name_):
                    continue
                key, extension = _split(name_)
                if sample is None or sample.key != key or _ends(sample, extension, image):
                    if sample is not None:
                        yield from _told(sample, image)
                    sample = Sample(key)
                if member.size > MAX_BYTES and compressed:
                    raise BrokenTar(f"{name_} has {member.size:,} bytes; what follows in a compressed tar is not read")
                _add(sample, archive, member, name_, extension, files)
            if _goes_on(archive):
                stop = "more follows the tar's end mark, and is not read: several tars in one file?"
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        stop = f"the tar is broken or cut here: {line(error)}"
    except OSError as error:
        stop = files.lost(error)
    if sample is not None and (sample.images or sample.error or not stop):
        yield from _told(sample, image)
    if stop:
        yield Sample("", error=stop)


def _goes_on(archive: tarfile.TarFile) -> bool:
    """Whether there is anything but zeros after the end mark."""
    assert archive.fileobj is not None
    while block := archive.fileobj.read(2**20):
        if block.strip(b"\0"):
            return True
    return False


def _told(sample: Sample, image: str) -> list[Sample]:
    return [sample] if image in sample.images else sample.parts()


def _ends(sample: Sample, extension: str, image: str) -> bool:
    """Whether a sample is whole before this member, whose name goes on with another word."""
    word = extension.rpartition(".")[0]
    last = next(reversed((*sample.images, *sample.texts)), "").rpartition(".")[0]
    return bool(word and last and word != last and image not in sample.images and sample.whole(last))


def _add(
    sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, extension: str, files: Files
) -> None:
    last = extension.rpartition(".")[2]
    is_image_, is_text = f".{last}" in SUFFIXES, last in TEXTS
    start, stream = b"", None
    if not is_image_ and not is_text and member.isreg() and may_be_image(name) and member.size:
        stream = archive.extractfile(member)
        assert stream is not None
        start = stream.read(min(START, member.size))
        is_image_ = starts_as_image(start)
    if not is_image_ and not is_text:
        files.leave(f".{clean(extension)}" if extension else NO_SUFFIX, NOT_IMAGES)
        return
    most = MAX_BYTES if is_image_ else MAX_SIBLING
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
        stream = stream or archive.extractfile(member)
        assert stream is not None
        content = start + stream.read()
        sample.size += len(content)
        (sample.images if is_image_ else sample.texts)[extension] = name, content


def _split(name: str) -> tuple[str, str]:
    """(the key, what follows it in small letters) of a member. The key goes up to the first dot of the last part, as WebDataset has
    it; numbers between dots belong to it: 22.05.png has the key 22.05, photo.001.png has photo.001.
    """
    folder, slash, last = name.rpartition("/")
    words = last.split(".")
    numbers = [i for i in range(1, len(words) - 1) if re.fullmatch(r"[\d_-]+", words[i])]
    first = 1 + (numbers[-1] if numbers else 0)
    return folder + slash + ".".join(words[:first]), ".".join(words[first:]).lower()


def list_tars(files: Files, chosen: Sequence[File], ask: Ask) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """(the Listing's fields that depend on what the tars hold, contents of label files). Where labels and captions are is found in
    the first LOOKED samples with an image. Where labels are names or folders, and no list of classes is given, all tars are read
    for them.

    Raises UserError where no tar can be read, or a column is named that the samples don't have.
    """
    labels, label_bytes = label_table(files, ask)
    captions, caption_bytes = caption_table(files, ask)
    first = _first(files, chosen, ask)
    out: dict[str, Any] = {"image_column": ask.image_column, "classes": labels.classes if labels else ()}
    if captions:
        out |= {"caption_file": ask.captions, "captioned": captions.name, "caption_column": ask.caption_column}
    elif ask.captions != "none":
        column = _column(first, ask.caption_column, ask.caption_columns, "caption", _no_boxes)
        out |= {"caption_columns": ask.caption_columns, "captioned": column or ""}
    if labels and labels.values:
        out["classes"], _ = numbered(list(labels.values.values()), labels.classes, labels.name)
        out |= {"label_file": ask.labels, "labelled": labels.name, "label_column": ask.label_column}
    elif ask.labels != "none":
        out |= _labels_within(files, chosen, first, ask, out["classes"], captioned=bool(out.get("captioned")))
    files.left_out.clear()  # of what was looked at: all of it is counted when it is read
    if captions and captions.further:
        files.leave("captions", FURTHER, captions.further)
    units = []
    for a, b in grouped([file.size or 0 for file in chosen], ask.unit_bytes):
        part = chosen[a:b]
        size = sum(file.size or 0 for file in part)
        units.append(Unit("tar", tuple(file.name for file in part), size=size))
    return out | {"units": tuple(units)}, (label_bytes, caption_bytes)


def _labels_within(
    files: Files,
    chosen: Sequence[File],
    first: Sequence[Sample],
    ask: Ask,
    classes: tuple[str, ...],
    *,
    captioned: bool,
) -> dict[str, Any]:
    column = None if ask.labels == "folders" else _column(first, ask.label_column, LABELS, "label", label_of)
    if column is not None:
        out = {"label_column": column, "labelled": column, "classes": classes}
        values = {_looked(sample, column, label_of) for sample in first} - {None, -1}
        if classes or not are_names(values):
            return out
        found: set[str | int | None] = set()
        for sample in _all(files, chosen):
            found.add(_looked(sample, column, label_of))
            if len(found) > MOST_CLASSES:
                break
        names = sorted(str(value) for value in found - {None, -1})
        return out | {"classes": numbered(names, (), column)[0], "label_names": True}
    must = ask.labels == "folders"
    if must or (not captioned and any("/" in sample.key for sample in first)):
        return _folders_within(files, chosen, classes, must=must)
    if classes:
        raise UserError(f"{ask.labels} lists classes, but the first sample, {first[0].key}, has no label")
    folders = sorted({folder for sample in first if (folder := sample.key.rpartition("/")[0])})
    if len(folders) < 2:
        return {}
    shown = ", ".join(clean(folder) for folder in folders[:2])
    return {
        "notes": (
            f"no labels: the images have captions; if their folders ({shown}, ...) are classes: --labels folders",
        )
    }


def _folders_within(files: Files, chosen: Sequence[File], classes: tuple[str, ...], *, must: bool) -> dict[str, Any]:
    """Labels by the folders of the members' names, of which there must be a list: an image of each is enough."""
    one_of_each: dict[str, str] = {}
    for sample in _all(files, chosen):
        if sample.images:
            one_of_each.setdefault(sample.key.rpartition("/")[0], sample.key)
    names = list(one_of_each.values())
    depth, notes = class_depth(files, names, must=must or bool(classes))
    if depth is None:
        return {"notes": notes}
    classes, _ = numbered([name.split("/")[depth] for name in names], classes, "folders")
    return {"class_depth": depth, "labelled": "folders", "classes": classes}


def _all(files: Files, chosen: Sequence[File]) -> Iterator[Sample]:
    for file in chosen:
        yield from samples(files, file.name)


def read_tars(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    of = {name: i for i, name in enumerate(listing.classes)}
    labels = _table(files, listing, listing.label_file, listing.label_column, LABELS, "label")
    captions = _table(files, listing, listing.caption_file, listing.caption_column, CAPTIONS, "caption")
    wanted = (listing.image_column or "").lower().lstrip(".")
    for name in unit.files:
        seen: set[bytes] = set()
        for sample in samples(files, name, wanted):
            if not (sample.images or sample.texts or sample.error):
                continue  # a README, or what else lies there
            item = _item(listing, sample, of, labels, captions, files)
            mark = blake2b(item.key.encode(), digest_size=8).digest()
            if mark in seen and sample.key:
                error = item.error or f"the tar has the name {item.key} twice"
                item = Item(f"{item.key}~{len(seen)}", None, error=error)
                mark = blake2b(item.key.encode(), digest_size=8).digest()
            seen.add(mark)
            yield replace(item, key=f"{clean(name)}#{item.key}")


def _item(
    listing: Listing, sample: Sample, of: dict[str, int], labels: Table | None, captions: Table | None, files: Files
) -> Item:
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
    number: int | None = None
    texts: list[str] = []
    used: set[str] = set()
    names = (alike(key), alike(sample.key))
    try:
        if listing.class_depth is not None:
            number = label_number(key.split("/")[listing.class_depth], of, listing)
        elif listing.labelled:
            column = str(listing.label_column)
            used.add(column if column in sample.texts else "json")
            value = _looked_up(sample, column) if labels is None else _by_name(labels, names)
            number = label_number(value, of, listing)
        if captions is not None:
            texts = captions_of(next((captions.values[n] for n in names if n in captions.values), None))
        else:
            texts = _captions(sample, listing.caption_columns, used, files)
    except (KeyError, ValueError, IndexError) as error:
        return Item(key, None, error=line(error) if isinstance(error, ValueError) else str(error.args[0]))
    for extension in sample.images:
        if extension != fit[0]:
            files.leave(f".{clean(extension)}", "further images of a sample")
    for extension in sample.texts.keys() - used:
        files.leave(f".{clean(extension)}", "not taken for labels or captions")
    return Item(key, image, number, one_of(texts, files))


def _captions(sample: Sample, columns: Sequence[str], used: set[str], files: Files) -> list[str]:
    """Those of the first of these columns that has one; the siblings that were looked at go into `used`. Raises ValueError for what
    can't be read, or is no caption.
    """
    for column in columns:
        try:
            value = _value(sample, column, "caption")
        except KeyError:
            continue
        used.add(column if column in sample.texts else "json")
        if column in sample.texts and are_boxes(value):
            files.leave(f".{clean(column)}", BOXES)
            continue
        try:
            if found := captions_of(value):
                return found
        except ValueError as error:
            raise ValueError(f"the caption in {column} is {error}") from error
    return []


def _no_boxes(value: Any) -> list[str]:
    return [caption for caption in captions_of(value) if not are_boxes(caption)]


def _by_name(table: Table, names: Sequence[str]) -> str | int | None:
    for name in names:
        if name in table.values:
            return table.values[name]
    raise KeyError(f"{table.name} has nothing for {names[0]}")


def _value(sample: Sample, column: str, what: str) -> Any:
    """The content of a sibling of this extension, or a field of the JSON. Raises KeyError with what is said to the user where there
    is none, NotText, which names the member, where it can't be read.
    """
    if column in sample.texts:
        name, content = sample.texts[column]
        text = text_of(content, f"{name}: the {what}").strip()
        return written_label(text) if what == "label" else text
    name, content = sample.texts.get("json", ("", b"{}"))
    fields = json_of(content, f"{name}: it")
    if not isinstance(fields, dict) or column not in fields:
        raise KeyError(f"no {column} beside the image")
    value = fields[column]
    return written_label(value) if what == "label" and isinstance(value, str) else value


def _looked_up(sample: Sample, column: str) -> Any:
    """The label as it stands there, None where there is none."""
    try:
        return _value(sample, column, "label")
    except KeyError:
        return None


def _looked(sample: Sample, column: str, taken: Callable[[Any], Any]) -> Any:
    """What a sample has there, or None."""
    try:
        return taken(_value(sample, column, "label" if taken is label_of else "caption"))
    except (KeyError, ValueError):
        return None


def _column(
    first: Sequence[Sample], named: str | None, defaults: Sequence[str], what: str, taken: Callable[[Any], Any]
) -> str | None:
    """What the user named, or the first of the usual names that any of these samples has a value for."""
    for column in [named] if named else defaults:
        if any(_looked(sample, column, taken) not in (None, []) for sample in first):
            return column
    if what == "label":
        _check_labels(first, [named] if named else defaults)
    if named:
        there = ", ".join(dict.fromkeys(extension for sample in first for extension in sample.texts))
        raise UserError(
            f"no {what} {named} in the first {_many(first)}, which {'has' if len(first) == 1 else 'have'} {there or 'none'}"
        )
    return None


def _check_labels(first: Sequence[Sample], columns: Sequence[str]) -> None:
    """Raises UserError where the samples have something there that is no label, and says what it is."""
    for column in columns:
        for sample in first:
            try:
                label_of(_value(sample, column, "label"))
            except (KeyError, NotText):
                continue
            except ValueError as error:
                raise UserError(f"{sample.key}: in {column} is {error}", hint="--labels none: no classes") from error


def _many(first: Sequence[Sample]) -> str:
    return f"sample, {first[0].key}" if len(first) == 1 else f"{len(first)} samples, {first[0].key} to {first[-1].key}"


def _first(files: Files, chosen: Sequence[File], ask: Ask) -> list[Sample]:
    """The first samples with an image, without its content. Raises UserError where no tar has one."""
    error = ""
    found: list[Sample] = []
    for file in chosen:
        for sample in islice(samples(files, file.name, (ask.image_column or "").lower().lstrip(".")), LOOKED):
            if sample.images:
                found.append(replace(sample, images={e: (name, b"") for e, (name, _) in sample.images.items()}))
            error = error or (f"; {clean(file.name)}: {sample.error}" if sample.error else "")
            if len(found) == LOOKED:
                return found
        if found:
            return found
    raise UserError(f"{files.source}: no tar has an image{error}")


_tables: dict[tuple[str, ...], Table] = {}
"""Files of labels and captions that this process has read."""


def _table(
    files: Files, listing: Listing, where: str | None, column: str | None, defaults: Sequence[str], what: What
) -> Table | None:
    if where is None:
        return None
    key = (files.root, listing.fingerprint, where, column or "", what)
    if key not in _tables:
        name, content = open_table(files, where)
        if len(_tables) > 1:
            _tables.clear()
        table = parse_table(name, content, column=column, defaults=defaults, what=what)
        _tables[key] = replace(table, values={alike(path): value for path, value in table.values.items()})
    return _tables[key]
