"""Reader of images in tar files in the layout of WebDataset: adjacent members with one key form a sample. Tars are streamed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

from workflows.dataset.readers.columns import label_number
from workflows.dataset.readers.decode import MAX_BYTES, START, SUFFIXES, starts_as_image
from workflows.dataset.readers.files import NO_SUFFIX, File, Files, clean, hidden, one_line, safe_path
from workflows.dataset.readers.image_files import NOT_IMAGES, first_caption, may_be_image
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
from workflows.dataset.readers.sidecars import LABELS, USUAL, Ask
from workflows.dataset.readers.spread import grouped
from workflows.dataset.readers.tables import Table, Value, What, open_table, parse_table
from workflows.dataset.readers.text import (
    NotText,
    are_boxes,
    are_names,
    captions_of,
    json_of,
    label_of,
    normalised,
    text_of,
    written_label,
)
from workflows.errors import UserError

MAX_SIBLING = 2**20
"""The most bytes of a .cls, .txt or .json file, and of a long header of the tar."""
MOST_IMAGES = 1000
"""The most images of a sample: all frames of a video, such as clip.f0001.jpg, have the key `clip`."""
TEXTS = ("cls", "txt", "json", "text", "caption", "label", "class", "prompt")
PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7z": lzma.LZMAFile,
}
"""First bytes of a compressed tar -> its decompressor."""
LOOKED = 100
"""Number of samples in which labels and captions are looked for."""
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BrokenTar(tarfile.ReadError):
    """The tar is truncated, or not a tar."""


class Header(tarfile.TarInfo):
    """A tar header that raises BrokenTar. tarfile itself takes a broken header, unless it is the first, for the end of the tar."""

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
    """Adjacent members of a tar with the same key.

    images, texts   extension -> (name, content). The extension is what follows the key in the name, in lower case
    size            total bytes in memory
    error           why one of the members can't be read
    """

    key: str
    images: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    texts: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    size: int = 0
    error: str = ""

    def parts(self) -> list[Sample]:
        """Splits the sample if its key is too short: all names have a further word before their suffix, as in dr.no.png, dr.no.txt,
        dr.who.png. Each word then makes a sample. Without any text file, several words are several images of one sample.
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
        """Whether the members with this word before their suffix are a complete sample, with an image and a text."""
        return all(
            any(e.rpartition(".")[0] == word for e in held) and all(e.rpartition(".")[0] for e in held)
            for held in (self.images, self.texts)
        )


class Unpacked:
    """A decompressed stream that returns the data before a truncation, instead of raising at once."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self, size: int) -> bytes:
        content: bytes = self.stream.read1(size)
        return content


@contextmanager
def _opened(files: Files, name: str) -> Iterator[tuple[tarfile.TarFile, bool]]:
    """Yields (the tar, opened for forward reading; whether it is compressed).

    The decompressors of tarfile are not used: they stop after the first of several streams, which pbzip2, bgzip and cat write.
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
    """Yields the samples of a tar, with one in memory at a time. A tar that is broken or truncated ends with a sample that has an
    error.

    image: the extension of the wanted image, for samples with several.
    """
    sample: Sample | None = None
    stop = ""
    try:
        with _opened(files, name) as (archive, compressed):
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all headers in memory
                name_ = safe_path(member.name)
                if member.isdir() or hidden(name_):
                    continue
                key, extension = _split(name_)
                if sample is None or sample.key != key or _is_complete(sample, extension, image):
                    if sample is not None:
                        yield from _split_sample(sample, image)
                    sample = Sample(key)
                if member.size > MAX_BYTES and compressed:
                    raise BrokenTar(f"{name_} has {member.size:,} bytes; what follows in a compressed tar is not read")
                _add(sample, archive, member, name_, extension, files)
            if _has_more(archive):
                stop = "the data after the tar's end mark is not read; does the file hold several tars?"
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        stop = f"the tar is broken or cut here: {one_line(error)}"
    except OSError as error:
        stop = files.explain(error)
    if sample is not None and (sample.images or sample.error or not stop):
        yield from _split_sample(sample, image)
    if stop:
        yield Sample("", error=stop)


def _has_more(archive: tarfile.TarFile) -> bool:
    """Whether anything but zeros follows the end mark."""
    assert archive.fileobj is not None
    while block := archive.fileobj.read(2**20):
        if block.strip(b"\0"):
            return True
    return False


def _split_sample(sample: Sample, image: str) -> list[Sample]:
    """Returns the sample itself if it has the wanted image, else its parts."""
    return [sample] if image in sample.images else sample.parts()


def _is_complete(sample: Sample, extension: str, image: str) -> bool:
    """Whether the sample ends before the next member, though that has the same key: `extension` begins with another word."""
    word = extension.rpartition(".")[0]
    last = next(reversed((*sample.images, *sample.texts)), "").rpartition(".")[0]
    return bool(word and last and word != last and image not in sample.images and sample.whole(last))


def _add(
    sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, extension: str, files: Files
) -> None:
    """Reads a member into its sample, counts it as left out, or sets the sample's error."""
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
        sample.error = f"{name} occurs twice"
    elif not member.isreg() or member.issparse():
        sample.error = f"{name} is a link, or not a regular file"
    elif member.size > most:
        sample.error = f"{name} has {member.size:,} bytes, more than {most:,}"
    elif sample.size + member.size > MAX_BYTES or len(sample.images) >= MOST_IMAGES:
        sample.error = (
            f"the files {sample.key}.* are more than {MOST_IMAGES:,} images, or more than {MAX_BYTES:,} bytes together"
        )
    else:
        stream = stream or archive.extractfile(member)
        assert stream is not None
        content = start + stream.read()
        sample.size += len(content)
        (sample.images if is_image_ else sample.texts)[extension] = name, content


def _split(name: str) -> tuple[str, str]:
    """Splits the name of a member into (key, extension in lower case).

    The key ends at the first dot of the file name, as in WebDataset. Numbers between dots belong to the key: 22.05.png has the key
    22.05, photo.001.png has photo.001.
    """
    folder, slash, last = name.rpartition("/")
    words = last.split(".")
    numbers = [i for i in range(1, len(words) - 1) if re.fullmatch(r"[\d_-]+", words[i])]
    first = 1 + (numbers[-1] if numbers else 0)
    return folder + slash + ".".join(words[:first]), ".".join(words[first:]).lower()


def list_tars(files: Files, chosen: Sequence[File], ask: Ask) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """Returns (the fields of the Listing that depend on the content of the tars, contents of the files that the user named).

    The first LOOKED samples with an image decide where labels and captions are. If labels are names without a class list, or
    folders, all tars are read once for them.

    Raises UserError if no tar has a readable image, or if the samples lack a column that the user named.
    """
    labels, label_bytes = label_table(files, ask)
    captions, caption_bytes = caption_table(files, ask)
    first = _first(files, chosen, ask)
    out: dict[str, Any] = {"image_column": ask.image_column, "classes": labels.classes if labels else ()}
    if captions:
        out |= {"caption_file": ask.captions, "captioned": captions.name, "caption_column": ask.caption_column}
    elif ask.captions != "none":
        column = _column(first, ask.caption_column, ask.caption_columns, "caption")
        out |= {"caption_columns": ask.caption_columns, "captioned": column or ""}
    if labels and labels.values:
        out["classes"], _ = numbered(list(labels.values.values()), labels.classes, labels.name)
        out |= {"label_file": ask.labels, "labelled": labels.name, "label_column": ask.label_column}
    elif ask.labels != "none":
        out |= _labels_within(files, chosen, first, ask, out["classes"], captioned=bool(out.get("captioned")))
    files.left_out.clear()  # the members seen so far are counted when they are read
    if captions and captions.further:
        files.leave("captions", FURTHER, captions.further)
    units = []
    for a, b in grouped([file.size or 0 for file in chosen], ask.unit_bytes):
        part = chosen[a:b]
        size = sum(file.size or 0 for file in part)
        units.append(Unit("tar", tuple(file.name for file in part), size=size))
    return out | {"kind": "webdataset", "units": tuple(units)}, (label_bytes, caption_bytes)


def _labels_within(
    files: Files,
    chosen: Sequence[File],
    first: Sequence[Sample],
    ask: Ask,
    classes: tuple[str, ...],
    *,
    captioned: bool,
) -> dict[str, Any]:
    """Returns the fields of the Listing about labels that are in the tars themselves."""
    column = None if ask.labels == "folders" else _column(first, ask.label_column, LABELS, "label")
    if column is not None:
        out = {"label_column": column, "labelled": column, "classes": classes}
        values = {_parsed(sample, column, "label") for sample in first} - {None, -1}
        if classes or not are_names(values):
            return out
        found: set[str | int | None] = set()
        for sample in _all(files, chosen):
            found.add(_parsed(sample, column, "label"))
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
    """Returns the fields of the Listing if folders are the classes. All tars are read for the list of folders."""
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
    """Yields the samples of all tars."""
    for file in chosen:
        yield from samples(files, file.name)


def read_tars(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields one item per sample of the unit. A repeated key, and the place where a tar is broken, are items with an error."""
    of = {name: i for i, name in enumerate(listing.classes)}
    of_source = files.fs, listing.source, listing.root, listing.fingerprint
    labels, captions = listing.label_file, listing.caption_file
    tables = (
        _table(*of_source, labels, listing.label_column, "label") if labels else None,
        _table(*of_source, captions, listing.caption_column, "caption") if captions else None,
    )
    wanted = _extension(listing.image_column)
    for name in unit.files:
        seen: set[bytes] = set()
        for sample in samples(files, name, wanted):
            if not (sample.images or sample.texts or sample.error):
                continue  # a README or the like
            item = _item(listing, sample, wanted, of, *tables, files)
            mark = blake2b(item.key.encode(), digest_size=8).digest()
            if mark in seen and sample.key:
                error = item.error or f"the tar has the name {item.key} twice"
                item = Item(f"{item.key}~{len(seen)}", None, error=error)
                mark = blake2b(item.key.encode(), digest_size=8).digest()
            seen.add(mark)
            yield replace(item, key=f"{clean(name)}#{item.key}")


def _extension(column: str | None) -> str:
    """Returns the extension that the user named as the image column; "" if none."""
    return (column or "").lower().lstrip(".")


def _item(
    listing: Listing,
    sample: Sample,
    wanted: str,
    of: dict[str, int],
    labels: Table | None,
    captions: Table | None,
    files: Files,
) -> Item:
    """Makes the item of a sample. Its key does not begin with the name of the tar yet."""
    plain = [extension for extension in sample.images if "." not in extension]
    fit = [wanted] if wanted in sample.images else plain or list(sample.images) if not wanted else []
    key, image = sample.images[fit[0]] if fit else (sample.key or "~end", None)
    if sample.error:
        return Item(key, None, error=sample.error)
    if image is None:
        missing = f"no image {wanted}" if wanted else "no image"
        beside = ", ".join([*sample.images, *sample.texts])
        return Item(key, None, error=f"{missing} beside {beside}: the files of a sample must be adjacent in the tar")
    if len(fit) > 1:
        return Item(key, None, error=f"which is the image? {', '.join(fit)}: name one as the image column")
    number: int | None = None
    texts: list[str] = []
    used: set[str] = set()
    names = (normalised(key), normalised(sample.key))
    try:
        if listing.class_depth is not None:
            number = label_number(key.split("/")[listing.class_depth], of, listing)
        elif labels is not None:
            used.add("json")
            if not any(name in labels.values for name in names):
                return Item(key, None, error=f"{labels.name} has no label for {names[0]}")
            number = label_number(_by_name(labels, names), of, listing)
        elif listing.label_column is not None:
            column = listing.label_column
            used.add(column if column in sample.texts else "json")
            with suppress(KeyError):
                number = label_number(_value(sample, column, "label"), of, listing)
        if captions is not None:
            texts = captions_of(_by_name(captions, names))
        else:
            texts = _captions(sample, listing.caption_columns, used, files)
    except (ValueError, IndexError) as error:
        return Item(key, None, error=one_line(error))
    for extension in sample.images:
        if extension != fit[0]:
            files.leave(f".{clean(extension)}", "further images of a sample")
    for extension in sample.texts.keys() - used:
        files.leave(f".{clean(extension)}", "not taken for labels or captions")
    return Item(key, image, number, first_caption(texts, files))


def _by_name(table: Table, names: Sequence[str]) -> Value:
    """Returns the value of the first of these names that the table has."""
    return next((table.values[name] for name in names if name in table.values), None)


def _captions(sample: Sample, columns: Sequence[str], used: set[str], files: Files) -> list[str]:
    """Returns the captions in the first of these columns that has any, and adds the extensions that were read to `used`.

    Raises ValueError for a text that can't be read, or a value that is not a caption.
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


def _value(sample: Sample, column: str, what: What) -> Any:
    """Returns the content of the member with this extension, or a field of the JSON member.

    Raises KeyError if there is neither; NotText, which names the member, if it can't be read.
    """
    if column in sample.texts:
        name, content = sample.texts[column]
        text = text_of(content, f"{name}: the {what}").strip()
        return written_label(text) if what == "label" else text
    name, content = sample.texts.get("json", ("", b"{}"))
    fields = json_of(content, f"{name}: it")
    if not isinstance(fields, dict) or column not in fields:
        raise KeyError(column)
    value = fields[column]
    return written_label(value) if what == "label" and isinstance(value, str) else value


def _parsed(sample: Sample, column: str, what: What) -> Any:
    """Returns the label or the captions in a column of a sample; None or [] if there are none or they are not valid."""
    try:
        value = _value(sample, column, what)
        return label_of(value) if what == "label" else [c for c in captions_of(value) if not are_boxes(c)]
    except (KeyError, ValueError):
        return None


def _column(first: Sequence[Sample], named: str | None, usual: Sequence[str], what: What) -> str | None:
    """Returns the column that the user named, or the first of the usual names for which any of these samples has a value.

    Raises UserError if no sample has the named column, or if the values are not valid labels.
    """
    columns = [named] if named else usual
    for column in columns:
        if any(_parsed(sample, column, what) not in (None, []) for sample in first):
            return column
    if what == "label":
        _check_labels(first, columns)
    if named:
        held = ", ".join(dict.fromkeys(extension for sample in first for extension in sample.texts)) or "none"
        if len(first) == 1:
            samples_ = f"sample, {first[0].key}, which has"
        else:
            samples_ = f"{len(first)} samples, {first[0].key} to {first[-1].key}, which have"
        raise UserError(f"no {what} {named} in the first {samples_} {held}")
    return None


def _check_labels(first: Sequence[Sample], columns: Sequence[str]) -> None:
    """Raises UserError if a sample has a value in one of these columns that is not a label."""
    for column in columns:
        for sample in first:
            try:
                label_of(_value(sample, column, "label"))
            except (KeyError, NotText):
                continue
            except ValueError as error:
                raise UserError(f"{sample.key}: {column} holds {error}", hint="--labels none: no classes") from error


def _first(files: Files, chosen: Sequence[File], ask: Ask) -> list[Sample]:
    """Returns the first LOOKED samples with an image, without the images' content. Raises UserError if no tar has one."""
    error = ""
    found: list[Sample] = []
    for file in chosen:
        for sample in islice(samples(files, file.name, _extension(ask.image_column)), LOOKED):
            if sample.images:
                found.append(replace(sample, images={e: (name, b"") for e, (name, _) in sample.images.items()}))
            error = error or (f"; {clean(file.name)}: {sample.error}" if sample.error else "")
            if len(found) == LOOKED:
                return found
        if found:
            return found
    raise UserError(f"{files.source}: no tar has an image{error}")


@lru_cache(maxsize=2)
def _table(fs: Any, source: str, root: str, version: str, where: str, column: str | None, what: What) -> Table:
    """Returns a table of labels or captions by normalised path, parsed once in a process. version: the source's fingerprint."""
    name, content = open_table(Files(source, fs, root), where)
    table = parse_table(name, content, column=column, defaults=USUAL[what], what=what)
    return replace(table, values={normalised(path): value for path, value in table.values.items()})
