"""What a data set is: a folder, here or in an object store, of Parquet shards and a manifest.json that is written last. Without the
manifest the folder is not a data set, so that a half-written one is never taken for a whole one.
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
"""Seconds for which a store's manifest is taken as it was read."""
FEWEST = 100
"""Images below which nothing can be held out, compared or learnt."""
ENCODINGS = {"float32": 4, "uint8": 1, "png": 1}
"""How a shard holds an image, and the bytes of a value once it is decoded: values in [-1, 1], or bytes of 0 to 255."""


@dataclass(frozen=True)
class Shard:
    """`file` below the data set's folder, its rows and those of them that are held out, its bytes and their hash."""

    file: str
    rows: int
    held_out: int
    size: int
    sha256: str

    def count(self, which: str) -> int:
        """Of "all" rows, of those of the "holdout", or of the "rest"."""
        return {"all": self.rows, "holdout": self.held_out, "rest": self.rows - self.held_out}[which]


@dataclass(frozen=True)
class Manifest:
    """
    count, held_out  images, and those of them that are held out
    shape            (c, h, w); `encoding` one of ENCODINGS
    classes, labels  names of the classes in the order of their numbers (empty: they have none), and images of each
    fingerprint      of the images and labels, whatever their order and however they are cut into shards; `held_fingerprint` of
                     those held out
    columns          further columns by name: latent, text, caption; shape, dtype, and what made them
    statistics       extractor, weights (their hash), accuracy on rows held out, and of each set of rows count, near (features
                     that are kept) and identity (hash of the files); empty: none were asked for
    taken            what was taken for labels and captions, and what was left out: {"labels", "captions", "left_out", "said"}
                     (stages/taken.py); empty: images that no preparation read
    skipped          {"count", "listed": [{"path", "reason"}]}: images that could not be read
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
        return sum(shard.count(which) for shard in self.shards)

    @cached_property
    def image_bytes(self) -> int:
        """Of one decoded image."""
        return math.prod(self.shape) * ENCODINGS[self.encoding]

    def in_memory(self) -> int:
        """Bytes of all decoded images."""
        return self.count * self.image_bytes


class Sum:
    """The sum of rows' digests: the same for the same rows in any order, and additive over shards."""

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
    return hashlib.sha256(f"{total.hex()} {count}".encode()).hexdigest()[:16]


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    _known.pop(join(root, MANIFEST), None)
    write(join(root, MANIFEST), (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def is_data_set(root: str | Path) -> bool:
    return exists(join(root, MANIFEST))


_known: dict[str, tuple[Any, Manifest]] = {}
"""What `known_manifest` has read, by URI, and what tells that it may still be taken."""


def known_manifest(root: str | Path) -> Manifest:
    """As `read_manifest`, but one that this process has read a moment ago is not read again: a configuration asks for it several
    times, a sweep's once a point. A local one counts as the same while its file is; one of a store for KNOWN seconds.
    """
    uri = join(str(root).removesuffix(f"/{MANIFEST}"), MANIFEST)
    mark = _mark(uri)
    if mark is None or uri not in _known or not _still(_known[uri][0], mark):
        _known[uri] = mark, read_manifest(root)
    return _known[uri][1]


def _mark(uri: str) -> Any:
    """Of a local file what changes with it, else the time."""
    if is_remote(uri):
        return time.monotonic()
    try:
        info = Path(uri.removeprefix("file://")).stat()
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def _still(before: Any, now: Any) -> bool:
    return bool(now - before < KNOWN) if isinstance(before, float) and isinstance(now, float) else bool(before == now)


def read_manifest(root: str | Path) -> Manifest:
    """Raises UserError where there is no data set, or one that another version wrote."""
    root = str(root).removesuffix(f"/{MANIFEST}")
    try:
        values = json.loads(read(join(root, MANIFEST)))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{shown(root)}: no data set: there is no {MANIFEST}",
            hint="`mmdistill prepare SOURCE DEST` writes one, the manifest last; one that was cut short goes on if run again",
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(root)}/{MANIFEST}: is no JSON ({error})") from error
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
        raise UserError(f"{shown(root)}/{MANIFEST}: does not hold what it should ({error})") from error
