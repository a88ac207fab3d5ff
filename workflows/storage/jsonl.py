"""Files of JSON objects, one a line, that are only ever added to. A kill may cut the last one short: it stays by itself, unread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """A line more. Half a line before it, of a full disk or a loss of power, stays by itself."""
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        glue = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(glue + json.dumps(row).encode() + b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Its whole lines; of a file that is not there, none."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue
