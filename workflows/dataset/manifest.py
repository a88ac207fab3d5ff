"""The manifest of a data set: its types, reading and writing it.

A data set is a folder, local or in an object store, of Parquet shards and a manifest.json. The manifest is written last, so that a
half-written folder is never taken for a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from workflows.errors import UserError
from workflows.storage.store import exists, read, write
from workflows.storage.uri import is_remote, join, shown

MANIFEST = "manifest.json"
FORMAT = 2
KNOWN = 60.0
"""Seconds for which a manifest read from an object store is cached."""
FEWEST = 100
"""The smallest number of images in a data set: with fewer, holding out, comparing and training make no sense."""
ENCODINGS = {"float32": 4, "uint8": 1, "png": 1}
"""Encoding of the images in a shard -> bytes per decoded value: float32 in [-1, 1], or uint8 of 0 to 255."""


@dataclass(frozen=True)
class Shard:
    """One shard: its path below the folder of the data set, rows, held-out rows, size in bytes, and SHA-256."""

    file: str
    rows: int
    held_out: int
    size: int
    sha256: str

    def count(self, which: str) -> int:
        """Returns the number of "all" rows, of those of the "holdout", or of the "rest"."""
        return {"all": self.rows, "holdout": self.held_out, "rest": self.rows - self.held_out}[which]


@dataclass(frozen=True)
class Manifest:
    """
    count, held_out  number of images, and how many of them are held out
    shape            (c, h, w); `encoding` is a key of ENCODINGS
    classes          class names in the order of their numbers; empty if they have no names
    labels           number of images of each label
    fingerprint      hash of the images, labels and captions; independent of their order and of how they are cut into shards.
                     `held_fingerprint` is that of the held-out rows
    columns          further columns by name (latent, text, caption): shape, dtype, and what made them
    statistics       extractor, hash of its weights, accuracy on held-out rows; for each set of rows the count, near (features
                     kept) and identity (hash of the files). Empty if none were requested
    taken            where labels and captions came from, and what was left out: {"labels", "captions", "left_out", "said"}
                     (workflows/ingest/summary.py). Empty for a data set that was not made by `mmdistill prepare`
    skipped          images that could not be read: {"count", "listed": [{"path", "reason"}]}
    """

    source: str
    count: int
    held_out: int
    shape: tuple[int, int, int]
    encoding: str
    num_classes: int
    labels: dict[str, int]
    fingerprint: str
    held_fingerprint: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    preprocessing: str = "whole images"
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, Any] = field(default_factory=lambda: {"count": 0, "listed": []})
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def rows(self, which: str) -> int:
        """Returns the number of "all" rows, of those of the "holdout", or of the "rest"."""
        return sum(shard.count(which) for shard in self.shards)

    @cached_property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        return math.prod(self.shape) * ENCODINGS[self.encoding]

    def in_memory(self) -> int:
        """Bytes of all decoded images."""
        return self.count * self.image_bytes


class Sum:
    """A sum of row digests. It does not depend on the order of the rows, and the sums of shards can be added."""

    BITS = 128

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, digests: Iterable[bytes]) -> None:
        self.value = (self.value + sum(int.from_bytes(d, "big") for d in digests)) % 2**self.BITS

    def merge(self, hexadecimal: str) -> None:
        self.value = (self.value + int(hexadecimal, 16)) % 2**self.BITS

    def hex(self) -> str:
        return f"{self.value:032x}"


def fingerprint(total: Sum, count: int) -> str:
    """Returns the fingerprint of `count` rows with this sum of digests."""
    return hashlib.sha256(f"{total.hex()} {count}".encode()).hexdigest()[:16]


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Writes manifest.json, which makes the folder a data set. Call it after all shards are written."""
    _known.pop(join(root, MANIFEST), None)
    write(join(root, MANIFEST), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def is_data_set(root: str | Path) -> bool:
    """Returns whether the folder holds a manifest."""
    return exists(join(root, MANIFEST))


_known: dict[str, tuple[Any, Manifest]] = {}
"""The cache of `known_manifest`: URI -> (mark that tells whether the entry is still valid, manifest)."""


def known_manifest(root: str | Path) -> Manifest:
    """Like `read_manifest`, but cached in this process: a configuration asks for it several times, a sweep once per point.

    A local manifest is cached until its file changes, and one in an object store for KNOWN seconds.
    """
    uri = join(str(root).removesuffix(f"/{MANIFEST}"), MANIFEST)
    mark = _mark(uri)
    if mark is None or uri not in _known or not _is_fresh(_known[uri][0], mark):
        _known[uri] = mark, read_manifest(root)
    return _known[uri][1]


def _mark(uri: str) -> Any:
    """For a local file, its inode, size and modification time (None if missing); for a remote one, the current time."""
    if is_remote(uri):
        return time.monotonic()
    try:
        info = Path(uri.removeprefix("file://")).stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def _is_fresh(before: Any, now: Any) -> bool:
    return bool(now - before < KNOWN) if isinstance(before, float) and isinstance(now, float) else bool(before == now)


def read_manifest(root: str | Path) -> Manifest:
    """Reads the manifest of a data set. Raises UserError if there is none, or if another version wrote it."""
    root = str(root).removesuffix(f"/{MANIFEST}")
    try:
        values = json.loads(read(join(root, MANIFEST)))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{shown(root)}: no data set: there is no {MANIFEST}",
            hint="`mmdistill prepare SOURCE DEST` writes one, the manifest last; run it again if it was interrupted",
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(root)}/{MANIFEST}: is not JSON ({error})") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{shown(root)}/{MANIFEST}: format {found}, this version reads {FORMAT}", hint="prepare the data set again"
        )
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        tuples = {name: tuple(values[name]) for name in ("shape", "classes")}
        return Manifest(**values | tuples, shards=shards)
    except (TypeError, KeyError) as error:
        raise UserError(f"{shown(root)}/{MANIFEST}: has missing or unknown fields ({error})") from error
