"""Where something is: a path, or a URI of a protocol."""

from __future__ import annotations

import re
from pathlib import Path


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def shown(uri: str | Path) -> str:
    """The URI without credentials that it may hold, for screens and logs."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", str(uri))
