"""The hash of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

AT_ONCE = 2**20
"""Bytes of one read."""


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    content = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(AT_ONCE):
            content.update(part)
    return content.hexdigest()
