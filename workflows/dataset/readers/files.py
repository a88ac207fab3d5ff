"""Files of a source, local or in any store: listing and reading them through fsspec."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from errno import EHOSTDOWN, EIO, EMFILE, ENFILE, ENOMEM, ENOTCONN, ESTALE, ETIMEDOUT
from typing import TYPE_CHECKING, Any

from workflows.dataset.readers.decode import MAX_BYTES, words
from workflows.dataset.readers.spread import grouped
from workflows.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 8 * 2**20
"""Bytes read ahead when a file is streamed from a store. The default of fsspec for S3 is 50 MiB."""
AT_ONCE, FILES_AT_ONCE = 4 * 2**20, 32
"""Maximum bytes and files that are requested from a store concurrently, if each image is a file."""
NO_SUFFIX = "no suffix"
SYSTEMS = words("__macosx thumbs.db ehthumbs.db desktop.ini @eadir #recycle $recycle.bin lost+found").union(
    ["system volume information"]
)
"""Files and folders that macOS, Windows and network drives leave, such as thumbnails and deleted files; in lower case."""
DENIED = "it can't be read: permission denied"
OUTAGES = {EIO, ESTALE, EMFILE, ENFILE, ENOMEM, ETIMEDOUT, ENOTCONN, EHOSTDOWN}
"""Errors of the store or the machine rather than of the file that was read."""
Read = Callable[[Sequence[str]], Iterator[bytes | str]]
"""Yields the content of each named file, or one line that says why it can't be read."""
LeftOut = Counter[tuple[str, str]]
"""Counts of what is left out: (what, why) -> count. `what` is a suffix or the like."""


@dataclass(frozen=True)
class File:
    """A file: its name below the root of the source, and its size and version (ETag, modification time) if the store tells."""

    name: str
    size: int | None
    version: str


class Files:
    """The files of `source`: a folder, a prefix of a store, one file, or a pattern with * and ?.

    root       the folder that names are relative to: the source, the folder of the one file, or the part before the pattern
    left_out   counts of what is not used; see `leave`
    """

    def __init__(self, source: str, filesystem: AbstractFileSystem | None = None, root: str | None = None) -> None:
        self.source = shown(source)
        self.fs, self.path = _opened(source, filesystem)
        self.local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.root = self.path if root is None else root
        self.left_out: LeftOut = Counter()

    def find(self) -> list[File]:
        """Returns all files sorted by name, without hidden files and folders.

        Raises UserError for a source that does not exist, can't be listed, or has no files.
        """
        try:
            self.fs.invalidate_cache()
            found = self._find()
        except FileNotFoundError as error:
            raise UserError(
                f"{self.source} does not exist", hint="a source is a folder, a file, or a prefix of a store"
            ) from error
        except PermissionError as error:
            raise UserError(
                f"{self.source} can't be read: {one_line(error)}", hint="check the credentials and the access rights"
            ) from error
        except Exception as error:  # each driver of a store raises its own kinds of errors
            raise UserError(f"{self.source} can't be listed: {one_line(error)}") from error
        files = sorted((file for file in found if not hidden(file.name)), key=lambda file: file.name)
        if not files:
            raise UserError(
                f"{self.source} has no files" if self._exists(self.path) else f"{self.source} does not exist"
            )
        return files

    def open(self, name: str) -> Any:
        """Opens the file as a seekable stream of bytes."""
        return self.fs.open(self._full(name), "rb", block_size=BLOCK)

    def has(self, name: str) -> bool:
        """Whether the file or folder exists. Members of archives do not count."""
        return self._exists(self._full(name))

    def starts(self, names: Sequence[str], count: int) -> Iterator[bytes]:
        """Yields the first `count` bytes of each file; b"" for one that can't be read, whose error is reported later."""
        for first in range(0, len(names), FILES_AT_ONCE):
            for start in self._contents(names[first : first + FILES_AT_ONCE], count):
                yield start if isinstance(start, bytes) else b""

    def leave(self, what: str, why: str, count: int = 1) -> None:
        """Counts something as left out, to be reported to the user."""
        self.left_out[what, why] += count

    def leave_files(self, names: Iterable[str], why: str) -> None:
        """Counts files that are not used."""
        for name in names:
            self.leave(suffix_shown(name), why)

    def leave_columns(self, names: Iterable[str]) -> None:
        """Counts columns of tables that are not used."""
        for name in names:
            self.leave(f"column {clean(name)}", "neither image, label nor caption")

    def read_many(self, names: Sequence[str], sizes: Sequence[int | None] | None = None) -> Iterator[bytes | str]:
        """Yields the content of each file, or one line that says why it can't be read. Files are requested concurrently if the
        store supports that.

        sizes: as listed; None for small files. An outage, such as a failed connection, is raised: it says nothing
        about the file.
        """
        at_once = FILES_AT_ONCE if self.fs.async_impl else 1
        expected = sizes or [None] * len(names)
        for first, last in grouped([size or BLOCK if sizes else 0 for size in expected], AT_ONCE, count=at_once):
            small = [i for i in range(first, last) if (expected[i] or 0) <= MAX_BYTES]
            contents = dict(zip(small, self._contents([names[i] for i in small]), strict=True))
            for i in range(first, last):
                content, size = contents.pop(i, None), expected[i]
                if content is None:
                    yield f"a file of {size:,} bytes, more than {MAX_BYTES:,}"
                elif isinstance(content, Exception):
                    yield self.explain(content)
                elif size is not None and len(content) != size:
                    yield f"changed since it was listed: {size:,} bytes then, {len(content):,} now"
                else:
                    yield content

    def _contents(self, names: Sequence[str], end: int | None = None) -> list[bytes | Exception]:
        """Returns the content of each file, up to byte `end`, or the error of the store."""
        paths = [self._full(name) for name in names]
        contents: list[bytes | Exception] = []
        if self.fs.async_impl:
            contents = self.fs.cat_ranges(paths, None, end, on_error="return")
            return contents
        for path in paths:
            try:
                contents.append(self.fs.cat_file(path, end=end))
            except OSError as error:
                contents.append(error)
        return contents

    def explain(self, error: Exception) -> str:
        """Returns why a file can't be read, in one line. Raises the error again if it is an outage of the store."""
        if isinstance(error, FileNotFoundError):
            return "it is no longer there"
        if isinstance(error, PermissionError):
            return DENIED
        if type(error) is OSError and error.errno is None:  # raised by a decompressor
            return f"broken: {one_line(error)}"
        if self.local and isinstance(error, OSError) and error.errno not in OUTAGES:
            return f"it can't be read: {error.strerror or one_line(error)}"
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

    def _exists(self, path: str) -> bool:
        try:
            return bool(self.fs.exists(path))
        except Exception:  # the answer only chooses the text of an error
            return True


def walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yields (path, stat) of the regular files below a local folder, without hidden folders. stat is None for a dangling link.

    Links are followed, except to a folder that contains them. Raises OSError for a folder that can't be read.
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
        except OSError:  # reported when the file is read
            yield entry.path, None
        else:
            if stat.S_ISREG(info.st_mode):
                yield entry.path, info


def fingerprint(files: Sequence[File], *, versions: bool = True, contents: Sequence[bytes] = ()) -> str:
    """Returns a hash of the names, sizes and (unless `versions` is False) versions of the files, and of the `contents` of further
    files. An empty content stands for no file.
    """
    lines = "".join(f"{file.name!r} {file.size} {file.version if versions else ''}\n" for file in files)
    parts = [hashlib.sha256(lines.encode()).hexdigest()[:16]]
    if not any(contents):
        return parts[0]
    parts += [hashlib.sha256(content).hexdigest() for content in contents]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def shown(source: str) -> str:
    """Returns a source without the user, password and query of its address, to be shown or logged."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return source
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def one_line(error: Exception) -> str:
    """Returns an error as one line. Addresses in it lose user, password and query, which may be secret."""
    text = " ".join((str(error) or type(error).__name__).split())
    return re.sub(r"\w+://[^\s\"']+", lambda m: shown(m[0]), text)[:200]


def clean(name: str) -> str:
    """Escapes control characters and undecodable bytes in a name, so that it can be printed and encoded."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda m: f"\\x{ord(m[0]):02x}", text)


def safe_path(name: str) -> str:
    """Returns the name of an archive member as a safe relative path: no root, no drive, no `..`."""
    parts = name.replace("\\", "/").split("/")
    return clean("/".join(p for p in parts if p not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", p)))


def suffix(name: str) -> str:
    """Returns the suffix in lower case, with its dot; "" if there is none."""
    return os.path.splitext(name)[1].lower()


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden or left by an operating system. Such files are not even counted as left out."""
    return any(part.startswith(".") or part.lower() in SYSTEMS for part in name.split("/"))


def suffix_shown(name: str) -> str:
    """Returns the name under which a left-out file is counted: its suffix, or NO_SUFFIX."""
    return clean(suffix(name)) or NO_SUFFIX


def common_suffixes(names: Iterable[str]) -> str:
    """Returns the three most frequent suffixes with their counts, as text."""
    return ", ".join(f"{what} ({n:,})" for what, n in Counter(map(suffix_shown, names)).most_common(3))


def whole(name: str, read: Read, source: str) -> bytes:
    """Returns the content of a file that the source needs. Raises UserError if it can't be read."""
    (content,) = read([name])
    if isinstance(content, str):
        raise UserError(f"{clean(name)} in {source}: {content}")
    return content


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
        raise UserError(f"{shown(source)}: {one_line(error)}") from error
    return opened, str(path)
