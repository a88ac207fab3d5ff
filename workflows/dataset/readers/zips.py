"""Reader of images in zip files. Nothing is unpacked to disk."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from workflows.dataset.readers.decode import MAX_BYTES, START, starts_as_image
from workflows.dataset.readers.files import File, Files, clean, common_suffixes, hidden, one_line, safe_path
from workflows.dataset.readers.image_files import NOT_IMAGES, at, is_image, may_be_image, named_item, picked
from workflows.dataset.readers.labels import Described, Named, describe
from workflows.dataset.readers.listing import Item, Listing, Unit, indices_of
from workflows.dataset.readers.sidecars import Ask
from workflows.dataset.readers.spread import evenly, grouped
from workflows.dataset.readers.tables import MAX_TABLE
from workflows.errors import UserError

MAX_RATIO = 200
"""A zip file is taken for a zip bomb if its declared bytes divided by its size exceed this: images are already compressed."""
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
"""What zipfile raises for a broken archive, an encrypted member, or an unknown compression."""


@dataclass(frozen=True)
class Member:
    """An image in an archive. key: its name there, made safe and unique. error: why it must not be read, or None."""

    key: str
    info: zipfile.ZipInfo
    error: str | None


@dataclass(frozen=True)
class Archive:
    """An open zip file, its images in the order of their position, and its other files by their safe names."""

    file: zipfile.ZipFile
    members: list[Member]
    others: dict[str, zipfile.ZipInfo]


def list_zips(files: Files, chosen: Sequence[File], ask: Ask) -> tuple[tuple[Unit, ...], int, Described]:
    """Returns (units, number of images in the whole source, labels and captions).

    dataset.json and metadata files in the archives give labels and captions as well. Raises UserError for a file that is not a
    readable zip or looks like a zip bomb, and for a source without images.
    """
    names: list[str] = []
    spans: list[tuple[File, str, list[int], int]] = []
    others: dict[str, tuple[Archive, str]] = {}
    for file in chosen:
        prefix = f"{clean(file.name)}/" if len(chosen) > 1 else ""
        try:
            archive = _opened(files, file.name)
        except BROKEN as error:
            raise UserError(
                f"{clean(file.name)} in {files.source}: it is not a zip file, or broken: {one_line(error)}"
            ) from error
        except OSError as error:
            raise UserError(f"{clean(file.name)} in {files.source}: {files.explain(error)}") from error
        _check_total(archive, file)
        spans.append((file, prefix, [member.info.file_size for member in archive.members], len(names)))
        names += [prefix + member.key for member in archive.members]
        others |= {prefix + name: (archive, name) for name in archive.others}
    if not names:
        held = f"; the zip files hold {common_suffixes(others)}" if others else ""
        raise UserError(f"{files.source} has no images{held}")

    def read(wanted: Sequence[str]) -> Iterator[bytes | str]:
        return (_other(*others[name], files) for name in wanted)

    about = describe(files, Named(names, list(others), read, zips=len(chosen) > 1), ask)
    files.leave_files(others.keys() - about.used, NOT_IMAGES)
    units = []
    for file, prefix, sizes, offset in spans:
        for first, last in grouped(sizes, ask.unit_bytes):
            index = evenly(len(names), ask.limit, first=offset + first, last=offset + last).tolist()
            if not index:
                continue
            sidecars = picked(about.caption_files, index)
            unit = Unit(
                kind="zip",
                files=(file.name,),
                first=first,
                last=last,
                offset=offset + first,
                size=sum(sizes[i - offset] for i in index),
                labels=picked(about.labels, index),
                captions=picked(about.captions, index),
                caption_files=tuple(name and name.removeprefix(prefix) for name in sidecars),
            )
            units.append(unit)
    return tuple(units), len(names), about


def read_zip(listing: Listing, unit: Unit, files: Files) -> Iterator[Item]:
    """Yields one item per image of the unit."""
    (name,) = unit.files
    archive, lost = None, "changed since it was listed"
    try:
        archive = _cached(files.fs, listing.source, listing.root, name, listing.fingerprint)
    except BROKEN as error:
        lost = f"broken since it was listed: {one_line(error)}"
    except OSError as error:
        lost = files.explain(error)
    for i, number in enumerate(indices_of(listing, unit).tolist()):
        if archive is None or number >= len(archive.members):
            yield Item(f"{clean(name)}#{number}", None, at(unit.labels, i), at(unit.captions, i), lost)
            continue
        member, sidecar = archive.members[number], at(unit.caption_files, i)
        content = member.error or _content(archive.file, member.info, files)
        text = (sidecar, _other(archive, sidecar, files)) if sidecar else None
        yield named_item(listing, unit, i, f"{clean(name)}#{member.key}", content, text, files)


def _other(archive: Archive, name: str, files: Files) -> bytes | str:
    """Returns the content of a member that is not an image, or why it can't be read."""
    info = archive.others.get(name)
    if info is None:
        return "changed since it was listed"
    if info.file_size > MAX_TABLE:
        return f"it declares {info.file_size:,} bytes, more than {MAX_TABLE:,}"
    return _refused(info) or _content(archive.file, info, files)


def _content(file: zipfile.ZipFile, info: zipfile.ZipInfo, files: Files) -> bytes | str:
    """Returns the content of a member, or why it can't be read. zipfile reads no more than the declared size, which was checked."""
    try:
        with file.open(info) as stream:
            return stream.read(MAX_BYTES)
    except BROKEN as error:
        return f"broken in the zip: {one_line(error)}"
    except OSError as error:
        return files.explain(error)


@lru_cache(maxsize=1)
def _cached(fs: Any, source: str, root: str, name: str, version: str) -> Archive:
    """The last archive is cached: reading the directory of a million members takes seconds. version: the fingerprint of the
    source. An archive is not closed, as another iterator may still be reading it.
    """
    return _opened(Files(source, fs, root), name)


def _opened(files: Files, name: str) -> Archive:
    file = zipfile.ZipFile(files.open(name))
    members: list[Member] = []
    others: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for info in sorted(file.infolist(), key=lambda info: info.header_offset):
        key = safe_path(info.filename)
        if info.is_dir() or hidden(key):
            continue
        if not is_image(key) and not (may_be_image(key) and _starts_as_image(file, info)):
            others.setdefault(key, info)
            continue
        error = _refused(info)
        if key in seen:
            key, error = f"{key}~{len(members)}", f"the zip has the name {key} twice"
        seen.add(key)
        members.append(Member(key, info, error))
    return Archive(file, members, others)


def _starts_as_image(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with file.open(info) as stream:
            return starts_as_image(stream.read(START))
    except (*BROKEN, OSError):
        return False


def _refused(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & 1:
        return "encrypted"
    if info.file_size > MAX_BYTES:
        return f"it declares {info.file_size:,} bytes, more than {MAX_BYTES:,}"
    return None


def _check_total(archive: Archive, file: File) -> None:
    declared = sum(info.file_size for info in archive.file.infolist())
    if file.size and declared > MAX_RATIO * file.size and declared > MAX_BYTES:
        raise UserError(f"{clean(file.name)} declares {declared:,} bytes within {file.size:,}: a zip bomb?")
