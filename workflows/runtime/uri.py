"""Where something is: a path, or a URI of a protocol."""

from __future__ import annotations

import re
from pathlib import Path


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def shown(uri: str | Path) -> str:
    """The URI, or a text with URIs, without users and passwords: as it may be shown and stored."""
    return re.sub(r"(?<=://)[^/\s]*@", "", str(uri))


def resolved(uri: str | Path) -> str:
    """A local path as an absolute one, so that tasks elsewhere on this machine mean the same; a URI as it is."""
    return (
        str(uri).rstrip("/") if is_remote(uri) else str(Path(str(uri).removeprefix("file://")).expanduser().resolve())
    )
