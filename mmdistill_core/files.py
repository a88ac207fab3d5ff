"""The content of a file in parts, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

AT_ONCE = 2**20
"""Bytes of one read."""


def read_in_parts(path: str | Path) -> Iterator[bytes]:
    """The file's content, so that a large file never lies in memory as a whole."""
    with Path(path).open("rb") as file:
        while part := file.read(AT_ONCE):
            yield part


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    content = hashlib.sha256()
    for part in read_in_parts(path):
        content.update(part)
    return content.hexdigest()
