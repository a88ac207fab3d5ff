"""Files and folders by path or URI, with the same calls for both. Every upload is verified against what the store then reports."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workflows.errors import UserError, expanded, home
from workflows.storage.local import atomic
from workflows.storage.s3 import PART, Changed, S3Settings, client, code_of, explained, filesystem, retry
from workflows.storage.uri import is_remote, join, shown

AT_ONCE = 8
"""Files of a folder that are transferred at the same time."""
LOCK_TIMEOUT, LOCK_TRIES = 5.0, 6
"""For the objects of leases: most seconds that a request may be silent, and requests. A lease must be renewed before it expires."""


@dataclass(frozen=True)
class Entry:
    """A file as its store lists it. `tag` changes with its content. `changed`: seconds since 1970, 0 if unknown."""

    size: int
    tag: str
    changed: float = 0.0


def cache_folder() -> Path:
    """Where copies of remote files are kept on this machine. Raises UserError if the user has no home."""
    if named := os.environ.get("MMDISTILL_CACHE"):
        return expanded(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "mmdistill"


# One file


def read(uri: str | Path) -> bytes:
    """The content of a file. Raises FileNotFoundError, UserError."""
    fs, path = filesystem(uri)
    return bytes(retry(lambda: fs.cat_file(path), uri))


def write(uri: str | Path, data: bytes) -> None:
    """Writes a file atomically. Raises UserError."""
    fs, path = filesystem(uri)
    if not is_remote(uri):
        with atomic(Path(path)) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return

    def put() -> None:
        fs.pipe_file(path, data, chunksize=PART)
        _verify(fs, path, len(data), (data[i : i + PART] for i in range(0, len(data), PART)))

    retry(put, uri)


def upload(path: Path, uri: str | Path) -> None:
    """Copies a local file to `uri` atomically; a large one as a multipart upload. Raises UserError."""
    fs, there = filesystem(uri)
    if not is_remote(uri):
        with atomic(Path(there)) as partial:
            shutil.copyfile(path, partial)
        return

    def put() -> None:
        fs.put_file(str(path), there, chunksize=PART)
        with path.open("rb") as file:
            _verify(fs, there, path.stat().st_size, iter(lambda: file.read(PART), b""))

    retry(put, uri)


def download(uri: str | Path, path: Path) -> None:
    """Copies a file to a local path atomically. Raises FileNotFoundError, UserError."""
    fs, there = filesystem(uri)

    def get() -> None:
        size = int(fs.size(there))
        fs.get_file(there, str(partial))
        if (got := partial.stat().st_size) != size:
            raise Changed(f"{got} of {size} bytes arrived")

    with atomic(path) as partial:
        retry(get, uri)


def etag(parts: Iterable[bytes], size: int) -> str:
    """The etag that S3 gives an object of `size` bytes, uploaded in these parts, or in one request if it is small."""
    if size < 2 * PART:
        whole = hashlib.md5(usedforsecurity=False)
        for part in parts:
            whole.update(part)
        return whole.hexdigest()
    digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in parts]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _verify(fs: Any, path: str, size: int, parts: Iterable[bytes]) -> None:
    """Raises Changed if the stored size differs, or the etag, where that is an MD5 (with encryption it is not)."""
    info = fs.info(path)
    if info["size"] != size:
        raise Changed(f"{size} bytes were written, the store has {info['size']}")
    tag = str(info.get("ETag", "")).strip('"')
    if "SSEKMSKeyId" not in info and re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) and tag != etag(parts, size):
        raise Changed("the stored content differs from what was written")


def _client_and_key(uri: str) -> tuple[Any, dict[str, str]]:
    parts = urlsplit(uri)
    if parts.scheme not in ("s3", "s3a"):
        raise UserError(f"{shown(uri)}: only folders and s3:// can be locked")
    settings = S3Settings.of_environment()
    settings = replace(settings, timeout=min(settings.timeout, LOCK_TIMEOUT))
    return client(settings), {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}


def put_if(uri: str, data: bytes, tag: str | None) -> str | None:
    """Writes a small s3:// object if its etag is still `tag` (None: if it does not exist). Returns the new etag, or None if it was
    not written. If the store does not answer, raises UserError after LOCK_TRIES.
    """
    client, where = _client_and_key(uri)
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

    def put() -> str | None:
        try:
            return str(client.put_object(Body=data, **where, **condition)["ETag"]).strip('"')
        except client.exceptions.ClientError as error:
            if code_of(error) in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409"):
                return None
            raise

    return retry(put, uri, tries=LOCK_TRIES)


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """The bytes of a small s3:// object and their etag, from one request; None if it does not exist."""
    client, where = _client_and_key(uri)

    def get() -> tuple[bytes, str] | None:
        try:
            found = client.get_object(**where)
        except client.exceptions.NoSuchKey:
            return None
        return found["Body"].read(), str(found["ETag"]).strip('"')  # Ceph accepts etags only without quotes

    return retry(get, uri, tries=LOCK_TRIES)


# Folders


def listing(uri: str | Path) -> dict[str, Entry]:
    """All files below `uri`, by relative path; {} if there are none. Raises UserError."""
    fs, path = filesystem(uri)
    try:
        found = retry(lambda: fs.find(path, detail=True), uri)
    except FileNotFoundError:
        return {}
    entries = {}
    for name, info in found.items():
        if info["type"] == "file" and name.rstrip("/") != path:
            tag, when = info.get("ETag") or info.get("mtime") or info.get("created") or "", info.get("LastModified")
            changed = float(info.get("mtime") or 0) if when is None else when.timestamp()
            entries[name[len(path) :].lstrip("/")] = Entry(int(info["size"] or 0), str(tag).strip('"'), changed)
    return entries


def exists(uri: str | Path) -> bool:
    """Whether the file exists. Raises UserError."""
    fs, path = filesystem(uri)
    return bool(retry(lambda: fs.isfile(path), uri))


def delete(uri: str | Path) -> None:
    """Deletes a file, or everything below a folder. Nothing happens if it does not exist. Raises UserError."""
    fs, path = filesystem(uri)

    def remove() -> None:
        if fs.exists(path):
            fs.rm(path, recursive=True)
            if is_remote(uri) and fs.exists(path):  # s3fs does not report single objects that the store refused
                raise Changed("it could not be deleted: is s3:DeleteObject allowed?")

    retry(remove, uri)


def publish(folder: Path, uri: str, *, skip: Callable[[str], bool] = lambda name: False, last: str = "") -> None:
    """Uploads all files of a local folder but partial ones. If `last` is there, the rest is complete. Raises UserError."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if not skip(name) and name != last and not name.endswith(".partial")]
    _in_parallel(lambda name: upload(folder / name, join(uri, name)), names)
    if last:
        upload(folder / last, join(uri, last))


def pull(uri: str, folder: Path, *, skip: Callable[[str], bool] = lambda name: False) -> None:
    """Downloads all files below `uri` into a local folder. Raises UserError."""
    _download_all(uri, folder, [name for name in listing(uri) if not skip(name)])


def skeleton(uri: str, folder: Path, *, whole: Callable[[str], bool]) -> None:
    """Recreates the files below `uri` in a local folder by name, size and date. Only those that `whole` selects have content."""
    entries, folder = listing(uri), folder.resolve()
    _download_all(uri, folder, [name for name in entries if whole(name)])
    newest: dict[Path, float] = {}
    for name, entry in entries.items():
        path = _within(folder, name)
        if not whole(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(entry.size)  # sparse: takes no space
        for part in (path, *path.parents):
            newest[part] = max(newest.get(part, 0), entry.changed)
            if part == folder:
                break
    for part, when in newest.items():
        os.utime(part, (when, when))


def fetch(uri: str | Path) -> Path:
    """The folder itself if it is local, else a cached local copy of its present content. Raises UserError if it is empty."""
    if not is_remote(uri):
        return expanded(str(uri).removeprefix("file://"))
    entries = listing(uri)
    if not entries:
        raise UserError(f"{shown(uri)}: there are no files")
    content = "\n".join(f"{name} {entry.size} {entry.tag}" for name, entry in sorted(entries.items()))
    target = cache_folder() / "copies" / hashlib.sha256(f"{uri}\n{content}".encode()).hexdigest()[:24]
    try:
        os.utime(target)  # marks it as used: `mmdistill gc` removes unused copies
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            _download_all(uri, partial, entries)
            try:
                partial.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _within(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`. Object names are not trusted: raises UserError for one that leads out of it."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{name!r}: the name leads out of its folder")
    return path


def _download_all(uri: str | Path, folder: Path, names: Iterable[str]) -> None:
    _in_parallel(lambda name: download(join(uri, name), _within(folder, name)), names)


def _in_parallel(call: Callable[[str], None], names: Iterable[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(call, names))  # raises the first error


def check(uri: str | Path) -> None:
    """Raises UserError within a few seconds if nothing can be written below `uri`."""
    probe = join(uri, f".probe-{os.getpid()}")
    fs, path = filesystem(probe)
    if not is_remote(uri):
        return
    if not urlsplit(str(uri)).netloc:
        raise UserError(f"{uri}: names no bucket")

    def put_and_remove() -> None:
        fs.pipe_file(path, b"")
        fs.rm_file(path)

    try:
        retry(put_and_remove, uri, tries=2)
    except FileNotFoundError as error:
        raise explained(error, uri) from error
