"""The hash of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

AT_ONCE = 2**20
"""Bytes that are read at once."""


def sha256_of(path: str | Path) -> str:
    """Of the file's content, in hexadecimal."""
    content = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(AT_ONCE):
            content.update(part)
    return content.hexdigest()
