"""A source's files, wherever they lie: found and read through fsspec."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.decode import MAX_BYTES
from workflows.dataset.readers.spread import grouped
from workflows.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 8 * 2**20
"""Bytes read ahead of a file that is streamed from a store (fsspec's own for S3 is 50 MiB)."""
AT_ONCE, FILES_AT_ONCE = 4 * 2**20, 32
"""What is asked of a store at once when a file is an image."""
NO_SUFFIX = "no suffix"
SYSTEMS = frozenset(
    (
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin"),
        *("system volume information", "lost+found"),
    )
)
"""What macOS, Windows and network drives put beside files, thumbnails and deleted ones among them; in small letters."""
DENIED = "it may not be read: permission denied"
OUTAGES = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
    )
)
"""Errors that say nothing of the file that was asked for."""


LeftOut = Counter[tuple[str, str]]
"""How many of what, such as a suffix, are left out, and why: (what, why) -> count."""


@dataclass(frozen=True)
class File:
    """`name` below the source's root; `size` and `version` (ETag, time of change) where the store tells."""

    name: str
    size: int | None
    version: str


class Files:
    """The files below `source`: a folder, a prefix of a store, one file, or a pattern with * and ?.

    root is what names are relative to: the folder, that of the one file, or the part before the pattern.
    """

    def __init__(self, source: str, filesystem: AbstractFileSystem | None = None, root: str | None = None) -> None:
        self.source = shown(source)
        self.fs, self.path = _opened(source, filesystem)
        self.local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.root = self.path if root is None else root
        self.left_out: LeftOut = Counter()

    def find(self) -> list[File]:
        """All files, in the order of their names. Hidden files and folders are left out.

        Raises UserError for a source that is not there, may not be listed, or has no files.
        """
        try:
            self.fs.invalidate_cache()
            found = self._find()
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"{self.source} is not there", hint="a folder, a file, or a store's prefix") from error
        except PermissionError as error:
            raise UserError(f"{self.source} may not be read: {line(error)}", hint="credentials, or rights") from error
        except Exception as error:  # every store's driver has errors of its own
            raise UserError(f"{self.source} can't be listed: {line(error)}") from error
        files = sorted((file for file in found if not hidden(file.name)), key=lambda file: file.name)
        if not files:
            raise UserError(f"{self.source} has no files" if self._there(self.path) else f"{self.source} is not there")
        return files

    def open(self, name: str) -> Any:
        """The file as a stream of bytes that can seek."""
        return self.fs.open(self._full(name), "rb", block_size=BLOCK)

    def read(self, name: str) -> bytes:
        content: bytes = self.fs.cat_file(self._full(name))
        return content

    def whole(self, name: str) -> bytes:
        """A file that the source can't do without. Raises UserError where it can't be read."""
        try:
            return self.read(name)
        except OSError as error:
            raise UserError(f"{clean(name)} in {self.source}: {self.lost(error)}") from error

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder: what an archive holds is none."""
        return self._there(self._full(name))

    def starts(self, names: Sequence[str], count: int) -> Iterator[bytes]:
        """The first `count` bytes of each file; b"" of one that can't be read, as is said when it is."""
        for first in range(0, len(names), FILES_AT_ONCE):
            part = [self._full(name) for name in names[first : first + FILES_AT_ONCE]]
            if self.fs.async_impl:
                got = self.fs.cat_ranges(part, [0] * len(part), [count] * len(part), on_error="return")
                yield from (start if isinstance(start, bytes) else b"" for start in got)
                continue
            for path in part:
                try:
                    yield self.fs.cat_file(path, 0, count)
                except OSError:
                    yield b""

    def read_small(self, names: Sequence[str]) -> Iterator[bytes | str]:
        """As `read_many`, of files whose sizes are not known, but small."""
        at_once = FILES_AT_ONCE if self.fs.async_impl else 1
        for first in range(0, len(names), at_once):
            for content in self._contents(list(names[first : first + at_once])):
                yield self._checked(content, None)

    def leave(self, what: str, why: str, count: int = 1) -> None:
        """Notes what is left out, so that it can be told."""
        self.left_out[what, why] += count

    def leave_columns(self, names: Iterable[str]) -> None:
        """Notes columns of tables that are not taken."""
        for name in names:
            self.leave(f"column {clean(name)}", "neither image, label nor caption")

    def read_many(self, names: Sequence[str], sizes: Sequence[int | None]) -> Iterator[bytes | str]:
        """The content of each file, or why it has none, in one line. Some are asked for at once where the store can.

        An outage (a connection that fails) is no property of a file: it is raised.
        """
        at_once = FILES_AT_ONCE if self.fs.async_impl else 1
        for first, last in grouped([size or BLOCK for size in sizes], AT_ONCE, count=at_once):
            fit = [i for i in range(first, last) if (sizes[i] or 0) <= MAX_BYTES]
            got = dict(zip(fit, self._contents([names[i] for i in fit]), strict=True))
            for i in range(first, last):
                yield self._checked(got.pop(i, None), sizes[i])

    def _checked(self, content: bytes | Exception | None, size: int | None) -> bytes | str:
        if content is None:
            return f"a file of {size:,} bytes, more than {MAX_BYTES:,}"
        if isinstance(content, Exception):
            return self.lost(content)
        if size is not None and len(content) != size:
            return f"changed since it was listed: {size:,} bytes then, {len(content):,} now"
        return content

    def _contents(self, names: list[str]) -> list[bytes | Exception]:
        if self.fs.async_impl:
            several: list[bytes | Exception] = self.fs.cat_ranges(
                [self._full(name) for name in names], None, None, on_error="return"
            )
            return several
        out: list[bytes | Exception] = []
        for name in names:
            try:
                out.append(self.read(name))
            except OSError as error:
                out.append(error)
        return out

    def lost(self, error: Exception) -> str:
        """Why a file can't be read, in one line. Raises the error again if it is an outage, which says nothing of the file."""
        if isinstance(error, FileNotFoundError):
            return "it is no longer there"
        if isinstance(error, PermissionError):
            return DENIED
        if type(error) is OSError and error.errno is None:  # a decoder's
            return f"broken: {line(error)}"
        if self.local and isinstance(error, OSError) and error.errno not in OUTAGES:
            return f"it can't be read: {error.strerror or line(error)}"
        raise error

    def _full(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if self.root else name

    def _find(self) -> list[File]:
        if self.fs.isfile(self.path):
            self.root, _, name = self.path.rpartition("/")
            return [_file(name, self.fs.info(self.path))]
        if re.search(r"[*?]", self.path) and not self.fs.exists(self.path):
            self.root = re.split(r"/[^/]*[*?]", self.path)[0]
            found = self.fs.glob(self.path, detail=True)
            return [_file(self._name(p), info) for p, info in found.items() if info["type"] == "file"]
        if self.local:
            return [_local(self._name(path), info) for path, info in walk(self.path)]
        found = self.fs.find(self.path, detail=True)
        return [_file(self._name(path), info) for path, info in found.items() if info.get("type") != "directory"]

    def _name(self, path: str) -> str:
        return path[len(self.root) :].lstrip("/")

    def _there(self, path: str) -> bool:
        try:
            return bool(self.fs.exists(path))
        except Exception:  # the question is only for better words
            return True


def walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, os.stat_result | None]]:
    """(path, what it is) of the plain files below a folder of this machine, but for hidden folders; None of a link to nothing.

    Links are followed, but not into a folder that they lie in. What can't be read is raised.
    """
    info = os.stat(folder)
    this = info.st_dev, info.st_ino
    if this in above:
        return
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            if not hidden(entry.name):
                yield from walk(entry.path, above | {this})
            continue
        try:
            info = entry.stat()
        except OSError:  # said when it is read
            yield entry.path, None
        else:
            if stat.S_ISREG(info.st_mode):
                yield entry.path, info


def fingerprint(files: Sequence[File], *, versions: bool = True) -> str:
    """Of names, sizes and versions."""
    lines = "".join(f"{file.name!r} {file.size} {file.version if versions else ''}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def shown(source: str) -> str:
    """A source as it may be shown: without the user, password, and query of an address."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return source
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def line(error: Exception) -> str:
    """An error as one line; of addresses in it without user, password and query, which may be secret."""
    text = " ".join((str(error) or type(error).__name__).split())
    return re.sub(r"\w+://[^\s\"']+", lambda m: shown(m[0]), text)[:200]


def clean(name: str) -> str:
    """A name that any file, screen and encoding takes: no control characters, no bytes that aren't text."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda m: f"\\x{ord(m[0]):02x}", text)


def inside(name: str) -> str:
    """The name of an archive's member as a clean relative one: no root, no drive, no `..`."""
    parts = name.replace("\\", "/").split("/")
    return clean("/".join(p for p in parts if p not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", p)))


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def hidden(name: str) -> bool:
    """Whether it is what systems leave in folders, and not worth a word."""
    return any(part.startswith(".") or part.lower() in SYSTEMS for part in name.split("/"))


def called(name: str) -> str:
    """What a file that is left out is counted as: its suffix, if it has one."""
    return clean(suffix(name)) or NO_SUFFIX


def kinds(names: Iterable[str]) -> str:
    """The most frequent suffixes, in words."""
    return ", ".join(f"{what} ({n:,})" for what, n in Counter(map(called, names)).most_common(3))


def _local(name: str, info: os.stat_result | None) -> File:
    return File(name, info.st_size, str(info.st_mtime_ns)) if info else File(name, None, "")


def _file(name: str, info: dict[str, Any]) -> File:
    known = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[key]) for key in known if info.get(key)), "")
    return File(name, info.get("size"), version)


def _opened(source: str, filesystem: AbstractFileSystem | None) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    if filesystem is not None:
        return filesystem, str(filesystem._strip_protocol(source))
    try:
        opened, path = url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"{shown(source)}: {line(error)}") from error
    return opened, str(path)
