"""Append-only files of JSON objects, one a line. A kill may cut a line short: it stays on a line of its own, and is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Appends a line. Half a line at the end, left by a full disk or a power loss, is ended first."""
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        glue = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(glue + json.dumps(row).encode() + b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; none if it does not exist."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue
